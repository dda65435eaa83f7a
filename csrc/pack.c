/* Packed weights: panels of ZQ_NR = 32 output channels, the same layout at every dispatch level.
 *
 *   F32        [k][32] float32
 *   S8         [k/4][32][4] int8: the four codes that one vpdpbusd lane multiplies lie together
 *   S8_GROUP   per group [32] float32 scales, then [group/4][32][4] unsigned bytes, code + 128; k padded to 8
 *   S4_GROUP   per group [32] float32 scales, then [group/8][32][4] bytes: low nibble is code k+b, high nibble code
 *              k+4+b, each + 8
 *
 * Missing channels and the padding of k are zero codes, so kernels need no edges inside a panel. With groups it is the
 * weights that are unsigned and the activations a that are signed: sum (code + 8) a - 8 sum a asks for one number per row
 * and group; the other way round it would be one per channel and group, to be read from memory beside the codes. */
#include "zq_kernels.h"

#include <math.h>
#include <string.h>

static int64_t
group_count(const zq_linear *w)
{
    return zq_ceil_div(w->k, w->group);
}

/* Bytes of a panel's group: its scales and its codes. */
static int64_t
group_bytes(const zq_linear *w)
{
    return ZQ_NR * ((int64_t)sizeof(float) + w->group / (w->kind == ZQ_W_S4_GROUP ? 2 : 1));
}

/* items elements of 4 bytes, zeroed */
static void *
alloc_words(int64_t items)
{
    void *p = zq_alloc((size_t)items * 4);
    if (p) {
        memset(p, 0, (size_t)items * 4);
    }
    return p;
}

void
zq_linear_free(zq_linear *w)
{
    zq_free(w->panels);
    zq_free(w->colsum);
    zq_free(w->scale);
    zq_free(w->zcorr);
    zq_free(w->bias);
    zq_free(w->last_use);
    zq_extras_free(w->extras);
    zq_free(w->in_factor);
    zq_free(w->in_shift);
    memset(w, 0, sizeof *w);
}

/* A copy of n floats, or NULL of NULL; 0 on success. */
static int
copy_floats(const float *from, int64_t n, float **to)
{
    *to = from ? zq_alloc((size_t)n * sizeof **to) : NULL;
    if (*to) {
        memcpy(*to, from, (size_t)n * sizeof **to);
    }
    return from && !*to;
}

zq_status
zq_linear_input(zq_linear *w, float scale, int32_t zero, const float *factor, const float *shift)
{
    float *f, *s;
    if (copy_floats(factor, w->k, &f) || copy_floats(shift, w->k, &s)) {
        zq_free(f);
        return ZQ_ENOMEM;
    }
    zq_free(w->in_factor);
    zq_free(w->in_shift);
    w->in_scale = scale;
    w->in_zero = zero;
    w->in_factor = f;
    w->in_shift = s;
    return ZQ_OK;
}

int64_t
zq_linear_bytes(const zq_linear *w)
{
    const int64_t panels = zq_panel_count(w->n);
    const int64_t grouped = w->kind == ZQ_W_S8_GROUP || w->kind == ZQ_W_S4_GROUP;
    const int64_t words = w->kind == ZQ_W_F32 ? 1 : grouped ? 2 : 3;
    const int64_t input = ((w->in_factor != NULL) + (w->in_shift != NULL)) * w->k * 4;
    return panels * (w->panel_bytes + words * ZQ_NR * 4) + input + zq_extras_bytes(w);
}

/* Everything but the panels' contents, which are filled with the byte of zero codes. */
static zq_status
start(zq_linear *w, zq_weight_kind kind, int64_t n, int64_t k, int64_t group, int64_t panel_bytes, const float *bias)
{
    const int grouped = kind == ZQ_W_S8_GROUP || kind == ZQ_W_S4_GROUP,
              zero = !grouped ? 0 : kind == ZQ_W_S4_GROUP ? 0x88 : 0x80;
    const int64_t panels = zq_panel_count(n), columns = panels * ZQ_NR;
    *w = (zq_linear){.kind = kind, .n = n, .k = k, .group = group, .panel_bytes = panel_bytes};
    w->panels = zq_alloc((size_t)(panels * panel_bytes) + ZQ_PANEL_SLACK);
    w->bias = alloc_words(columns);
    w->last_use = zq_alloc(sizeof *w->last_use);
    if (kind == ZQ_W_S8) {
        w->scale = alloc_words(columns);
        w->colsum = alloc_words(columns);
    }
    if (grouped) {
        w->zcorr = alloc_words(columns);
    }
    if (!w->panels || !w->bias || !w->last_use || (kind == ZQ_W_S8 && (!w->scale || !w->colsum)) || (grouped && !w->zcorr)) {
        zq_linear_free(w);
        return ZQ_ENOMEM;
    }
    atomic_init(w->last_use, ZQ_NEVER);
    memset(w->panels, zero, (size_t)(panels * panel_bytes));
    if (bias) {
        memcpy(w->bias, bias, (size_t)n * sizeof *bias);
    }
    return ZQ_OK;
}

typedef struct {
    zq_linear *w;
    const float *weight;
    const int8_t *codes;
    const float *scales;
} pack_job;

static void
pack_f32_panel(void *ctx, int64_t p)
{
    const pack_job *job = ctx;
    const zq_linear *w = job->w;
    float *out = (float *)((char *)w->panels + p * w->panel_bytes);
    const int64_t columns = zq_min(ZQ_NR, w->n - p * ZQ_NR);
    zq_active()->transpose_f32(job->weight + p * ZQ_NR * w->k, columns, w->k, w->k, out, ZQ_NR);
}

void
zq_linear_fill_f32(zq_linear *w, const float *weight)
{
    assert(w->kind == ZQ_W_F32);
    zq_parallel_for(zq_panel_count(w->n), pack_f32_panel, &(pack_job){.w = w, .weight = weight});
}

zq_status
zq_linear_pack_f32(zq_linear *w, const float *weight, int64_t n, int64_t k, const float *bias)
{
    const zq_status s = start(w, ZQ_W_F32, n, k, k, k * ZQ_NR * 4, bias);
    if (s == ZQ_OK) {
        zq_linear_fill_f32(w, weight);
    }
    return s;
}

/* -128 would make |code| * 255 * k leave int32 earlier, and has no counterpart in +-127 grids. */
static int
codes_within(const int8_t *codes, int64_t count, int8_t lowest, int8_t highest)
{
    int8_t lo = 0, hi = 0;
    for (int64_t i = 0; i < count; i++) {
        lo = codes[i] < lo ? codes[i] : lo;
        hi = codes[i] > hi ? codes[i] : hi;
    }
    return lo >= lowest && hi <= highest;
}

static void
pack_s8_panel(void *ctx, int64_t p)
{
    const pack_job *job = ctx;
    const zq_linear *w = job->w;
    int8_t *out = (int8_t *)w->panels + p * w->panel_bytes;
    const int64_t columns = zq_min(ZQ_NR, w->n - p * ZQ_NR);
    for (int64_t j = 0; j < columns; j++) {
        const int64_t channel = p * ZQ_NR + j;
        const int8_t *row = job->codes + channel * w->k;
        int32_t sum = 0;
        for (int64_t k = 0; k < w->k; k++) {
            out[(k / 4 * ZQ_NR + j) * 4 + k % 4] = row[k];
            sum += row[k];
        }
        w->colsum[channel] = sum;
        w->scale[channel] = job->scales[channel];
    }
}

/* Channel j's codes of one group, each plus the offset that makes it unsigned, into the group's place in the panel. */
static void
pack_group_codes(const zq_linear *w, const int8_t *codes, int64_t count, int64_t j, uint8_t *out)
{
    for (int64_t k = 0; k < count; k++) {
        if (w->kind == ZQ_W_S8_GROUP) {
            out[(k / 4 * ZQ_NR + j) * 4 + k % 4] = (uint8_t)(codes[k] + 128);
        }
        else {
            uint8_t *byte = out + (k / 8 * ZQ_NR + j) * 4 + k % 4;
            const int high = k % 8 >= 4, nibble = codes[k] + 8;
            *byte = (uint8_t)(high ? (*byte & 0x0f) | nibble << 4 : (*byte & 0xf0) | nibble);
        }
    }
}

static void
pack_group_panel(void *ctx, int64_t p)
{
    const pack_job *job = ctx;
    const zq_linear *w = job->w;
    const int64_t columns = zq_min(ZQ_NR, w->n - p * ZQ_NR), groups = group_count(w);
    for (int64_t g = 0; g < groups; g++) {
        uint8_t *at = (uint8_t *)w->panels + p * w->panel_bytes + g * group_bytes(w);
        const int64_t count = zq_min(w->group, w->k - g * w->group);
        float scales[ZQ_NR] = {0};
        for (int64_t j = 0; j < columns; j++) {
            const int64_t channel = p * ZQ_NR + j;
            const int8_t *codes = job->codes + channel * w->k + g * w->group;
            int32_t sum = 0;
            for (int64_t k = 0; k < count; k++) {
                sum += codes[k];
            }
            scales[j] = job->scales[channel * groups + g];
            w->zcorr[channel] = fmaf((float)sum, scales[j], w->zcorr[channel]);
            pack_group_codes(w, codes, count, j, at + sizeof scales);
        }
        memcpy(at, scales, sizeof scales);
    }
}

void
zq_linear_fill_codes(zq_linear *w, const int8_t *codes, const float *scales)
{
    assert(w->kind != ZQ_W_F32);
    if (w->zcorr) { /* adds up over the groups */
        memset(w->zcorr, 0, (size_t)w->n * sizeof *w->zcorr);
    }
    zq_parallel_for(zq_panel_count(w->n), w->kind == ZQ_W_S8 ? pack_s8_panel : pack_group_panel,
                    &(pack_job){.w = w, .codes = codes, .scales = scales});
}

zq_status
zq_linear_pack_s8(zq_linear *w, const int8_t *codes, const float *scale, int64_t n, int64_t k, const float *bias)
{
    if (k > ZQ_MAX_K || !codes_within(codes, n * k, -127, 127)) {
        return ZQ_ERANGE;
    }
    const zq_status s = start(w, ZQ_W_S8, n, k, k, zq_round_up(k, 4) * ZQ_NR, bias);
    if (s == ZQ_OK) {
        zq_linear_fill_codes(w, codes, scale);
    }
    return s;
}

zq_status
zq_linear_pack_group(zq_linear *w, const int8_t *codes, const float *scales, int64_t n, int64_t k, int64_t group, int bits,
                     const float *bias)
{
    const int four = bits == 4;
    if (k == 0) { /* no groups: one scale per channel, of which nothing is multiplied with it */
        return start(w, ZQ_W_S8, n, k, k, 0, bias);
    }
    if (group >= k) {
        group = zq_round_up(k, ZQ_KSTEP); /* one group, as deep as the padded panel */
    }
    if (k > ZQ_MAX_K || !codes_within(codes, n * k, four ? -8 : -127, four ? 7 : 127)) {
        return ZQ_ERANGE;
    }
    const int64_t bytes =
        zq_ceil_div(k, group) * ZQ_NR * (int64_t)sizeof(float) + zq_round_up(k, ZQ_KSTEP) * ZQ_NR / (four ? 2 : 1);
    const zq_status s = start(w, four ? ZQ_W_S4_GROUP : ZQ_W_S8_GROUP, n, k, group, bytes, bias);
    if (s == ZQ_OK) {
        zq_linear_fill_codes(w, codes, scales);
    }
    return s;
}
