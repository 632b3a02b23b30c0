"""The real llama-server on loopback, as a client sees it."""

import contextlib
import json
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor


class Server:
    """A running server; its index is checked against K after every step, which ends it on a difference."""

    def __init__(self, program, model, *args, log):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        command = [program, "-m", model, "--port", self.port, "-fa", "on", "-fit", "off", "--no-warmup", "-t", 1, *args]
        env = {**os.environ, "LLAMA_FASA_VERIFY": "1", "GGML_NO_BACKTRACE": "1"}
        self.log = log
        with open(log, "w") as out:
            self.process = subprocess.Popen(
                list(map(str, command)), stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, env=env
            )
        try:
            self._wait()
        except BaseException:
            self.stop()
            raise

    def _wait(self):
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.said()
            with contextlib.suppress(OSError):  # it does not listen yet
                if self.request("/health")[0] == 200:
                    return
            time.sleep(0.1)
        raise TimeoutError(self.said())

    def said(self):
        return self.log.read_text(errors="replace")[-3000:]

    def stop(self):
        """Ends the server as Ctrl-C does, and says how it ended."""
        if self.process.poll() is None:
            self.process.send_signal(2)
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        return self.process.returncode

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        status = self.stop()
        if kind is None:
            assert status == 0, self.said()

    def request(self, path, body=None):
        """(status, text) of a GET, or of a POST if there is a body."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", data)
        request.add_header("Content-Type", "application/json")
        try:
            with urllib.request.urlopen(request, timeout=300) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def get(self, path):
        status, text = self.request(path)
        assert status == 200, text
        return json.loads(text)

    def post(self, path, **body):
        status, text = self.request(path, body)
        assert status == 200, text + self.said()
        return json.loads(text)

    def complete(self, prompt, n, **more):
        """(token ids, timings) of the n likeliest next tokens."""
        greedy = dict(n_predict=n, temperature=0.0, top_k=1, return_tokens=True, ignore_eos=True)
        answer = self.post("/completion", prompt=prompt, **{**greedy, **more})
        return answer["tokens"], answer["timings"]

    def complete_all(self, requests):
        """complete() of several argument dicts at once."""
        with ThreadPoolExecutor(len(requests)) as pool:
            return list(pool.map(lambda request: self.complete(**request), requests))

    def metrics(self):
        """The counters and gauges of FASA in /metrics, without their prefix."""
        status, text = self.request("/metrics")
        assert status == 200, text
        lines = [line.split() for line in text.splitlines() if line.startswith("llamacpp:fasa_")]
        return {name.removeprefix("llamacpp:fasa_"): int(value) for name, value in lines}
