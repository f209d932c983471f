/*
 * Quantised weights: rows of blocks of 32, and their product with a vector.
 *
 *   Q4_1  20 bytes: fp16 d, fp16 m, 16 bytes; weight i = d * q_i + m, q_0..15 the low nibbles,
 *         q_16..31 the high ones
 *   Q8_0  34 bytes: fp16 d, 32 signed bytes; weight i = d * q_i
 *   F32   as it is (norms; never a matrix of a product)
 *
 * The type numbers are GGUF's. A row's bytes need no alignment.
 */
#pragma once

#include <stdint.h>

enum { QUANT_F32 = 0, QUANT_Q4_1 = 3, QUANT_Q8_0 = 8 };
enum { QUANT_BLOCK_ITEMS = 32 };

int quant_type_known(uint32_t type);
/* Elements a block; a row holds whole blocks. */
uint32_t quant_block_items(uint32_t type);
uint64_t quant_row_bytes(uint32_t type, uint32_t n_items);

/* out [n_items] = the row's weights as fp32, exactly d * q (+ m) rounded once. */
void quant_row_unpack(uint32_t type, const uint8_t *row, uint32_t n_items, float *out);

/*
 * A vector for quant_rows_dot: signed 16-bit items with a scale for each block of 32.
 * Products with 4- and 8-bit weights are then sums of integers, exact in 32 bits; the rounding of
 * the vector (1 / 65,534 of a block's largest item) is 100 times finer than that of 8-bit
 * activations, so logits stay within 1e-3 of an fp32 product's.
 */
struct quant_vector {
    int16_t *items; /* [n_items] */
    float *scales;  /* [n_items / 32][2]: the scale, and the block's sum for the term m */
    uint32_t n_items;
};

/* Room for n_items_max; -ENOMEM. destroy is fine on a zeroed struct. */
int quant_vector_create(struct quant_vector *vector, uint32_t n_items_max);
void quant_vector_destroy(struct quant_vector *vector);
/* x [n_items], n_items a multiple of 32 up to n_items_max. */
void quant_vector_pack(struct quant_vector *vector, const float *x, uint32_t n_items);

/* out[r] = row r . vector for n_rows rows of vector->n_items weights, Q4_1 or Q8_0. Any thread. */
void quant_rows_dot(uint32_t type, const uint8_t *rows, uint32_t n_rows,
                    const struct quant_vector *vector, float *out);

/* The versions of quant_rows_dot this CPU runs, slowest first, for tests: NULL past the last. */
typedef void quant_dot_fn(uint32_t type, const uint8_t *rows, uint32_t n_rows,
                          const struct quant_vector *vector, float *out);
quant_dot_fn *quant_dot_version(uint32_t version, const char **name);
