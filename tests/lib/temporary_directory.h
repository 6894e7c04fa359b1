/* A directory of the test program's own, which is the current one while the tests run; for cmocka's group
 * setup and teardown. */
#ifndef IHA_TESTS_LIB_TEMPORARY_DIRECTORY_H
#define IHA_TESTS_LIB_TEMPORARY_DIRECTORY_H

#include <stdlib.h>
#include <unistd.h>

#include "model/checkpoint/files.h"

static char temporary_directory[] = "/tmp/iha_test_XXXXXX";

static int enter_directory(void **state) {
    (void)state;
    return mkdtemp(temporary_directory) && chdir(temporary_directory) == 0 ? 0 : -1;
}

static int leave_directory(void **state) {
    (void)state;
    return chdir("/") == 0 ? files_remove_tree(temporary_directory, NULL) : -1;
}

#endif
