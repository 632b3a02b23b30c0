"""llama-server on a free port of loopback."""

import contextlib
import json
import socket
import subprocess
import time
import urllib.error
import urllib.request


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def get(url, timeout=60):
    with urllib.request.urlopen(url, timeout=timeout) as response:
        return json.load(response)


@contextlib.contextmanager
def serving(command, log, timeout=120):
    """Runs a llama-server command, which names --port, until the block ends; log: the file for its output."""
    port = command[command.index("--port") + 1]
    with open(log, "wb") as out:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + timeout
        while True:
            try:
                get(f"http://127.0.0.1:{port}/health")
                break
            except (urllib.error.URLError, ConnectionError):
                if process.poll() is not None or time.monotonic() > deadline:
                    with open(log, errors="replace") as text:
                        raise RuntimeError("llama-server did not start: " + text.read()[-2000:]) from None
                time.sleep(0.1)
        yield process
    finally:
        process.terminate()
        process.wait(60)
