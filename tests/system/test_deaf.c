/* A disk that goes deaf under a running daemon (deaf.c): who asks is told, status says why, it is
 * used again once it answers, and a daemon that stops meanwhile leaves its memory to the kernel. */
#include <base/clock.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <system/daemon.h>
#include <system/engine.h>
#include <test.h>
#include <unistd.h>

enum { N_TOKENS = 3000 };

static const char *const small[] = {
    "--host-pool",    "16MiB", "--disk-cap",  "512MiB", "--threads", "2", "--segment-tokens", "512",
    "--index-memory", "32MiB", "--io-method", "pread",  NULL};

struct scene {
    struct daemon daemon;
    struct engine engine;
    char preload[300], variable[120], deaf[80];
};

/* A context of 24 MiB in a pool of 16. */
static void scene_begin(struct scene *scene)
{
    char path[256];
    winnow_model model = engine_model(4, 4, 4, 64, 64, WINNOW_DTYPE_FP32, WINNOW_DTYPE_FP32);
    daemon_init(&scene->daemon, small);
    snprintf(scene->deaf, sizeof scene->deaf, "%s/deaf", scene->daemon.dir);
    snprintf(scene->preload, sizeof scene->preload, "LD_PRELOAD=%s",
             program_path("winnow_deaf.so", path));
    snprintf(scene->variable, sizeof scene->variable, "WINNOW_TEST_DEAF=%s", scene->deaf);
    scene->daemon.env[0] = scene->preload;
    scene->daemon.env[1] = scene->variable;
    scene->daemon.env[2] = "ASAN_OPTIONS=verify_asan_link_order=0";
    daemon_start(&scene->daemon);
    engine_open(&scene->engine, scene->daemon.socket, &model, 11, N_TOKENS + 64, NULL);
    while (scene->engine.n_tokens < N_TOKENS)
        ENGINE_OK(engine_window(&scene->engine, 500, NULL));
}

static void disk_deafen(const struct scene *scene)
{
    int fd = open(scene->deaf, O_CREAT | O_WRONLY | O_CLOEXEC, 0600);
    CHECK(fd >= 0);
    close(fd);
}

/* A step that wants nearly all of the context; after a failure its layers are made even again. */
static int step(struct scene *scene)
{
    uint32_t n_before = scene->engine.n_tokens;
    int rc = engine_decode(&scene->engine, &(struct engine_step){.mass = 0.999F});
    if (rc < 0)
        ENGINE_OK(engine_truncate(&scene->engine, n_before));
    return rc;
}

static void command_check(const struct scene *scene, const char *name, int status, const char *word)
{
    char path[256], *output;
    const char *argv[] = {program_path("winnow", path), name, NULL};
    int is = program_run(argv, scene->daemon.socket, &output);
    if (is != status || !strstr(output, word))
        fprintf(stderr, "winnow %s: %d, expected %d and \"%s\":\n%s", name, is, status, word,
                output);
    CHECK(is == status && strstr(output, word));
    free(output);
}

/* One step waits for its deadline, the next does not; status and doctor name the disk and exit 1
 * while ping is answered; once the disk answers all is as before. */
static void test_deaf__disk_is_named_and_used_again(void)
{
    static struct scene scene;
    scene_begin(&scene);
    ENGINE_OK(step(&scene));
    disk_deafen(&scene);
    CHECK_EQ(step(&scene), -ETIMEDOUT);
    command_check(&scene, "status", 1, "! the disk does not answer");
    command_check(&scene, "status", 1, "degraded");
    command_check(&scene, "doctor", 1, "disk_stuck");
    command_check(&scene, "ping", 0, "answers in");
    int64_t begin_ns = winnow_clock_now_ns();
    CHECK_EQ(step(&scene), -ETIMEDOUT);
    int64_t took_ns = winnow_clock_now_ns() - begin_ns;
    printf("refused after %.1f ms\n", (double)took_ns / 1e6);
    CHECK(took_ns < 2 * WINNOW_NS_PER_S); /* the deadline of a step */

    CHECK_EQ(unlink(scene.deaf), 0);
    begin_ns = winnow_clock_now_ns();
    while (step(&scene) < 0)
        CHECK(winnow_clock_now_ns() - begin_ns < 30 * WINNOW_NS_PER_S);
    printf("back after %.1f s\n", (double)(winnow_clock_now_ns() - begin_ns) / 1e9);
    command_check(&scene, "status", 0, "ready");
    engine_close(&scene.engine);
    CHECK_EQ(daemon_stop(&scene.daemon, SIGTERM), 0);
    char *log = daemon_output(&scene.daemon);
    CHECK(strstr(log, "warning disk_stuck ") && strstr(log, "notice disk_back "));
    free(log);
    daemon_remove(&scene.daemon);
}

/* Stopped while the disk holds reads, the daemon waits its ten seconds, says what it leaves, and
 * ends with 70: the memory stays the kernel's to the last. */
static void test_deaf__stop_leaves_what_the_disk_holds(void)
{
    static struct scene scene;
    scene_begin(&scene);
    disk_deafen(&scene);
    CHECK_EQ(step(&scene), -ETIMEDOUT);
    engine_close(&scene.engine);
    CHECK_EQ(daemon_stop(&scene.daemon, SIGTERM), 70);
    char *log = daemon_output(&scene.daemon);
    CHECK(strstr(log, "error disk_held "));
    free(log);
    daemon_remove(&scene.daemon);
}

int main(int argc, char **argv)
{
    TEST_INIT(argc, argv);
    TEST_RUN(test_deaf__disk_is_named_and_used_again);
    TEST_RUN(test_deaf__stop_leaves_what_the_disk_holds);
    return TEST_END();
}
