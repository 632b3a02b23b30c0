// Stage loader: GGUF keys -> llama_fasa_metadata. Reads untrusted input; every rule of docs/metadata.md is checked here.

#pragma once

#include "fasa-metadata.h"

#include <memory>
#include <string>

struct gguf_context;
struct llama_hparams;
struct llama_model_loader;

// Never throws and never fails the model: what is wrong is said in error, and reported when a context wants FASA.
// Reads the file of llama_fasa_set_file, else the model's own keys, else the sidecar beside the model.
std::shared_ptr<const llama_fasa_metadata> llama_fasa_load(llama_model_loader & ml, const llama_hparams & hparams);

// The keys of one file, checked against the model, into md. Throws std::runtime_error, one sentence, for the rule they break.
void llama_fasa_read(const gguf_context * gguf, const llama_hparams & hparams, llama_fasa_metadata & md);

// fasa.fingerprint of a file; throws as llama_fasa_read does.
std::string llama_fasa_fingerprint(const gguf_context * gguf);
