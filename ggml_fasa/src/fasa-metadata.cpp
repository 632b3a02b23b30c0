#include "fasa-metadata.h"

#include "ggml-fasa.h"
#include "llama-fasa.h"

#include <cstring>

std::vector<int32_t> llama_fasa_metadata::dims(size_t il) const {
    const llama_fasa_layer & layer = layers.at(il);

    std::vector<int32_t> res;
    res.reserve(2*layer.fc.size());
    for (int32_t g = 0; g < layer.n_head_kv; ++g) {
        for (int32_t second = 0; second < 2; ++second) {
            for (int32_t i = 0; i < layer.n_tip; ++i) {
                const int32_t fc = layer.fc[g*layer.n_tip + i];
                res.push_back(rope == LLAMA_FASA_ROPE_NORM ? 2*fc + second : fc + second*(layer.n_rot/2));
            }
        }
    }
    return res;
}

int32_t llama_fasa_index_type(const char * name) {
    for (int32_t type = 0; type < GGML_FASA_INDEX_COUNT; ++type) {
        if (strcmp(name, ggml_fasa_index_type_name((ggml_fasa_index_type) type)) == 0) {
            return type;
        }
    }
    return -1;
}
