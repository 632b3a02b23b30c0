"""The command fasa-calibrate."""

import argparse
import contextlib
import os
import sys
from importlib import resources

from tqdm import tqdm

from . import __version__
from .calibrate import (
    DENSE_SHARE,
    LARGE_HEAD,
    LARGE_INDEX_TYPE,
    LARGE_TIP_SHARE,
    TIP_SHARE,
    Options,
    calibrate,
    sha256_text,
)
from .criteria import CRITERIA, Rules
from .errors import CalibrateError, escape_what_it_cannot_encode
from .gguf_file import read_gguf, read_parts
from .measure import HELD_OUT, smallest_budget
from .metadata import INDEX_TYPES, PREFIX, fasa_keys, fingerprint, sidecar_of
from .native import load_llama_cpp
from .observe import Model
from .write import termination_as_exception, write_keys, write_sidecar

BUILTIN_TEXT = "calibration_text.txt"
MAX_U32 = (1 << 32) - 1


def build_parser():
    def integer(low, high=1 << 24):
        def parse(text):
            value = int(text)
            if not low <= value <= high:
                raise argparse.ArgumentTypeError(f"must be {low} to {high}")
            return value

        parse.__name__ = "integer"  # what argparse calls it in messages
        return parse

    options, rules = Options(), Rules()
    parser = argparse.ArgumentParser(
        prog="fasa-calibrate",
        description="Runs a text through a GGUF model, chooses the dominant frequency chunks (FCs) of every KV head"
        " and stores them in the file as fasa.* keys (docs/metadata.md). Tensors are not touched.",
    )
    add = parser.add_argument
    add("model", metavar="MODEL.gguf", help="the model; rewritten in place unless -o is given")
    add("-o", "--output", metavar="OUT.gguf", help="write a copy and leave the model alone")
    add("--force", action="store_true", help="let -o replace an existing file")
    add("--sidecar", action="store_true",
        help="write the keys into a small file of their own, by default MODEL.fasa.gguf, where llama.cpp with FASA finds"
        " them; the model is not changed")
    add("--remove", action="store_true", help="remove the fasa.* keys instead of writing them")
    add("--text", metavar="FILE", help="calibration text, UTF-8 (default: a built-in one)")
    add("--criterion", choices=CRITERIA, default=options.criterion,
        help="how FCs are chosen: mass, the attention they capture together under the rules of run time; overlap, the"
        " tokens they find of those that full scores would select; error, how little they change the output; ca, the"
        " paper's contextual agreement; random, a control (default: %(default)s)")
    add("--n-tip", type=integer(1, 4096), metavar="N", default=options.n_tip,
        help=f"FCs per head (default: {TIP_SHARE} of the head size, {LARGE_TIP_SHARE} from {LARGE_HEAD} on)")
    add("--n-ctx", type=integer(1), metavar="N", default=options.n_ctx,
        help="most tokens of the text to use (default: %(default)s)")
    add("--n-query", type=integer(1), metavar="N", default=options.n_query,
        help="query positions to look at (default: %(default)s)")
    add("--budget", type=integer(1), metavar="N", default=rules.budget,
        help="tokens kept per query that is assumed while choosing (default: %(default)s)")
    add("--sink", type=integer(0), metavar="N", default=rules.n_sink,
        help="first tokens that are always kept, stored as a recommendation (default: %(default)s)")
    add("--recent", type=integer(0), metavar="N", default=rules.n_recent,
        help="last tokens that are always kept, stored as a recommendation (default: %(default)s)")
    add("--store-budget", type=integer(0), metavar="N",
        help="recommended budget to store, with which FASA switches on by itself; 0: none (default: that of --budget)")
    add("--target-kld", type=_positive, metavar="X",
        help="store the smallest budget whose mean KL divergence from dense is at most X; a quarter of the text is kept for"
        " measuring that")
    add("--index-type", choices=INDEX_TYPES,
        help="store this as the recommended type of the index (default: with heads of"
        f" {LARGE_HEAD} and more, and no --n-tip, {LARGE_INDEX_TYPE}, else none, the runtime's default)")
    add("--dense-layers", type=integer(0), metavar="N", default=options.n_dense,
        help="layers that stay dense, those whose output FASA would change most"
        f" (default: one in {DENSE_SHARE} of the layers that it can serve)")
    add("--seed", type=integer(0, MAX_U32), metavar="N", default=options.seed,
        help="of the query positions and of --criterion random (default: %(default)s)")
    add("--threads", type=integer(1, 4096), metavar="N", default=_n_cpu(),
        help="threads to use (default: all, here %(default)s)")
    add("--n-gpu-layers", type=integer(0), metavar="N", default=0, help="layers to run on the GPU (default: none)")
    add("--quiet", action="store_true", help="print nothing but errors")
    add("--verbose", action="store_true", help="show the log of llama.cpp")
    add("--version", action="version", version=f"fasa-calibrate {__version__}")
    return parser


def _positive(text):
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError("must be a positive number")
    return value


def _n_cpu():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def main(argv=None):
    """Returns the exit status: 0, 1 after an error, 130 when interrupted."""
    args = build_parser().parse_args(argv)
    escape_what_it_cannot_encode(sys.stdout)
    try:
        with termination_as_exception():
            _run(args)
    except CalibrateError as err:
        print(f"fasa-calibrate: error: {err}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("fasa-calibrate: interrupted, nothing is half written", file=sys.stderr)
        return 130
    return 0


def _run(args):
    rules = Rules(args.budget, args.sink, args.recent)
    if min(rules.budget, args.store_budget or rules.budget) <= args.sink + args.recent:
        raise CalibrateError("--budget and --store-budget must be larger than --sink plus --recent")
    if args.store_budget is not None and args.target_kld:
        raise CalibrateError("--store-budget and --target-kld both name a budget to store")
    if args.sidecar and args.remove:
        raise CalibrateError("--remove takes the keys out of a model; a sidecar is a file to delete")
    target = _target(args)
    parts = read_parts(args.model)
    gguf = parts[0]
    _check_model(gguf)
    if len(parts) > 1 and not args.sidecar:
        raise CalibrateError("this model is split: give --sidecar, or join its parts with llama-gguf-split --merge first")
    if args.remove:
        keys = []
        note = f"removed {sum(name.startswith(PREFIX) for name in gguf.keys)} keys"
    else:
        keys, note = _calibrate(args, parts, rules)
    if args.sidecar:
        write_sidecar(target, keys, args.model)
    else:
        with _bar(args, "writing", gguf.size - gguf.data_start, unit="B", unit_scale=True) as bar:
            write_keys(gguf, target, keys, bar.update)
    if not args.quiet:
        print(f"{note}; wrote {target}")
        if args.sidecar and f"{PREFIX}version" in gguf.keys:
            print("the model has keys of its own, which are used unless --fasa-file names the sidecar")


def _target(args):
    target = args.output
    if target is None:  # "" is not: a shell makes it of a variable that is not set
        target = sidecar_of(args.model) if args.sidecar else args.model
    if os.path.exists(os.path.realpath(target)) and not os.path.isfile(target):
        raise CalibrateError(f"'{target}' is not a file but a directory or a device")
    folder = os.path.dirname(os.path.realpath(target))
    if not os.path.isdir(folder):
        raise CalibrateError(f"there is no directory '{folder}'")
    if not os.access(folder, os.W_OK):
        raise CalibrateError(f"the directory '{folder}' is not writable")
    is_model = os.path.realpath(target) == os.path.realpath(args.model)
    if is_model and args.sidecar:
        raise CalibrateError("the sidecar needs another name than the model")
    if os.path.exists(target) and not (args.force or is_model or args.sidecar and _is_sidecar(target)):
        raise CalibrateError(f"'{target}' exists; --force replaces it")
    return target


def _is_sidecar(path):
    try:
        gguf = read_gguf(path)
    except CalibrateError:
        return False
    return not gguf.tensors and f"{PREFIX}version" in gguf.keys


def _check_model(gguf):
    arch = gguf.get("general.architecture")
    if not isinstance(arch, str):
        raise CalibrateError("the GGUF file does not say its architecture")
    if not gguf.tensors:
        raise CalibrateError("the GGUF file holds no tensors")
    if f"{arch}.attention.kv_lora_rank" in gguf.keys:
        raise CalibrateError("this model uses multi-head latent attention (MLA), which FASA does not support")


def _read_text(path):
    if path is None:
        text = resources.files(__package__).joinpath(BUILTIN_TEXT).read_text(encoding="utf-8")
        return text, f"built-in {__version__}"
    try:
        with open(path, encoding="utf-8", newline="") as file:
            return file.read(), os.fsencode(os.path.basename(path)).decode("utf-8", "replace")  # GGUF holds UTF-8
    except OSError as err:
        raise CalibrateError(f"cannot read '{path}': {err.strerror}") from err
    except UnicodeDecodeError:
        raise CalibrateError(f"'{path}' is not UTF-8 text") from None


def _calibrate(args, parts, rules):
    text, text_name = _read_text(args.text)
    options = Options(
        args.criterion, args.n_tip, rules, args.n_ctx, args.n_query, args.dense_layers, args.seed, args.index_type
    )
    llama_cpp = load_llama_cpp()
    with Model(llama_cpp, args.model, args.n_gpu_layers, args.verbose) as model:
        with _bar(args, "calibrating", model.n_layer, unit="layer") as bar:
            held_out = HELD_OUT if args.target_kld else 0
            result = calibrate(model, text, options, args.threads, bar.update, held_out)
    if not args.quiet and not held_out and result.n_tokens < args.n_ctx:
        print(f"used {result.n_tokens} tokens, less than --n-ctx {args.n_ctx}: the text or the model allows no more")
    budget = args.budget if args.store_budget is None else args.store_budget or None
    of_model = fingerprint(parts)
    sha256 = sha256_text(text)

    def keys_with(budget):
        return fasa_keys(parts[0], of_model, result, options, text_name, sha256, budget)

    n_tip = {len(heads[0]) for heads in result.fcs.values()}
    note = (
        f"calibrated {len(result.fcs)} of {result.n_layer} layers with {'/'.join(map(str, sorted(n_tip)))} FCs per head"
        f" on {result.n_tokens} tokens"
    )
    if args.target_kld:
        budget, kld = smallest_budget(
            llama_cpp, args.model, keys_with(None), text, options, args.target_kld, args.threads, args.n_gpu_layers,
            args.verbose,
        )  # fmt: skip
        note += f"; KL divergence from dense {kld:.2g} at budget {budget}"
    return keys_with(budget), note


def _bar(args, what, total, **kwargs):
    return contextlib.closing(tqdm(total=total, desc=what, disable=args.quiet, **kwargs))
