"""The one table of tolerances. Each states where it comes from; none is tuned to a result.

NMSE is sum((a - b)^2) / sum(b^2), b being the oracle. eps16 = 2^-11 and eps32 = 2^-24 are unit roundoffs.
"""

import numpy as np

# tip: the index values are read exactly, dot products and softmax run in f32. A logit is off by about
# sqrt(J) * eps32 * |q||k| <= 8 * 6e-8 * 100 = 5e-5, and a probability by as much relative to itself: NMSE 2.5e-9.
# 1e-6 is the bound upstream asks of its own indexer op.
TIP_NMSE = 1e-6

# tip, each score alone: the relative error above with a margin of 20 for exp() by polynomial. It guards small
# scores, which NMSE cannot see and which select must still rank.
TIP_RELATIVE = 1e-3
TIP_RELATIVE_FLOOR = 1e-20  # below it f32 exp may flush to zero

# fac: K and V are read exactly and summed in f32, as for tip. f16 accumulation would give eps16 * sqrt(n) = 1e-2
# relative, NMSE 1e-4, and must fail.
FAC_NMSE = 1e-6

# op: fac's bound; selection is compared through the output, a wrong cell moves it by about 1 / budget >= 1e-3.
OP_NMSE = 1e-6

# Random op cases are drawn until the oracle's last kept and first dropped score differ by more than this, relatively:
# nearer than that f32 may rightly choose the other cell. Logits there are below 10: 10 * sqrt(J) * eps32 = 3e-6.
MARGIN = 1e-5

# whole model: our op and the weights' products are good to f32, but upstream's attention, which prefill and dense
# layers use, rounds q to f16 and sums V in f16 when it decodes: a few eps16 relatively, (4 * eps16)^2 = 4e-6. K and V
# are rounded to f16 in both models; an activation next to a rounding boundary may land on either side.
MODEL_NMSE = 1e-5
MODEL_MARGIN = 2e-3  # eps16 times a few moves a score by so much at most

# the same tokens read in other batches or from other cells: K differs where upstream's attention differs, which prefill
# and decode compute in different ways (see MODEL_NMSE).
LIFECYCLE_NMSE = 1e-5


def nmse(actual, expected):
    """Normalised mean squared error; inf if a value that should be finite is not."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    if actual.shape != expected.shape or not np.isfinite(actual).all():
        return np.inf
    error, power = np.sum((actual - expected) ** 2), np.sum(expected**2)
    return error if power == 0 else error / power
