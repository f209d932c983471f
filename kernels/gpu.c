/* Loads the library of GPU kernels, which is there or not: nothing else in Winnow needs it. */
#include <dlfcn.h>
#include <kernels/gpu.h>
#include <limits.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

static const char NAME[] = "winnow_cuda.so";

/* The library beside this program, if it is there. */
static void *open_beside(void)
{
    char path[PATH_MAX];
    ssize_t n = readlink("/proc/self/exe", path, sizeof path);

    if (n <= 0 || (size_t)n >= sizeof path)
        return NULL;
    path[n] = 0;
    char *slash = strrchr(path, '/');
    if (!slash || (size_t)(slash + 1 - path) + sizeof NAME > sizeof path)
        return NULL;
    memcpy(slash + 1, NAME, sizeof NAME);
    return access(path, R_OK) == 0 ? dlopen(path, RTLD_NOW | RTLD_LOCAL) : NULL;
}

const struct winnow_gpu_api *winnow_gpu_load(const char *path, char text[256])
{
    void *library = path ? NULL : open_beside();

    text[0] = 0;
    if (!library)
        library = dlopen(path ? path : NAME, RTLD_NOW | RTLD_LOCAL);
    if (!library) {
        snprintf(text, 256, "no GPU kernels: %s", dlerror());
        return NULL;
    }
    const struct winnow_gpu_api *(*find)(uint32_t) =
        (const struct winnow_gpu_api *(*)(uint32_t))dlsym(library, "winnow_gpu_find");
    const struct winnow_gpu_api *api = find ? find(WINNOW_GPU_API_VERSION) : NULL;
    if (!api)
        snprintf(text, 256, "%s: not of this version (%d). hint: install both from one build",
                 path ? path : NAME, WINNOW_GPU_API_VERSION);
    return api; /* a library once open stays so: its threads may run on */
}
