"""The exceptions of this package: one per cause, all of them `FasaError`."""

from __future__ import annotations


class FasaError(Exception):
    """Base of every error this package raises."""


class FasaImportError(FasaError, ImportError):
    """The patched libraries or the matching llama-cpp-python cannot be used in this process."""


class FasaVersionError(FasaImportError):
    """llama-cpp-python is not of the version that the libraries were built for."""


class FasaConfigError(FasaError, ValueError):
    """A FASA setting is out of range, or contradicts another argument."""


class FasaUncalibratedError(FasaError, ValueError):
    """FASA was asked for, and the model carries no calibration."""


class FasaMetadataError(FasaError, ValueError):
    """The model carries calibration that breaks a rule of docs/metadata.md."""


class FasaContextError(FasaError, ValueError):
    """FASA cannot serve a context with these settings."""
