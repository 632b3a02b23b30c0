"""The command fasa-inspect: shows the calibration that a model or a sidecar carries."""

import argparse
import json
import operator
import os
import sys

import numpy as np

from . import __version__
from .errors import CalibrateError, escape_what_it_cannot_encode
from .gguf_file import read_gguf, read_parts
from .metadata import PREFIX, VERSION, fingerprint, sidecar_of

_MOST = 1 << 13  # more heads, and more dims of one, than any model has: what is untrusted must not fill the memory
_MAX_F32 = float(np.finfo(np.float32).max)


def read_calibration(path):
    """(path of the file that carries the calibration, {name without prefix: value}); a sidecar beside path counts."""
    for candidate in (path, sidecar_of(path)):
        if candidate != path and not os.path.exists(candidate):
            break
        gguf = read_gguf(candidate)
        keys = {name[len(PREFIX) :]: value for name, value in gguf.values.items() if name.startswith(PREFIX)}
        if "version" in keys:
            if keys["version"] != VERSION:
                raise CalibrateError(f"the calibration is not of version {VERSION}; run fasa-calibrate again")
            if candidate != path and keys.get("fingerprint") != fingerprint(read_parts(path)):
                raise CalibrateError(f"'{candidate}' was made for other weights; run fasa-calibrate again")
            return candidate, keys
    raise CalibrateError(f"'{path}' carries no calibration; run fasa-calibrate on it")


def _numbers(keys, name, kind, low, high, n=None):
    """A stored array: n numbers (None: any count) of a kind, int or float, from low to high."""
    values = keys.get(name)
    whole = isinstance(values, list) and n in (None, len(values))
    if not whole or not all(type(value) is kind and low <= value <= high for value in values):
        raise CalibrateError(f"{PREFIX}{name} is missing or damaged; run fasa-calibrate again")
    return values


def layers_of(keys):
    """One dict per layer: what is stored of it; fc is a list per KV head."""
    n_tip = _numbers(keys, "n_tip", int, 0, _MOST)
    if not any(n_tip):
        raise CalibrateError("the calibration leaves every layer dense; run fasa-calibrate again")
    n_rot = _numbers(keys, "n_rot", int, 0, _MOST, len(n_tip))
    n_head_kv = _numbers(keys, "n_head_kv", int, 0, _MOST, len(n_tip))
    fcs = iter(_numbers(keys, "fc", int, 0, max(n_rot) // 2 - 1, sum(map(operator.mul, n_head_kv, n_tip))))
    layers = [
        {
            "layer": il,
            "n_head_kv": n_head_kv[il],
            "n_rot": n_rot[il],
            "n_tip": n,
            "fc": [[next(fcs) for _ in range(n)] for _ in range(n_head_kv[il])] if n else [],
        }
        for il, n in enumerate(n_tip)
    ]
    if "calibration.error" in keys:
        budgets = _numbers(keys, "calibration.recall_budget", int, 1, 1 << 24)
        errors = _numbers(keys, "calibration.error", float, -1, _MAX_F32, len(layers))
        recall = _numbers(keys, "calibration.recall", float, -1, _MAX_F32, len(layers) * len(budgets))
        for il, layer in enumerate(layers):
            if errors[il] >= 0:
                of_layer = recall[il * len(budgets) : (il + 1) * len(budgets)]
                layer["error"], layer["recall"] = errors[il], dict(zip(map(str, budgets), of_layer))
    return layers


def summary(layers):
    """FC ids of all KV heads as a short text: runs of neighbours that any head uses."""
    used = sorted({fc for layer in layers for head in layer["fc"] for fc in head})
    runs = np.split(used, np.flatnonzero(np.diff(used) != 1) + 1) if used else []
    return " ".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs)


def _general(keys):
    """What is stored of no single layer."""
    return {name: value for name, value in keys.items() if isinstance(value, (int, str))}


def _printable(text):
    """Escaped where a terminal could take it for a command."""
    return text if text.isprintable() else ascii(text)


def table(path, keys, layers):
    per_layer = ["layer  KV heads  n_rot  n_tip  error    recall  FCs of any head"]
    for layer in layers:
        recall = layer.get("recall", {}).get(str(keys.get("calibration.budget")))
        error = f"{layer['error']:.5f}" if "error" in layer else ""
        per_layer.append(
            f"{layer['layer']:5}  {layer['n_head_kv']:8}  {layer['n_rot']:5}  {layer['n_tip'] or 'dense':>5}  {error:7}"
            f"  {'' if recall is None else format(recall, '.4f'):6}  {summary([layer])}"
        )
    general = [f"{path}"]
    for name, value in sorted(_general(keys).items()):
        general.append(f"  {_printable(name):28} {_printable(str(value))}")
    notes = [
        "error: squared difference of attention's output from dense, relative, on the calibration text",
        "recall: share of dense attention on the selected tokens, at the calibration's budget",
    ]
    return "\n".join([*general, "", *per_layer, "", *notes])


def plot(path, title, layers):
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        raise CalibrateError("--plot needs matplotlib: pip install matplotlib") from None
    n_fc = max(layer["n_rot"] for layer in layers) // 2
    rows = [(layer["layer"], head) for layer in layers for head in layer["fc"] or [[]] * layer["n_head_kv"]]
    chosen = np.zeros((len(rows), n_fc))
    for row, (_, head) in zip(chosen, rows):
        row[head] = 1
    with_recall = [layer for layer in layers if "recall" in layer]
    figure, axes = pyplot.subplots(
        1, 2 if with_recall else 1, figsize=(11 if with_recall else 6, 2 + len(rows) / 14), squeeze=False
    )
    axes[0, 0].imshow(chosen, aspect="auto", cmap="Greys", interpolation="nearest")
    firsts = [i for i, (il, _) in enumerate(rows) if i == 0 or rows[i - 1][0] != il]
    axes[0, 0].set_yticks(firsts, [rows[i][0] for i in firsts], fontsize=6)
    axes[0, 0].set(xlabel="FC, highest frequency first", ylabel="layer, one row per KV head", title="dominant FCs")
    for layer in with_recall:
        budgets = [int(b) for b in layer["recall"]]
        color = pyplot.cm.viridis(layer["layer"] / len(layers))
        axes[0, 1].plot(budgets, list(layer["recall"].values()), color=color, linewidth=1)
    if with_recall:
        axes[0, 1].set(
            xscale="log", xlabel="budget", ylabel="share of dense attention selected", title="recall, first layers dark"
        )
        axes[0, 1].set_xticks(budgets, budgets)
    figure.suptitle(title)
    figure.tight_layout()
    try:
        figure.savefig(path, dpi=130)
    except (OSError, ValueError) as err:
        raise CalibrateError(f"cannot write '{path}': {err}") from err


def main(argv=None):
    """Returns the exit status: 0, or 1 after an error."""
    parser = argparse.ArgumentParser(
        prog="fasa-inspect", description="Shows the calibration of FASA that a GGUF model, or a sidecar of one, carries."
    )
    add = parser.add_argument
    add("file", metavar="MODEL.gguf", help="the model or the sidecar")
    add("--json", action="store_true", help="print everything as JSON")
    add("--plot", metavar="OUT.png", help="draw which FCs each KV head uses, and recall by budget (needs matplotlib)")
    add("--version", action="version", version=f"fasa-inspect {__version__}")
    args = parser.parse_args(argv)
    escape_what_it_cannot_encode(sys.stdout)
    try:
        path, keys = read_calibration(args.file)
        layers = layers_of(keys)
        if args.json:
            text = json.dumps({"file": path, **_general(keys), "layers": layers}, indent=1)
        else:
            text = table(path, keys, layers)
        print(text, flush=True)
        if args.plot:
            plot(args.plot, os.path.basename(path), layers)
    except CalibrateError as err:
        print(f"fasa-inspect: error: {err}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # as of `fasa-inspect model.gguf | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is flushed at exit
        return 1
    return 0
