"""pytest plugin: one seed for all random inputs, shown with every failure and settable, and the fixture ``rng``."""

import os
import zlib

import numpy as np
import pytest

DEFAULT_SEED = 20260203


def pytest_addoption(parser):
    parser.addoption(
        "--seed",
        type=int,
        default=int(os.environ.get("FASA_TEST_SEED", DEFAULT_SEED)),
        help="seed of all random test inputs (also FASA_TEST_SEED); a failure prints the one it ran with",
    )


def pytest_report_header(config):
    return f"seed: {config.getoption('--seed')}"


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item):
    outcome = yield
    report = outcome.get_result()
    if report.failed:
        report.sections.append(("seed", f"reproduce with --seed {item.config.getoption('--seed')}"))


@pytest.fixture
def rng(request):
    """A generator of this test's own: the same inputs whichever other tests run."""
    return np.random.default_rng([request.config.getoption("--seed"), zlib.crc32(request.node.name.encode())])
