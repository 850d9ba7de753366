"""Shared fixtures: one toy competition for all tests, and where the real data lies when it is there."""
import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

import pytest


ROOT = Path(__file__).resolve().parents[1]
REALDATA = ROOT.parent/"shared"/"realdata"


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: long; run with --slow")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--slow"): return
    for item in items:
        if "slow" in item.keywords: item.add_marker(pytest.mark.skip(reason="slow; run with --slow"))


@pytest.fixture(scope="session")
def project_folder() -> Path:
    "The root of this clone."
    return ROOT


@pytest.fixture(scope="session")
def realdata() -> Path:
    "Real radiographs and tables beside the project; tests that need them skip where they are missing."
    if not REALDATA.is_dir(): pytest.skip("the folder shared/realdata is not beside the project")
    return REALDATA
