// Stage tip on the CPU: token importance prediction, paper section 4.1, for one KV group and one query row.

#include "fasa-simd.h"
#include "fasa-stages.h"

#include <algorithm>
#include <cfloat>

namespace fasa {

static constexpr int64_t  TILE     = GGML_FASA_TILE;
static constexpr uint16_t F16_NINF = 0xFC00;
static constexpr uint16_t F16_NEG0 = 0x8000;
static constexpr uint32_t F32_NINF = 0xFF800000;
static constexpr uint32_t F32_NEG0 = 0x80000000;

static uint32_t bits32(const void * data, int64_t t) {
    uint32_t u;
    memcpy(&u, (const float *) data + t, sizeof(u));
    return u;
}

bool mask_row::hidden(int64_t t) const {
    return f16 ? ((const uint16_t *) data)[t] == F16_NINF : bits32(data, t) == F32_NINF;
}

bool mask_row::forced(int64_t t) const {
    return f16 ? ((const uint16_t *) data)[t] == F16_NEG0 : bits32(data, t) == F32_NEG0;
}

bool mask_row::plain(int64_t t0, int64_t n) const {
    const size_t size = f16 ? sizeof(uint16_t) : sizeof(float);
    const char * row  = (const char *) data + t0*size;

    uint64_t any = n % TILE; // only whole tiles, which are whole words
    for (size_t i = 0; i < (n - n % TILE)*size; i += sizeof(uint64_t)) {
        uint64_t word;
        memcpy(&word, row + i, sizeof(word));
        any |= word;
    }
    return any == 0;
}

bool mask_row::plain_chunk(int64_t chunk, int64_t n_kv) const {
    return plain(chunk*TIP_CHUNK, std::min(TIP_CHUNK, n_kv - chunk*TIP_CHUNK));
}

template <typename T>
static mask_row::tile_bits bits_of(const char * row, int64_t n, T hidden, T forced) {
    mask_row::tile_bits bits = { n < TILE ? UINT32_MAX << n : 0, 0 };
    for (int64_t i = 0; i < n; ++i) {
        T value;
        memcpy(&value, row + i*sizeof(value), sizeof(value));
        bits.hidden |= (uint32_t) (value == hidden) << i;
        bits.forced |= (uint32_t) (value == forced) << i;
    }
    return bits;
}

mask_row::tile_bits mask_row::tile(int64_t t0, int64_t n) const {
    if (plain(t0, n)) { // as nearly every tile is
        return { 0, 0 };
    }
    return f16 ? bits_of((const char *) data + t0*sizeof(F16_NINF), n, F16_NINF, F16_NEG0)
               : bits_of((const char *) data + t0*sizeof(F32_NINF), n, F32_NINF, F32_NEG0);
}

// Fours of integers of a query: as many as whole words of the index take.
static int64_t n_query_four(int64_t n_dim) {
    return (n_dim + 7)/8*2;
}

static int64_t query_size(int64_t n_dim) {
    const int64_t n_four = n_query_four(n_dim);
    return GGML_PAD(std::max(n_dim, (1 + (n_four + DOT4_RUN - 1)/DOT4_RUN + n_four)*W), 16);
}

int64_t tip_query_size(int64_t n_dim) {
    return query_size(n_dim);
}

// Heads that one pass over a tile serves: their accumulators stay in registers.
static constexpr int MAX_HEADS = 4;
static constexpr int NV        = 2; // vectors of cells per pass

// How far ahead of what is at work memory is asked for more, beyond a page of 4 KiB, where hardware stops to do so itself:
// in values of an F16 index, which is asked for value by value, and in tiles of one of integers.
static constexpr int64_t PREFETCH       = 2048;
static constexpr int64_t PREFETCH_TILES = 8;

static_assert(TILE % (NV*W) == 0, "a tile is a whole number of passes");

// Dims of 16 FCs, which calibration keeps for heads of 64 dims: kernels are compiled for these, and for any number, N_DIM = 0.
static constexpr int USUAL_DIMS = 32;

// Least factor of a query of integers: e to the power of what it gives is 1, yet its inverse is finite.
static constexpr float FACTOR_MIN = 1e-30f;

// Scores a tile for NH heads: out[h][0..TILE) = S_h. query is as tip_query makes it.
template <int NH, int N_DIM>
static void tip_tile_f16(const float * query, int64_t any_dim, const char * tile, float * out, int64_t stride) {
    constexpr int64_t RUN = N_DIM ? 8 : 1; // dims of a loop that unrolls

    const int64_t n_dim = N_DIM ? N_DIM : any_dim;
    const int64_t size  = query_size(n_dim);

    for (int64_t c = 0; c < TILE; c += NV*W) {
        vec acc[NH][NV];
        for (int h = 0; h < NH; ++h) {
            for (int i = 0; i < NV; ++i) {
                acc[h][i] = zero();
            }
        }
        auto add_dim = [&](int64_t j) {
            vec k[NV];
            for (int i = 0; i < NV; ++i) {
                k[i] = load((const ggml_fp16_t *) tile + j*TILE + c + i*W);
            }
            if (c == 0) { // the tile's values of a dim are one cache line
                prefetch((const ggml_fp16_t *) tile + j*TILE + PREFETCH);
            }
            for (int h = 0; h < NH; ++h) {
                const vec qj = splat(query[h*size + j]);
                for (int i = 0; i < NV; ++i) {
                    acc[h][i] = fma(qj, k[i], acc[h][i]);
                }
            }
        };
        for (int64_t j = 0; j < n_dim; j += RUN) {
            for (int64_t i = 0; i < RUN; ++i) {
                add_dim(j + i);
            }
        }
        for (int h = 0; h < NH; ++h) {
            for (int i = 0; i < NV; ++i) {
                store(out + h*stride + c + i*W, acc[h][i]);
            }
        }
    }
}

// Adds to acc what n_word words of NV vectors of cells give with the bytes of NH queries, whose splats are q[h*size ..],
// for an index of 8 bits.
template <int NH, int NV>
static void add_words_q8(ivec (&acc)[NH][NV], const char * words, int64_t n_word, const float * q, int64_t size) {
    for (int64_t w = 0; w < n_word; ++w) {
        for (int i = 0; i < NV; ++i) {
            const ivec x = iload(words + (w*TILE + i*W)*4);
            for (int h = 0; h < NH; ++h) {
                acc[h][i] = dot8(acc[h][i], x, iload(q + h*size + w*W));
            }
        }
    }
}

// The same for an index of 4 bits, and at most DOT4_RUN/2 words; q begins with what sums start from.
template <int NH, int NV>
static void add_words_q4(ivec (&acc)[NH][NV], const char * words, int64_t n_word, const float * q, int64_t size) {
    ivec part[NH][NV];
    for (int h = 0; h < NH; ++h) {
        for (int i = 0; i < NV; ++i) {
            part[h][i] = iload(q + h*size);
        }
    }
    for (int64_t w = 0; w < n_word; ++w) {
        for (int i = 0; i < NV; ++i) {
            const ivec x    = iload(words + (w*TILE + i*W)*4);
            const ivec low  = low_nibbles(x);
            const ivec high = high_nibbles(x);
            for (int h = 0; h < NH; ++h) {
                part[h][i] = dot4(part[h][i], low,  iload(q + h*size + (1 + 2*w)*W));
                part[h][i] = dot4(part[h][i], high, iload(q + h*size + (2 + 2*w)*W));
            }
        }
    }
    for (int h = 0; h < NH; ++h) {
        for (int i = 0; i < NV; ++i) {
            acc[h][i] = dot4_end(acc[h][i], part[h][i]);
        }
    }
}

// The same as tip_tile_f16 for an index of integers, except that S is still to be multiplied by the query's factor. Sums are
// exact, so every instruction set gives the same.
template <int NH, int N_DIM, ggml_fasa_index_type TYPE>
static void tip_tile_int(const float * query, int64_t any_dim, const char * tile, float * out, int64_t stride) {
    constexpr bool    Q8       = TYPE == GGML_FASA_INDEX_Q8;
    constexpr int64_t PER_WORD = Q8 ? 4 : 8;
    constexpr int64_t RUN      = DOT4_RUN/2;

    const int64_t n_dim  = N_DIM ? N_DIM : any_dim;
    const int64_t size   = query_size(n_dim);
    const int64_t n_word = (n_dim + PER_WORD - 1)/PER_WORD;
    const float * q      = query + W;
    const char  * words  = tile + TILE*sizeof(ggml_fp16_t);

    for (int64_t c = 0; c < TILE; c += NV*W) {
        ivec acc[NH][NV];
        for (int h = 0; h < NH; ++h) {
            for (int i = 0; i < NV; ++i) {
                acc[h][i] = Q8 ? iload(q + h*size) : isplat(0);
            }
        }
        if (Q8) {
            add_words_q8(acc, words + c*4, n_word, q + W, size);
        } else {
            int64_t w = 0;
            for (; w + RUN <= n_word; w += RUN) { // a loop that unrolls
                add_words_q4(acc, words + (w*TILE + c)*4, RUN, q + (w/RUN + 2*w)*W, size);
            }
            if (w < n_word) {
                add_words_q4(acc, words + (w*TILE + c)*4, n_word - w, q + (w/RUN + 2*w)*W, size);
            }
        }
        for (int i = 0; i < NV; ++i) {
            const vec d = load((const ggml_fp16_t *) tile + c + i*W);
            for (int h = 0; h < NH; ++h) {
                store(out + h*stride + c + i*W, mul(d, to_float(acc[h][i])));
            }
        }
    }
}

template <int NH, int N_DIM>
static void tip_tiles(
        const float * query, const index_plane & index, const char * tile, int64_t n, float * out, int64_t stride) {
    const int64_t n_dim = index.n_dim;
    const size_t  size  = ggml_fasa_tile_size(index.type, n_dim);

    for (; n > 0; --n, tile += size, out += TILE) {
        if (index.type != GGML_FASA_INDEX_F16) {
            prefetch(tile + PREFETCH_TILES*size, size);
        }
        switch (index.type) {
            case GGML_FASA_INDEX_Q8: tip_tile_int<NH, N_DIM, GGML_FASA_INDEX_Q8>(query, n_dim, tile, out, stride); break;
            case GGML_FASA_INDEX_Q4: tip_tile_int<NH, N_DIM, GGML_FASA_INDEX_Q4>(query, n_dim, tile, out, stride); break;
            default:                 tip_tile_f16<NH, N_DIM>(query, n_dim, tile, out, stride); break;
        }
    }
}

template <int NH>
static void tip_tiles(
        const float * query, const index_plane & index, const char * tile, int64_t n, float * out, int64_t stride) {
    if (index.n_dim == USUAL_DIMS) {
        tip_tiles<NH, USUAL_DIMS>(query, index, tile, n, out, stride);
    } else {
        tip_tiles<NH, 0>(query, index, tile, n, out, stride);
    }
}

// Scores n tiles from cell t on for all heads of the group.
static void tip_cells(
        const float * query, int64_t n_group, const index_plane & index, int64_t t, int64_t n, float * weight) {
    const char * tile = index.tile(t/TILE);
    for (int64_t h = 0; h < n_group; h += MAX_HEADS) {
        const float * q   = query + h*query_size(index.n_dim);
        float       * out = weight + h*TIP_CHUNK;
        switch (std::min<int64_t>(n_group - h, MAX_HEADS)) {
            case 4: tip_tiles<4>(q, index, tile, n, out, TIP_CHUNK); break;
            case 3: tip_tiles<3>(q, index, tile, n, out, TIP_CHUNK); break;
            case 2: tip_tiles<2>(q, index, tile, n, out, TIP_CHUNK); break;
            case 1: tip_tiles<1>(q, index, tile, n, out, TIP_CHUNK); break;
        }
    }
}

// m, the largest magnitude in one head's query, and the integer of one value of it; see ggml_fasa_attn.
static float query_top(const float * q, int64_t n_dim) {
    float m = 0.0f;
    for (int64_t j = 0; j < n_dim; ++j) {
        m = std::max(m, fabsf(q[j]));
    }
    return m;
}

static int8_t query_integer(float q, float m) {
    return m < FLT_MIN ? 0 : (int8_t) rintf(q*(127.0f/m));
}

void tip_query(const float * q, int64_t n_group, int64_t n_dim, ggml_fasa_index_type type, float * query) {
    for (int64_t h = 0; h < n_group; ++h, q += n_dim, query += query_size(n_dim)) {
        if (type == GGML_FASA_INDEX_F16) {
            std::copy(q, q + n_dim, query);
            continue;
        }
        const bool    q8     = type == GGML_FASA_INDEX_Q8;
        const int64_t n_four = n_query_four(n_dim);
        const int64_t run    = q8 ? n_four : DOT4_RUN;
        const float   m      = query_top(q, n_dim);

        float * to = query;
        store(to, splat(std::max(m/127.0f, FACTOR_MIN)));
        for (int64_t j0 = 0; j0 < n_four; j0 += run) {
            float * start = to += W;
            int32_t low   = 0;
            int32_t high  = 0;
            for (int64_t j = 4*j0; j < 4*std::min(j0 + run, n_four); j += 4) {
                int8_t four[4] = { 0 };
                for (int64_t i = 0; i < std::min<int64_t>(n_dim - j, 4); ++i) {
                    four[i] = query_integer(q[j + i], m);
                }
                low  += four[0] + four[1];
                high += four[2] + four[3];

                int32_t word;
                memcpy(&word, four, sizeof(word));
                istore(to += W, isplat(word));
            }
            istore(start, isplat(q8 ? -BIAS8*(low + high) : dot4_start(-8*low, -8*high)));
        }
    }
}

void tip_chunk(
        const float * query, int64_t n_group, const index_plane & index, mask_row mask, bool plain, int64_t n_kv, int64_t chunk,
        float * weight, float * peak, float * total) {
    const int64_t t0      = chunk*TIP_CHUNK;
    const int64_t n_cells = std::min(n_kv - t0, TIP_CHUNK);
    const int64_t end     = GGML_PAD(n_cells, TILE);

    if (plain) {
        tip_cells(query, n_group, index, t0, n_cells/TILE, weight);
    }
    for (int64_t t = 0; t < n_cells && !plain; t += TILE) {
        const uint32_t hidden = mask.tile(t0 + t, std::min(TILE, n_cells - t)).hidden;
        if (hidden != UINT32_MAX) {
            tip_cells(query, n_group, index, t0 + t, 1, weight + t);
        }
        // hidden cells are overwritten, never added to: a stale index row may hold NaN
        for (uint32_t bits = hidden; bits; bits &= bits - 1) {
            for (int64_t h = 0; h < n_group; ++h) {
                weight[h*TIP_CHUNK + t + lowest_bit(bits)] = -INFINITY;
            }
        }
    }

    for (int64_t h = 0; h < n_group; ++h) {
        float * w = weight + h*TIP_CHUNK;

        const float factor = index.type == GGML_FASA_INDEX_F16 ? 1.0f : query[h*query_size(index.n_dim)];
        const float limit  = EXP_MAX/factor;

        vec vmax = splat(-INFINITY);
        for (int64_t t = 0; t < end; t += 2*W) {
            vmax = max(vmax, max(load(w + t), load(w + t + W)));
        }
        float m = hmax(vmax);
        if (m > limit || (m < -limit && m > -INFINITY)) { // of no sound model
            std::transform(w, w + end, w, [limit](float x) { return x > -INFINITY ? std::clamp(x, -limit, limit) : x; });
            m = std::clamp(m, -limit, limit);
        }

        // weights of equal cells in different chunks must differ by a power of two only, else rounding breaks their tie
        const float c = factor*LOG2_E;
        float n   = -INFINITY;
        vec   sum = zero();
        if (m > -INFINITY) {
            n = exp2_round(m*c);
            const vec least = splat(m - EXP_MIN/factor);
            for (int64_t t = 0; t < end; t += W) {
                const vec e = exp2_scaled(max(load(w + t), least), splat(c), splat(ROUND - n));
                sum = add(sum, e);
                store(w + t, e);
            }
        } else {
            std::fill(w, w + end, 0.0f);
        }
        peak [chunk*n_group + h] = n;
        total[chunk*n_group + h] = hsum(sum);
    }
}

// 2^n for an integer n <= 0, and 0 from -127 on.
static float power2(float n) {
    const uint32_t bits = (uint32_t) (int32_t) (std::max(n, -127.0f) + 127.0f) << 23;
    float f;
    memcpy(&f, &bits, sizeof(f));
    return f;
}

void tip_factors(int64_t n_group, int64_t n_chunk, const float * peak, const float * total, float * factor) {
    for (int64_t h = 0; h < n_group; ++h) {
        float top = -FLT_MAX;
        for (int64_t i = h; i < n_chunk*n_group; i += n_group) {
            top = std::max(top, peak[i]);
        }
        float sum = 0.0f;
        for (int64_t i = h; i < n_chunk*n_group; i += n_group) {
            factor[i] = power2(peak[i] - top);
            sum += factor[i]*total[i];
        }
        const float inverse = sum > 0.0f ? 1.0f/sum : 0.0f;
        for (int64_t i = h; i < n_chunk*n_group; i += n_group) {
            factor[i] *= inverse;
        }
    }
}

void tip_combine(
        const float * weight, int64_t n_group, const float * factor, mask_row mask, bool plain, int64_t n_kv, int64_t chunk,
        float * scores) {
    const float * f  = factor + chunk*n_group;
    const int64_t t0 = chunk*TIP_CHUNK;
    const int64_t t1 = std::min(n_kv, t0 + TIP_CHUNK);

    for (int64_t t = t0; t < t1; t += TILE) {
        const int64_t n = std::min(TILE, t1 - t);

        vec sum[TILE/W];
        for (vec & x : sum) {
            x = zero();
        }
        for (int64_t h = 0; h < n_group; ++h) {
            const vec     fh = splat(f[h]);
            const float * w  = weight + h*TIP_CHUNK + t - t0;
            for (int i = 0; i < TILE/W; ++i) {
                sum[i] = fma(fh, load(w + i*W), sum[i]);
            }
        }
        for (int i = 0; i < TILE/W; ++i) {
            store(scores + t + i*W, sum[i]);
        }
        const mask_row::tile_bits marks = plain ? mask_row::tile_bits{ 0, 0 } : mask.tile(t, n);
        for (uint32_t bits = marks.hidden | marks.forced; bits; bits &= bits - 1) {
            const int i = lowest_bit(bits);
            scores[t + i] = marks.hidden >> i & 1 ? -INFINITY : INFINITY;
        }
    }
}

// The oracle of the fast path: one cell, one head and one value at a time. query as tip_query makes it, except that
// q' are floats here.
static float tip_score_ref(const float * q, float factor, const index_plane & index, int64_t cell) {
    const int64_t n_dim = index.n_dim;
    const char  * tile  = index.tile(cell/TILE);
    cell %= TILE;

    if (index.type == GGML_FASA_INDEX_F16) {
        double s = 0.0;
        for (int64_t j = 0; j < n_dim; ++j) {
            s += (double) q[j]*ggml_fp16_to_fp32(((const ggml_fp16_t *) tile)[j*TILE + cell]);
        }
        return (float) s;
    }

    const int8_t  * integers = (const int8_t *) q;
    const uint8_t * words    = (const uint8_t *) tile + TILE*sizeof(ggml_fp16_t);
    int32_t sum = 0;
    for (int64_t j = 0; j < n_dim; ++j) {
        const int x = index.type == GGML_FASA_INDEX_Q8
            ? words[(j/4*TILE + cell)*4 + j%4] - 128
            : (words[(j/8*TILE + cell)*4 + j%4] >> (j%8/4*4) & 15) - 8;
        sum += integers[j]*x;
    }
    return factor*ggml_fp16_to_fp32(((const ggml_fp16_t *) tile)[cell])*(float) sum;
}

static void tip_ref(
        const float * q, int64_t n_group, const index_plane & index, mask_row mask, int64_t n_kv,
        float * query, float * w, float * scores) {
    for (int64_t t = 0; t < n_kv; ++t) {
        scores[t] = mask.hidden(t) ? -INFINITY : mask.forced(t) ? INFINITY : 0.0f;
    }

    for (int64_t h = 0; h < n_group; ++h, q += index.n_dim) {
        const bool  ints = index.type != GGML_FASA_INDEX_F16;
        const float m    = query_top(q, index.n_dim);
        for (int64_t j = 0; j < index.n_dim && ints; ++j) {
            ((int8_t *) query)[j] = query_integer(q[j], m);
        }

        float peak = -INFINITY;
        for (int64_t t = 0; t < n_kv; ++t) {
            if (!mask.hidden(t)) {
                w[t] = tip_score_ref(ints ? query : q, m/127.0f, index, t);
                peak = std::max(peak, w[t]);
            }
        }

        double total = 0.0;
        for (int64_t t = 0; t < n_kv; ++t) {
            if (!mask.hidden(t)) {
                w[t]   = expf(w[t] - peak);
                total += w[t];
            }
        }
        for (int64_t t = 0; t < n_kv; ++t) {
            if (!mask.hidden(t)) {
                scores[t] += (float) (w[t]/total);
            }
        }
    }
}

} // namespace fasa

size_t ggml_fasa_cpu_tip_scratch(int64_t n_group, int64_t n_dim, int64_t n_kv) {
    return n_group*(fasa::tip_query_size(n_dim) + (fasa::TIP_CHUNK + 3)*fasa::n_tip_chunk(n_kv));
}

void ggml_fasa_cpu_tip(
        const float * q, int64_t n_group, int64_t n_dim, int index_type, const void * index,
        const void * mask, bool mask_f16, int64_t n_kv, float * scratch, float * scores, bool use_ref) {
    const fasa::index_plane plane   = { (ggml_fasa_index_type) index_type, n_dim, index };
    const fasa::mask_row    row     = { mask, mask_f16 };
    const int64_t           n_chunk = fasa::n_tip_chunk(n_kv);

    float * weight = scratch;
    float * query  = weight + n_chunk*n_group*fasa::TIP_CHUNK;
    if (use_ref) {
        fasa::tip_ref(q, n_group, plane, row, n_kv, query, weight, scores);
        return;
    }

    float * peak   = query + n_group*fasa::tip_query_size(n_dim);
    float * total  = peak  + n_group*n_chunk;
    float * factor = total + n_group*n_chunk;
    fasa::tip_query(q, n_group, n_dim, plane.type, query);
    for (int64_t c = 0; c < n_chunk; ++c) {
        fasa::tip_chunk(query, n_group, plane, row, row.plain_chunk(c, n_kv), n_kv, c, weight + c*n_group*fasa::TIP_CHUNK, peak, total);
    }
    fasa::tip_factors(n_group, n_chunk, peak, total, factor);
    for (int64_t c = 0; c < n_chunk; ++c) {
        fasa::tip_combine(weight + c*n_group*fasa::TIP_CHUNK, n_group, factor, row, row.plain_chunk(c, n_kv), n_kv, c, scores);
    }
}
