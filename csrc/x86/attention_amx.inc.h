/* Attention on codes at level amx: attend_tile_b8 with both products in tile registers. Included by nn_avx512.c behind
 * attention.inc.h, in a region with tile instructions. Between the products codes and floats are those of attention.inc.h.
 *
 *                 first operand (16 rows)       second operand (lines of 4 codes)     sums
 *     scores      k: 16 keys, u8                q: 16 query rows, s8                  (keys, query rows)
 *     values      p: 16 query rows, u8          v: 16 columns, s8                     (query rows, columns)
 *
 * k, q and v lie in memory as the tile registers want them; only p, which the softmax makes four keys to a word and a query
 * row to a lane, is transposed. Registers: 0, 1 sums; 2, 3 v; 4, 5 k; 6 q; 7 p.
 *
 * Sixteen query rows at a time, as the scores of 32 do not stay in L1. Beside products in tile registers the core runs slower
 * (here shifts and shuffles by a third, fma by a tenth, for some microseconds behind the last one), so that of the time that
 * the products no longer take a part is lost again: the more, the smaller heads are. */
#include "amx_tiles.h"

/* Up to FEW_KEYS keys, and in steps of less than LEAST_DEPTH codes, products of vectors are quicker. */
enum { BLOCK = 32, CHUNK = ZQ_KEY_BLOCK, LANES = 16, FEW_KEYS = 96, LEAST_DEPTH = 16 };
_Static_assert(CHUNK % BLOCK == 0 && CHUNK == 64, "a chunk of keys fills a row of a tile register, in whole blocks");

/* Codes of a step: d4 in the fewest equal steps that fit a tile register */
ZQ_INLINE int64_t
step_depth(int64_t d4)
{
    int64_t steps = zq_ceil_div(d4, 64);
    while (d4 % (4 * steps)) {
        steps++;
    }
    return d4 / steps;
}

ZQ_INLINE void
configure_attention(int64_t depth)
{
    const uint8_t lines = (uint8_t)(depth / 4);
    const uint16_t bytes = (uint16_t)depth;
    const zq_tile_config config = {.palette = 1,
                                   .row_bytes = {64, 64, 64, 64, bytes, bytes, 64, 64},
                                   .rows = {16, 16, 16, 16, 16, 16, lines, 16}};
    zq_load_tile_config(&config);
}

/* Scores of the BLOCK keys from `key` on, as integers: (BLOCK, LANES) of t->s. */
ZQ_INLINE void
block_scores(const zq_code_tile *t, int64_t key, int64_t lane, int64_t depth)
{
    const uint8_t *k = t->k + key * t->d4, *q = t->q + 4 * lane;
    float *s = t->s + key * LANES;
    _tile_loadd(0, t->start + lane, 0); /* every key starts with the same */
    _tile_loadd(1, t->start + lane, 0);
    for (int64_t i = 0; i < t->d4; i += depth, k += depth, q += depth * ZQ_NR) {
        _tile_loadd(6, q, ZQ_PANEL_LINE);
        _tile_loadd(4, k, (size_t)t->d4);
        _tile_dpbusd(0, 4, 6);
        _tile_loadd(5, k + 16 * t->d4, (size_t)t->d4);
        _tile_dpbusd(1, 5, 6);
    }
    _tile_stored(0, s, 4 * LANES);
    _tile_stored(1, s + 16 * LANES, 4 * LANES);
    ZQ_TILES_IN_ORDER();
}

ZQ_INLINE v16
score_float(float *s, const float *k_scale, v16 max)
{
    const v16 x = v16_mul(v16_from_i(v16i_load((const int32_t *)(const void *)s)), v16_set1(*k_scale));
    v16_store(s, x);
    return v16_max(max, x);
}

/* Those of `keys` keys become floats; max becomes the larger of it and them, in four vectors, as one would wait for itself. */
ZQ_INLINE void
block_floats(float *s, int64_t keys, const float *k_scale, v16 *max)
{
    int64_t i = 0;
    for (; i + 4 <= keys; i += 4) {
        ZQ_UNROLL(4)
        for (int u = 0; u < 4; u++) {
            max[u] = score_float(s + (i + u) * LANES, k_scale + i + u, max[u]);
        }
    }
    for (; i < keys; i++) {
        max[0] = score_float(s + i * LANES, k_scale + i, max[0]);
    }
}

/* Scores of all keys; those of a block become floats while the next block is multiplied. */
ZQ_INLINE v16
tile_scores(const zq_code_tile *t, int64_t lane, int64_t depth)
{
    const v16 old = v16_load(t->max + lane);
    v16 max[4] = {old, old, old, old};
    for (int64_t key = 0; key < t->keys + BLOCK; key += BLOCK) {
        if (key < t->keys) {
            block_scores(t, key, lane, depth);
        }
        if (key > 0) {
            const int64_t before = key - BLOCK;
            block_floats(t->s + before * LANES, zq_min(BLOCK, t->keys - before), t->k_scale + before, max);
        }
    }
    return v16_max(v16_max(max[0], max[1]), v16_max(max[2], max[3]));
}

/* 16 x 16 words: pairs, quads, then the 128-bit parts. */
ZQ_INLINE void
transpose_words(v16i *x)
{
    v16i y[16];
    ZQ_UNROLL(8)
    for (int i = 0; i < 16; i += 2) {
        y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
        y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
    }
    ZQ_UNROLL(4)
    for (int i = 0; i < 16; i += 4) { /* x[i + j]: word j of each 128-bit part, of rows i to i + 3 */
        x[i] = _mm512_unpacklo_epi64(y[i], y[i + 2]);
        x[i + 1] = _mm512_unpackhi_epi64(y[i], y[i + 2]);
        x[i + 2] = _mm512_unpacklo_epi64(y[i + 1], y[i + 3]);
        x[i + 3] = _mm512_unpackhi_epi64(y[i + 1], y[i + 3]);
    }
    ZQ_UNROLL(4)
    for (int j = 0; j < 4; j++) {
        y[j] = _mm512_shuffle_i32x4(x[j], x[j + 4], 0x88);
        y[j + 4] = _mm512_shuffle_i32x4(x[j], x[j + 4], 0xdd);
        y[j + 8] = _mm512_shuffle_i32x4(x[j + 8], x[j + 12], 0x88);
        y[j + 12] = _mm512_shuffle_i32x4(x[j + 8], x[j + 12], 0xdd);
    }
    ZQ_UNROLL(4)
    for (int j = 0; j < 4; j++) {
        x[j] = _mm512_shuffle_i32x4(y[j], y[j + 8], 0x88);
        x[j + 8] = _mm512_shuffle_i32x4(y[j], y[j + 8], 0xdd);
        x[j + 4] = _mm512_shuffle_i32x4(y[j + 4], y[j + 12], 0x88);
        x[j + 12] = _mm512_shuffle_i32x4(y[j + 4], y[j + 12], 0xdd);
    }
}

/* code_word of four keys that are there: v16_exp2_codes with instructions that take two steps of it each, t less its nearest
 * integer and the product with a power of two. Halfway between two integers this one takes the other of them, which gives the
 * same codes (tests/test_attention.py). Without a lower bound of t the powers become denormal, and slow. */
ZQ_INLINE v16i
whole_word(const float *s, v16 max, v16 f)
{
    const __m512i keys_together = _mm512_set4_epi32(0x0f0b0703, 0x0e0a0602, 0x0d090501, 0x0c080400);
    v16 t[4], r[4], p[4];
    v16i code[4];
#define EACH ZQ_UNROLL(4) for (int u = 0; u < 4; u++)
    EACH { t[u] = v16_max(v16_set1(ZQ_CODE_LO), v16_mul(v16_sub(v16_load(s + u * LANES), max), f)); }
    EACH { r[u] = _mm512_reduce_ps(t[u], _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
    EACH { p[u] = v16_set1(zq_code_poly[3]); }
    ZQ_UNROLL(4)
    for (int i = 2; i >= 0; i--) {
        EACH { p[u] = v16_fma(p[u], r[u], v16_set1(zq_code_poly[i])); }
    }
    EACH { code[u] = v16_to_i(_mm512_scalef_ps(p[u], v16_sub(t[u], r[u]))); }
#undef EACH
    const __m512i four = _mm512_packus_epi16(_mm512_packs_epi32(code[0], code[1]), _mm512_packs_epi32(code[2], code[3]));
    return _mm512_shuffle_epi8(four, keys_together); /* within 128 bits: four rows of a key become four keys of a row */
}

/* Codes of p of a chunk of keys for sixteen query rows, a row of t->p each, ld_p apart; keys that do not exist have 0. Returns
 * sum and their sums. */
ZQ_INLINE v16i
chunk_codes(const zq_code_tile *t, int64_t key, int64_t lane, int64_t ld_p, v16 max, v16i sum)
{
    const v16 f = v16_load(t->factor + lane);
    const float *s = t->s + key * LANES;
    const int64_t keys = zq_min(CHUNK, t->keys - key);
    v16i word[16]; /* in memory: the registers are taken */
    for (int w = 0; w < 16; w++, s += 4 * LANES) {
        const int64_t here = keys - 4 * w;
        word[w] = here >= 4 ? whole_word(s, max, f) : here > 0 ? code_word(s, LANES, here, max, f) : v16i_zero();
        sum = v16i_dot4(sum, word[w], v16i_set1(0x01010101));
    }
    transpose_words(word);
    ZQ_UNROLL(16)
    for (int i = 0; i < 16; i++) {
        v16i_store((int32_t *)(void *)(t->p + i * ld_p + key), word[i]);
    }
    return sum;
}

/* P V of sixteen query rows and a panel of 32 columns, (16, 32) */
ZQ_INLINE void
multiply_values(const uint8_t *p, int64_t ld_p, const uint8_t *v, int64_t keys, int32_t *c)
{
    _tile_zero(0);
    _tile_zero(1);
    for (int64_t key = 0; key < keys; key += CHUNK, v += CHUNK / 4 * ZQ_PANEL_LINE) {
        _tile_loadd(7, p + key, (size_t)ld_p);
        _tile_loadd(2, v, ZQ_PANEL_LINE);
        _tile_dpbusd(0, 7, 2);
        _tile_loadd(3, v + 64, ZQ_PANEL_LINE);
        _tile_dpbusd(1, 7, 3);
    }
    _tile_stored(0, c, ZQ_PANEL_LINE);
    _tile_stored(1, c + 16, ZQ_PANEL_LINE);
    ZQ_TILES_IN_ORDER();
}

/* o of the query rows in sixteen lanes += P V, where c is the latter in integers, 32 columns from `col` on. */
ZQ_INLINE void
add_values(const zq_code_tile *t, int64_t lane, int64_t col, const int32_t *c, int first)
{
    const v16 scale[2] = {v16_load(t->v_scale + col), v16_load(t->v_scale + col + 16)};
    for (int64_t i = lane; i < zq_min(lane + 16, t->rows); i++, c += ZQ_NR) {
        float *o = t->o + i * t->n + col;
        ZQ_UNROLL(2)
        for (int j = 0; j < 2; j++) {
            const v16 before = first ? v16_zero() : v16_load(o + 16 * j);
            v16_store(o + 16 * j, v16_fma(v16_from_i(v16i_load(c + 16 * j)), scale[j], before));
        }
    }
}

/* Sixteen query rows from `lane` on */
static void
attend_sixteen_codes(const zq_code_tile *t, int64_t lane, int64_t depth)
{
    const int first = t->max[lane] == -INFINITY;
    const int64_t ld_p = zq_round_up(t->keys, CHUNK), keys4 = zq_round_up(t->keys, 4);
    _Alignas(64) int32_t c[16 * ZQ_NR];
    const v16 max = tile_scores(t, lane, depth);
    v16i sum = v16i_zero();
    for (int64_t key = 0; key < t->keys; key += CHUNK) {
        sum = chunk_codes(t, key, lane, ld_p, max, sum);
    }
    ZQ_TILES_IN_ORDER();
    raise_lanes(t, lane, first, max, sum);
    for (int64_t col = 0; col < t->n; col += ZQ_NR) {
        multiply_values(t->p, ld_p, t->v + col * keys4, t->keys, c);
        add_values(t, lane, col, c, first);
    }
}

static void
zq_attend_tile_b8__amx(const zq_code_tile *t)
{
    const int64_t depth = step_depth(t->d4);
    if (t->keys <= FEW_KEYS || depth < LEAST_DEPTH) {
        attend_tile_b8(t);
        return;
    }
    assert(t->rows >= 1 && t->rows <= ZQ_NR && t->n % ZQ_NR == 0 && t->d4 % 4 == 0);
    configure_attention(depth);
    for (int64_t lane = 0; lane < t->rows; lane += 16) {
        attend_sixteen_codes(t, lane, depth);
    }
    _tile_release();
}
