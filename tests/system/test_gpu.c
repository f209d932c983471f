/* winnowd with a GPU, simulated behind the library that it loads: the CPU's bits, before and after
 * the GPU is lost, and the log says which it was. */
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
    bool used, lost; /* by the log */
};

static struct result run(const char *gpu, const char *fails_after)
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
    while (engine.n_tokens < N_TOKENS)
        ENGINE_OK(engine_window(&engine, 500, NULL));
    for (uint32_t i = 0; i < N_STEPS; i++)
        ENGINE_OK(engine_decode(
            &engine, &(struct engine_step){.mass = i % 10 ? 0.9F : 1, .hash = &result.steps}));
    result.windows = engine.hash_windows;
    engine_close(&engine);
    CHECK_EQ(daemon_stop(&daemon, SIGTERM), 0);
    char *output = daemon_output(&daemon);
    result.used = strstr(output, "gpu used=1") != NULL;
    result.lost = strstr(output, "gpu_lost") != NULL;
    free(output);
    daemon_remove(&daemon);
    return result;
}

/* Sessions whose layout the client leaves open are the GPU's; when it is lost in the middle of
 * them they go on. That calls were made, 100 of them and more, is what loses it. */
static void test_gpu__same_bits_used_and_lost(void)
{
    char path[256];
    if (access(program_path("winnow_cuda.so", path), F_OK) == 0)
        TEST_SKIP("winnowd would load the real GPU's library, which lies beside it");
    struct result cpu = run("off", NULL), gpu = run("required", NULL);
    struct result lost = run("required", "SIM_GPU_FAILS_AFTER=100");
    CHECK(!cpu.used && gpu.used && lost.used);
    CHECK(!cpu.lost && !gpu.lost && lost.lost);
    CHECK_EQ(gpu.windows, cpu.windows);
    CHECK_EQ(gpu.steps, cpu.steps);
    CHECK_EQ(lost.windows, cpu.windows);
    CHECK_EQ(lost.steps, cpu.steps);
}

int main(int argc, char **argv)
{
    TEST_INIT(argc, argv);
    TEST_RUN(test_gpu__same_bits_used_and_lost);
    return TEST_END();
}
