// Stage metadata: what a model file says about FASA, validated. Key table: docs/metadata.md.

#pragma once

#include <cstdint>
#include <string>
#include <vector>

// How rotary embedding pairs the dims of a head.
enum llama_fasa_rope {
    LLAMA_FASA_ROPE_NONE, // not rotary, or in a way that FASA does not know
    LLAMA_FASA_ROPE_NORM, // FC i = dims (2i, 2i + 1)
    LLAMA_FASA_ROPE_NEOX, // FC i = dims (i, i + n_rot/2)
};

struct llama_fasa_layer {
    int32_t n_tip     = 0; // FCs of a head that token importance prediction reads, 0 = dense
    int32_t n_head_kv = 0;
    int32_t n_rot     = 0;

    std::vector<int32_t> fc; // [n_head_kv][n_tip], ids in [0, n_rot/2), ascending within a head

    // what tokens have in common in the dims of the FCs, [n_head_kv][2*n_tip] in the order of llama_fasa_metadata::dims;
    // empty if the file does not say
    std::vector<float> center;
};

struct llama_fasa_metadata {
    bool            present = false; // the file carries fasa.version
    std::string     error;           // why the calibration is unusable, "" if it is not
    llama_fasa_rope rope = LLAMA_FASA_ROPE_NONE;

    std::vector<llama_fasa_layer> layers;

    // recommendations, -1 = none
    int32_t budget     = -1;
    int32_t n_sink     = -1;
    int32_t n_recent   = -1;
    int32_t index_type = -1; // enum ggml_fasa_index_type

    bool usable() const { return present && error.empty(); }

    // What is known of a layer; nothing of those that only draft tokens, which are dense.
    llama_fasa_layer layer(size_t il) const { return il < layers.size() ? layers[il] : llama_fasa_layer {}; }

    // The dims of layer il's dominant FCs, [n_head_kv][2*n_tip]: first dims of the planes, then second dims.
    std::vector<int32_t> dims(size_t il) const;
};
