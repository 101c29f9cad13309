"""Set-up of the whole suite: the Triton interpreter where there is no GPU, poisoned memory, threads, random
examples, GPU tests."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

if not torch.cuda.is_available():
    # Triton reads it when a kernel is decorated, so it is set before anything imports triton.
    assert "triton" not in sys.modules
    os.environ["TRITON_INTERPRET"] = "1"
for _name in ("MOEKERN_BACKEND", "MOEKERN_CPU_ISA", "MOEKERN_DISABLE"):
    os.environ.pop(_name, None)  # a developer's shell must not choose what is tested

settings.register_profile(
    "suite",
    deadline=None,
    max_examples=int(os.environ.get("MOEKERN_TEST_EXAMPLES", "25")),
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("suite")

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the workers already fill the cores


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no GPU on this machine"))


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """torch.empty gives NaN (integers: the largest value), so a result that nobody wrote cannot pass a comparison."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)
