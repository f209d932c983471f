#include <base/clock.h>
#include <time.h>

int64_t winnow_clock_now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * WINNOW_NS_PER_S + now.tv_nsec;
}
