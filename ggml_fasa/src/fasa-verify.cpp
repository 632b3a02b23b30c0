// The debug check LLAMA_FASA_VERIFY: is the index what a rebuild from K would give, and the mask llama.cpp's?

#include "fasa-graph.h"
#include "fasa-index-cache.h"

#include "llama-context.h"
#include "llama-impl.h"
#include "llama-kv-cache.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <stdexcept>

namespace {

std::vector<uint8_t> bytes_of(const ggml_tensor * t) {
    std::vector<uint8_t> bytes(ggml_nbytes(t));
    ggml_backend_tensor_get(t, bytes.data(), 0, bytes.size());
    return bytes;
}

// The cell of a tile that a byte of it belongs to; see ggml_fasa_new_index.
int64_t cell_in_tile(ggml_fasa_index_type type, size_t byte) {
    const size_t scales = GGML_FASA_TILE*sizeof(ggml_fp16_t);
    if (type == GGML_FASA_INDEX_F16 || byte < scales) {
        return byte/sizeof(ggml_fp16_t) % GGML_FASA_TILE;
    }
    return (byte - scales)/sizeof(uint32_t) % GGML_FASA_TILE;
}

} // namespace

std::string llama_fasa_index_cache::verify() const {
    const std::vector<int64_t> ids = used_cells(false);
    if (ids.empty()) {
        return "";
    }
    lctx.synchronize();

    for (const layer & l : layers) {
        if (l.n_tip == 0) {
            continue;
        }
        ggml_backend_t backend = llama_fasa_backend_of(lctx.get_sched(), l.index);

        ggml_init_params params = { 8*ggml_tensor_overhead() + ggml_graph_overhead(), nullptr, /*.no_alloc =*/ true };
        ggml_context_ptr ctx(ggml_init(params));

        // the rows in use are indexed anew over a copy of the index: what then differs was wrong
        ggml_tensor * anew  = ggml_dup_tensor(ctx.get(), l.index);
        ggml_tensor * cells = ggml_new_tensor_1d(ctx.get(), GGML_TYPE_I64, ids.size());
        ggml_backend_buffer_ptr buffer(ggml_backend_alloc_ctx_tensors(ctx.get(), backend));
        if (!buffer) {
            throw std::runtime_error("FASA: no memory to verify the index cache");
        }
        const std::vector<uint8_t> stored = bytes_of(l.index);
        ggml_backend_tensor_set(anew, stored.data(), 0, stored.size());
        ggml_backend_tensor_set(cells, ids.data(), 0, ggml_nbytes(cells));

        ggml_cgraph * gf = ggml_new_graph(ctx.get());
        layer copy = l;
        copy.index     = anew;
        copy.row_state = nullptr;
        ggml_build_forward_expand(gf, index_write(ctx.get(), copy, l.k, cells));
        if (ggml_backend_graph_compute(backend, gf) != GGML_STATUS_SUCCESS) {
            throw std::runtime_error("FASA: failed to verify the index cache");
        }

        const std::vector<uint8_t> expected = bytes_of(anew);
        const size_t at = std::mismatch(stored.begin(), stored.end(), expected.begin()).first - stored.begin();
        if (at < stored.size()) {
            return format("FASA: the index is out of date in layer %d, stream %d, KV head %d, cell %d",
                    l.il, (int) (at/l.index->nb[3]), (int) (at % l.index->nb[3]/l.index->nb[2]),
                    (int) (at % l.index->nb[2]/l.index->nb[1]*GGML_FASA_TILE +
                        cell_in_tile(config.index_type, at % l.index->nb[1])));
        }
    }
    return "";
}

void llama_fasa_index_cache::verify_mask(const ggml_tensor * mask) {
    if (!mask_to_verify.empty() && memcmp(mask_to_verify.data(), mask->data, mask_to_verify.size()) != 0) {
        GGML_ABORT("FASA: the attention mask is not that of llama.cpp");
    }
    mask_to_verify.clear();
}

bool llama_fasa_verifies() {
    static const char * const env = getenv("LLAMA_FASA_VERIFY");
    static const bool enabled = env && strcmp(env, "0") != 0;
    return enabled;
}

void llama_fasa_verify(llama_context & lctx) {
    const llama_fasa_index_cache * fasa = lctx.get_cparams().fasa;
    if (!llama_fasa_verifies() || !fasa) {
        return;
    }
    const std::string wrong = fasa->verify();
    if (!wrong.empty()) {
        GGML_ABORT("%s", wrong.c_str());
    }
}
