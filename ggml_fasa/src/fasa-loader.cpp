#include "fasa-loader.h"

#include "llama-fasa.h"
#include "llama-hparams.h"
#include "llama-impl.h"

#include "gguf.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>

namespace {

constexpr uint32_t FASA_METADATA_VERSION = 1;
constexpr float    CENTER_MAX            = 65504.0f; // of F16, in which K is cached

// A rule of docs/metadata.md that the file breaks.
struct bad_metadata : std::runtime_error {
    using std::runtime_error::runtime_error;
};

class reader {
public:
    explicit reader(const gguf_context * gguf) : gguf(gguf) {}

    bool has(const char * key) const {
        return gguf_find_key(gguf, key) >= 0;
    }

    uint32_t u32(const char * key) const {
        return gguf_get_val_u32(gguf, find(key, GGUF_TYPE_UINT32, "a u32"));
    }

    std::string str(const char * key) const {
        return gguf_get_val_str(gguf, find(key, GGUF_TYPE_STRING, "a string"));
    }

    std::vector<int32_t> i32_array(const char * key, size_t n_expected) const {
        return array<int32_t>(key, n_expected, GGUF_TYPE_INT32, "an i32 array");
    }

    std::vector<float> f32_array(const char * key, size_t n_expected) const {
        return array<float>(key, n_expected, GGUF_TYPE_FLOAT32, "an f32 array");
    }

private:
    template <typename T>
    std::vector<T> array(const char * key, size_t n_expected, gguf_type type, const char * type_name) const {
        const int64_t id = find(key, GGUF_TYPE_ARRAY, type_name);
        if (gguf_get_arr_type(gguf, id) != type) {
            throw bad_metadata(format("%s is not %s", key, type_name));
        }
        const size_t n = gguf_get_arr_n(gguf, id);
        if (n != n_expected) {
            throw bad_metadata(format("%s has %zu values instead of %zu", key, n, n_expected));
        }
        const T * data = (const T *) gguf_get_arr_data(gguf, id);
        return std::vector<T>(data, data + n);
    }

    int64_t find(const char * key, gguf_type type, const char * type_name) const {
        const int64_t id = gguf_find_key(gguf, key);
        if (id < 0) {
            throw bad_metadata(format("%s is missing", key));
        }
        if (gguf_get_kv_type(gguf, id) != type) {
            throw bad_metadata(format("%s is not %s", key, type_name));
        }
        return id;
    }

    const gguf_context * gguf;
};

llama_fasa_rope rope_of(const llama_hparams & hparams) {
    switch (hparams.rope_type) {
        case LLAMA_ROPE_TYPE_NORM: return LLAMA_FASA_ROPE_NORM;
        case LLAMA_ROPE_TYPE_NEOX: return LLAMA_FASA_ROPE_NEOX;
        default:                   return LLAMA_FASA_ROPE_NONE;
    }
}

const char * rope_name(llama_fasa_rope rope) {
    switch (rope) {
        case LLAMA_FASA_ROPE_NORM: return "norm";
        case LLAMA_FASA_ROPE_NEOX: return "neox";
        default:                   return "none";
    }
}

void load_fc(const reader & in, llama_fasa_metadata & md) {
    size_t n_fc = 0;
    for (const llama_fasa_layer & layer : md.layers) {
        n_fc += (size_t) layer.n_head_kv*layer.n_tip;
    }

    const std::vector<int32_t> fc = in.i32_array("fasa.fc", n_fc);

    size_t at = 0;
    for (size_t il = 0; il < md.layers.size(); ++il) {
        llama_fasa_layer & layer = md.layers[il];
        for (int32_t g = 0; g < layer.n_head_kv; ++g) {
            for (int32_t i = 0; i < layer.n_tip; ++i, ++at) {
                if (fc[at] < 0 || fc[at] >= layer.n_rot/2) {
                    throw bad_metadata(format("fasa.fc names FC %d in layer %zu, outside [0, %d)", fc[at], il, layer.n_rot/2));
                }
                if (i > 0 && fc[at] <= fc[at - 1]) {
                    throw bad_metadata(format("fasa.fc is not ascending in layer %zu, KV head %d", il, g));
                }
                layer.fc.push_back(fc[at]);
            }
        }
    }
}

void load_center(const reader & in, llama_fasa_metadata & md) {
    size_t n = 0;
    for (const llama_fasa_layer & layer : md.layers) {
        n += 2*layer.fc.size();
    }

    const std::vector<float> center = in.f32_array("fasa.center", n);

    auto at = center.begin();
    for (size_t il = 0; il < md.layers.size(); ++il) {
        llama_fasa_layer & layer = md.layers[il];
        layer.center.assign(at, at + 2*layer.fc.size());
        at += 2*layer.fc.size();
        for (float x : layer.center) {
            if (!(std::fabs(x) <= CENTER_MAX)) {
                throw bad_metadata(format("fasa.center is %g in layer %zu, outside [-%g, %g]", x, il, CENTER_MAX, CENTER_MAX));
            }
        }
    }
}

// A per-layer fact of the file that must equal the model's.
void check_same(const char * key, size_t il, int32_t file, int32_t model) {
    if (file != model) {
        throw bad_metadata(format("%s is %d in layer %zu, but the model has %d: the calibration belongs to another model",
                    key, file, il, model));
    }
}

} // namespace

void llama_fasa_read(const gguf_context * gguf, const llama_hparams & hparams, llama_fasa_metadata & md) {
    const reader in(gguf);
    const uint32_t version = in.u32("fasa.version");
    if (version != FASA_METADATA_VERSION) {
        throw bad_metadata(format("fasa.version is %u, this build reads %u: calibrate again", version, FASA_METADATA_VERSION));
    }

    const std::string file_rope = in.str("fasa.rope_type");
    md.rope = rope_of(hparams);
    if (file_rope != "norm" && file_rope != "neox") {
        throw bad_metadata("fasa.rope_type is neither norm nor neox");
    }
    if (file_rope != rope_name(md.rope)) {
        throw bad_metadata(format("fasa.rope_type is %s, but the model has %s: the calibration belongs to another model",
                    file_rope.c_str(), rope_name(md.rope)));
    }

    const size_t n_layer = hparams.n_layer(); // without layers that only draft tokens

    const std::vector<int32_t> n_head_kv = in.i32_array("fasa.n_head_kv", n_layer);
    const std::vector<int32_t> n_rot     = in.i32_array("fasa.n_rot",     n_layer);
    const std::vector<int32_t> n_tip     = in.i32_array("fasa.n_tip",     n_layer);

    bool any = false;
    md.layers.resize(n_layer);
    for (size_t il = 0; il < n_layer; ++il) {
        check_same("fasa.n_head_kv", il, n_head_kv[il], (int32_t) hparams.n_head_kv(il));
        check_same("fasa.n_rot",     il, n_rot[il],     (int32_t) hparams.n_rot(il));
        // of a head: none where there is no head, or where the model claims that more is rotated than a head has
        const bool indexed = n_head_kv[il] > 0 && n_rot[il] <= (int32_t) hparams.n_embd_head_k(il) &&
            hparams.has_kv(il) && !hparams.is_swa(il);
        const int32_t n_fc = indexed ? n_rot[il]/2 : 0;
        if (n_tip[il] < 0 || n_tip[il] > n_fc) {
            throw bad_metadata(format("fasa.n_tip is %d in layer %zu, outside [0, %d]", n_tip[il], il, n_fc));
        }
        md.layers[il].n_head_kv = n_head_kv[il];
        md.layers[il].n_rot     = n_rot[il];
        md.layers[il].n_tip     = n_tip[il];
        any |= n_tip[il] > 0;
    }
    if (!any) {
        throw bad_metadata("fasa.n_tip is 0 in every layer");
    }

    load_fc(in, md);
    if (in.has("fasa.center")) {
        load_center(in, md);
    }

    if (in.has("fasa.budget")) {
        const uint32_t budget = in.u32("fasa.budget");
        if (budget < 1 || budget > LLAMA_FASA_COUNT_MAX) {
            throw bad_metadata(format("fasa.budget is %u, outside [1, %d]", budget, LLAMA_FASA_COUNT_MAX));
        }
        md.budget = (int32_t) budget;
    }
    for (const auto & [key, value] : {
            std::pair<const char *, int32_t *>{ "fasa.n_sink", &md.n_sink }, { "fasa.n_recent", &md.n_recent } }) {
        if (in.has(key)) {
            const uint32_t n = in.u32(key);
            if (n > LLAMA_FASA_COUNT_MAX) {
                throw bad_metadata(format("%s is %u, outside [0, %d]", key, n, LLAMA_FASA_COUNT_MAX));
            }
            *value = (int32_t) n;
        }
    }
    if (in.has("fasa.index_type")) {
        md.index_type = llama_fasa_index_type(in.str("fasa.index_type").c_str());
        if (md.index_type < 0) {
            throw bad_metadata("fasa.index_type is none of f16, q8 and q4");
        }
    }
}

std::string llama_fasa_fingerprint(const gguf_context * gguf) {
    return reader(gguf).str("fasa.fingerprint");
}
