// llama-fasa: configuration, state and counters of FASA in libllama. Plain C, no upstream struct is changed.
//
// Precedence of every setting: set by the caller (llama_fasa_set_params), else the model's fasa.* metadata, else the
// default below.

#pragma once

#include "ggml-fasa.h"
#include "llama.h"

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum llama_fasa_mode {
    LLAMA_FASA_MODE_OFF  = 0, // never
    LLAMA_FASA_MODE_AUTO = 1, // when the model is calibrated and a budget is given by the caller or the metadata
    LLAMA_FASA_MODE_ON   = 2, // always; a context that cannot is not created
};

// Where K and V of the layers that decode sparse are kept.
enum llama_fasa_variant {
    LLAMA_FASA_VARIANT_AUTO = 0, // C if it fits into the free memory of the layer's device (and into vram), else M
    LLAMA_FASA_VARIANT_C    = 1, // where llama.cpp keeps them (FASA-C)
    LLAMA_FASA_VARIANT_M    = 2, // in pinned host memory, which the device reads in place; the index stays there (FASA-M, CUDA)
};

#define LLAMA_FASA_BUDGET_DEFAULT    256
#define LLAMA_FASA_N_SINK_DEFAULT      4
#define LLAMA_FASA_N_RECENT_DEFAULT   32
#define LLAMA_FASA_MAX_BATCH_DEFAULT   8
#define LLAMA_FASA_INDEX_TYPE_DEFAULT  GGML_FASA_INDEX_Q4
#define LLAMA_FASA_BUDGET_SCHEDULE_DEFAULT 100

#define LLAMA_FASA_COUNT_MAX    16777216 // most tokens in any setting, 2^24

struct llama_fasa_params {
    int32_t mode;       // enum llama_fasa_mode
    int32_t budget;     // tokens kept per query and KV group, forced ones included; 0 = not set
    int32_t n_sink;     // first tokens of a sequence that are always kept; -1 = not set
    int32_t n_recent;   // last tokens of a sequence that are always kept, the query's own included; -1 = not set
    int32_t max_batch;  // most query rows per sequence that decode sparse; more are dense (prefill); 0 = not set
    int32_t index_type; // enum ggml_fasa_index_type; -1 = not set
    int32_t variant;    // enum llama_fasa_variant
    int32_t vram;       // MiB of each device's memory that FASA-M may hold: index, row cache, staging; 0 = not set, no bound
    int32_t budget_schedule; // budget of the first sparse layer in percent of budget; the last one gets 200 less this, those
                             // between lie on a line, and the mean is budget; 1 to 199, 100 = all alike; 0 = not set
};

// What a context runs.
struct llama_fasa_info {
    int32_t  active;         // 1 if FASA serves this context
    int32_t  n_layer_sparse; // layers that decode with FASA
    int32_t  n_layer_dense;  // layers that stay dense
    int32_t  n_tip_min;      // fewest and most FCs over the sparse layers
    int32_t  n_tip_max;
    int32_t  budget;         // now in force, 0 = dense
    int32_t  n_sink;
    int32_t  n_recent;
    int32_t  max_batch;
    int32_t  index_type;     // enum ggml_fasa_index_type
    uint64_t index_bytes;    // size of the index cache
    uint64_t kv_bytes;       // size of the K and V cache
    uint64_t mapped_bytes;   // part of kv_bytes that is in host memory and read by the device in place (FASA-M); 0: FASA-C
    uint64_t staging_bytes;  // device memory through which FASA-M reads K and V densely
    uint64_t rows_bytes;     // device memory that keeps rows of K and V which FASA-M selected in the last step; 0: none
    int32_t  budget_schedule; // 100: all layers have the same budget
};

// What a context has run. A step is one ubatch.
struct llama_fasa_stats {
    uint64_t n_step_sparse;   // decode steps through FASA
    uint64_t n_step_dense;    // decode steps left dense, n_kv being within the budget or the budget 0
    uint64_t n_step_prefill;  // steps with more than max_batch rows of a sequence, dense
    uint64_t n_row_sparse;    // query rows of the sparse and the mixed steps that went through FASA
    uint64_t n_index_rebuild; // times a part of the index was written anew from K
    uint64_t n_step_mixed;    // steps whose decode rows went through FASA while the rest, prompts, were dense
};

// Rows of K and V that FASA-M selected, since the context was made: a row is a token's K and V of one layer and KV head.
struct llama_fasa_row_stats {
    uint64_t n_hit;  // read from the device, where the step before had left them
    uint64_t n_miss; // read from host memory
};

LLAMA_API struct llama_fasa_params llama_fasa_default_params(void); // everything "not set", mode AUTO

// Sets what contexts created from now on in this process will use; the context may be created in another thread.
// Returns 0, or -1 with a sentence in llama_fasa_last_error() and nothing changed.
LLAMA_API int32_t                  llama_fasa_set_params(const struct llama_fasa_params * params);
LLAMA_API struct llama_fasa_params llama_fasa_get_params(void);

// Where models loaded from now on in this process find their calibration: a GGUF file with fasa.* keys (a sidecar). NULL or
// "": in the model itself, else in the file beside it that is called like it, model.fasa.gguf for model.gguf.
LLAMA_API void                     llama_fasa_set_file(const char * path);

// The enum ggml_fasa_index_type of a name ("f16", "q8", "q4"); -1 if it names none.
LLAMA_API int32_t llama_fasa_index_type(const char * name);

// Whether the model carries valid calibration: 1 yes, 0 none, -1 invalid (llama_fasa_last_error() says why).
LLAMA_API int32_t llama_fasa_model_calibrated(const struct llama_model * model);

// The budget that the model's calibration recommends; 0 if there is none, or no valid calibration.
LLAMA_API int32_t llama_fasa_model_budget(const struct llama_model * model);

// The architectures of llama.cpp, in [0, llama_fasa_n_arch()): the name, and why FASA cannot serve any model of it, a
// sentence; "" if it can, NULL if the table in fasa-arch.cpp does not list it.
LLAMA_API int32_t      llama_fasa_n_arch      (void);
LLAMA_API const char * llama_fasa_arch_name   (int32_t arch);
LLAMA_API const char * llama_fasa_arch_refusal(int32_t arch);

LLAMA_API struct llama_fasa_info  llama_fasa_get_info   (const struct llama_context * ctx);
// Changes the budget of all steps from now on; 0 decodes dense until it is set again. Not while the context decodes.
// Returns 0, or -1 with a sentence in llama_fasa_last_error() and nothing changed: a budget that does not cover the forced
// tokens, or one above 0 for a context that FASA does not serve.
LLAMA_API int32_t llama_fasa_set_budget  (      struct llama_context * ctx, int32_t budget);
LLAMA_API int32_t llama_fasa_check_budget(const struct llama_context * ctx, int32_t budget); // the same, changes nothing

// The n sequences whose tokens, in all steps from now on, are read of a prompt: their rows are dense, however few they are.
// Without it a sequence decodes if it brings at most max_batch rows. Not while the context decodes.
LLAMA_API void llama_fasa_set_prompts(struct llama_context * ctx, const llama_seq_id * seqs, size_t n);

LLAMA_API struct llama_fasa_stats llama_fasa_get_stats  (const struct llama_context * ctx);
LLAMA_API void                    llama_fasa_reset_stats(      struct llama_context * ctx);

// Waits for the device, so not for every step. All 0 where no row cache is.
LLAMA_API struct llama_fasa_row_stats llama_fasa_get_row_stats(struct llama_context * ctx);

// One line for a person: what the context ran. Written when a context that FASA serves is freed.
LLAMA_API void llama_fasa_print_stats(const struct llama_context * ctx);

// The last error of FASA on this thread, "" if none. Valid until the next call of this API on the thread.
LLAMA_API const char * llama_fasa_last_error(void);

LLAMA_API const char * llama_fasa_version(void); // of this software, "0.1.0"
LLAMA_API const char * llama_fasa_pin(void);     // of llama-cpp-python, "0.3.36"

#ifdef __cplusplus
}
#endif
