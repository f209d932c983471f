/*
 * Sort: distinct u64 keys, ascending. Heap sort: nothing to allocate, no worst case; and as keys carry
 * their number in the low bits, nothing can tell that it is not stable.
 */
#include <kernels/ref/ref.h>

static void sift_down(uint64_t *key, size_t root, size_t n)
{
    uint64_t x = key[root];

    for (size_t child = 2 * root + 1; child < n; root = child, child = 2 * root + 1) {
        if (child + 1 < n && key[child + 1] > key[child])
            child++;
        if (key[child] <= x)
            break;
        key[root] = key[child];
    }
    key[root] = x;
}

void winnow_ref_sort(uint64_t *key, size_t n)
{
    for (size_t i = n / 2; i > 0; i--)
        sift_down(key, i - 1, n);
    for (size_t last = n; last > 1; last--) {
        uint64_t largest = key[0];
        key[0] = key[last - 1];
        key[last - 1] = largest;
        sift_down(key, 0, last - 1);
    }
}
