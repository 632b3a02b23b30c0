"""Stage calibrate, last part: how far the output is from dense at a budget, through the op that ships."""

import os
import tempfile

import numpy as np

from .errors import CalibrateError
from .observe import Model
from .write import write_sidecar

BUDGETS = (64, 128, 256, 512, 1024, 2048)
HELD_OUT = 4  # the last one in so many tokens of the text is not calibrated on
_N_POSITION = 256


def smallest_budget(llama_cpp, path, keys, text, options, target, n_threads, n_gpu_layers=0, verbose=False):
    """(budget, mean KL divergence from dense): the smallest of BUDGETS at which keys keep the divergence within target.

    Measured at positions spread over the held-out end of the text, each predicted from all tokens before it.
    """
    try:
        temporary = tempfile.TemporaryDirectory()
    except OSError as err:
        raise CalibrateError(f"cannot make a temporary folder, for which TMPDIR names a place: {err.strerror}") from err
    with temporary as folder:
        sidecar = os.path.join(folder, "keys.gguf")
        write_sidecar(sidecar, keys, path)
        with Model(llama_cpp, path, n_gpu_layers, verbose, sidecar) as model:
            tokens = model.tokenize(text)[: min(options.n_ctx, model.n_ctx_train)]
            first = len(tokens) - len(tokens) // HELD_OUT
            positions = np.unique(np.linspace(first, len(tokens) - 1, _N_POSITION).astype(int))
            dense = model.log_probs(tokens, positions, n_threads)
            rules, found = options.rules, {}
            for budget in BUDGETS:
                # a cache that fits the budget is decoded dense, which would measure nothing
                if rules.n_sink + rules.n_recent < budget < first // 2:
                    found[budget] = _divergence(dense, model.log_probs(tokens, positions, n_threads, budget))
                    if found[budget] <= target:
                        return budget, found[budget]
    if not found:
        raise CalibrateError(f"{len(tokens)} tokens are too few to measure the divergence from dense")
    best = min(found, key=found.get)
    raise CalibrateError(
        f"no budget up to {max(found)} keeps the KL divergence within {target:g}: it is {found[best]:.2g} at {best}"
    )


def _divergence(dense, sparse):
    """Mean over rows of log-probabilities of sum p_dense * log(p_dense / p_sparse)."""
    return float(np.mean([np.sum(np.exp(p) * (p - q)) for p, q in zip(dense.astype(np.float64), sparse.astype(np.float64))]))
