"""fasa-calibrate: chooses the dominant FCs of a GGUF model and stores them in it."""

import os

# the work is spread over heads; threads of BLAS besides would only wait for each other
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

__version__ = "0.1.0"
