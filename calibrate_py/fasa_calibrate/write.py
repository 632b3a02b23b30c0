"""Rewrites a GGUF file with other fasa.* keys. Whatever happens, the target is the old file or the new one, whole."""

import contextlib
import errno
import glob
import os
import shutil
import signal
import struct
import tempfile

try:
    import fcntl
except ImportError:  # not on Windows: stale temporary files then stay
    fcntl = None

from .errors import CalibrateError
from .gguf_file import DEFAULT_ALIGNMENT, MAGIC, VERSIONS
from .metadata import PREFIX, encode_key

_BLOCK = 1 << 22


def write_keys(gguf, target, keys, progress=None):
    """Writes gguf's content to target with all its fasa.* keys replaced by keys, [(name, kind, value), ...].

    Other keys and the tensor table are copied as bytes, tensor data too. progress(n) follows the bytes copied.
    """
    target = os.path.realpath(target)
    kept = [key for key in gguf.keys.values() if not key.name.startswith(PREFIX)]
    added = b"".join(encode_key(*key) for key in keys)
    header = MAGIC + struct.pack("<IQQ", gguf.version, len(gguf.tensors), len(kept) + len(keys))
    n_head = len(header) + sum(key.end - key.start for key in kept) + len(added) + gguf.infos_end - gguf.infos_start
    padding = -n_head % gguf.alignment
    with _errors_of(target):
        _check_space(target, n_head + padding + gguf.size - gguf.data_start)
        with gguf.open() as source, _replacement(target, gguf.path) as out:
            out.write(header)
            for key in kept:
                _copy(source, out, key.start, key.end)
            out.write(added)
            _copy(source, out, gguf.infos_start, gguf.infos_end)
            out.write(b"\0" * padding)
            _copy(source, out, gguf.data_start, gguf.size, progress)


def write_sidecar(target, keys, like):
    """Writes a GGUF file with these keys and no tensors, with the mode of the file like."""
    target = os.path.realpath(target)
    data = MAGIC + struct.pack("<IQQ", VERSIONS[-1], 0, len(keys)) + b"".join(encode_key(*key) for key in keys)
    with _errors_of(target), _replacement(target, like) as out:
        out.write(data + b"\0" * (-len(data) % DEFAULT_ALIGNMENT))


@contextlib.contextmanager
def _errors_of(target):
    try:
        yield
    except OSError as err:
        if err.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise CalibrateError(f"no space left to write '{target}', which is unchanged") from err
        raise CalibrateError(f"cannot write '{target}': {err.strerror}") from err


def _check_space(target, need):
    free = shutil.disk_usage(os.path.dirname(target)).free
    if free < need:
        raise CalibrateError(f"writing '{target}' needs {need >> 20} MiB, but only {free >> 20} MiB are free")


def _copy(source, out, start, end, progress=None):
    source.seek(start)
    while start < end:
        block = source.read(min(_BLOCK, end - start))
        if not block:
            raise CalibrateError("the GGUF file was truncated while it was read")
        out.write(block)
        start += len(block)
        if progress is not None:
            progress(len(block))


@contextlib.contextmanager
def _replacement(target, like):
    """A file that takes target's place when the block ends well and vanishes when it does not."""
    folder, name = os.path.split(target)
    prefix = f".{name}.fasa-"
    _remove_stale(os.path.join(folder, prefix))
    out, path = _create(folder, prefix)
    try:
        with out:
            old = os.stat(target if os.path.exists(target) else like)
            os.chmod(path, old.st_mode & 0o7777)
            if hasattr(os, "chown"):
                with contextlib.suppress(OSError):
                    os.chown(path, old.st_uid if os.path.exists(target) else -1, old.st_gid)
            yield out
            out.flush()
            os.fsync(out.fileno())
            if fcntl is None:
                out.close()  # Windows cannot rename an open file; elsewhere the lock is held to the end
            os.replace(path, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(path)
        raise
    if fcntl is not None:
        with contextlib.suppress(OSError):  # not of every file system and folder; the target is in its place
            directory = os.open(folder, os.O_RDONLY)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)


def _create(folder, prefix):
    """A new temporary file, open and locked, which tells other runs that it is in use; and its path."""
    while True:
        handle, path = tempfile.mkstemp(".tmp", prefix, folder)
        out = os.fdopen(handle, "wb")
        if fcntl is None:
            return out, path
        with contextlib.suppress(OSError):  # a file system without locks: no other run can take it for stale either
            fcntl.flock(out, fcntl.LOCK_EX)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.stat(path), os.fstat(handle)):
                return out, path
        out.close()  # another run took it for a stale one before it was locked


def _remove_stale(prefix):
    """Removes what killed runs left; a file in use is locked."""
    if fcntl is None:
        return
    for path in glob.glob(glob.escape(prefix) + "*.tmp"):
        with contextlib.suppress(OSError), open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.unlink(path)


@contextlib.contextmanager
def termination_as_exception():
    """Lets SIGTERM, unless it is ignored, unwind the stack as SIGINT does, so that temporary files go."""

    def stop(number, frame):
        raise SystemExit(128 + number)

    old = signal.getsignal(signal.SIGTERM)
    if old != signal.SIG_IGN:
        signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, old)
