#include "fasa-args.h"

#include "llama-fasa.h"
#include "log.h"

#include <algorithm>
#include <charconv>
#include <cinttypes>
#include <cstdio>
#include <cstdlib>
#include <stdexcept>

static const char * mode_name(int32_t mode) {
    switch (mode) {
        case LLAMA_FASA_MODE_OFF: return "off";
        case LLAMA_FASA_MODE_ON:  return "on";
        default:                  return "auto";
    }
}

static void apply(const llama_fasa_params & fasa) {
    if (llama_fasa_set_params(&fasa) != 0) {
        throw std::invalid_argument(llama_fasa_last_error());
    }
}

static void set_mode(common_params &, const std::string & value) {
    llama_fasa_params fasa = llama_fasa_get_params();
    if (common_arg_utils::is_truthy(value)) {
        fasa.mode = LLAMA_FASA_MODE_ON;
    } else if (common_arg_utils::is_falsey(value)) {
        fasa.mode = LLAMA_FASA_MODE_OFF;
    } else if (common_arg_utils::is_autoy(value)) {
        fasa.mode = LLAMA_FASA_MODE_AUTO;
    } else {
        throw std::invalid_argument("expected on, off or auto, got '" + value + "'");
    }
    apply(fasa);
}

template <int32_t llama_fasa_params::*field, int32_t min, int32_t max = LLAMA_FASA_COUNT_MAX>
static void set_count(common_params &, const std::string & value) {
    int32_t n = 0;
    const char * end = value.data() + value.size();
    const auto res = std::from_chars(value.data(), end, n);
    if (res.ec != std::errc() || res.ptr != end || n < min || n > max) {
        throw std::invalid_argument("expected a whole number from " + std::to_string(min) + " to " +
                                    std::to_string(max) + ", got '" + value + "'");
    }
    llama_fasa_params fasa = llama_fasa_get_params();
    fasa.*field = n;
    apply(fasa);
}

static void set_index_type(common_params &, const std::string & value) {
    llama_fasa_params fasa = llama_fasa_get_params();
    fasa.index_type = llama_fasa_index_type(value.c_str());
    if (fasa.index_type < 0) {
        throw std::invalid_argument("expected f16, q8 or q4, got '" + value + "'");
    }
    apply(fasa);
}

static const char * const VARIANTS[] = { "auto", "c", "m" }; // by enum llama_fasa_variant

static void set_variant(common_params &, const std::string & value) {
    llama_fasa_params fasa = llama_fasa_get_params();
    const auto it = std::find(std::begin(VARIANTS), std::end(VARIANTS), value);
    if (it == std::end(VARIANTS)) {
        throw std::invalid_argument("expected auto, c or m, got '" + value + "'");
    }
    fasa.variant = it - std::begin(VARIANTS);
    apply(fasa);
}

static void set_file(common_params &, const std::string & path) {
    llama_fasa_set_file(path.c_str());
}

static std::string index_type_name(int32_t type) {
    return ggml_fasa_index_type_name((ggml_fasa_index_type) type);
}

static std::string with_default(const std::string & help, const std::string & value) {
    return help + " (default: " + value + ", or what the model's metadata says)";
}

static std::string with_default(const std::string & help, int32_t value) {
    return with_default(help, std::to_string(value));
}

// The thread that writes the log does not outlive exit, so the counts that a context logs when it is freed could be lost.
static void flush_log_at_exit() {
#ifndef _WIN32 // where threads are gone when a DLL's handlers run
    static const int registered = std::atexit([] { common_log_flush(common_log_main()); });
    GGML_UNUSED(registered);
#endif
}

std::vector<common_arg> fasa_args() {
    flush_log_at_exit();
    std::vector<common_arg> args;
    args.push_back(common_arg(
        {"--fasa"}, "[on|off|auto]",
        "sparse decode with FASA: each step attends to the few hundred cached tokens that matter to its query; "
        "'auto' uses it when the model is calibrated (fasa-calibrate) and a budget comes from --fasa-budget or the "
        "model's metadata, 'on' fails when it cannot be used (default: auto)",
        set_mode).set_env("LLAMA_ARG_FASA"));
    args.push_back(common_arg(
        {"--fasa-budget"}, "N",
        with_default("tokens kept per query and KV head, forced ones included", LLAMA_FASA_BUDGET_DEFAULT),
        set_count<&llama_fasa_params::budget, 1>).set_env("LLAMA_ARG_FASA_BUDGET"));
    args.push_back(common_arg(
        {"--fasa-budget-schedule"}, "PERCENT",
        "budget of the first sparse layer in percent of the budget; the last one gets 200 less this, those between lie on a "
        "line, so that the mean stays; above 100: a pyramid (default: " + std::to_string(LLAMA_FASA_BUDGET_SCHEDULE_DEFAULT) +
        ", all alike)",
        set_count<&llama_fasa_params::budget_schedule, 1, 199>).set_env("LLAMA_ARG_FASA_BUDGET_SCHEDULE"));
    args.push_back(common_arg(
        {"--fasa-sink"}, "N",
        with_default("first tokens of a sequence that FASA always keeps", LLAMA_FASA_N_SINK_DEFAULT),
        set_count<&llama_fasa_params::n_sink, 0>).set_env("LLAMA_ARG_FASA_SINK"));
    args.push_back(common_arg(
        {"--fasa-recent"}, "N",
        with_default("last tokens of a sequence that FASA always keeps", LLAMA_FASA_N_RECENT_DEFAULT),
        set_count<&llama_fasa_params::n_recent, 0>).set_env("LLAMA_ARG_FASA_RECENT"));
    args.push_back(common_arg(
        {"--fasa-max-batch"}, "N",
        "largest batch per sequence that is decoded sparse, larger ones are dense; set it to the batch size to measure "
        "quality with llama-perplexity (default: " + std::to_string(LLAMA_FASA_MAX_BATCH_DEFAULT) + ")",
        set_count<&llama_fasa_params::max_batch, 1>).set_env("LLAMA_ARG_FASA_MAX_BATCH"));
    args.push_back(common_arg(
        {"--fasa-index-type"}, "[f16|q8|q4]",
        with_default("how FASA's index keeps the dominant dims of K", index_type_name(LLAMA_FASA_INDEX_TYPE_DEFAULT)),
        set_index_type).set_env("LLAMA_ARG_FASA_INDEX_TYPE"));
    args.push_back(common_arg(
        {"--fasa-mode"}, "[auto|c|m]",
        "where K and V are: 'c' where llama.cpp keeps them, 'm' in pinned host memory, of which a CUDA device reads the "
        "selected tokens only; 'auto' is c if that fits into the memory of the device, else m (default: auto)",
        set_variant).set_env("LLAMA_ARG_FASA_MODE"));
    args.push_back(common_arg(
        {"--fasa-vram"}, "MiB",
        "most memory of each device that --fasa-mode m may take for the KV cache: the index, rows selected last, and what K and V "
        "pass through (default: no bound); with --fasa-mode auto, what K and V and the index may take for c, too",
        set_count<&llama_fasa_params::vram, 1>).set_env("LLAMA_ARG_FASA_VRAM"));
    args.push_back(common_arg(
        {"--fasa-file"}, "FNAME",
        "take FASA's calibration from this file, which 'fasa-calibrate --sidecar' wrote for the model (default: the model "
        "itself, or model.fasa.gguf beside model.gguf)",
        set_file).set_env("LLAMA_ARG_FASA_FILE"));
    return args;
}

std::string fasa_bench_usage() {
    std::string text;
    for (const common_arg & opt : fasa_args()) {
        text += opt.to_string();
    }
    return text;
}

static std::string count_name(int32_t n, int32_t not_set) {
    return n == not_set ? "not set" : std::to_string(n);
}

// What llama-bench runs, in turn: every combination of the values given.
static std::vector<llama_fasa_params> bench_settings;
static size_t bench_next  = 0;
static bool   bench_given = false;

// Every setting so far, with each value of a list given to an option. The last option changes slowest.
static void bench_combine(const common_arg & opt, const std::string & source, const std::string & list) {
    common_params unused;
    std::vector<llama_fasa_params> combined;
    for (const std::string & value : string_split<std::string>(list, ',')) {
        for (const llama_fasa_params & setting : bench_settings) {
            try {
                apply(setting);
                opt.handler_string(unused, value);
            } catch (const std::invalid_argument & e) {
                fprintf(stderr, "error: %s: %s\n", source.c_str(), e.what());
                exit(1);
            }
            combined.push_back(llama_fasa_get_params());
        }
    }
    bench_settings = combined;
    bench_given    = true;
}

void fasa_bench_args(int & argc, char ** argv) {
    struct given {
        std::string source;
        std::string list;
    };
    const std::vector<common_arg> opts = fasa_args();
    std::vector<given> found(opts.size());
    for (size_t i = 0; i < opts.size(); i++) {
        if (opts[i].get_value_from_env(found[i].list)) {
            found[i].source = opts[i].env;
        }
    }

    int n_left = std::min(argc, 1);
    for (int i = 1; i < argc; i++) {
        std::string arg = argv[i];
        if (arg.compare(0, 2, "--") == 0) {
            std::replace(arg.begin(), arg.end(), '_', '-');
        }
        const auto opt = std::find_if(opts.begin(), opts.end(), [&](const common_arg & o) { return arg == o.args[0]; });
        if (opt == opts.end()) {
            argv[n_left++] = argv[i];
        } else if (i + 1 == argc) {
            fprintf(stderr, "error: %s: expected a value\n", arg.c_str());
            exit(1);
        } else {
            found[opt - opts.begin()] = { arg, argv[++i] };
        }
    }
    argc = n_left;

    bench_settings = { llama_fasa_get_params() };
    for (size_t i = 0; i < opts.size(); i++) {
        if (!found[i].source.empty()) {
            bench_combine(opts[i], found[i].source, found[i].list);
        }
    }
}

size_t fasa_bench_n_settings() {
    return bench_settings.size();
}

void fasa_bench_set_next() {
    const llama_fasa_params & fasa = bench_settings[bench_next++ % bench_settings.size()];
    apply(fasa);
    if (bench_given) {
        fprintf(stderr, "fasa: mode %s, budget %s, budget schedule %s, sink %s, recent %s, max batch %s, index type %s, mode %s\n",
                mode_name(fasa.mode), count_name(fasa.budget, 0).c_str(), count_name(fasa.budget_schedule, 0).c_str(),
                count_name(fasa.n_sink, -1).c_str(), count_name(fasa.n_recent, -1).c_str(), count_name(fasa.max_batch, 0).c_str(),
                fasa.index_type < 0 ? "not set" : index_type_name(fasa.index_type).c_str(), VARIANTS[fasa.variant]);
    }
}

void fasa_bench_stats(const llama_context * ctx) {
    const llama_fasa_info info = llama_fasa_get_info(ctx);
    if (!info.active) {
        return;
    }
    const llama_fasa_stats stats = llama_fasa_get_stats(ctx);
    fprintf(stderr,
            "fasa: budget %d, layers %d sparse %d dense, n_tip %d to %d, index %s %" PRIu64 " bytes, kv %" PRIu64 " bytes, "
            "mapped %" PRIu64 " bytes, "
            "steps %" PRIu64 " sparse %" PRIu64 " dense %" PRIu64 " prefill, index rebuilt %" PRIu64 " times\n",
            info.budget, info.n_layer_sparse, info.n_layer_dense, info.n_tip_min, info.n_tip_max,
            index_type_name(info.index_type).c_str(), info.index_bytes, info.kv_bytes, info.mapped_bytes, stats.n_step_sparse,
            stats.n_step_dense, stats.n_step_prefill, stats.n_index_rebuild);
}

void fasa_bench_error() {
    const std::string error = llama_fasa_last_error();
    if (!error.empty()) {
        fprintf(stderr, "fasa: %s\n", error.c_str());
    }
}
