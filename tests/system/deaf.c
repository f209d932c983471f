/* A disk that can go deaf: preloaded into winnowd with --io-method pread. While the file that
 * WINNOW_TEST_DEAF names exists, no read is answered; once it is gone, all are. */
#include <dlfcn.h>
#include <poll.h>
#include <stdlib.h>
#include <sys/types.h>
#include <unistd.h>

__attribute__((visibility("default"))) ssize_t pread(int fd, void *data, size_t n_bytes,
                                                     off_t offset)
{
    static ssize_t (*real)(int, void *, size_t, off_t);
    const char *deaf = getenv("WINNOW_TEST_DEAF");
    if (!real)
        *(void **)&real = dlsym(RTLD_NEXT, "pread");
    while (deaf && !access(deaf, F_OK))
        poll(NULL, 0, 10);
    return real(fd, data, n_bytes, offset);
}
