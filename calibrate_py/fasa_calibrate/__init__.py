"""fasa-calibrate: chooses the dominant FCs of a GGUF model and stores them in it."""

__version__ = "0.1.0"
