/*
 * The store's directory: who may use it, what may lie in it, and the lock that one daemon holds
 * for life. Refuses before it touches anything.
 */
#pragma once

struct winnow_dir {
    int fd, lock_fd; /* -1: none */
    char data_path[4096];
};

/*
 * Makes the directory (0700) if it is missing, checks it, locks it, makes data/ in it.
 * 0, or with a line in text and nothing held
 *   -EACCES   foreign, writable by group or others, below a directory where others may replace it
 *             (writable by all, not sticky), or reached through a symbolic link
 *   -ENOTSUP  holds SUPER (a newer format) or names that are not the store's: untouched
 *   -EBUSY    locked; text names the holder's pid
 *   -errno    of mkdir, open, write
 */
int winnow_dir_open(struct winnow_dir *dir, const char *path, char text[256]);
void winnow_dir_close(struct winnow_dir *dir); /* gives the lock back; fine on a failed open */

/* The number in a data file's name, %08x.dat; -1: it is none. */
long winnow_dir_file_no(const char *name);
