/*
 * Where tests of real files put them: WINNOW_TEST_DIR, else /var/tmp.
 */
#pragma once

#include <linux/magic.h>
#include <stdbool.h>
#include <stdlib.h>
#include <sys/vfs.h>

static inline const char *test_dir(void)
{
    const char *dir = getenv("WINNOW_TEST_DIR");
    return dir ? dir : "/var/tmp";
}

/* Memory has no direct I/O that the kernel would account. */
static inline bool test_dir_is_tmpfs(void)
{
    struct statfs fs;
    return !statfs(test_dir(), &fs) && (fs.f_type == TMPFS_MAGIC || fs.f_type == RAMFS_MAGIC);
}
