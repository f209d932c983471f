/* winnowd with a GPU. Simulated behind the library that it loads: the CPU's bits, before and after
 * the GPU is lost, and the log says which it was. Where the product's library lies beside it, a real
 * one: what it answers, within the memory that was printed. */
#include <errno.h>
#include <kernels/gpu.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <system/daemon.h>
#include <system/engine.h>
#include <test.h>
#include <unistd.h>

enum { N_TOKENS = 2000, N_STEPS = 20, N_LAYERS = 2 };

struct result {
    uint64_t windows, steps;
    bool used;       /* by the log */
    uint32_t n_lost; /* lines of it */
    int status;      /* of `winnow status` */
    bool shown;      /* what it says of the GPU is what the case is to say */
    winnow_stats stats;
};

static uint32_t count(const char *text, const char *word)
{
    uint32_t n = 0;
    for (const char *at = text; (at = strstr(at, word)); at++)
        n++;
    return n;
}

static void status_take(const struct daemon *daemon, const char *shown, struct result *result)
{
    char path[256], *output;
    const char *argv[] = {program_path("winnow", path), "status", "--json", NULL};
    result->status = program_run(argv, daemon->socket, &output);
    result->shown = strstr(output, shown) != NULL;
    free(output);
}

/* `shown`: what `winnow status --json` has to say of the GPU at the end. */
static struct result run(const char *gpu, const char *fails_after, const char *shown)
{
    const char *const args[] = {"--gpu",       gpu,     "--gpu-memory",     "64MiB",
                                "--host-pool", "64MiB", "--disk-cap",       "512MiB",
                                "--threads",   "2",     "--segment-tokens", "512",
                                NULL};
    static char library[300];
    char folder[256];
    struct daemon daemon;
    struct engine engine;
    struct result result = {0};
    winnow_model model = engine_model(N_LAYERS, 4, 2, 64, 64, WINNOW_DTYPE_FP16, WINNOW_DTYPE_FP32);
    snprintf(library, sizeof library, "LD_LIBRARY_PATH=%s", program_path("gpu", folder));
    daemon_init(&daemon, args);
    daemon.env[0] = library;
    daemon.env[1] = fails_after;
    daemon_start(&daemon);
    engine_open(&engine, daemon.socket, &model, 5, N_TOKENS + N_STEPS, NULL);
    result.steps = engine_converse(&engine, N_TOKENS, N_STEPS);
    result.windows = engine.hash_windows;
    result.stats = (winnow_stats)WINNOW_STATS;
    ENGINE_OK(winnow_stats_get(engine.client, NULL, &result.stats, 0));
    status_take(&daemon, shown, &result);
    engine_close(&engine);
    CHECK_EQ(daemon_stop(&daemon, SIGTERM), 0);
    char *output = daemon_output(&daemon);
    result.used = strstr(output, "gpu used=1") != NULL;
    result.n_lost = count(output, "gpu_lost");
    free(output);
    daemon_remove(&daemon);
    return result;
}

/* Sessions whose layout the client leaves open are the GPU's; when it is lost in the middle of
 * them they go on. That calls were made, 100 of them and more, is what loses it. */
static void test_gpu__same_bits_used_and_lost(void)
{
    struct result cpu = run("off", NULL, "\"gpu\": \"off\"");
    struct result gpu = run("required", NULL, "\"gpu\": \"ready\"");
    struct result lost = run("required", "SIM_GPU_FAILS_AFTER=100", "\"gpu\": \"lost\"");
    CHECK(!cpu.used && gpu.used && lost.used);
    CHECK(cpu.n_lost == 0 && gpu.n_lost == 0 && lost.n_lost == 1);
    CHECK(cpu.shown && gpu.shown && lost.shown);
    CHECK(cpu.status == 0 && gpu.status == 0 && lost.status == 1);
    CHECK_EQ(gpu.windows, cpu.windows);
    CHECK_EQ(gpu.steps, cpu.steps);
    CHECK_EQ(lost.windows, cpu.windows);
    CHECK_EQ(lost.steps, cpu.steps);
    const winnow_stats *of_gpu = &gpu.stats;
    CHECK_EQ(cpu.stats.device_launches, 0);
    CHECK_EQ(of_gpu->device_steps, N_LAYERS * N_STEPS);
    CHECK_EQ(of_gpu->device_windows, of_gpu->exact_windows);
    CHECK_EQ(cpu.stats.device_windows, 0);
    CHECK_EQ(of_gpu->device_launches, of_gpu->device_steps);
    CHECK(of_gpu->device_misses > 0 && of_gpu->device_misses == of_gpu->device_unfit);
    CHECK_EQ(of_gpu->blocks_host, cpu.stats.blocks_host); /* its caches are none */
    CHECK(lost.stats.device_steps > 0 && lost.stats.device_steps < of_gpu->device_steps);
}

/* A context whose index has no room is refused as it opens. */
static void too_long_check(struct engine *engine)
{
    winnow_session_options options = WINNOW_SESSION_OPTIONS;
    winnow_session *session;
    options.model = engine->model;
    options.n_tokens_max = UINT32_C(1) << 20;
    CHECK_EQ(winnow_session_open(engine->client, &options, &session, 0), -EDQUOT);
    CHECK(strstr(winnow_error_text(), "index_memory"));
}

/* Every step is the GPU's, everything read is plain attention, and what has been resident at most,
 * the driver's part and the pinned pool too, is below the sum printed at the start. */
static void test_gpu__real_one_stays_within_the_sum(void)
{
    static const char *const args[] = {"--gpu",
                                       "required",
                                       "--gpu-memory",
                                       "1GiB",
                                       "--host-pool",
                                       "64MiB",
                                       "--disk-cap",
                                       "512MiB",
                                       "--threads",
                                       "2",
                                       "--segment-tokens",
                                       "512",
                                       "--index-memory",
                                       "28MiB",
                                       NULL};
    struct daemon daemon;
    struct engine engine;
    winnow_stats stats = WINNOW_STATS;
    winnow_model model = engine_model(N_LAYERS, 4, 2, 64, 64, WINNOW_DTYPE_FP16, WINNOW_DTYPE_FP32);
    const char *libraries = getenv("LD_LIBRARY_PATH"); /* winnowd's too, in a bundle */
    char variable[1024];
    double error = 0;
    snprintf(variable, sizeof variable, "LD_LIBRARY_PATH=%s", libraries ? libraries : "");
    daemon_init(&daemon, args);
    daemon.env[0] = variable;
    daemon_start(&daemon);
    engine_open(&engine, daemon.socket, &model, test_seed(), N_TOKENS + N_STEPS + 1, NULL);
    engine_converse(&engine, N_TOKENS, N_STEPS);
    ENGINE_OK(engine_decode(&engine, &(struct engine_step){.mass = 1, .error = &error}));
    too_long_check(&engine);
    ENGINE_OK(winnow_stats_get(engine.client, NULL, &stats, 0));
    uint64_t peak_bytes = proc_number(daemon.pid, "status", "VmHWM:") << 10;
    engine_close(&engine);
    CHECK_EQ(daemon_stop(&daemon, SIGTERM), 0);
    daemon_remove(&daemon);
    printf("error %.2g; at most %.1f MiB resident, %.1f printed\n", error,
           (double)peak_bytes * 0x1p-20, (double)stats.printed_bytes * 0x1p-20);
    CHECK(error > 0 && error < 2e-3);
    CHECK_EQ(stats.device_steps, N_LAYERS * (N_STEPS + 1));
    CHECK(peak_bytes <= stats.printed_bytes);
}

int main(int argc, char **argv)
{
    const char *library;
    char path[256], text[256] = "";
    TEST_INIT(argc, argv);
    library = program_path("winnow_cuda.so", path);
    if (access(library, F_OK) == 0) { /* winnowd would load it in the simulated one's place */
        const struct winnow_gpu_api *api = winnow_gpu_load(library, text);
        if (!api || api->probe(0, text) < 0)
            TEST_SKIP(text);
        TEST_RUN(test_gpu__real_one_stays_within_the_sum);
        return TEST_END();
    }
    TEST_RUN(test_gpu__same_bits_used_and_lost);
    return TEST_END();
}
