// FASA-M on a GPU: K and V in host memory that the device reads in place. Checks the op, and runs a model once for
// tools/bench_mapped.sh, which says how.
//
//   fasa-mapped ops                        the op with K and V on the device and in mapped memory: same bits
//   fasa-mapped run MODEL [KEY=VALUE...]   one context: speed, device memory by the driver's figure, tokens; a JSON line
//   fasa-mapped copy                       rate of a plain copy from mapped memory to the device; a JSON line
//   fasa-mapped balloon MIB                takes device memory until MIB are left, and holds it until it is killed
//
// Keys of run, all optional:
//   mode=off|c|m|auto  budget=N  index=f16|q8|q4  vram=MIB  ctx=N  depth=N (tokens of the prompt)  gen=N  ubatch=N
//   text=FILE (the prompt, again and again up to depth; else random tokens)  type=f16|q8_0 (of K and V)
//   offload=0|1 (of the KV cache)  save=FILE, load=FILE (the state after the prompt)

#include "ggml-alloc.h"
#include "ggml-backend.h"
#include "ggml-cpp.h"
#include "ggml-fasa-mapped.h"
#include "ggml-fasa.h"
#include "llama-fasa.h"
#include "llama.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <map>
#include <random>
#include <string>
#include <thread>
#include <vector>

[[noreturn]] static void fail(const std::string & reason) {
    fprintf(stderr, "error: %s\n", reason.c_str());
    exit(1);
}

static ggml_backend_dev_t gpu() {
    ggml_backend_dev_t dev = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_GPU);
    if (!dev || !ggml_fasa_mapped_buffer_type(dev)) {
        fail("there is no GPU that reads mapped host memory");
    }
    return dev;
}

// 0 where there is no GPU.
static size_t free_memory() {
    size_t free  = 0;
    size_t total = 0;
    if (ggml_backend_dev_t dev = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_GPU)) {
        ggml_backend_dev_memory(dev, &free, &total);
    }
    return free;
}

static double seconds() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Shape of a case.
struct shape {
    int64_t   d, n_head_kv, n_group, n_kv, budget, n_row, n_stream;
    ggml_type type; // of K and V
    int64_t   n_cached = 0; // rows of the row cache
    bool      whole    = false; // staging holds all heads
    int64_t   n_cells() const { return GGML_PAD(n_kv, 256) + 256; }
    int64_t   n_head() const { return n_head_kv*n_group; }
};

// One graph on the GPU with K and V in memory of one kind. The same seed gives the same data in either kind.
struct op_case {
    static constexpr int64_t N_DIM     = 32;
    static constexpr int64_t N_WRITTEN = 5;

    std::mt19937 gen;

    const shape & s;
    ggml_backend_ptr backend { ggml_backend_dev_init(gpu(), nullptr) };
    ggml_context_ptr ctx_kv     { new_context() };
    ggml_context_ptr ctx_device { new_context() };
    ggml_backend_buffer_ptr buf_kv, buf_device;

    ggml_tensor * k, * v, * index, * dims, * cells, * q, * mask, * sinks, * staging, * written;
    ggml_tensor * row_state = nullptr, * rows = nullptr;
    ggml_context_ptr ctx_graph;
    ggml_gallocr_ptr alloc;

    static ggml_context * new_context() {
        return ggml_init({ 64*ggml_tensor_overhead() + ggml_graph_overhead(), nullptr, /*.no_alloc =*/ true });
    }

    op_case(const shape & s, bool mapped, uint32_t seed) : s(s) {
        ggml_context * kv  = ctx_kv.get();
        ggml_context * dev = ctx_device.get();
        k       = ggml_new_tensor_3d(kv, s.type, s.d*s.n_head_kv, s.n_cells(), s.n_stream);
        v       = ggml_new_tensor_3d(kv, s.type, s.d*s.n_head_kv, s.n_cells(), s.n_stream);
        index   = ggml_fasa_new_index(dev, GGML_FASA_INDEX_Q4, N_DIM, s.n_cells(), s.n_head_kv, s.n_stream);
        dims    = ggml_new_tensor_2d(dev, GGML_TYPE_I32, N_DIM, s.n_head_kv);
        cells   = ggml_new_tensor_1d(dev, GGML_TYPE_I64, s.n_cells()*s.n_stream);
        q       = ggml_new_tensor_4d(dev, GGML_TYPE_F32, s.d, s.n_head(), s.n_row, s.n_stream);
        mask    = ggml_new_tensor_4d(dev, GGML_TYPE_F16, s.n_kv, s.n_row, 1, s.n_stream);
        sinks   = ggml_new_tensor_1d(dev, GGML_TYPE_F32, s.n_head());
        staging = ggml_new_tensor_1d(dev, GGML_TYPE_I8, ggml_fasa_staging_size(s.type, s.d, s.type, s.d, s.n_kv*s.n_stream,
                s.whole ? s.n_head_kv : ggml_fasa_staged_heads_max(s.n_head_kv), s.n_head_kv));
        written = ggml_new_tensor_1d(dev, GGML_TYPE_I64, N_WRITTEN);
        if (mapped && s.n_cached > 0) {
            row_state = ggml_fasa_new_row_state(dev, s.n_cached, s.n_head_kv, s.n_stream);
            rows      = ggml_new_tensor_4d(dev, GGML_TYPE_F16, 4*s.n_cached*s.d, 1, s.n_head_kv, s.n_stream);
        }

        ggml_backend_buffer_type_t device = ggml_backend_dev_buffer_type(gpu());
        buf_kv.reset(ggml_backend_alloc_ctx_tensors_from_buft(kv, mapped ? ggml_fasa_mapped_buffer_type(gpu()) : device));
        buf_device.reset(ggml_backend_alloc_ctx_tensors_from_buft(dev, device));
        if (!buf_kv || !buf_device) {
            fail("no memory for a case");
        }

        ggml_backend_buffer_clear(buf_device.get(), 0);
        gen.seed(seed);
        fill_normal(k);
        fill_normal(v);
        fill_normal(q);
        fill_normal(sinks);

        std::vector<int32_t> dim(ggml_nelements(dims));
        for (size_t i = 0; i < dim.size(); ++i) {
            dim[i] = i%N_DIM*s.d/N_DIM;
        }
        ggml_backend_tensor_set(dims, dim.data(), 0, ggml_nbytes(dims));

        std::vector<int64_t> cell(ggml_nelements(cells));
        for (size_t i = 0; i < cell.size(); ++i) {
            cell[i] = i;
        }
        ggml_backend_tensor_set(cells, cell.data(), 0, ggml_nbytes(cells));

        std::vector<ggml_fp16_t> m(ggml_nelements(mask));
        for (size_t i = 0; i < m.size(); ++i) {
            const int64_t t = i%s.n_kv;
            m[i] = ggml_fp32_to_fp16(gen()%7 == 0 ? -INFINITY : t < 4 || t >= s.n_kv - 32 ? -0.0f : 0.0f);
        }
        ggml_backend_tensor_set(mask, m.data(), 0, ggml_nbytes(mask));
    }

    std::vector<float> normal(int64_t n) {
        std::vector<float> values(n);
        std::normal_distribution<float> normal;
        for (float & x : values) {
            x = normal(gen);
        }
        return values;
    }

    void fill_normal(ggml_tensor * t) {
        const std::vector<float> values = normal(ggml_nelements(t));
        std::vector<char> data(ggml_nbytes(t));
        if (t->type == GGML_TYPE_F32) {
            memcpy(data.data(), values.data(), data.size());
        } else {
            ggml_quantize_chunk(t->type, values.data(), data.data(), 0, ggml_nrows(t), t->ne[0], nullptr);
        }
        ggml_backend_tensor_set(t, data.data(), 0, data.size());
    }

    ggml_tensor * heads(ggml_tensor * cache) {
        return ggml_view_4d(ctx_graph.get(), cache, s.d, s.n_kv, s.n_head_kv, s.n_stream, cache->nb[1],
                ggml_row_size(cache->type, s.d), cache->nb[2], 0);
    }

    // What lies between two steps: another query, much like the last, and other K and V in a few cells.
    void go_on() {
        std::vector<float> now(ggml_nelements(q));
        ggml_backend_tensor_get(q, now.data(), 0, ggml_nbytes(q));
        const std::vector<float> change = normal(now.size());
        for (size_t i = 0; i < now.size(); ++i) {
            now[i] += 0.3f*change[i];
        }
        ggml_backend_tensor_set(q, now.data(), 0, ggml_nbytes(q));

        // one that is always selected, one that is selected if it is not hidden, others
        std::vector<int64_t> ids(N_WRITTEN);
        for (int64_t i = 0; i < N_WRITTEN; ++i) {
            ids[i] = (gen()%s.n_stream)*s.n_cells() + (i == 0 ? s.n_kv - 1 : i == 1 ? gen()%4 : gen()%s.n_kv);
            for (ggml_tensor * t : { k, v }) {
                const std::vector<float> row = normal(t->ne[0]);
                std::vector<ggml_fp16_t> half(row.size());
                ggml_fp32_to_fp16_row(row.data(), half.data(), row.size());
                ggml_backend_tensor_set(t, half.data(), ids[i]*t->nb[1], t->nb[1]);
            }
        }
        ggml_backend_tensor_set(written, ids.data(), 0, ggml_nbytes(written));
    }

    // {hits, misses} of the row cache
    std::pair<int64_t, int64_t> row_counts() const {
        std::vector<int32_t> state(ggml_nelements(row_state));
        ggml_backend_tensor_get(row_state, state.data(), 0, ggml_nbytes(row_state));
        std::pair<int64_t, int64_t> sum;
        for (size_t at = 0; at < state.size(); at += row_state->ne[0]) {
            sum.first  += state[at + 4];
            sum.second += state[at + 6];
        }
        return sum;
    }

    enum op { SPARSE, STEP, STAGED, FLASH };

    std::vector<float> run(op what) {
        ctx_graph.reset(new_context());
        alloc.reset(ggml_gallocr_new(ggml_backend_dev_buffer_type(gpu())));
        ggml_context * ctx = ctx_graph.get();
        ggml_cgraph  * gf  = ggml_new_graph(ctx);

        const float scale = 1.0f/sqrtf(s.d);
        ggml_tensor * qp  = ggml_permute(ctx, q, 0, 2, 1, 3);
        ggml_tensor * out;
        switch (what) {
            case SPARSE: // all cells are new
            case STEP: { // a few are
                ggml_tensor * write = ggml_fasa_index_write(
                        ctx, k, what == STEP ? written : cells, index, dims, GGML_FASA_INDEX_Q4, 0);
                out = ggml_fasa_attn(ctx, qp, heads(k), heads(v), mask, sinks, index, dims, scale, 0.0f, s.budget,
                        GGML_FASA_INDEX_Q4, 0);
                if (row_state) {
                    ggml_fasa_index_write_set_row_state(write, row_state);
                    ggml_fasa_attn_set_row_cache(out, row_state, rows);
                }
                ggml_build_forward_expand(gf, write);
                break;
            }
            case STAGED:
                out = ggml_fasa_staged(ctx, qp, heads(k), heads(v), mask, sinks, staging, scale, 0.0f);
                break;
            default:
                out = ggml_flash_attn_ext(ctx, qp, heads(k), heads(v), mask, scale, 0.0f, 0.0f);
                ggml_flash_attn_ext_add_sinks(out, sinks);
                ggml_prec_set_acc(out, GGML_PREC_F32);
        }
        ggml_build_forward_expand(gf, out);
        for (int i = 0; i < ggml_graph_n_nodes(gf); ++i) {
            if (!ggml_backend_supports_op(backend.get(), ggml_graph_node(gf, i))) {
                return {};
            }
        }
        if (!ggml_gallocr_alloc_graph(alloc.get(), gf) || ggml_backend_graph_compute(backend.get(), gf) != GGML_STATUS_SUCCESS) {
            fail("a graph did not run");
        }
        std::vector<float> result(ggml_nelements(out));
        ggml_backend_tensor_get(out, result.data(), 0, ggml_nbytes(out));
        return result;
    }
};

static double nmse(const std::vector<float> & a, const std::vector<float> & b) {
    double error = 0.0;
    double norm  = 0.0;
    for (size_t i = 0; i < a.size(); ++i) {
        error += (a[i] - b[i])*(a[i] - b[i]);
        norm  += a[i]*a[i];
    }
    return error/norm;
}

static int ops() {
    const uint32_t seed = 2603;
    printf("seed %u\n", seed);
    int n_case = 0;
    int n_bad  = 0;
    auto check = [&](const shape & s, const char * what, bool good, double error) {
        ++n_case;
        n_bad += !good;
        printf("%s: d=%d heads=%dx%d n_kv=%d budget=%d rows=%d streams=%d %s: error %g: %s\n", what, (int) s.d, (int) s.n_head_kv,
                (int) s.n_group, (int) s.n_kv, (int) s.budget, (int) s.n_row, (int) s.n_stream, ggml_type_name(s.type), error,
                good ? "OK" : "FAIL");
    };
    const shape shapes[] = {
        //  d  G  R     kv budget rows streams
        { 128, 8, 4,  4096,  256,   1, 1, GGML_TYPE_F16  },
        {  64, 3, 3,  1024,   64,   1, 2, GGML_TYPE_F16  },
        { 128, 1, 8,  1024,  128,   3, 1, GGML_TYPE_F16  },
        {  64, 5, 2,   768,  100,   2, 2, GGML_TYPE_F16  },
        { 128, 4, 1,  1280,  256,   1, 1, GGML_TYPE_BF16 },
        { 128, 6, 4,  1024,   96,   2, 1, GGML_TYPE_Q8_0 },
        {  64, 2, 16,  512,   64,  17, 1, GGML_TYPE_F16  },
        { 256, 2, 2,  1024,  128,   1, 1, GGML_TYPE_Q4_0 },
    };
    for (const shape & s : shapes) {
        op_case on_device(s, false, seed);
        op_case in_host(s, true, seed);
        std::vector<float> flash = on_device.run(op_case::FLASH);
        if (flash.empty()) {
            printf("upstream's flash attention does not take this shape\n");
        } else {
            // bits may differ where fewer heads at a time mean another order of sums
            const double error = nmse(flash, in_host.run(op_case::STAGED));
            check(s, "staged", error <= (s.n_head_kv == 1 ? 0.0 : 1e-6), error);
            shape whole = s;
            whole.whole = true;
            const double error_whole = nmse(flash, op_case(whole, true, seed).run(op_case::STAGED));
            check(s, "staged as a whole", error_whole == 0.0, error_whole);
        }
        const double error = nmse(on_device.run(op_case::SPARSE), in_host.run(op_case::SPARSE));
        check(s, "sparse", error == 0.0, error);
    }

    const shape cached[] = { // cells of the cache: all, all, fewer than the budget
        { 128, 8, 4, 4096, 256, 1, 1, GGML_TYPE_F16, 256 },
        {  64, 3, 3, 1024,  64, 1, 2, GGML_TYPE_F16,  64 },
        {  96, 2, 8, 1024, 128, 1, 1, GGML_TYPE_F16,  96 },
        {  64, 2, 16, 768, 100, 1, 1, GGML_TYPE_F16, 128 },
    };
    for (const shape & s : cached) {
        op_case on_device(s, false, seed);
        op_case in_host(s, true, seed);
        double error = 0.0;
        for (int step = 0; step < 16; ++step) {
            const op_case::op what = step == 0 ? op_case::SPARSE : op_case::STEP;
            error = std::max(error, nmse(on_device.run(what), in_host.run(what)));
            on_device.go_on();
            in_host.go_on();
        }
        const auto [n_hit, n_miss] = in_host.row_counts();
        printf("%d rows from the cache, %d from the host\n", (int) n_hit, (int) n_miss);
        check(s, "row cache", error == 0.0 && n_hit > n_miss/8 && n_hit + n_miss == 16*s.budget*s.n_head_kv*s.n_stream, error);
    }
    printf("%d/%d cases passed\n", n_case - n_bad, n_case);
    return n_bad == 0 ? 0 : 1;
}

using settings = std::map<std::string, std::string>;

static int64_t number(const settings & given, const char * key, int64_t otherwise) {
    const auto it = given.find(key);
    return it == given.end() ? otherwise : atoll(it->second.c_str());
}

static std::string word(const settings & given, const char * key, const char * otherwise) {
    const auto it = given.find(key);
    return it == given.end() ? otherwise : it->second;
}

static void decode(llama_context * ctx, llama_token * tokens, int32_t n) {
    if (llama_decode(ctx, llama_batch_get_one(tokens, n)) != 0) {
        fail("a batch could not be decoded");
    }
}

static std::vector<llama_token> tokens_of(const llama_vocab * vocab, const std::string & path) {
    std::ifstream file(path);
    const std::string text { std::istreambuf_iterator<char>(file), {} };
    std::vector<llama_token> tokens(text.size() + 1);
    const int32_t n = llama_tokenize(vocab, text.data(), text.size(), tokens.data(), tokens.size(), true, false);
    if (!file || n <= 0) {
        fail("there is no text in " + path);
    }
    tokens.resize(n);
    return tokens;
}

static int run(const char * path, const settings & given) {
    const std::string mode   = word(given, "mode", "auto");
    const int64_t     depth  = number(given, "depth", 1024);
    const int64_t     n_gen  = number(given, "gen", 32);
    const int64_t     ubatch = number(given, "ubatch", 2048);

    llama_fasa_params fasa = llama_fasa_default_params();
    fasa.mode    = mode == "off" ? LLAMA_FASA_MODE_OFF : LLAMA_FASA_MODE_ON;
    fasa.variant = mode == "m" ? LLAMA_FASA_VARIANT_M : mode == "c" ? LLAMA_FASA_VARIANT_C : LLAMA_FASA_VARIANT_AUTO;
    fasa.budget  = number(given, "budget", 256);
    fasa.vram    = number(given, "vram", 0);
    fasa.index_type = llama_fasa_index_type(word(given, "index", "q4").c_str());
    if (llama_fasa_set_params(&fasa) != 0) {
        fail(llama_fasa_last_error());
    }
    llama_log_set([](ggml_log_level level, const char * text, void *) {
        if (level == GGML_LOG_LEVEL_ERROR || (level == GGML_LOG_LEVEL_WARN && strncmp(text, "fasa:", 5) == 0)) {
            fputs(text, stderr);
        }
    }, nullptr);

    const size_t at_start = free_memory();

    llama_model_params mparams = llama_model_default_params();
    mparams.n_gpu_layers = 999;
    llama_model * model = llama_model_load_from_file(path, mparams);
    if (!model) {
        fail("the model could not be loaded");
    }
    const size_t with_model = free_memory();

    llama_context_params cparams = llama_context_default_params();
    cparams.n_ctx   = number(given, "ctx", depth + n_gen + 8);
    cparams.n_batch = cparams.n_ubatch = ubatch;
    cparams.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_ENABLED;
    cparams.offload_kqv = number(given, "offload", 1);
    cparams.type_k = cparams.type_v = word(given, "type", "f16") == "q8_0" ? GGML_TYPE_Q8_0 : GGML_TYPE_F16;
    const double t_context = seconds();
    llama_context * ctx = llama_init_from_model(model, cparams);
    if (!ctx) {
        fail("there is no context: " + std::string(llama_fasa_last_error()));
    }
    const double s_context    = seconds() - t_context;
    const size_t with_context = free_memory();

    const llama_vocab * vocab   = llama_model_get_vocab(model);
    const int32_t       n_vocab = llama_vocab_n_tokens(vocab);
    std::vector<llama_token> prompt(depth);
    if (given.count("text")) {
        const std::vector<llama_token> text = tokens_of(vocab, given.at("text"));
        for (int64_t i = 0; i < depth; ++i) {
            prompt[i] = text[i%text.size()];
        }
    } else {
        std::mt19937 gen(1);
        for (llama_token & token : prompt) {
            token = 300 + gen()%std::min(n_vocab - 300, 30000);
        }
    }

    // all but the last token, which every run decodes alone
    double s_prompt = 0.0;
    if (given.count("load")) {
        std::vector<llama_token> tokens(depth);
        size_t n = 0;
        if (!llama_state_load_file(ctx, given.at("load").c_str(), tokens.data(), tokens.size(), &n) || (int64_t) n != depth - 1) {
            fail("the state could not be loaded");
        }
    } else {
        const double start = seconds();
        for (int64_t i = 0; i < depth - 1; i += ubatch) {
            decode(ctx, prompt.data() + i, std::min(ubatch, depth - 1 - i));
        }
        llama_synchronize(ctx);
        s_prompt = seconds() - start;
    }
    if (given.count("save") && !llama_state_save_file(ctx, given.at("save").c_str(), prompt.data(), depth - 1)) {
        fail("the state could not be saved");
    }

    std::vector<llama_token> said = { prompt.back() };
    std::vector<float> gaps; // between the likeliest token's logit and the next
    uint64_t hash    = 1469598103934665603ull; // FNV-1a of all logits
    double   s_step  = 0.0;
    int64_t  n_timed = 0;
    for (int64_t i = 0; i < n_gen; ++i) {
        const double start = seconds();
        decode(ctx, &said.back(), 1);
        llama_synchronize(ctx);
        if (i >= 4) { // the first ones capture graphs
            s_step += seconds() - start;
            ++n_timed;
        }
        const float * logits = llama_get_logits_ith(ctx, -1);
        for (int32_t j = 0; j < n_vocab; ++j) {
            uint32_t bits;
            memcpy(&bits, logits + j, sizeof(bits));
            hash = (hash ^ bits)*1099511628211ull;
        }
        const int32_t best = std::max_element(logits, logits + n_vocab) - logits;
        float gap = INFINITY;
        for (int32_t j = 0; j < n_vocab; ++j) {
            gap = j == best ? gap : std::min(gap, logits[best] - logits[j]);
        }
        said.push_back(best);
        gaps.push_back(gap);
    }
    const size_t at_end = free_memory();

    const llama_fasa_info  info  = llama_fasa_get_info(ctx);
    const llama_fasa_stats stats = llama_fasa_get_stats(ctx);
    const llama_fasa_row_stats rows = llama_fasa_get_row_stats(ctx);

    constexpr double MIB = 1 << 20;
    printf("{\"ran\": \"%s\", \"ctx\": %u, \"depth\": %d, \"n_gen\": %d, \"budget\": %d, \"index_type\": \"%s\", \"n_tip\": %d, "
            "\"vram\": %d, \"prompt_tok_s\": %.1f, \"decode_tok_s\": %.2f, \"context_s\": %.1f, ",
            !info.active ? "off" : info.mapped_bytes > 0 ? "m" : "c", llama_n_ctx(ctx), (int) depth, (int) n_gen, info.budget,
            ggml_fasa_index_type_name((ggml_fasa_index_type) info.index_type), info.n_tip_max, fasa.vram,
            s_prompt > 0.0 ? (depth - 1)/s_prompt : 0.0, n_timed > 0 ? n_timed/s_step : 0.0, s_context);
    printf("\"free_mib\": [%.1f, %.1f, %.1f, %.1f], \"context_mib\": %.1f, \"kv_mib\": %.1f, \"mapped_mib\": %.1f, "
            "\"index_mib\": %.1f, \"staging_mib\": %.1f, \"rows_mib\": %.1f, ", at_start/MIB, with_model/MIB, with_context/MIB, at_end/MIB,
            (with_model - at_end)/MIB, info.kv_bytes/MIB, info.mapped_bytes/MIB, info.index_bytes/MIB, info.staging_bytes/MIB, info.rows_bytes/MIB);
    printf("\"row_bytes\": %.1f, ", (double) info.kv_bytes/llama_n_ctx(ctx)/llama_model_n_layer(model)/llama_model_n_head_kv(model));
    printf("\"n_row_hit\": %llu, \"n_row_miss\": %llu, ", (unsigned long long) rows.n_hit, (unsigned long long) rows.n_miss);
    printf("\"n_step_sparse\": %d, \"n_step_dense\": %d, \"logits\": \"%016llx\", \"tokens\": [", (int) stats.n_step_sparse,
            (int) stats.n_step_dense, (unsigned long long) hash);
    for (size_t i = 1; i < said.size(); ++i) {
        printf("%s%d", i > 1 ? ", " : "", said[i]);
    }
    printf("], \"gaps\": [");
    for (size_t i = 0; i < gaps.size(); ++i) {
        printf("%s%.4f", i > 0 ? ", " : "", gaps[i]);
    }
    printf("]}\n");

    llama_free(ctx);
    llama_model_free(model);
    return 0;
}

static int copy() {
    constexpr int64_t SIZE = 256 << 20;
    ggml_context_ptr ctx_host(op_case::new_context()), ctx_device(op_case::new_context());
    ggml_tensor * host   = ggml_new_tensor_1d(ctx_host.get(),   GGML_TYPE_I8, SIZE);
    ggml_tensor * device = ggml_new_tensor_1d(ctx_device.get(), GGML_TYPE_I8, SIZE);
    ggml_backend_buffer_ptr buf_host(ggml_backend_alloc_ctx_tensors_from_buft(ctx_host.get(), ggml_fasa_mapped_buffer_type(gpu())));
    ggml_backend_buffer_ptr buf_device(ggml_backend_alloc_ctx_tensors_from_buft(ctx_device.get(), ggml_backend_dev_buffer_type(gpu())));
    if (!buf_host || !buf_device) {
        fail("no memory for a copy");
    }
    memset(host->data, 1, SIZE);
    double best = 0.0;
    for (int i = 0; i < 8; ++i) {
        const double start = seconds();
        ggml_backend_tensor_set(device, host->data, 0, SIZE);
        best = std::max(best, SIZE/(seconds() - start));
    }
    printf("{\"copy_gb_s\": %.1f}\n", best/1e9);
    return 0;
}

static int balloon(size_t leave) {
    std::vector<ggml_backend_buffer_ptr> held;
    for (size_t piece = 1ull << 34; piece >= 1 << 20; piece /= 2) {
        while (free_memory() >= piece + leave) {
            ggml_backend_buffer_t buffer = ggml_backend_buft_alloc_buffer(ggml_backend_dev_buffer_type(gpu()), piece);
            if (!buffer) {
                break;
            }
            held.emplace_back(buffer);
        }
    }
    printf("%.0f MiB are left\n", free_memory()/1024.0/1024.0);
    fflush(stdout);
    for (;;) {
        std::this_thread::sleep_for(std::chrono::hours(1));
    }
}

int main(int argc, char ** argv) {
    ggml_backend_load_all();
    const std::string what = argc > 1 ? argv[1] : "";
    if (what == "ops" && argc == 2) {
        return ops();
    }
    if (what == "copy" && argc == 2) {
        return copy();
    }
    if (what == "balloon" && argc == 3) {
        return balloon((size_t) atoll(argv[2]) << 20);
    }
    if (what == "run" && argc >= 3) {
        settings given;
        for (int i = 3; i < argc; ++i) {
            const char * eq = strchr(argv[i], '=');
            if (!eq) {
                fail("expected KEY=VALUE, got '" + std::string(argv[i]) + "'");
            }
            given[std::string(argv[i], eq - argv[i])] = eq + 1;
        }
        return run(argv[2], given);
    }
    fail("expected ops, run MODEL [KEY=VALUE...], copy or balloon MIB");
}
