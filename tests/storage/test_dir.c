/* The directory: who may use it and what may lie in it. Nothing refused is touched. */
#include "place.h"

#include <errno.h>
#include <fcntl.h>
#include <storage/dir.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <test.h>
#include <unistd.h>

static char base[64]; /* a directory of each test's own */

static void base_make(void)
{
    snprintf(base, sizeof base, "%s/winnow-dir-XXXXXX", test_dir());
    CHECK(mkdtemp(base));
}

static void base_remove(void)
{
    char command[128];
    snprintf(command, sizeof command, "rm -r '%s'", base);
    CHECK_EQ(system(command), 0);
}

static const char *in_base(const char *name)
{
    static char path[4][128];
    static uint32_t turn;
    char *p = path[turn++ % 4];
    snprintf(p, 128, "%s/%s", base, name);
    return p;
}

static void file_put(const char *name)
{
    int fd = open(in_base(name), O_WRONLY | O_CREAT | O_EXCL, 0600);
    CHECK(fd >= 0 && write(fd, "x", 1) == 1);
    close(fd);
}

static uint32_t mode_of(const char *path)
{
    struct stat st;
    CHECK_EQ(stat(path, &st), 0);
    return st.st_mode & 07777;
}

static bool exists(const char *name)
{
    return access(in_base(name), F_OK) == 0;
}

/* A missing directory is made, for its owner alone; closing gives it back. */
static void test_dir__missing_is_made(void)
{
    struct winnow_dir dir;
    char text[256];
    base_make();
    for (uint32_t i = 0; i < 2; i++) {
        CHECK_EQ(winnow_dir_open(&dir, in_base("store"), text), 0);
        CHECK_EQ(mode_of(in_base("store")), 0700);
        CHECK_EQ(mode_of(in_base("store/data")), 0700);
        CHECK_EQ(mode_of(in_base("store/LOCK")), 0600);
        CHECK(!strcmp(dir.data_path, in_base("store/data")));
        winnow_dir_close(&dir);
    }
    CHECK_EQ(winnow_dir_open(&dir, in_base("no/store"), text), -ENOENT);
    base_remove();
}

/* An existing directory that others may read is fine, and so are the store's own names. */
static void test_dir__readable_and_own_names_are_fine(void)
{
    struct winnow_dir dir;
    char text[256];
    base_make();
    CHECK_EQ(mkdir(in_base("store"), 0755), 0);
    CHECK_EQ(mkdir(in_base("store/data"), 0700), 0);
    CHECK_EQ(mkdir(in_base("store/lost+found"), 0700), 0);
    file_put("store/CACHEDIR.TAG");
    file_put("store/data/0000001f.dat");
    CHECK_EQ(winnow_dir_open(&dir, in_base("store"), text), 0);
    winnow_dir_close(&dir);
    base_remove();
}

/* A second holder is told who the first is; a fork of the first changes nothing; its end frees. */
static void test_dir__second_holder_is_told_the_first(void)
{
    struct winnow_dir dir, second;
    char text[256], pid[32];
    base_make();
    CHECK_EQ(winnow_dir_open(&dir, in_base("store"), text), 0);
    pid_t child = fork();
    if (!child)
        _exit(0); /* closes its copies */
    CHECK_EQ(waitpid(child, NULL, 0), child);
    CHECK_EQ(winnow_dir_open(&second, in_base("store"), text), -EBUSY);
    snprintf(pid, sizeof pid, "in use by process %d:", (int)getpid());
    CHECK(strstr(text, pid));
    winnow_dir_close(&dir);
    CHECK_EQ(winnow_dir_open(&second, in_base("store"), text), 0);
    winnow_dir_close(&second);
    base_remove();
}

static void refused(int rc, const char *word)
{
    struct winnow_dir dir;
    char text[256] = "";
    CHECK_EQ(winnow_dir_open(&dir, in_base("store"), text), rc);
    if (!strstr(text, word))
        test_fail(__FILE__, __LINE__, text);
    CHECK(!exists("store/LOCK"));
}

/* What others may write is refused: the directory, or the one it could be swapped in. */
static void test_dir__writable_by_others_is_refused(void)
{
    static const mode_t mode[] = {0770, 0702, 01777};
    base_make();
    CHECK_EQ(mkdir(in_base("store"), 0700), 0);
    for (uint32_t i = 0; i < 3; i++) {
        CHECK_EQ(chmod(in_base("store"), mode[i]), 0);
        refused(-EACCES, "chmod 700");
    }
    CHECK_EQ(chmod(in_base("store"), 0700), 0);
    CHECK_EQ(chmod(base, 0777), 0);
    refused(-EACCES, "sticky");
    CHECK_EQ(chmod(base, 01777), 0);
    CHECK_EQ(mkdir(in_base("store/data"), 0700), 0);
    CHECK_EQ(chmod(in_base("store/data"), 0777), 0);
    struct winnow_dir dir;
    char text[256];
    CHECK_EQ(winnow_dir_open(&dir, in_base("store"), text), -EACCES);
    CHECK_EQ(chmod(in_base("store/data"), 0755), 0);
    CHECK_EQ(winnow_dir_open(&dir, in_base("store"), text), 0);
    winnow_dir_close(&dir);
    base_remove();
}

/* Another user's directory. */
static void test_dir__foreign_is_refused(void)
{
    base_make();
    CHECK_EQ(mkdir(in_base("store"), 0700), 0);
    CHECK_EQ(chown(in_base("store"), 65534, 65534), 0);
    refused(-EACCES, "belongs to uid 65534");
    base_remove();
}

/* A symbolic link, as the directory, on the way to it, or as its data/. */
static void test_dir__links_are_refused(void)
{
    struct winnow_dir dir;
    char text[256];
    base_make();
    CHECK_EQ(mkdir(in_base("real"), 0700), 0);
    CHECK_EQ(symlink("real", in_base("store")), 0);
    refused(-EACCES, "symbolic link");
    CHECK_EQ(symlink(".", in_base("way")), 0);
    CHECK_EQ(winnow_dir_open(&dir, in_base("way/real"), text), -EACCES);
    CHECK(strstr(text, "symbolic link"));
    CHECK_EQ(winnow_dir_open(&dir, in_base("way/new"), text), -EACCES);
    CHECK(!exists("new"));
    CHECK_EQ(symlink("..", in_base("real/data")), 0);
    CHECK_EQ(winnow_dir_open(&dir, in_base("real"), text), -EACCES);
    CHECK(!exists("real/LOCK"));
    base_remove();
}

/* Strangers' files and newer formats stay as they are. */
static void test_dir__strangers_are_untouched(void)
{
    base_make();
    CHECK_EQ(mkdir(in_base("store"), 0700), 0);
    file_put("store/thesis.tex");
    refused(-ENOTSUP, "thesis.tex");
    CHECK(exists("store/thesis.tex") && !exists("store/data"));
    CHECK_EQ(unlink(in_base("store/thesis.tex")), 0);

    file_put("store/SUPER");
    refused(-ENOTSUP, "SUPER");
    CHECK(exists("store/SUPER") && !exists("store/data"));
    CHECK_EQ(unlink(in_base("store/SUPER")), 0);

    CHECK_EQ(mkdir(in_base("store/data"), 0700), 0);
    file_put("store/data/0000001F.dat"); /* not as we write it */
    refused(-ENOTSUP, "0000001F.dat");
    CHECK(exists("store/data/0000001F.dat"));
    base_remove();
}

/* Only our own spelling is a data file's name. */
static void test_dir__file_numbers(void)
{
    CHECK_EQ(winnow_dir_file_no("00000000.dat"), 0);
    CHECK_EQ(winnow_dir_file_no("ffffffff.dat"), 0xffffffff);
    static const char *const none[] = {
        "",          "0.dat",         "0000000g.dat", "00000000.da",
        "00000000.", "000000000.dat", "+0000001.dat", "0000001F.dat"};
    for (uint32_t i = 0; i < sizeof none / sizeof *none; i++)
        CHECK_EQ(winnow_dir_file_no(none[i]), -1);
}

int main(int argc, char **argv)
{
    TEST_INIT(argc, argv);
    umask(022);
    TEST_RUN(test_dir__missing_is_made);
    TEST_RUN(test_dir__readable_and_own_names_are_fine);
    TEST_RUN(test_dir__second_holder_is_told_the_first);
    TEST_RUN(test_dir__writable_by_others_is_refused);
    TEST_RUN(test_dir__links_are_refused);
    TEST_RUN(test_dir__strangers_are_untouched);
    TEST_RUN(test_dir__file_numbers);
    if (geteuid())
        TEST_SKIP("a foreign directory needs root to make one");
    TEST_RUN(test_dir__foreign_is_refused);
    return TEST_END();
}
