#include "gguf_build.h"

#include <errno.h>
#include <examples/smollm2/fault.h>
#include <examples/smollm2/quant.h>
#include <test.h>

static struct gguf_build build;
static struct gguf gguf;

enum { N_MATRIX_BYTES = 3 * 2 * 20 };

/* Two values, an array of texts and two tensors: a Q4_1 matrix of 3 x 64 and an F32 vector of 4. */
static void build_small(uint64_t second_offset)
{
    build_header(&build, 2, 3);
    build_value_u32(&build, "llama.block_count", 30);
    build_value_text(&build, "general.architecture", "llama");
    build_array(&build, "names", GGUF_STRING, 2);
    build_text(&build, "one");
    build_text(&build, "");
    build_tensor(&build, "matrix", QUANT_Q4_1, 64, 3, 0);
    build_tensor(&build, "vector", QUANT_F32, 4, 1, second_offset);
    build_pad(&build, 32);
    for (int i = 0; i < 128 + 16; i++)
        build.bytes[build.n_bytes++] = (uint8_t)i;
}

/* A parsed copy of exactly the given bytes, so that a read past the end is seen by ASan. */
static int parse_exactly(size_t n_bytes)
{
    uint8_t *bytes = aligned_alloc(64, (n_bytes + 63) / 64 * 64 + 64);
    CHECK(bytes);
    uint8_t *at = bytes + (64 - n_bytes % 64) % 64;
    memcpy(at, build.bytes, n_bytes);
    int rc = gguf_parse(&gguf, at, n_bytes);
    gguf_close(&gguf);
    free(bytes);
    return rc;
}

/* Values, texts and tensors of a good file come back with their shapes and bytes. */
static void test_gguf__reads_what_is_there(void)
{
    uint32_t n_layers;
    struct gguf_text text;

    build_small(128);
    CHECK_EQ(gguf_parse(&gguf, build.bytes, build.n_bytes), 0);
    CHECK_EQ(gguf_u32(&gguf, "llama.block_count", &n_layers), 0);
    CHECK_EQ(n_layers, 30);
    CHECK_EQ(gguf_text(&gguf, "general.architecture", &text), 0);
    CHECK(text.n_bytes == 5 && !memcmp(text.bytes, "llama", 5));
    const struct gguf_value *names = gguf_value_find(&gguf, "names");
    CHECK(names && names->is_array && names->n_items == 2);
    const struct gguf_tensor *matrix = gguf_tensor_find(&gguf, "matrix");
    CHECK(matrix && matrix->n_bytes == N_MATRIX_BYTES && matrix->data[5] == 5);
    const struct gguf_tensor *vector = gguf_tensor_find(&gguf, "vector");
    CHECK(vector && vector->n_bytes == 16 && vector->data[0] == 128);
    CHECK(!gguf_tensor_find(&gguf, "matri"));
    gguf_close(&gguf);
}

/* A key that is missing or of another type is told apart. */
static void test_gguf__wrong_keys_are_refused(void)
{
    uint32_t value = 77;

    build_small(128);
    CHECK_EQ(gguf_parse(&gguf, build.bytes, build.n_bytes), 0);
    CHECK_EQ(gguf_u32(&gguf, "llama.block_coun", &value), -ENOENT);
    CHECK_EQ(gguf_u32(&gguf, "general.architecture", &value), -EBADMSG);
    CHECK_EQ(gguf_u32(&gguf, "names", &value), -EBADMSG);
    CHECK_EQ(value, 77);
    gguf_close(&gguf);
}

/* A file cut at any byte is refused, and nothing past its end is read. */
static void test_gguf__every_cut_is_refused(void)
{
    build_small(128);
    for (size_t n_bytes = 0; n_bytes < build.n_bytes; n_bytes++)
        CHECK(parse_exactly(n_bytes) < 0);
    CHECK_EQ(parse_exactly(build.n_bytes), 0);
}

/* Random bytes changed anywhere never lead outside the file, whatever they come to mean. */
static void test_gguf__changed_bytes_stay_inside(void)
{
    uint64_t state = test_seed() | 1;

    for (int round = 0; round < 20000; round++) {
        build_small(128);
        for (int i = 0; i < 3; i++) {
            state = state * 6364136223846793005u + 1442695040888963407u;
            build.bytes[(state >> 33) % build.n_bytes] = (uint8_t)(state >> 20);
        }
        if (gguf_parse(&gguf, build.bytes, build.n_bytes) < 0)
            continue;
        for (uint32_t i = 0; i < gguf.n_tensors; i++) {
            CHECK(gguf.tensors[i].data >= build.bytes);
            CHECK(gguf.tensors[i].n_bytes <= build.n_bytes);
            CHECK(gguf.tensors[i].data + gguf.tensors[i].n_bytes <= build.bytes + build.n_bytes);
        }
        gguf_close(&gguf);
    }
}

/* Counts and sizes near 2^64 are refused by what is left, not by a sum that wraps. */
static void test_gguf__huge_numbers_are_refused(void)
{
    build_header(&build, UINT64_MAX, 0);
    CHECK_EQ(parse_exactly(build.n_bytes), -EBADMSG);
    build_header(&build, 0, 1ull << 40);
    CHECK_EQ(parse_exactly(build.n_bytes), -EBADMSG);
    build_header(&build, 65536, 0); /* no table of 6 MB for a file of 24 bytes */
    CHECK_EQ(parse_exactly(build.n_bytes), -EBADMSG);
    CHECK(strstr(fault_text(), "do not fit this file"));

    build_header(&build, 0, 1);
    build_array(&build, "a", GGUF_U64, UINT64_MAX / 8 + 2); /* its size wraps to 8 bytes */
    build_u64(&build, 0);
    build_u64(&build, 0);
    CHECK_EQ(parse_exactly(build.n_bytes), -EBADMSG);

    build_header(&build, 0, 1);
    build_u64(&build, UINT64_MAX - 3); /* the key's size */
    build_u64(&build, 0);
    build_u64(&build, 0);
    CHECK_EQ(parse_exactly(build.n_bytes), -EBADMSG);

    build_header(&build, 1, 0);
    build_tensor(&build, "t", QUANT_F32, 1u << 24, 1u << 24, 0);
    build_pad(&build, 32);
    CHECK_EQ(parse_exactly(build.n_bytes), -EBADMSG);
}

/* A tensor that lies outside, off its alignment, of part blocks or of an unknown type is refused. */
static void test_gguf__misplaced_tensors_are_refused(void)
{
    build_small(160);
    CHECK_EQ(parse_exactly(build.n_bytes), -EBADMSG);
    build_small(100);
    CHECK_EQ(parse_exactly(build.n_bytes), -EBADMSG);
    build_small(UINT64_MAX - 31);
    CHECK_EQ(parse_exactly(build.n_bytes), -EBADMSG);

    build_header(&build, 1, 0);
    build_tensor(&build, "t", QUANT_Q8_0, 33, 1, 0);
    build_pad(&build, 32);
    build.n_bytes += 4096;
    CHECK_EQ(parse_exactly(build.n_bytes), -EBADMSG);

    build_header(&build, 1, 0);
    build_tensor(&build, "t", 12, 256, 1, 0);
    build_pad(&build, 32);
    build.n_bytes += 4096;
    CHECK_EQ(parse_exactly(build.n_bytes), -ENOTSUP);
    CHECK(strstr(fault_text(), "type 12"));
}

/* What is no GGUF file, or no file, has an error that names the path. */
static void test_gguf__other_files_are_refused(void)
{
    CHECK_EQ(gguf_open(&gguf, "/nonexistent/model.gguf"), -ENOENT);
    CHECK(strstr(fault_text(), "/nonexistent/model.gguf"));
    CHECK_EQ(gguf_open(&gguf, "/"), -EBADMSG);
    CHECK_EQ(gguf_open(&gguf, "LICENSE"), -EBADMSG);
}

int main(int argc, char **argv)
{
    TEST_INIT(argc, argv);
    TEST_RUN(test_gguf__reads_what_is_there);
    TEST_RUN(test_gguf__wrong_keys_are_refused);
    TEST_RUN(test_gguf__every_cut_is_refused);
    TEST_RUN(test_gguf__changed_bytes_stay_inside);
    TEST_RUN(test_gguf__huge_numbers_are_refused);
    TEST_RUN(test_gguf__misplaced_tensors_are_refused);
    TEST_RUN(test_gguf__other_files_are_refused);
    return TEST_END();
}
