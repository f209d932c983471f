/* Monotonic time, the only time that decides anything. Rooms below daemon/ take `now_ns` as an
 * argument, so that a simulated clock can drive them. Thread: any. */
#pragma once

#include <stdint.h>

#define WINNOW_NS_PER_S  INT64_C(1000000000)
#define WINNOW_NS_PER_MS INT64_C(1000000)
#define WINNOW_NS_PER_US INT64_C(1000)
#define WINNOW_NEVER_NS  INT64_MAX /* a deadline or a wake time that does not come */

int64_t winnow_clock_now_ns(void); /* CLOCK_MONOTONIC */
