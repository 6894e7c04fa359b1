/* What a process reads from the environment variables of launchers. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

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

/* Set the variables in `settings`, "NAME=value" words, and unset all others. */
static void set_env(const char *settings) {
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

static struct launcher_env read_env(const char *settings) {
    struct launcher_env s;
    struct error e = {0};
    set_env(settings);
    if (launcher_read_env(&s, &e) != 0)
        fail_msg("%s: %s", settings, e.text);
    return s;
}

static void refused(const char *settings, const char *what) {
    struct launcher_env s;
    struct error e = {0};
    set_env(settings);
    assert_int_equal(launcher_read_env(&s, &e), -1);
    assert_int_equal(e.exit_code, EXIT_USER);
    if (!strstr(e.text, what))
        fail_msg("%s: \"%s\" does not name %s", settings, e.text, what);
}

static void first_host_of_a_slurm_list(void **state) {
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
        assert_int_equal(launcher_first_host(good[i][0], host, sizeof host), 0);
        assert_string_equal(host, good[i][1]);
    }
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        if (launcher_first_host(bad[i], host, sizeof host) == 0)
            fail_msg("\"%s\" gave \"%s\"", bad[i], host);
    /* Exactly as long as the buffer allows, and one byte longer. */
    assert_int_equal(launcher_first_host("abcdefghijklmnopqrs,x", host, 20), 0);
    assert_int_equal(launcher_first_host("abcdefghijklmnopqrst,x", host, 20), -1);
    assert_int_equal(launcher_first_host("abcdefghijklmnopq[12-13]", host, 20), 0);
    assert_int_equal(launcher_first_host("abcdefghijklmnopq[123]", host, 20), -1);
}

#define TORCH "MASTER_ADDR=node1 MASTER_PORT=29500 "

static void torchrun_variables(void **state) {
    (void)state;
    assert_int_equal(read_env("").ranks, 1);
    assert_int_equal(read_env("RANK=0 WORLD_SIZE=1").ranks, 1);
    struct launcher_env s =
        read_env(TORCH "RANK=3 WORLD_SIZE=8 LOCAL_RANK=1 LOCAL_WORLD_SIZE=2 SLURM_PROCID=5");
    assert_int_equal(s.rank, 3);
    assert_int_equal(s.ranks, 8);
    assert_int_equal(s.local_rank, 1);
    assert_int_equal(s.local_ranks, 2);
    assert_int_equal(s.master_port, 29500);
    assert_string_equal(s.master_addr, "node1");
    assert_int_equal(launcher_rank(), 3);
    s = read_env(TORCH "RANK=3 WORLD_SIZE=8 LOCAL_RANK=1");
    assert_int_equal(s.local_ranks, 0); /* host names are compared later */
    assert_int_equal(s.local_rank, 0);
    /* torchrun's own store listens on the port. */
    assert_int_equal(read_env(TORCH "RANK=0 WORLD_SIZE=2 TORCHELASTIC_USE_AGENT_STORE=True").master_port,
                     29501);
    assert_int_equal(read_env(TORCH "RANK=0 WORLD_SIZE=2 TORCHELASTIC_USE_AGENT_STORE=False").master_port,
                     29500);
}

static void invalid_variables_are_refused(void **state) {
    (void)state;
    refused("RANK=0", "WORLD_SIZE");
    refused(TORCH "WORLD_SIZE=2", "RANK");
    refused(TORCH "RANK=2 WORLD_SIZE=2", "RANK = 2");
    assert_int_equal(launcher_rank(), 0); /* so it reports the error itself */
    refused("RANK=1", "WORLD_SIZE");      /* set by something else */
    assert_int_equal(launcher_rank(), 0);
    read_env(TORCH "RANK=0 WORLD_SIZE=2 SLURM_PROCID=1"); /* torchrun may number ranks differently */
    assert_int_equal(launcher_rank(), 0);
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

static void slurm_variables(void **state) {
    (void)state;
    struct launcher_env s =
        read_env(STEP "SLURM_JOB_ID=77 SLURM_STEP_ID=2 SLURM_STEP_NODELIST=n[4-5] SLURM_JOB_NODELIST=n[1-5]");
    assert_int_equal(s.rank, 1);
    assert_int_equal(s.ranks, 4);
    assert_string_equal(s.master_addr, "n4");
    assert_int_equal(launcher_rank(), 1);
    assert_in_range(s.master_port, 1024, 32767); /* not privileged, not ephemeral */
    int port = s.master_port;
    assert_int_equal(read_env(STEP "SLURM_JOB_ID=77 SLURM_STEP_ID=2 SLURM_JOB_NODELIST=n[4-5]").master_port,
                     port);
    assert_int_not_equal(read_env(STEP "SLURM_JOB_ID=78 SLURM_STEP_ID=2 SLURM_JOB_NODELIST=n").master_port,
                         port);
    assert_int_not_equal(read_env(STEP "SLURM_JOB_ID=77 SLURM_STEP_ID=3 SLURM_JOB_NODELIST=n").master_port,
                         port);
    s = read_env(STEP "SLURM_JOB_ID=77 SLURM_STEP_NODELIST=n[4-5] MASTER_ADDR=10.0.0.1 MASTER_PORT=7000");
    assert_string_equal(s.master_addr, "10.0.0.1");
    assert_int_equal(s.master_port, 7000);
    /* Only in a job step: the batch script is one process, however many tasks the job has. */
    assert_int_equal(read_env("SLURM_NTASKS=4 SLURM_PROCID=1 SLURM_STEP_NODELIST=n").ranks, 4);
    assert_int_equal(read_env("SLURM_NTASKS=4 SLURM_PROCID=0 SLURM_JOB_NODELIST=n").ranks, 1);
    assert_int_equal(read_env("SLURM_STEP_NUM_TASKS=1 SLURM_NTASKS=4 SLURM_PROCID=0").ranks, 1);
}

/* Ranks of one run have the same token, under whatever name they know rank 0's machine; other runs
 * another. */
static void run_tokens_differ_between_runs(void **state) {
    (void)state;
    uint64_t torch = read_env(TORCH "RANK=0 WORLD_SIZE=2").run_token;
    assert_true(torch == read_env("MASTER_ADDR=localhost MASTER_PORT=29500 RANK=1 WORLD_SIZE=2").run_token);
    assert_true(torch != read_env("MASTER_ADDR=node1 MASTER_PORT=29501 RANK=1 WORLD_SIZE=2").run_token);
    assert_true(torch != read_env(TORCH "RANK=1 WORLD_SIZE=2 IHA_TOKEN=x").run_token);
    assert_true(torch != read_env(TORCH "RANK=1 WORLD_SIZE=2 TORCHELASTIC_RUN_ID=x").run_token);
    assert_true(torch == read_env(TORCH "RANK=1 WORLD_SIZE=2 SLURM_JOB_ID=5").run_token);
    uint64_t job =
        read_env(STEP "SLURM_JOB_ID=77 SLURM_STEP_ID=2 SLURM_JOB_NODELIST=n MASTER_PORT=1").run_token;
    assert_true(
        job != read_env(STEP "SLURM_JOB_ID=78 SLURM_STEP_ID=2 SLURM_JOB_NODELIST=n MASTER_PORT=1").run_token);
    assert_true(
        job != read_env(STEP "SLURM_JOB_ID=77 SLURM_STEP_ID=3 SLURM_JOB_NODELIST=n MASTER_PORT=1").run_token);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(first_host_of_a_slurm_list),     cmocka_unit_test(torchrun_variables),
        cmocka_unit_test(invalid_variables_are_refused),  cmocka_unit_test(slurm_variables),
        cmocka_unit_test(run_tokens_differ_between_runs),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
