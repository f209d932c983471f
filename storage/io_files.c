#include <base/alloc.h>
#include <base/assert.h>
#include <base/clock.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/stat.h>
#include <stdio.h>
#include <storage/io_files.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { ALIGN_BYTES = 4096 };

/* A file system says what direct I/O it takes only of an open file. An unnamed one serves; where
 * there are none, direct I/O is tried with the first data file. */
static int dir_takes_direct(int dir_fd)
{
    int fd = openat(dir_fd, ".", O_TMPFILE | O_RDWR | O_DIRECT | O_CLOEXEC, 0600);
    if (fd < 0)
        return errno == EOPNOTSUPP || errno == EISDIR;
    struct statx stx = {0};
    int rc = (int)syscall(SYS_statx, fd, "", AT_EMPTY_PATH, STATX_DIOALIGN, &stx);
    close(fd);
    if (rc < 0 || !(stx.stx_mask & STATX_DIOALIGN))
        return 1;
    return stx.stx_dio_offset_align > 0 && stx.stx_dio_offset_align <= ALIGN_BYTES &&
           stx.stx_dio_mem_align <= ALIGN_BYTES;
}

int winnow_io_files_init(struct winnow_io_files *files, const struct winnow_io_open *options)
{
    winnow_assert(options->n_files_max > 0);
    *files = (struct winnow_io_files){.dir_fd = -1};
    files->fd = winnow_alloc_array(options->n_files_max, sizeof *files->fd);
    if (!files->fd)
        return -ENOMEM;
    files->n_files_max = options->n_files_max;
    for (uint32_t i = 0; i < files->n_files_max; i++)
        files->fd[i] = -1;
    files->dir_fd = open(options->dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC | O_NOFOLLOW);
    if (files->dir_fd < 0)
        return -errno;
    files->direct = !options->refuse_direct && dir_takes_direct(files->dir_fd);
    return 0;
}

void winnow_io_files_finish(struct winnow_io_files *files)
{
    for (uint32_t i = 0; i < files->n_files_max; i++)
        if (files->fd[i] >= 0)
            close(files->fd[i]);
    if (files->dir_fd >= 0)
        close(files->dir_fd);
    winnow_alloc_free(files->fd);
    *files = (struct winnow_io_files){.dir_fd = -1};
}

int winnow_io_files_open(void *io, const char *name, int create, uint32_t *ret_file_idx,
                         uint64_t *ret_bytes)
{
    struct winnow_io_files *files = io;
    uint32_t file_idx = 0;
    winnow_assert(files->dir_fd >= 0);
    while (file_idx < files->n_files_max && files->fd[file_idx] >= 0)
        file_idx++;
    if (file_idx == files->n_files_max)
        return -ENFILE;
    int flags = O_RDWR | O_CLOEXEC | O_NOFOLLOW | (files->direct ? O_DIRECT : 0);
    int fd = openat(files->dir_fd, name, flags | (create ? O_CREAT : 0), 0600);
    if (fd < 0)
        return -errno;
    struct stat st;
    if (fstat(fd, &st) < 0 || !S_ISREG(st.st_mode)) {
        close(fd);
        return -EINVAL;
    }
    files->fd[file_idx] = fd;
    *ret_file_idx = file_idx;
    *ret_bytes = (uint64_t)st.st_size;
    return 0;
}

int winnow_io_files_close(void *io, uint32_t file_idx)
{
    struct winnow_io_files *files = io;
    winnow_assert(file_idx < files->n_files_max);
    winnow_assert(files->fd[file_idx] >= 0);
    int rc = close(files->fd[file_idx]) < 0 ? -errno : 0;
    files->fd[file_idx] = -1;
    return rc;
}

int winnow_io_files_list(void *io, void (*each)(void *arg, const char *name), void *arg)
{
    struct winnow_io_files *files = io;
    int fd = openat(files->dir_fd, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0)
        return -errno;
    DIR *dir = fdopendir(fd);
    if (!dir) {
        close(fd);
        return -ENOMEM;
    }
    errno = 0;
    struct dirent *entry;
    while ((entry = readdir(dir)))
        if (strcmp(entry->d_name, ".") && strcmp(entry->d_name, ".."))
            each(arg, entry->d_name);
    int rc = -errno;
    closedir(dir);
    return rc;
}

int winnow_io_files_rename(void *io, const char *from, const char *to)
{
    struct winnow_io_files *files = io;
    return renameat(files->dir_fd, from, files->dir_fd, to) < 0 ? -errno : 0;
}

int winnow_io_files_unlink(void *io, const char *name)
{
    struct winnow_io_files *files = io;
    return unlinkat(files->dir_fd, name, 0) < 0 ? -errno : 0;
}

int winnow_io_files_dir_sync(void *io)
{
    struct winnow_io_files *files = io;
    return fsync(files->dir_fd) < 0 ? -errno : 0;
}

int64_t winnow_io_files_now(void *io)
{
    (void)io;
    return winnow_clock_now_ns();
}
