"""The one exception of this package, and what keeps others from the user."""


class CalibrateError(Exception):
    """Something a user can act on. Its text is one sentence."""


def escape_what_it_cannot_encode(stream):
    """Names of files, which may be of any bytes, are then printed whatever the encoding of the stream."""
    if hasattr(stream, "reconfigure"):
        stream.reconfigure(errors="backslashreplace")
