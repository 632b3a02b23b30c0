"""The one exception of this package."""


class CalibrateError(Exception):
    """Something a user can act on. Its text is one sentence."""
