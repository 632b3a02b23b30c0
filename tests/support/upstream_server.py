"""pytest plugin for upstream's tests of llama-server where there is no network.

Their stories260K becomes the GGUF file that FASA_UPSTREAM_MODEL names, and tests that use any other model are skipped,
since they would download it.
"""

import inspect
import os
import sys

import pytest

LOCAL = "tinyllama2"


def _skipped(*_):
    pytest.skip("needs a download", allow_module_level=True)


def pytest_configure(config):
    sys.path.insert(0, str(config.rootpath))
    import utils  # upstream's

    plain = utils.ServerPreset.tinyllama2

    def local():
        server = plain()
        server.model_hf_repo = server.model_hf_file = None
        server.model_file = os.environ["FASA_UPSTREAM_MODEL"]
        return server

    for name, _ in inspect.getmembers(utils.ServerPreset, inspect.isfunction):
        setattr(utils.ServerPreset, name, staticmethod(_skipped))
    utils.ServerPreset.tinyllama2 = staticmethod(local)
    utils.ServerPreset.load_all = staticmethod(lambda: None)
