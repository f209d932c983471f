// A directory that another user can write is not a place for files that are read back and believed:
// names could be swapped under the store. So: ours, writable by us alone, no link on the way.
//
// The lock is an open-file-description lock: it dies with the process, whatever forks and whichever
// descriptor is closed, which a lock of fcntl's older kind does not promise. It cannot name its
// holder, so the file's text does.
#include <base/assert.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/openat2.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <storage/dir.h>
#include <storage/text.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

long winnow_dir_file_no(const char *name)
{
    if (strlen(name) != 12 || strcmp(name + 8, ".dat"))
        return -1;
    for (int i = 0; i < 8; i++)
        if (!strchr("0123456789abcdef", name[i]))
            return -1;
    long file_no = strtol(name, NULL, 16);
    winnow_assert(file_no >= 0);
    winnow_assert(file_no <= UINT32_MAX);
    return file_no;
}

static int path_open(const char *path)
{
    struct open_how how = {.flags = O_RDONLY | O_DIRECTORY | O_CLOEXEC,
                           .resolve = RESOLVE_NO_SYMLINKS | RESOLVE_NO_MAGICLINKS};
    int fd = (int)syscall(SYS_openat2, AT_FDCWD, path, &how, sizeof how);
    if (fd < 0 &&
        (errno == ENOSYS || errno == EPERM)) /* refused as a call: the last name at least */
        fd = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC | O_NOFOLLOW);
    return fd < 0 ? -errno : fd;
}

static int owner_check(int fd, const char *path, char text[WINNOW_TEXT_BYTES])
{
    struct stat st, parent;
    if (fstat(fd, &st) < 0 || fstatat(fd, "..", &parent, 0) < 0)
        return winnow_text_refuse(-errno, text, "data_dir %.120s: %s", path, strerror(errno));
    if (st.st_uid != geteuid())
        return winnow_text_refuse(-EACCES, text,
                                  "data_dir %.120s belongs to uid %u, not to %u: chown it", path,
                                  st.st_uid, geteuid());
    if (st.st_mode & (S_IWGRP | S_IWOTH))
        return winnow_text_refuse(
            -EACCES, text, "data_dir %.120s has mode %04o, others may write it: chmod 700 %.60s",
            path, st.st_mode & 07777, path);
    if ((parent.st_mode & S_IWOTH) && !(parent.st_mode & S_ISVTX))
        return winnow_text_refuse(
            -EACCES, text,
            "data_dir %.120s lies in a directory that all may write (mode %04o): chmod "
            "o-w it, or set its sticky bit",
            path, parent.st_mode & 07777);
    return 0;
}

static bool name_known(const char *name, bool in_data)
{
    if (!strcmp(name, ".") || !strcmp(name, ".."))
        return true;
    if (in_data)
        return winnow_dir_file_no(name) >= 0;
    return !strcmp(name, "LOCK") || !strcmp(name, "data") || !strcmp(name, "CACHEDIR.TAG") ||
           !strcmp(name, "lost+found");
}

/* Refuses names that are not the store's. A missing directory holds none. */
static int names_check(int dir_fd, const char *sub, const char *path, char text[WINNOW_TEXT_BYTES])
{
    int fd = openat(dir_fd, sub, O_RDONLY | O_DIRECTORY | O_CLOEXEC | O_NOFOLLOW);
    DIR *stream = fd < 0 ? NULL : fdopendir(fd);
    if (!stream) {
        int rc = -errno;
        if (fd >= 0)
            close(fd);
        return rc == -ENOENT
                   ? 0
                   : winnow_text_refuse(rc == -ELOOP || rc == -ENOTDIR ? -EACCES : rc, text,
                                        "data_dir %.120s/%s: %s", path, sub, strerror(-rc));
    }
    int rc = 0;
    struct dirent *entry;
    while (!rc && (entry = readdir(stream))) {
        bool in_data = strcmp(sub, ".") != 0;
        if (!in_data && !strcmp(entry->d_name, "SUPER"))
            rc = winnow_text_refuse(
                -ENOTSUP, text,
                "data_dir %.120s holds a durable store (SUPER), which this version does "
                "not read: use another directory",
                path);
        else if (!name_known(entry->d_name, in_data))
            rc = winnow_text_refuse(
                -ENOTSUP, text,
                "data_dir %.100s%s holds \"%.60s\", which is not the store's: use an empty "
                "directory",
                path, in_data ? "/data" : "", entry->d_name);
    }
    closedir(stream);
    return rc;
}

static int lock_take(struct winnow_dir *dir, const char *path, char text[WINNOW_TEXT_BYTES])
{
    winnow_assert(dir->lock_fd < 0);
    dir->lock_fd = openat(dir->fd, "LOCK", O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600);
    if (dir->lock_fd < 0)
        return winnow_text_refuse(-errno, text, "data_dir %.120s/LOCK: %s", path, strerror(errno));
    struct flock lock = {.l_type = F_WRLCK, .l_whence = SEEK_SET};
    char pid[16] = "";
    if (fcntl(dir->lock_fd, F_OFD_SETLK, &lock) < 0) {
        if (errno != EAGAIN && errno != EACCES)
            return winnow_text_refuse(-errno, text, "data_dir %.120s/LOCK: %s", path,
                                      strerror(errno));
        ssize_t n_bytes = read(dir->lock_fd, pid, sizeof pid - 1);
        pid[n_bytes > 0 ? n_bytes : 0] = '\0';
        return winnow_text_refuse(
            -EBUSY, text,
            "data_dir %.120s is in use by process %ld: stop it, or use another directory", path,
            strtol(pid, NULL, 10));
    }
    int n_bytes = snprintf(pid, sizeof pid, "%d\n", (int)getpid());
    winnow_assert(n_bytes < (int)sizeof pid);
    if (ftruncate(dir->lock_fd, 0) < 0 || pwrite(dir->lock_fd, pid, (size_t)n_bytes, 0) != n_bytes)
        pid[0] = '\0'; /* a full disk: the lock holds without its text */
    return 0;
}

/* data/ is held to what the directory is. */
static int data_check(const struct winnow_dir *dir, char text[WINNOW_TEXT_BYTES])
{
    int fd = openat(dir->fd, "data", O_RDONLY | O_DIRECTORY | O_CLOEXEC | O_NOFOLLOW);
    if (fd < 0)
        return winnow_text_refuse(-errno, text, "data_dir %.120s: %s", dir->data_path,
                                  strerror(errno));
    int rc = owner_check(fd, dir->data_path, text);
    close(fd);
    return rc;
}

int winnow_dir_open(struct winnow_dir *dir, const char *path, char text[WINNOW_TEXT_BYTES])
{
    *dir = (struct winnow_dir){.fd = -1, .lock_fd = -1};
    if (snprintf(dir->data_path, sizeof dir->data_path, "%s/data", path) >=
        (int)sizeof dir->data_path)
        return winnow_text_refuse(-ENAMETOOLONG, text, "data_dir is longer than %zu bytes",
                                  sizeof dir->data_path);
    int rc = dir->fd = path_open(path);
    if (rc == -ENOENT && mkdir(path, 0700) == 0)
        rc = dir->fd = path_open(path);
    if (rc == -ELOOP)
        rc = winnow_text_refuse(
            -EACCES, text, "data_dir %.120s is reached through a symbolic link: name the real path",
            path);
    else if (rc < 0)
        rc = winnow_text_refuse(rc, text, "data_dir %.120s: %s", path, strerror(-rc));
    else
        rc = owner_check(dir->fd, path, text);
    if (!rc)
        rc = names_check(dir->fd, ".", path, text);
    if (!rc)
        rc = names_check(dir->fd, "data", path, text);
    if (!rc)
        rc = lock_take(dir, path, text);
    if (!rc && mkdirat(dir->fd, "data", 0700) < 0 && errno != EEXIST)
        rc = winnow_text_refuse(-errno, text, "data_dir %.120s/data: %s", path, strerror(errno));
    if (!rc)
        rc = data_check(dir, text);
    if (rc < 0)
        winnow_dir_close(dir);
    winnow_assert((rc == 0) == (dir->lock_fd >= 0));
    return rc;
}

void winnow_dir_close(struct winnow_dir *dir)
{
    if (dir->lock_fd >= 0)
        close(dir->lock_fd);
    if (dir->fd >= 0)
        close(dir->fd);
    dir->fd = dir->lock_fd = -1;
}
