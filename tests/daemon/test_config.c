// Options, their origins, and every complaint with its hint.
#include <test.h>

#include <daemon/config.h>
#include <errno.h>
#include <stdlib.h>
#include <unistd.h>

static struct winnow_config config;
static struct winnow_origins origins;
static struct winnow_complaints complaints;
static enum winnow_verb verb;

static int read_with(char **environment, int argc, const char *const *argv)
{
    memset(&complaints, 0, sizeof complaints);
    return winnow_config_read(argc, (char **)argv, environment, &config, &origins, &verb,
                              &complaints);
}

#define READ(environment, ...)                                                                     \
    read_with(environment,                                                                         \
              (int)(sizeof((const char *const[]){"winnowd", __VA_ARGS__}) / sizeof(char *)),       \
              (const char *const[]){"winnowd", __VA_ARGS__})

static char *no_environment[] = {NULL};

/* Sizes are powers of 1,024 in every spelling, and nothing else is a size. */
static void test_config__sizes(void)
{
    static const struct {
        const char *text;
        uint64_t n_bytes;
    } good[] = {
        {"4096", 4096},
        {"48MiB", 48 << 20},
        {"48M", 48 << 20},
        {"48MB", 48 << 20},
        {"48 MiB", 48 << 20},
        {"1k", 1024},
        {"2G", UINT64_C(2) << 30},
        {"16777215T", UINT64_C(16777215) << 40},
    };
    static const char *const bad[] = {"",     "x",         "-1", "1.5G",  "1Q",
                                      "1MiX", "16777216T", "M",  "1 M B", "99999999999999999999"};
    uint64_t n_bytes;
    for (size_t i = 0; i < sizeof good / sizeof *good; i++) {
        CHECK_EQ(winnow_size_parse(good[i].text, &n_bytes), 0);
        CHECK_EQ(n_bytes, good[i].n_bytes);
    }
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        CHECK_EQ(winnow_size_parse(bad[i], &n_bytes), -EINVAL);
    char text[24];
    CHECK_STR(winnow_size_text(48 << 20, text), "48 MiB");
    CHECK_STR(winnow_size_text(UINT64_C(3) << 29, text), "1.5 GiB");
    CHECK_STR(winnow_size_typed(UINT64_C(3) << 29, text), "1536MiB");
    CHECK_STR(winnow_size_typed(1025, text), "1025");
}

/* Flag over variable over file over default, and the origin is told. */
static void test_config__precedence(void)
{
    char path[] = "/tmp/winnow-config-XXXXXX";
    int fd = mkstemp(path);
    CHECK(fd >= 0);
    dprintf(fd, "# comment\n\nhost_pool = 100MiB\nmass = 0.5 # half\n threads=3\ndisk_cap=1GiB\n");
    close(fd);
    char *environment[] = {"WINNOW_HOST_POOL=200MiB", "WINNOW_MASS=0.75", "HOME=/x", NULL};
    CHECK_EQ(READ(environment, "--config", path, "--host-pool=300MiB"), 0);
    unlink(path);
    CHECK_EQ(complaints.n, 0);
    CHECK_EQ(config.host_pool_bytes, 300 << 20);
    CHECK_STR(winnow_origin(&origins, offsetof(struct winnow_config, host_pool_bytes)),
              "--host-pool");
    CHECK(config.mass == 0.75F);
    CHECK_STR(winnow_origin(&origins, offsetof(struct winnow_config, mass)), "WINNOW_MASS");
    CHECK_EQ(config.n_threads, 3);
    const char *origin = winnow_origin(&origins, offsetof(struct winnow_config, n_threads));
    CHECK(strstr(origin, "winnow-config-") && strstr(origin, ":5"));
    CHECK_EQ(config.dense_below, 1024);
    CHECK_STR(winnow_origin(&origins, offsetof(struct winnow_config, dense_below)), "default");
    CHECK_EQ(config.allow_uids.n, 1);
    CHECK_EQ(config.allow_uids.uid[0], geteuid());
}

/* A wrong key or variable is no silence: the nearest name is offered, all faults come at once. */
static void test_config__all_faults_at_once(void)
{
    char *environment[] = {"WINNOW_HOST_POL=1GiB", "WINNOW_FROBNICATE=1", "WINNOW_mass=1", NULL};
    CHECK_EQ(READ(environment, "--mass", "2", "--io-method", "fast", "--segment-tokens", "300",
                  "--allow-uids", "1,x", "--disk-cap", "1KiB"),
             0);
    CHECK_EQ(complaints.n, 8);
    CHECK(strstr(complaints.text,
                 "unrecognized variable \"host_pol\". from: WINNOW_HOST_POL. hint: host_pool\n"));
    CHECK(
        strstr(complaints.text, "unrecognized variable \"frobnicate\". from: WINNOW_FROBNICATE\n"));
    CHECK(strstr(complaints.text, "from: WINNOW_mass. hint: mass\n"));
    CHECK(strstr(complaints.text, "mass \"2\" is not a share above 0 and up to 1. from: --mass\n"));
    CHECK(strstr(complaints.text,
                 "io_method \"fast\" is none of: auto io_uring pread. from: --io-method\n"));
    CHECK(strstr(complaints.text, "segment_tokens 300 is no multiple of 128. from: "
                                  "--segment-tokens. hint: 384\n"));
    CHECK(strstr(complaints.text, "allow_uids \"1,x\" is not a list"));
    CHECK(strstr(complaints.text, "disk_cap \"1KiB\" lies outside 128 MiB to "));
    CHECK(config.mass == 0.9F); /* a refused value changes nothing */
}

/* A file's faults carry file and line. */
static void test_config__file_faults_have_lines(void)
{
    char path[] = "/tmp/winnow-config-XXXXXX";
    int fd = mkstemp(path);
    CHECK(fd >= 0);
    dprintf(fd, "mass = 0.5\nhost_pol = 1GiB\nnonsense\n");
    close(fd);
    CHECK_EQ(READ(no_environment, "--config", path), 0);
    unlink(path);
    CHECK_EQ(complaints.n, 2);
    CHECK(strstr(complaints.text, "unrecognized key \"host_pol\". from: winnow-config-"));
    CHECK(strstr(complaints.text, ":2. hint: host_pool\n"));
    CHECK(strstr(complaints.text, "\"nonsense\" is not key = value. from: winnow-config-"));
    CHECK_EQ(READ(no_environment, "--config", "/nonexistent/winnow.conf"), 0);
    CHECK_EQ(complaints.n, 1);
}

/* Reads n_bytes as a configuration file. */
static void read_bytes(const char *bytes, size_t n_bytes)
{
    char path[] = "/tmp/winnow-config-XXXXXX";
    int fd = mkstemp(path);
    CHECK(fd >= 0);
    CHECK_EQ(write(fd, bytes, n_bytes), (ssize_t)n_bytes);
    close(fd);
    CHECK_EQ(READ(no_environment, "--config", path), 0);
    unlink(path);
}

/* What editors and other systems make of a file: nothing in it, no last newline, CRLF, tabs, a '#'
 * in a path. */
static void test_config__odd_files_are_read(void)
{
    read_bytes("", 0);
    CHECK_EQ(complaints.n, 0);
    static const char text[] = "\thost_pool\t=\t64 MiB\r\n\r\n# mass = 0.1\r\n"
                               "data_dir = /srv/a#b\t# here\r\nthreads=3";
    read_bytes(text, sizeof text - 1);
    CHECK_EQ(complaints.n, 0);
    CHECK_EQ(config.host_pool_bytes, 64 << 20);
    CHECK(config.mass == 0.9F);
    CHECK(!strcmp(config.data_dir, "/srv/a#b"));
    CHECK_EQ(config.n_threads, 3);
}

/* What is no file of ours is refused, never half read. */
static void test_config__no_files_of_ours(void)
{
    CHECK_EQ(READ(no_environment, "--config", "/tmp"), 0);
    CHECK_EQ(complaints.n, 1);
    CHECK(strstr(complaints.text, "cannot read /tmp: Is a directory. from: --config"));
    static char bytes[5000];
    memset(bytes, '#', sizeof bytes);
    read_bytes(bytes, sizeof bytes);
    CHECK_EQ(complaints.n, 1);
    CHECK(strstr(complaints.text, "a line is longer than 2046 bytes") &&
          strstr(complaints.text, ":1\n"));
    read_bytes("mass = 0.5\nhost_pool = 64MiB\0x\nthreads = 0\n", 43);
    CHECK_EQ(complaints.n, 1);
    CHECK(strstr(complaints.text, ":2\n"));
    CHECK_EQ(config.host_pool_bytes, 0);
}

/* Values at the ends of their ranges, and past them: by one, by units, by 64 bits. */
static void test_config__values_past_their_range(void)
{
    static const struct {
        const char *flag, *value;
        bool fits;
    } cases[] = {
        {"--host-pool", "16MiB", true},
        {"--host-pool", "16777215", false},
        {"--host-pool", "1024G", true},
        {"--host-pool", "1025G", false},
        {"--host-pool", "18446744073709551616", false},
        {"--host-pool", "16777216T", false},
        {"--host-pool", "-1", false},
        {"--host-pool", "", false},
        {"--threads", "256", true},
        {"--threads", "257", false},
        {"--threads", "4294967297", false}, /* 1 in 32 bits */
        {"--tokens-max", "16M", true},
        {"--mass", "1", true},
        {"--mass", "1.0000001", false},
        {"--mass", "0", false},
        {"--mass", "nan", false},
        {"--mass", "0.5x", false},
        {"--policy", "codes tactic", false},
        {"--policy", "", false},
        {"--allow-uids", "0,4294967294", true},
        {"--allow-uids", "4294967295", false}, /* no uid: the kernel's -1 */
        {"--allow-uids", "1,", false},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        CHECK_EQ(READ(no_environment, cases[i].flag, cases[i].value), 0);
        if ((complaints.n == 0) != cases[i].fits)
            printf("%s %s: %s\n", cases[i].flag, cases[i].value, complaints.text);
        CHECK_EQ(complaints.n, cases[i].fits ? 0 : 1);
        CHECK(cases[i].fits || strstr(complaints.text, cases[i].flag)); /* its origin */
    }
}

/* Variables of the client, the tests and the traces are not the daemon's, and are let be. */
static void test_config__other_variables(void)
{
    char *environment[] = {"WINNOW_ADDRESS=/x",  "WINNOW_MODEL=m", "WINNOW_TRACES=t",
                           "WINNOW_TEST_SEED=1", "WINNOWER=1",     NULL};
    CHECK_EQ(READ(environment, "--mass=1"), 0);
    CHECK_EQ(complaints.n, 0);
    char *longer[] = {"WINNOW_ADDRESSES=/x", NULL};
    CHECK_EQ(READ(longer, "--mass=1"), 0);
    CHECK_EQ(complaints.n, 1);
}

/* Flags that do not exist, or lack their value, are usage errors with the nearest flag. */
static void test_config__usage(void)
{
    CHECK_EQ(READ(no_environment, "--host-pol", "1GiB"), -EINVAL);
    CHECK(!strcmp(complaints.text, "unrecognized option \"--host-pol\". hint: --host-pool\n"));
    CHECK_EQ(READ(no_environment, "--mass"), -EINVAL);
    CHECK_EQ(READ(no_environment, "serve"), -EINVAL);
    CHECK_EQ(READ(no_environment, "--check", "--threads", "2"), 0);
    CHECK_EQ(verb, WINNOW_VERB_CHECK);
    CHECK_EQ(config.n_threads, 2);
}

/* A socket's path must fit its address with the suffix it is made under. */
static void test_config__long_socket(void)
{
    char path[121];
    memset(path, 'a', sizeof path - 1);
    path[sizeof path - 1] = 0;
    CHECK_EQ(READ(no_environment, "--socket", path), 0);
    CHECK_EQ(complaints.n, 1);
    CHECK(strstr(complaints.text, "socket of 120 bytes exceeds the 103"));
    path[103] = 0;
    CHECK_EQ(READ(no_environment, "--socket", path), 0);
    CHECK_EQ(complaints.n, 0);
}

/* Names are unique, found in both spellings, and each is its own nearest. */
static void test_config__table(void)
{
    for (uint32_t i = 0; i < WINNOW_N_OPTIONS; i++) {
        const struct winnow_option *option = &winnow_options[i];
        CHECK(winnow_option_find(option->name) == option);
        CHECK_STR(winnow_option_nearest(option->name), option->name);
        CHECK(option->about && option->fallback);
        char dashed[64];
        snprintf(dashed, sizeof dashed, "%s", option->name);
        for (char *c = dashed; *c; c++)
            *c = *c == '_' ? '-' : *c;
        CHECK(winnow_option_find(dashed) == option);
    }
    CHECK(!winnow_option_find("host"));
    CHECK(!winnow_option_find("host_pools"));
    CHECK(!winnow_option_nearest("completely_else"));
}

/* docs/operations.md holds the table that `winnowd --options-table` prints. */
static void test_config__docs_have_the_table(void)
{
    static char docs[65536], table[16384];
    FILE *file = fopen("docs/operations.md", "r");
    CHECK(file);
    docs[fread(docs, 1, sizeof docs - 1, file)] = 0;
    fclose(file);
    FILE *memory = fmemopen(table, sizeof table, "w");
    CHECK(memory);
    winnow_options_print_table(memory);
    fclose(memory);
    CHECK(strstr(docs, table));
}

/* The example file is accepted as it is. */
static void test_config__example_file(void)
{
    char path[] = "/tmp/winnow-config-XXXXXX";
    FILE *file = fdopen(mkstemp(path), "w");
    CHECK(file);
    winnow_options_print_example(file);
    fclose(file);
    CHECK_EQ(READ(no_environment, "--config", path), 0);
    unlink(path);
    CHECK_EQ(complaints.n, 0);
}

int main(int argc, char **argv)
{
    TEST_INIT(argc, argv);
    TEST_RUN(test_config__sizes);
    TEST_RUN(test_config__precedence);
    TEST_RUN(test_config__all_faults_at_once);
    TEST_RUN(test_config__file_faults_have_lines);
    TEST_RUN(test_config__odd_files_are_read);
    TEST_RUN(test_config__no_files_of_ours);
    TEST_RUN(test_config__values_past_their_range);
    TEST_RUN(test_config__other_variables);
    TEST_RUN(test_config__usage);
    TEST_RUN(test_config__long_socket);
    TEST_RUN(test_config__table);
    TEST_RUN(test_config__docs_have_the_table);
    TEST_RUN(test_config__example_file);
    return TEST_END();
}
