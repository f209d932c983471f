/*
 * Names and descriptors of a real data directory, shared by the pread pool and io_uring: the calls
 * on names of struct winnow_io_method, with the same contracts. An instance of either method
 * begins with this struct, so that the table can point here.
 */
#pragma once

#include <storage/io.h>

struct winnow_io_files {
    int dir_fd;
    int direct; /* files are opened with O_DIRECT */
    uint32_t n_files_max;
    int *fd; /* [n_files_max], -1: free */
};

/* Opens the directory and learns whether it takes O_DIRECT at 4,096 bytes. -ENOMEM, -errno. */
int winnow_io_files_init(struct winnow_io_files *files, const struct winnow_io_open *options);
void winnow_io_files_finish(struct winnow_io_files *files); /* fine on a failed init */

int winnow_io_files_open(void *io, const char *name, int create, uint32_t *ret_file_idx,
                         uint64_t *ret_bytes);
int winnow_io_files_close(void *io, uint32_t file_idx);
int winnow_io_files_list(void *io, void (*each)(void *arg, const char *name), void *arg);
int winnow_io_files_rename(void *io, const char *from, const char *to);
int winnow_io_files_unlink(void *io, const char *name);
int winnow_io_files_dir_sync(void *io);
int64_t winnow_io_files_now(void *io); /* real time */
