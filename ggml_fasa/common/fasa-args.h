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

// llama-bench has a parser of its own. Takes FASA's options out of argv (argc shrinks), the environment's where argv has
// none. As with its other options a value may be a list, separated by commas: every combination is a setting to run.
// Prints one sentence and exits with 1 on a bad value.
void fasa_bench_args(int & argc, char ** argv);

size_t fasa_bench_n_settings();

// llama-bench's tests, each once per setting, next to each other: those at one depth then share what was decoded for it.
template <typename T> std::vector<T> fasa_bench_repeat(const std::vector<T> & tests) {
    std::vector<T> repeated;
    for (const T & test : tests) {
        repeated.insert(repeated.end(), fasa_bench_n_settings(), test);
    }
    return repeated;
}

// Puts the next setting in force, in turn, and prints it to stderr if any option was given.
void fasa_bench_set_next();

// The options as help text, for llama-bench's usage.
std::string fasa_bench_usage();

// Prints what the context ran to stderr (llama-bench drops the log); nothing if FASA does not serve it.
void fasa_bench_stats(const llama_context * ctx);

// Prints the last error of FASA to stderr, if there is one: why a model or a context could not be made.
void fasa_bench_error();
