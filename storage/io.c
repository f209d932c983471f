// Choosing a method. What a kernel, a container's filter and a file system allow is known only by
// doing it: a page is written and read back through each candidate, in the order of their cost.
//
// 256 blocks of 4 KiB: io_uring 3.3 ms, 32 threads 4.2 ms; the difference in CPU is larger, three
// to five times a block. On tmpfs there is no disk to wait for, and no gain in a ring.
#include <assert.h>
#include <base/alloc.h>
#include <base/assert.h>
#include <base/clock.h>
#include <errno.h>
#include <linux/magic.h>
#include <stdio.h>
#include <storage/io.h>
#include <string.h>
#include <sys/vfs.h>

enum { PAGE_BYTES = 4096 };

/* A data file's name, so that one left by a crash is free space at the next start. */
static const char probe_name[] = "ffffffff.dat";
static_assert(sizeof probe_name == sizeof "00000000.dat", "winnow_dir_file_no takes it for one");
static const int64_t probe_wait_ns = 5 * WINNOW_NS_PER_S;

int winnow_io_run(const struct winnow_io_method *method, void *io, const struct winnow_io_op *op,
                  int64_t deadline_ns)
{
    if (method->submit(io, op, 1) != 1)
        return -EBUSY;
    struct winnow_io_done done;
    while (!method->poll(io, &done, 1))
        if (method->wait(io, deadline_ns) == -ETIMEDOUT && !method->poll(io, &done, 1))
            return -ETIMEDOUT;
    winnow_assert(done.tag == op->tag);
    return done.result;
}

/* Writes a page and reads it back. A full disk proves nothing against the method. */
static int page_check(const struct winnow_io_method *method, void *io, uint32_t file_idx,
                      uint8_t *page)
{
    struct winnow_io_op op = {
        .kind = WINNOW_IO_WRITE, .file_idx = file_idx, .data = page, .n_bytes = PAGE_BYTES};
    int64_t deadline_ns = winnow_clock_now_ns() + probe_wait_ns;
    memset(page, 0x5a, PAGE_BYTES);
    int rc = winnow_io_run(method, io, &op, deadline_ns);
    if (rc == -ENOSPC)
        return 0;
    if (rc != PAGE_BYTES)
        return rc < 0 ? rc : -EIO;
    memset(page, 0, PAGE_BYTES);
    op.kind = WINNOW_IO_READ;
    rc = winnow_io_run(method, io, &op, deadline_ns);
    if (rc != PAGE_BYTES)
        return rc < 0 ? rc : -EIO;
    for (uint32_t i = 0; i < PAGE_BYTES; i++)
        if (page[i] != 0x5a)
            return -EIO;
    return 0;
}

/* A page of a read that timed out stays the kernel's, and so does the instance. */
static int method_probe(const struct winnow_io_method *method, const char *dir, bool refuse_direct,
                        bool *ret_direct)
{
    struct winnow_io_open options = {
        .dir = dir, .n_ops_max = 2, .n_files_max = 1, .refuse_direct = refuse_direct};
    struct winnow_io_facts facts;
    void *io;
    uint8_t *page = winnow_alloc_map(PAGE_BYTES);
    if (!page)
        return -ENOMEM;
    int rc = method->open(&options, NULL, &io, &facts);
    if (rc < 0) {
        winnow_alloc_unmap(page, PAGE_BYTES);
        return rc;
    }
    *ret_direct = facts.direct;
    uint32_t file_idx;
    uint64_t n_bytes;
    rc = method->file_open(io, probe_name, 1, &file_idx, &n_bytes);
    if (!rc) {
        rc = page_check(method, io, file_idx, page);
        method->unlink(io, probe_name);
    }
    if (method->close(io) == 0)
        winnow_alloc_unmap(page, PAGE_BYTES);
    return rc;
}

/* Tries with O_DIRECT, then without, where the first refusal may be O_DIRECT's. */
static int method_try(const struct winnow_io_method *method, const char *dir,
                      bool *ret_refuse_direct)
{
    bool direct = false;
    int rc = method_probe(method, dir, false, &direct);
    *ret_refuse_direct = false;
    if (rc == -EINVAL) {
        rc = method_probe(method, dir, true, &direct);
        *ret_refuse_direct = true;
    }
    *ret_refuse_direct |= !direct;
    return rc;
}

static const char *uring_hint(int rc)
{
    return rc == -ENOSYS || rc == -EPERM || rc == -EACCES
               ? "allow io_uring_setup in the seccomp filter, set kernel.io_uring_disabled=0"
           : rc == -ENOMEM ? "raise the memlock limit (LimitMEMLOCK=infinity)"
                           : "a kernel of 5.15 or later has it";
}

static bool dir_is_tmpfs(const char *dir)
{
    struct statfs fs;
    return !statfs(dir, &fs) && (fs.f_type == TMPFS_MAGIC || fs.f_type == RAMFS_MAGIC);
}

static int uring_choose(const char *dir, bool *ret_refuse_direct, char remedy[160])
{
    int rc = method_try(&winnow_io_uring, dir, ret_refuse_direct);
    if (rc < 0)
        snprintf(remedy, 160, "io_uring refused (%s): %s", strerror(-rc), uring_hint(rc));
    return rc;
}

int winnow_io_choose(const char *name, const char *dir, const struct winnow_io_method **ret_method,
                     bool *ret_refuse_direct, char remedy[160])
{
    bool only_uring = !strcmp(name, "io_uring"), only_pread = !strcmp(name, "pread");
    bool refuse_direct = false;
    const struct winnow_io_method *method = NULL;
    remedy[0] = '\0';
    if (!only_uring && !only_pread && strcmp(name, "auto")) {
        snprintf(remedy, 160, "io_method \"%s\": one of auto, io_uring, pread", name);
        return -EINVAL;
    }
    if (only_uring || (!only_pread && !dir_is_tmpfs(dir))) {
        int rc = uring_choose(dir, &refuse_direct, remedy);
        if (rc < 0 && only_uring)
            return -EINVAL;
        if (!rc && (only_uring || !refuse_direct)) /* buffered reads gain nothing from a ring */
            method = &winnow_io_uring;
    }
    if (!method) {
        int rc = method_try(&winnow_io_pread, dir, &refuse_direct);
        if (rc < 0) {
            snprintf(remedy, 160, "a page could not be written and read in %.60s: %s", dir,
                     strerror(-rc));
            return rc;
        }
        method = &winnow_io_pread;
    }
    if (refuse_direct && !remedy[0] && !dir_is_tmpfs(dir))
        snprintf(remedy, 160,
                 "O_DIRECT refused by the file system: buffered, blocks fill the page cache too");
    *ret_method = method;
    *ret_refuse_direct = refuse_direct;
    return 0;
}
