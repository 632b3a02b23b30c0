// fasa-args: the command-line options of FASA and their environment twins, for every llama.cpp tool.
//
// A handler reads the process-wide parameters, changes one field and sets them again (llama_fasa_set_params), so that
// neither the order of options nor the mix of environment and command line matters, and common_params stays untouched.
// A handler throws std::invalid_argument with one sentence when the value is bad. Rules that join two options
// (forced tokens must fit the budget) are checked when a context is created, since any order must be accepted here.

#pragma once

#include "arg.h"

#include <string>
#include <vector>

struct llama_context;

// The options, for the list in common/arg.cpp.
std::vector<common_arg> fasa_args();

// llama-bench has a parser of its own. Applies the environment, takes FASA's options out of argv (argc shrinks) and
// prints the configuration to stderr if any was given. Prints one sentence and exits with 1 on a bad value.
void fasa_bench_args(int & argc, char ** argv);

// The options as help text, for llama-bench's usage.
std::string fasa_bench_usage();

// Prints what the context ran to stderr (llama-bench drops the log); nothing if FASA does not serve it.
void fasa_bench_stats(const llama_context * ctx);

// Prints the last error of FASA to stderr, if there is one: why a model or a context could not be made.
void fasa_bench_error();
