"""pytest plugin for upstream's tests of llama-server where there is no network.

Their text models become the GGUF file that FASA_UPSTREAM_MODEL names; tests that would download anything are skipped.
"""

import inspect
import os
import sys

import pytest

ELSEWHERE = ("tinygemma3", "router")  # a model with a projector, which has no stand-in; no model at all
DRAFT = "stories15M-q4_0.gguf"


def _skip(*_args, **_kwargs):
    pytest.skip("needs a download", allow_module_level=True)


def pytest_configure(config):
    sys.path.insert(0, str(config.rootpath))
    import utils  # upstream's

    model = os.environ["FASA_UPSTREAM_MODEL"]

    def stand_in(plain):
        def preset():
            server = plain()
            server.model_hf_repo = server.model_hf_file = None
            server.model_file = model
            server.pooling = "mean" if server.server_embeddings else None  # what their models say in their metadata
            return server

        return staticmethod(preset)

    start = utils.ServerProcess.start

    def start_without_download(server, *args, **kwargs):
        if server.model_hf_repo or server.model_url or server.mmproj_url:
            _skip()
        return start(server, *args, **kwargs)

    for name, plain in inspect.getmembers(utils.ServerPreset, inspect.isfunction):
        if name not in ELSEWHERE:
            setattr(utils.ServerPreset, name, stand_in(plain))
    utils.ServerPreset.load_all = staticmethod(lambda: None)
    utils.ServerProcess.start = start_without_download
    utils.download_file = lambda url, *_: model if url.endswith(DRAFT) else _skip()
