#include "gguf_build.h"

#include <errno.h>
#include <examples/smollm2/tokenizer.h>
#include <test.h>

static struct gguf_build build;
static struct gguf gguf;
static struct tokenizer *tokenizer;
static struct tokens tokens;

/* Ids 0 and 1 are special; then letters and marks, then what merges make. */
static const char *const vocabulary[] = {"<|a|>",
                                         "<|a|>b<|",
                                         "a",
                                         "b",
                                         "c",
                                         "\xc4\xa0" /* space */,
                                         "1",
                                         "<",
                                         "|",
                                         ">",
                                         "ab",
                                         "abc",
                                         "bc",
                                         "\xc4\xa0"
                                         "a",
                                         "\xc3\x83" /* byte 0xc3 */,
                                         "aa",
                                         "a<"};
enum {
    N_VOCABULARY = sizeof vocabulary / sizeof *vocabulary,
    SPACE = 5,
    ONE = 6,
    BYTE_C3 = 14,
    AA = 15
};

static void build_vocabulary(uint32_t n_merges, const char *const *merges, const char *pre)
{
    build_header(&build, 0, 6);
    build_value_text(&build, "tokenizer.ggml.model", "gpt2");
    build_value_text(&build, "tokenizer.ggml.pre", pre);
    build_array(&build, "tokenizer.ggml.tokens", GGUF_STRING, N_VOCABULARY);
    for (uint32_t i = 0; i < N_VOCABULARY; i++)
        build_text(&build, vocabulary[i]);
    build_array(&build, "tokenizer.ggml.token_type", GGUF_I32, N_VOCABULARY);
    for (uint32_t i = 0; i < N_VOCABULARY; i++)
        build_u32(&build, i < 2 ? 3 : 1);
    build_array(&build, "tokenizer.ggml.merges", GGUF_STRING, n_merges);
    for (uint32_t i = 0; i < n_merges; i++)
        build_text(&build, merges[i]);
    build_value_u32(&build, "tokenizer.ggml.eos_token_id", 0);
}

static int create(uint32_t n_merges, const char *const *merges, const char *pre)
{
    build_vocabulary(n_merges, merges, pre);
    CHECK_EQ(gguf_parse(&gguf, build.bytes, build.n_bytes), 0);
    int rc = tokenizer_create(&gguf, &tokenizer);
    if (rc < 0)
        gguf_close(&gguf);
    return rc;
}

static void destroy(void)
{
    tokenizer_destroy(tokenizer);
    tokens_free(&tokens);
    gguf_close(&gguf);
}

static void check_ids(const char *text, bool special, const uint32_t *ids, uint32_t n_ids)
{
    tokens.n_ids = 0;
    CHECK_EQ(tokenizer_encode(tokenizer, text, strlen(text), special, &tokens), 0);
    CHECK_EQ(tokens.n_ids, n_ids);
    for (uint32_t i = 0; i < n_ids; i++)
        CHECK_EQ(tokens.ids[i], ids[i]);
}
#define CHECK_IDS(text, special, ...)                                                              \
    check_ids(text, special, (const uint32_t[]){__VA_ARGS__},                                      \
              sizeof((const uint32_t[]){__VA_ARGS__}) / sizeof(uint32_t))

static const char *const merges[] = {"b c", "a b", "\xc4\xa0 a", "ab c", "a a", "a <"};
enum { N_MERGES = sizeof merges / sizeof *merges };

/* The best rank merges first, and the leftmost of equals: abc is a + bc, although ab + c exists. */
static void test_tokenizer__best_rank_merges_first(void)
{
    CHECK_EQ(create(N_MERGES, merges, "smollm"), 0);
    CHECK_IDS("abc", false, 2, 12);
    CHECK_IDS("ab", false, 10);
    CHECK_IDS("abab", false, 10, 10);
    CHECK_IDS("aaa", false, AA, 2);
    destroy();

    const char *const others[] = {"a b", "b c", "ab c"};
    CHECK_EQ(create(3, others, "smollm"), 0);
    CHECK_IDS("abc", false, 11);
    destroy();
}

/* A digit is a word of its own, and the space before it stays behind. */
static void test_tokenizer__digits_split(void)
{
    CHECK_EQ(create(N_MERGES, merges, "smollm"), 0);
    CHECK_IDS("a11 a", false, 2, ONE, ONE, 13);
    CHECK_IDS("a<1", false, 2, 7,
              ONE); /* the gap before a digit is words too: no merge over them */
    CHECK_IDS("a  1", false, 2, SPACE, SPACE, ONE);
    CHECK_IDS("b  a", false, 3, SPACE, 13);
    destroy();
}

/* Special tokens are text unless asked for; then the longest at a place wins. */
static void test_tokenizer__special_tokens_only_when_asked(void)
{
    CHECK_EQ(create(N_MERGES, merges, "smollm"), 0);
    CHECK_IDS("<|a|>", false, 7, 8, 2, 8, 9);
    CHECK_IDS("c<|a|>c", true, 4, 0, 4);
    CHECK_IDS("<|a|>b<|c", true, 1, 4);
    CHECK_IDS("<<|a|>", true, 7, 0);
    CHECK_IDS("<|a", true, 7, 8, 2);
    destroy();
}

/* Bytes that are no UTF-8 keep their tokens; those without one are left out. */
static void test_tokenizer__any_bytes_are_encoded(void)
{
    CHECK_EQ(create(N_MERGES, merges, "smollm"), 0);
    CHECK_IDS("a\xc3"
              "b\xff",
              false, 2, BYTE_C3, 3);
    destroy();
}

/* A word of 200,000 letters takes no quadratic time. */
static void test_tokenizer__long_words_are_fast(void)
{
    enum { N_LETTERS = 200000 };
    char *text = malloc(N_LETTERS);

    CHECK(text);
    for (int i = 0; i < N_LETTERS; i++)
        text[i] = "ab"[i % 2];
    CHECK_EQ(create(N_MERGES, merges, "smollm"), 0);
    CHECK_EQ(tokenizer_encode(tokenizer, text, N_LETTERS, false, &tokens), 0);
    CHECK_EQ(tokens.n_ids, N_LETTERS / 2);
    CHECK_EQ(tokens.ids[N_LETTERS / 2 - 1], 10);
    destroy();
    free(text);
}

/* Pieces give the bytes back; special tokens and unknown ids have none. */
static void test_tokenizer__pieces_are_bytes(void)
{
    char piece[TOKENIZER_PIECE_BYTES_MAX];

    CHECK_EQ(create(N_MERGES, merges, "smollm"), 0);
    CHECK_EQ(tokenizer_piece(tokenizer, 13, piece), 2);
    CHECK(!memcmp(piece, " a", 2));
    CHECK_EQ(tokenizer_piece(tokenizer, BYTE_C3, piece), 1);
    CHECK_EQ((uint8_t)piece[0], 0xc3);
    CHECK_EQ(tokenizer_piece(tokenizer, 0, piece), 0);
    CHECK_EQ(tokenizer_piece(tokenizer, N_VOCABULARY, piece), 0);
    destroy();
}

/* Another rule, and merges of what is no token, are refused. */
static void test_tokenizer__foreign_vocabularies_are_refused(void)
{
    const char *const bad[] = {"a z", "ab", " a", "a b c", "c c"};

    CHECK_EQ(create(N_MERGES, merges, "llama3"), -ENOTSUP);
    for (uint32_t i = 0; i < sizeof bad / sizeof *bad; i++)
        CHECK_EQ(create(1, &bad[i], "smollm"), -EBADMSG);
}

int main(int argc, char **argv)
{
    TEST_INIT(argc, argv);
    TEST_RUN(test_tokenizer__best_rank_merges_first);
    TEST_RUN(test_tokenizer__digits_split);
    TEST_RUN(test_tokenizer__special_tokens_only_when_asked);
    TEST_RUN(test_tokenizer__any_bytes_are_encoded);
    TEST_RUN(test_tokenizer__long_words_are_fast);
    TEST_RUN(test_tokenizer__pieces_are_bytes);
    TEST_RUN(test_tokenizer__foreign_vocabularies_are_refused);
    return TEST_END();
}
