"""Options and fixtures that every test may use."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# Two processes on two cores: more threads only fight. Before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

GOLDEN = Path(__file__).parent / "golden"
# Files and folders that take long. They go first, so that no worker is left alone with one of them at the end.
LONG = ("test_recipes", "test_exit_codes", "test_leaving", "test_methods", "run/", "contract/", "tests/test_")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--golden-dir", type=Path, default=GOLDEN, help="reference numbers, one folder a method")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort the tests by file as ``LONG`` says."""

    def place(item: pytest.Item) -> int:
        return next((i for i, part in enumerate(LONG) if part in item.nodeid), len(LONG))

    items.sort(key=place)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """``golden_case`` and ``precision`` run over every case of the method that the test file names.

    A test file ``test_<method>.py`` with a test that takes both gets each case in each precision that
    states a tolerance. The file's ``SPEC`` holds the hyper-parameters that a case may leave out.
    """
    if "golden_case" not in metafunc.fixturenames:
        return
    from sslzoo.testing.golden import load_cases

    assert metafunc.module is not None
    method = metafunc.module.__name__.rpartition(".")[2].removeprefix("test_")
    cases = load_cases(metafunc.config.getoption("--golden-dir") / method, metafunc.module.SPEC)
    runs = [(case, precision) for case in cases for precision in case.tolerance]
    ids = [f"{case.name}-{precision}" for case, precision in runs]
    metafunc.parametrize(("golden_case", "precision"), runs, ids=ids)


@pytest.fixture(autouse=True)
def _one_thread_and_a_fixed_seed() -> None:
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(scope="module", autouse=True)
def _memory_goes_back() -> Iterator[None]:
    """Free memory is returned to the system after each file: every fork of a large process pays for its pages."""
    yield
    gc.collect()
    if sys.platform == "linux":
        getattr(ctypes.CDLL(None), "malloc_trim", lambda padding: None)(0)
