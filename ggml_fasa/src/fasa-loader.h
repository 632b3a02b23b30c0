// Stage loader: GGUF keys -> llama_fasa_metadata. Reads untrusted input; every rule of docs/metadata.md is checked here.

#pragma once

#include "fasa-metadata.h"

#include <memory>

struct gguf_context;
struct llama_hparams;

// Never throws and never fails the model: what is wrong is said in error, and reported when a context wants FASA.
std::shared_ptr<const llama_fasa_metadata> llama_fasa_load(const gguf_context * gguf, const llama_hparams & hparams);
