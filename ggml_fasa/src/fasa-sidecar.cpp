// Stage loader: which file a model's calibration comes from, its own or a sidecar, and whether a sidecar fits.

#include "fasa-loader.h"

#include "llama-fasa.h"
#include "llama-impl.h"
#include "llama-model-loader.h"

#include "gguf.h"

#include <algorithm>
#include <fstream>
#include <map>
#include <mutex>
#include <stdexcept>

namespace {

constexpr size_t FINGERPRINT_SAMPLE   = 256; // bytes
constexpr size_t FINGERPRINT_N_SAMPLE = 8;   // of a tensor

// blk.N.attn_ followed by q, k or qkv, then _norm or not, then .weight or .bias
bool is_qk_weight(const std::string & name) {
    int il = -1;
    int n  = 0;
    if (sscanf(name.c_str(), "blk.%d.attn_%n", &il, &n) != 1 || n == 0) {
        return false;
    }
    const std::string rest = name.substr(n);
    for (const char * which : { "q", "k", "qkv", "q_norm", "k_norm", "qkv_norm" }) {
        if (rest == std::string(which) + ".weight" || rest == std::string(which) + ".bias") {
            return true;
        }
    }
    return false;
}

class fnv1a {
public:
    void add(const void * data, size_t n) {
        for (size_t i = 0; i < n; ++i) {
            hash = (hash ^ ((const uint8_t *) data)[i])*0x100000001b3;
        }
    }

    void add(uint64_t x) {
        uint8_t bytes[8]; // little-endian
        for (int i = 0; i < 8; ++i) {
            bytes[i] = x >> 8*i;
        }
        add(bytes, sizeof(bytes));
    }

    std::string hex() const {
        return format("%016llx", (unsigned long long) hash);
    }

private:
    uint64_t hash = 0xcbf29ce484222325;
};

// The fingerprint of docs/metadata.md.
std::string fingerprint(llama_model_loader & ml) {
    std::map<std::string, const llama_model_loader::llama_tensor_weight *> weights; // ordered by byte, as ml's are not
    for (const auto & [name, weight] : ml.weights_map) {
        if (is_qk_weight(name)) {
            weights[name] = &weight;
        }
    }

    fnv1a hash;
    for (const auto & [name, weight] : weights) {
        hash.add(name.c_str(), name.size() + 1);
        hash.add(weight->tensor->type);
        for (int64_t n : weight->tensor->ne) {
            hash.add(n);
        }
        const size_t size = ggml_nbytes(weight->tensor);
        uint8_t sample[FINGERPRINT_SAMPLE];
        const size_t n = std::min(size, sizeof(sample));
        for (size_t i = 0; i < FINGERPRINT_N_SAMPLE; ++i) {
            llama_file & file = *ml.files.at(weight->idx);
            file.seek(weight->offs + (size - n)/(FINGERPRINT_N_SAMPLE - 1)*i, SEEK_SET);
            file.read_raw(sample, n);
            hash.add(sample, n);
        }
    }
    return hash.hex();
}

// model.gguf -> model.fasa.gguf
std::string sidecar_beside(const std::string & model) {
    const std::string ext = ".gguf";
    const bool has_ext = model.size() > ext.size() && model.compare(model.size() - ext.size(), ext.size(), ext) == 0;
    const std::string path = model.substr(0, model.size() - (has_ext ? ext.size() : 0)) + ".fasa" + ext;
    return !model.empty() && std::ifstream(path).good() ? path : "";
}

void load_sidecar(const std::string & path, llama_model_loader & ml, const llama_hparams & hparams, llama_fasa_metadata & md) {
    md.present = true; // whatever is wrong with it, it was meant to be used

    const gguf_context_ptr gguf(gguf_init_from_file(path.c_str(), { /*.no_alloc =*/ true, /*.ctx =*/ nullptr }));
    if (!gguf) {
        throw std::runtime_error(format("'%s' cannot be read as a GGUF file", path.c_str()));
    }
    if (gguf_find_key(gguf.get(), "fasa.version") < 0) {
        throw std::runtime_error(format("'%s' carries no calibration", path.c_str()));
    }
    if (llama_fasa_fingerprint(gguf.get()) != fingerprint(ml)) {
        throw std::runtime_error(format("'%s' was made for other weights: calibrate again", path.c_str()));
    }
    llama_fasa_read(gguf.get(), hparams, md);
    LLAMA_LOG_INFO("fasa: calibration from '%s'\n", path.c_str());
}

std::mutex  file_mutex;
std::string file_given;

} // namespace

void llama_fasa_set_file(const char * path) {
    std::lock_guard<std::mutex> lock(file_mutex);
    file_given = path ? path : "";
}

std::shared_ptr<const llama_fasa_metadata> llama_fasa_load(llama_model_loader & ml, const llama_hparams & hparams) {
    auto md = std::make_shared<llama_fasa_metadata>();
    if (!ml.metadata) {
        return md;
    }

    std::string sidecar;
    {
        std::lock_guard<std::mutex> lock(file_mutex);
        sidecar = file_given;
    }
    const bool has_keys = gguf_find_key(ml.metadata, "fasa.version") >= 0;
    try {
        if (sidecar.empty() && !has_keys) {
            sidecar = sidecar_beside(ml.fasa_model_path);
        }
        if (!sidecar.empty()) {
            load_sidecar(sidecar, ml, hparams, *md);
        } else if (has_keys) {
            md->present = true;
            llama_fasa_read(ml.metadata, hparams, *md);
        }
    } catch (const std::exception & e) { // also of reading weights
        md->error = std::string("FASA metadata: ") + e.what();
    }
    return md;
}
