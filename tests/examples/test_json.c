#include <examples/smollm2/json.h>
#include <math.h>
#include <test.h>

static char *text;
static size_t n_text;
static struct json json;

static void begin(void)
{
    json = (struct json){.stream = open_memstream(&text, &n_text)};
    CHECK(json.stream);
}

static void check(const char *expected)
{
    fclose(json.stream);
    CHECK_STR(text, expected);
    free(text);
}

/* Commas stand between values and nowhere else, however they nest. */
static void test_json__commas_and_nesting(void)
{
    const uint32_t counts[] = {1, 2};

    begin();
    json_object_begin(&json, NULL);
    json_counts(&json, "none", counts, 0);
    json_counts(&json, "two", counts, 2);
    json_array_begin(&json, "rows");
    json_object_begin(&json, NULL);
    json_object_end(&json);
    json_object_begin(&json, NULL);
    json_bool(&json, "yes", true);
    json_null(&json, "no");
    json_object_end(&json);
    json_array_end(&json);
    json_object_end(&json);
    check("{\"none\": [], \"two\": [1, 2], \"rows\": [{}, {\"yes\": true, \"no\": null}]}");
}

/* What JSON or UTF-8 does not allow is escaped or replaced; the rest passes. */
static void test_json__texts_are_valid(void)
{
    static const char bytes[] =
        "a\"\\\n\x1f\0z \xc3\xa9 \xf0\x9f\x98\x80 \xc3 \xff \xed\xa0\x80 \xc0\xaf"
        " \xf4\x90\x80\x80 \xe2\x82";

    begin();
    json_text(&json, NULL, bytes, sizeof bytes - 1);
    check("\"a\\\"\\\\\\n\\u001f\\u0000z \xc3\xa9 \xf0\x9f\x98\x80 \\ufffd \\ufffd "
          "\\ufffd\\ufffd\\ufffd \\ufffd\\ufffd \\ufffd\\ufffd\\ufffd\\ufffd \\ufffd\\ufffd\"");
}

/* Numbers that JSON lacks are null; counts of 64 bits keep their digits. */
static void test_json__numbers(void)
{
    begin();
    json_array_begin(&json, NULL);
    json_number(&json, NULL, (double)NAN);
    json_number(&json, NULL, (double)-INFINITY);
    json_number(&json, NULL, -0.125);
    json_count(&json, NULL, UINT64_MAX);
    json_array_end(&json);
    check("[null, null, -0.125, 18446744073709551615]");
}

int main(int argc, char **argv)
{
    TEST_INIT(argc, argv);
    TEST_RUN(test_json__commas_and_nesting);
    TEST_RUN(test_json__texts_are_valid);
    TEST_RUN(test_json__numbers);
    return TEST_END();
}
