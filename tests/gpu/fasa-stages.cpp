// What the stages of FASA cost on a GPU, against the flash attention of the same step, on random tensors: one JSON line for each
// shape, in microseconds for one layer, median of rounds. A library built with -DFASA_CUDA_CLOCK=ON prints the times of tip, select
// and fac in between (with few cells that of tip is more than the kernel adds to a step: it starts early and waits for the one
// before it). tools/bench_gpu.sh makes rows of both.
//
//   fasa-stages [KEY=VALUE...]   head=128 (size)  heads=32  kv_heads=8  dims=32  layers=8

#include "ggml-alloc.h"
#include "ggml-backend.h"
#include "ggml-cpp.h"
#include "ggml-fasa.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <numeric>
#include <random>
#include <string>
#include <vector>

namespace {

[[noreturn]] void fail(const std::string & reason) {
    fprintf(stderr, "error: %s\n", reason.c_str());
    exit(1);
}

double seconds() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

struct shape {
    int64_t head = 128, heads = 32, kv_heads = 8, dims = 32, layers = 8;
};

class bench {
public:
    bench(ggml_backend_t backend, const shape & of, int64_t n_kv) : backend(backend), of(of), n_kv(n_kv) {
        ggml_init_params params = { (size_t) (8*of.layers + 8)*ggml_tensor_overhead(), nullptr, /*.no_alloc =*/ true };
        ctx.reset(ggml_init(params));
        for (int64_t l = 0; l < of.layers; ++l) {
            k.push_back(ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F16, of.head*of.kv_heads, n_kv));
            v.push_back(ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F16, of.head*of.kv_heads, n_kv));
            for (int type = 0; type < GGML_FASA_INDEX_COUNT; ++type) {
                index[type].push_back(ggml_fasa_new_index(ctx.get(), (ggml_fasa_index_type) type, of.dims, n_kv, of.kv_heads, 1));
            }
        }
        q    = ggml_new_tensor_4d(ctx.get(), GGML_TYPE_F32, of.head, of.heads, 1, 1);
        mask = ggml_new_tensor_4d(ctx.get(), GGML_TYPE_F16, n_kv, 1, 1, 1);
        dims = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_I32, of.dims, of.kv_heads);
        all  = ggml_new_tensor_1d(ctx.get(), GGML_TYPE_I64, n_kv);
        last = ggml_new_tensor_1d(ctx.get(), GGML_TYPE_I64, 1);
        buffer.reset(ggml_backend_alloc_ctx_tensors(ctx.get(), backend));
        if (!buffer) {
            fail("no memory for " + std::to_string(n_kv) + " cells: give fewer layers");
        }
        fill();
    }

    // Median time of one layer of a step, in microseconds; build(ctx, layer) is its op.
    double time(const std::function<ggml_tensor * (ggml_context *, int64_t)> & build) const {
        const size_t size = 64*of.layers*ggml_tensor_overhead() + ggml_graph_overhead();
        ggml_init_params params = { size, nullptr, /*.no_alloc =*/ true };
        ggml_context_ptr graph_ctx(ggml_init(params));
        ggml_cgraph * graph = ggml_new_graph(graph_ctx.get());
        for (int64_t l = 0; l < of.layers; ++l) {
            ggml_build_forward_expand(graph, build(graph_ctx.get(), l));
        }
        ggml_gallocr_ptr alloc(ggml_gallocr_new(ggml_backend_get_default_buffer_type(backend)));
        ggml_gallocr_alloc_graph(alloc.get(), graph);

        const int N_STEP = 10;
        std::vector<double> times;
        for (int round = -1; round < 7; ++round) { // the first warms up
            ggml_backend_synchronize(backend);
            const double start = seconds();
            for (int i = 0; i < N_STEP; ++i) {
                ggml_backend_graph_compute_async(backend, graph);
            }
            ggml_backend_synchronize(backend);
            if (round >= 0) {
                times.push_back(1e6*(seconds() - start)/(N_STEP*of.layers));
            }
        }
        std::sort(times.begin(), times.end());
        return times[times.size()/2];
    }

    double flash_attn() const {
        return time([&](ggml_context * c, int64_t l) {
            return ggml_flash_attn_ext(c, queries(c), heads(c, k[l]), heads(c, v[l]), mask, scale(), 0.0f, 0.0f);
        });
    }

    // cells: all for an index that is full, or one
    double index_write(ggml_fasa_index_type type, bool full) const {
        return time([&](ggml_context * c, int64_t l) { return write(c, l, type, full ? all : last); });
    }

    // joined: with the write of the step
    double attn(ggml_fasa_index_type type, int32_t budget, bool joined) const {
        return time([&](ggml_context * c, int64_t l) {
            ggml_tensor * out = ggml_fasa_attn(c, queries(c), heads(c, k[l]), heads(c, v[l]), mask, nullptr, index[type][l], dims,
                    scale(), 0.0f, budget, type, 0);
            if (joined) {
                ggml_fasa_attn_join_write(out, write(c, l, type, last));
            }
            return out;
        });
    }

private:
    ggml_backend_t    backend;
    const shape       of;
    const int64_t     n_kv;
    ggml_context_ptr  ctx;
    ggml_backend_buffer_ptr buffer;
    std::vector<ggml_tensor *> k, v, index[GGML_FASA_INDEX_COUNT];
    ggml_tensor     * q, * mask, * dims, * all, * last;

    float scale() const {
        return 1.0f/sqrtf(of.head);
    }
    ggml_tensor * queries(ggml_context * c) const {
        return ggml_permute(c, q, 0, 2, 1, 3);
    }
    ggml_tensor * heads(ggml_context * c, ggml_tensor * cache) const {
        return ggml_view_4d(c, cache, of.head, n_kv, of.kv_heads, 1, cache->nb[1], ggml_row_size(cache->type, of.head),
                cache->nb[1]*n_kv, 0);
    }
    ggml_tensor * write(ggml_context * c, int64_t l, ggml_fasa_index_type type, ggml_tensor * cells) const {
        return ggml_fasa_index_write(c, k[l], cells, index[type][l], dims, type, 0);
    }

    void fill() {
        std::mt19937 gen(2602);
        std::normal_distribution<float> normal;
        std::vector<ggml_fp16_t> pool(1 << 20);
        for (ggml_fp16_t & x : pool) {
            x = ggml_fp32_to_fp16(normal(gen));
        }
        std::vector<ggml_fp16_t> values(ggml_nelements(k[0]));
        for (ggml_tensor * t : { k[0], v[0] }) {
            for (ggml_fp16_t & x : values) {
                x = pool[gen() % pool.size()];
            }
            ggml_backend_tensor_set(t, values.data(), 0, ggml_nbytes(t));
        }
        for (int64_t l = 1; l < of.layers; ++l) {
            ggml_backend_tensor_copy(k[0], k[l]);
            ggml_backend_tensor_copy(v[0], v[l]);
        }
        std::vector<float> queries(ggml_nelements(q));
        std::generate(queries.begin(), queries.end(), [&] { return normal(gen); });
        ggml_backend_tensor_set(q, queries.data(), 0, ggml_nbytes(q));

        std::vector<ggml_fp16_t> marks(n_kv, ggml_fp32_to_fp16(0.0f)); // 4 sinks and 32 recent cells are forced
        for (int64_t i = 0; i < std::min<int64_t>(36, n_kv); ++i) {
            marks[i < 4 ? i : n_kv - (i - 3)] = ggml_fp32_to_fp16(-0.0f);
        }
        ggml_backend_tensor_set(mask, marks.data(), 0, ggml_nbytes(mask));

        std::vector<int32_t> of_heads(of.dims*of.kv_heads);
        for (size_t i = 0; i < of_heads.size(); ++i) {
            of_heads[i] = i%of.dims*of.head/of.dims;
        }
        ggml_backend_tensor_set(dims, of_heads.data(), 0, ggml_nbytes(dims));

        std::vector<int64_t> ids(n_kv);
        std::iota(ids.begin(), ids.end(), 0);
        ggml_backend_tensor_set(all,  ids.data(),        0, ggml_nbytes(all));
        ggml_backend_tensor_set(last, &ids.back(), 0, ggml_nbytes(last));
    }
};

// Bytes read and written per second of a plain copy on the device.
double copy_rate(ggml_backend_t backend) {
    ggml_init_params params = { 8*ggml_tensor_overhead() + ggml_graph_overhead(), nullptr, /*.no_alloc =*/ true };
    ggml_context_ptr ctx(ggml_init(params));
    ggml_tensor * from = ggml_new_tensor_1d(ctx.get(), GGML_TYPE_F32, 256 << 20);
    ggml_tensor * to   = ggml_dup_tensor(ctx.get(), from);
    ggml_backend_buffer_ptr buffer(ggml_backend_alloc_ctx_tensors(ctx.get(), backend));
    if (!buffer) {
        fail("no memory to measure a copy");
    }
    ggml_backend_buffer_clear(buffer.get(), 0);
    ggml_cgraph * graph = ggml_new_graph(ctx.get());
    ggml_build_forward_expand(graph, ggml_cpy(ctx.get(), from, to));
    std::vector<double> times;
    for (int round = 0; round < 9; ++round) {
        ggml_backend_synchronize(backend);
        const double start = seconds();
        ggml_backend_graph_compute(backend, graph);
        times.push_back(seconds() - start);
    }
    std::sort(times.begin(), times.end());
    return 2.0*ggml_nbytes(from)/times[times.size()/2];
}

} // namespace

int main(int argc, char ** argv) {
    shape of;
    std::map<std::string, int64_t *> keys = {
        { "head", &of.head }, { "heads", &of.heads }, { "kv_heads", &of.kv_heads }, { "dims", &of.dims }, { "layers", &of.layers },
    };
    for (int i = 1; i < argc; ++i) {
        const std::string arg = argv[i];
        const size_t      eq  = arg.find('=');
        const auto        key = keys.find(arg.substr(0, eq));
        char * end = nullptr;
        if (eq == std::string::npos || key == keys.end() || (*key->second = strtoll(arg.c_str() + eq + 1, &end, 10)) <= 0 || *end) {
            fail("'" + arg + "' is not KEY=NUMBER with a key that there is");
        }
    }
    if (of.heads % of.kv_heads != 0 || of.dims > of.head || of.dims % 2 != 0) {
        fail("heads must be a multiple of kv_heads, dims even and at most head");
    }

    ggml_backend_load_all();
    ggml_backend_ptr backend(ggml_backend_init_by_type(GGML_BACKEND_DEVICE_TYPE_GPU, nullptr));
    if (!backend) {
        fail("there is no GPU");
    }
    printf("{\"copy_gb_per_s\": %.1f}\n", 1e-9*copy_rate(backend.get()));

    for (int64_t n_kv : { 256, 4096, 32768, 65536, 131072 }) {
        const bench on(backend.get(), of, n_kv);
        const double flash = on.flash_attn();
        for (int t = 0; t < GGML_FASA_INDEX_COUNT; ++t) {
            const ggml_fasa_index_type type = (ggml_fasa_index_type) t;
            on.index_write(type, true);
            for (int32_t budget : { 256, 1024 }) {
                const double attn = on.attn(type, budget, false);
                printf("{\"n_kv\": %lld, \"index_type\": \"%s\", \"budget\": %d, \"flash_attn_us\": %.2f, \"index_write_us\": %.2f, "
                    "\"attn_us\": %.2f, \"joined_us\": %.2f, \"index_bytes\": %lld}\n", (long long) n_kv,
                    ggml_fasa_index_type_name(type), budget, flash, on.index_write(type, false), attn, on.attn(type, budget, true),
                    (long long) (ggml_fasa_tile_size(type, of.dims)*n_kv/GGML_FASA_TILE*of.kv_heads));
                fflush(stdout);
            }
        }
    }
}
