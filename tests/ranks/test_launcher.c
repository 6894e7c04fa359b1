/* What a process learns from the variables that launchers set. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/comm.h"
#include "kernels/comm/launcher.h"

static const char *const VARIABLES[] = {"OMPI_COMM_WORLD_SIZE",
                                        "OMPI_COMM_WORLD_RANK",
                                        "PMIX_RANK",
                                        "PMI_RANK",
                                        "RANK",
                                        "WORLD_SIZE",
                                        "MASTER_ADDR",
                                        "MASTER_PORT",
                                        "LOCAL_RANK",
                                        "LOCAL_WORLD_SIZE",
                                        "IHA_TOKEN",
                                        "TORCHELASTIC_RUN_ID",
                                        "TORCHELASTIC_USE_AGENT_STORE",
                                        "SLURM_PROCID",
                                        "SLURM_NTASKS",
                                        "SLURM_STEP_NUM_TASKS",
                                        "SLURM_STEP_NODELIST",
                                        "SLURM_JOB_NODELIST",
                                        "SLURM_JOB_ID",
                                        "SLURM_STEP_ID"};

/* Nothing of these but what `settings` says: "NAME=value" words. */
static void set(const char *settings) {
    char text[1024], *rest = text;
    for (size_t i = 0; i < sizeof VARIABLES / sizeof *VARIABLES; i++)
        unsetenv(VARIABLES[i]);
    snprintf(text, sizeof text, "%s", settings);
    for (char *word = strsep(&rest, " "); word; word = strsep(&rest, " ")) {
        char *equals = strchr(word, '=');
        if (!equals)
            continue;
        *equals = '\0';
        setenv(word, equals + 1, 1);
    }
}

static struct start started(const char *settings) {
    struct start s;
    struct error e = {0};
    set(settings);
    if (start_read(&s, &e) != 0)
        fail_msg("%s: %s", settings, e.text);
    return s;
}

static void refused(const char *settings, const char *what) {
    struct start s;
    struct error e = {0};
    set(settings);
    assert_int_equal(start_read(&s, &e), -1);
    assert_int_equal(e.exit_code, EXIT_USER);
    if (!strstr(e.text, what))
        fail_msg("%s: \"%s\" does not name %s", settings, e.text, what);
}

static void first_hosts(void **state) {
    (void)state;
    static const char *const good[][2] = {
        {"node[03-07,9],x1", "node03"},  {"a", "a"},           {"a-1,b", "a-1"},
        {"n[1-2]-ib[0-3],n3", "n1-ib0"}, {"n[0010]", "n0010"}, {"gpu[7,1-3].cluster.org", "gpu7.cluster.org"},
        {"x1,node[03-07,9]", "x1"},      {"[12-14]", "12"},
    };
    static const char *const bad[] = {"",      ",a", "a[",    "a[]", "a[1",  "a[x]",
                                      "a[1x]", "a]", "a[-1]", "a b", "a[1]]"};
    char host[20];
    for (size_t i = 0; i < sizeof good / sizeof *good; i++) {
        assert_int_equal(start_first_host(good[i][0], host, sizeof host), 0);
        assert_string_equal(host, good[i][1]);
    }
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        if (start_first_host(bad[i], host, sizeof host) == 0)
            fail_msg("\"%s\" gave \"%s\"", bad[i], host);
    /* To the byte. */
    assert_int_equal(start_first_host("abcdefghijklmnopqrs,x", host, 20), 0);
    assert_int_equal(start_first_host("abcdefghijklmnopqrst,x", host, 20), -1);
    assert_int_equal(start_first_host("abcdefghijklmnopq[12-13]", host, 20), 0);
    assert_int_equal(start_first_host("abcdefghijklmnopq[123]", host, 20), -1);
}

#define TORCH "MASTER_ADDR=node1 MASTER_PORT=29500 "

static void torchrun(void **state) {
    (void)state;
    assert_int_equal(started("").ranks, 1);
    assert_int_equal(started("RANK=0 WORLD_SIZE=1").ranks, 1);
    struct start s = started(TORCH "RANK=3 WORLD_SIZE=8 LOCAL_RANK=1 LOCAL_WORLD_SIZE=2 SLURM_PROCID=5");
    assert_int_equal(s.rank, 3);
    assert_int_equal(s.ranks, 8);
    assert_int_equal(s.local_rank, 1);
    assert_int_equal(s.local_ranks, 2);
    assert_int_equal(s.port, 29500);
    assert_string_equal(s.address, "node1");
    assert_int_equal(comm_launch_rank(), 3);
    s = started(TORCH "RANK=3 WORLD_SIZE=8 LOCAL_RANK=1");
    assert_int_equal(s.local_ranks, 0); /* the names of hosts will tell */
    assert_int_equal(s.local_rank, 0);
    /* torchrun's own store has the port. */
    assert_int_equal(started(TORCH "RANK=0 WORLD_SIZE=2 TORCHELASTIC_USE_AGENT_STORE=True").port, 29501);
    assert_int_equal(started(TORCH "RANK=0 WORLD_SIZE=2 TORCHELASTIC_USE_AGENT_STORE=False").port, 29500);
}

static void wrong(void **state) {
    (void)state;
    refused("RANK=0", "WORLD_SIZE");
    refused(TORCH "WORLD_SIZE=2", "RANK");
    refused(TORCH "RANK=2 WORLD_SIZE=2", "RANK = 2");
    assert_int_equal(comm_launch_rank(), 0); /* it speaks for itself */
    refused("RANK=1", "WORLD_SIZE");         /* left over from something else */
    assert_int_equal(comm_launch_rank(), 0);
    started(TORCH "RANK=0 WORLD_SIZE=2 SLURM_PROCID=1"); /* torchrun numbers as it likes */
    assert_int_equal(comm_launch_rank(), 0);
    refused(TORCH "RANK=-1 WORLD_SIZE=2", "RANK = -1");
    refused(TORCH "RANK=0 WORLD_SIZE=two", "WORLD_SIZE = two");
    refused(TORCH "RANK=0 WORLD_SIZE=0", "WORLD_SIZE = 0");
    refused("MASTER_PORT=1 RANK=0 WORLD_SIZE=2", "MASTER_ADDR");
    refused("MASTER_ADDR=a RANK=0 WORLD_SIZE=2", "MASTER_PORT");
    refused("MASTER_ADDR=a MASTER_PORT=65536 RANK=0 WORLD_SIZE=2", "MASTER_PORT = 65536");
    refused("MASTER_ADDR=a MASTER_PORT=1x RANK=0 WORLD_SIZE=2", "MASTER_PORT = 1x");
    refused("SLURM_STEP_NUM_TASKS=4 SLURM_PROCID=4 SLURM_STEP_NODELIST=a", "SLURM_PROCID = 4");
    refused("SLURM_STEP_NUM_TASKS=4 SLURM_PROCID=1 SLURM_STEP_NODELIST=a[", "SLURM_STEP_NODELIST = a[");
    refused("SLURM_STEP_NUM_TASKS=4 SLURM_PROCID=1", "MASTER_ADDR");
}

#define STEP "SLURM_STEP_NUM_TASKS=4 SLURM_PROCID=1 "

static void slurm(void **state) {
    (void)state;
    struct start s =
        started(STEP "SLURM_JOB_ID=77 SLURM_STEP_ID=2 SLURM_STEP_NODELIST=n[4-5] SLURM_JOB_NODELIST=n[1-5]");
    assert_int_equal(s.rank, 1);
    assert_int_equal(s.ranks, 4);
    assert_string_equal(s.address, "n4");
    assert_int_equal(comm_launch_rank(), 1);
    assert_in_range(s.port, 1024, 32767); /* not one that the system gives to others */
    int port = s.port;
    assert_int_equal(started(STEP "SLURM_JOB_ID=77 SLURM_STEP_ID=2 SLURM_JOB_NODELIST=n[4-5]").port, port);
    assert_int_not_equal(started(STEP "SLURM_JOB_ID=78 SLURM_STEP_ID=2 SLURM_JOB_NODELIST=n").port, port);
    assert_int_not_equal(started(STEP "SLURM_JOB_ID=77 SLURM_STEP_ID=3 SLURM_JOB_NODELIST=n").port, port);
    s = started(STEP "SLURM_JOB_ID=77 SLURM_STEP_NODELIST=n[4-5] MASTER_ADDR=10.0.0.1 MASTER_PORT=7000");
    assert_string_equal(s.address, "10.0.0.1");
    assert_int_equal(s.port, 7000);
    /* In a step; the script of a job is one process, however many tasks the job has. */
    assert_int_equal(started("SLURM_NTASKS=4 SLURM_PROCID=1 SLURM_STEP_NODELIST=n").ranks, 4);
    assert_int_equal(started("SLURM_NTASKS=4 SLURM_PROCID=0 SLURM_JOB_NODELIST=n").ranks, 1);
    assert_int_equal(started("SLURM_STEP_NUM_TASKS=1 SLURM_NTASKS=4 SLURM_PROCID=0").ranks, 1);
}

/* Ranks of one run have the same, whatever name rank 0's machine has for them; those of others do not. */
static void tokens(void **state) {
    (void)state;
    uint64_t torch = started(TORCH "RANK=0 WORLD_SIZE=2").token;
    assert_true(torch == started("MASTER_ADDR=localhost MASTER_PORT=29500 RANK=1 WORLD_SIZE=2").token);
    assert_true(torch != started("MASTER_ADDR=node1 MASTER_PORT=29501 RANK=1 WORLD_SIZE=2").token);
    assert_true(torch != started(TORCH "RANK=1 WORLD_SIZE=2 IHA_TOKEN=x").token);
    assert_true(torch != started(TORCH "RANK=1 WORLD_SIZE=2 TORCHELASTIC_RUN_ID=x").token);
    assert_true(torch == started(TORCH "RANK=1 WORLD_SIZE=2 SLURM_JOB_ID=5").token);
    uint64_t job = started(STEP "SLURM_JOB_ID=77 SLURM_STEP_ID=2 SLURM_JOB_NODELIST=n MASTER_PORT=1").token;
    assert_true(job !=
                started(STEP "SLURM_JOB_ID=78 SLURM_STEP_ID=2 SLURM_JOB_NODELIST=n MASTER_PORT=1").token);
    assert_true(job !=
                started(STEP "SLURM_JOB_ID=77 SLURM_STEP_ID=3 SLURM_JOB_NODELIST=n MASTER_PORT=1").token);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(first_hosts), cmocka_unit_test(torchrun), cmocka_unit_test(wrong),
        cmocka_unit_test(slurm),       cmocka_unit_test(tokens),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
