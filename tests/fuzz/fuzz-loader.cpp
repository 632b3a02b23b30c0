// libFuzzer target of the stage loader: any bytes as a GGUF file, read as llama.cpp reads one, then by FASA's loader for
// models of several shapes. A crash, a leak, a sanitizer report or metadata that break a rule of docs/metadata.md end it.

#include "fasa-loader.h"
#include "llama-hparams.h"
#include "llama-fasa.h"

#include "ggml.h"
#include "gguf.h"

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <stdexcept>

namespace {

constexpr uint32_t N_LAYER = 4; // as in make_corpus.py

std::unique_ptr<llama_hparams> make_hparams(llama_rope_type rope_type, uint32_t n_head_kv, uint32_t n_rot) {
    auto hparams = std::make_unique<llama_hparams>();
    hparams->n_layer_all = N_LAYER;
    hparams->rope_type   = rope_type;
    hparams->n_rot_full  = n_rot;
    hparams->n_rot_swa   = n_rot;
    hparams->n_head_kv_arr.fill(n_head_kv);
    hparams->is_swa_impl.fill(false);
    return hparams;
}

void require(bool holds, const char * what) {
    if (!holds) {
        fprintf(stderr, "the loader accepted metadata that it must refuse: %s\n", what);
        abort();
    }
}

bool in_range(int32_t count, int32_t min) {
    return count == -1 || (count >= min && count <= LLAMA_FASA_COUNT_MAX);
}

// What the rest of FASA relies on.
void check(const llama_fasa_metadata & md, const llama_hparams & hparams) {
    require(md.layers.size() == N_LAYER, "layers");
    require(in_range(md.budget, 1) && in_range(md.n_sink, 0) && in_range(md.n_recent, 0), "counts");
    for (size_t il = 0; il < N_LAYER; ++il) {
        const auto layer = md.layer(il);
        require(layer.n_head_kv == (int32_t) hparams.n_head_kv(il) && layer.n_rot == (int32_t) hparams.n_rot(il), "shape");
        require(layer.fc.size() == (size_t) layer.n_head_kv*layer.n_tip, "number of FCs");
        for (const int32_t dim : md.dims(il)) {
            require(dim >= 0 && dim < layer.n_rot, "dims");
        }
    }
}

} // namespace

extern "C" int LLVMFuzzerInitialize(int *, char ***) {
    ggml_log_set([](ggml_log_level, const char *, void *) {}, nullptr); // gguf.cpp tells every fault that it finds
    return 0;
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t * data, size_t size) {
    static const auto models = {
        make_hparams(LLAMA_ROPE_TYPE_NORM, 2, 32),
        make_hparams(LLAMA_ROPE_TYPE_NEOX, 1, 8),
        make_hparams(LLAMA_ROPE_TYPE_NONE, 2, 32),
    };
    gguf_context * gguf = gguf_init_from_buffer(data, size, { /*.no_alloc =*/ true, /*.ctx =*/ nullptr });
    if (!gguf) {
        return 0;
    }
    for (const auto & hparams : models) {
        llama_fasa_metadata md;
        try {
            llama_fasa_read(gguf, *hparams, md);
        } catch (const std::runtime_error & refused) {
            continue;
        }
        check(md, *hparams);
    }
    gguf_free(gguf);
    return 0;
}
