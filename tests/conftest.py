"""Fixtures and markers that hold for all tests."""

from __future__ import annotations

import os

# Before torch, onnxruntime and triton read them. Parallel test processes share the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1" if "PYTEST_XDIST_WORKER" in os.environ else "2")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import functools
import importlib
import random
import sys
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch

from fxopt.cost_models import hardware
from fxopt.cost_models.measured import Measured
from fxopt.decide import runs

IN_CI = os.environ.get("CI", "").lower() in {"1", "true"}

hypothesis.settings.register_profile("local", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("ci" if IN_CI else "local")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")
    parser.addoption("--exhaustive", action="store_true", help="run every test")


class Failures:
    """Prints each failure when it happens, so that a run which is cut short says what failed."""

    def __init__(self, config: pytest.Config) -> None:
        self.plugins = config.pluginmanager

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        reporter = self.plugins.get_plugin("terminalreporter")
        if report.failed and reporter is not None:
            reporter.ensure_newline()
            reporter.write_line(f"FAILED {report.nodeid} ({report.when})\n{report.longreprtext}")


def pytest_configure(config: pytest.Config) -> None:
    if IN_CI:
        config.pluginmanager.register(Failures(config))
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    if not torch.cuda.is_available():
        # Triton decides at its own import, and at that of a kernel, whether to interpret.
        os.environ.setdefault("TRITON_INTERPRET", "1")
    # Dynamo knows functions by identity and must see torch's own before `nan_empty` replaces them.
    importlib.import_module("torch._dynamo")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
    every = config.getoption("--exhaustive")
    left_out = [] if every else ["exhaustive"]
    left_out += [] if every or config.getoption("--slow") or IN_CI else ["slow"]
    deselected = [item for item in items if any(map(item.get_closest_marker, left_out))]
    if deselected:
        config.hook.pytest_deselected(items=deselected)
        items[:] = [item for item in items if item not in deselected]


@pytest.fixture(autouse=True, scope="session")
def user_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep the on-disk cache of measurements apart from the user's, and empty at the start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("FXOPT_CACHE_DIR", raising=False)
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


FACTS = hardware.Device(
    name="the tests' machine",
    kind="cpu",
    bandwidth=2e10,
    matmul_rate={"float32": 5e10, "bfloat16": 2e10, "float16": 1e10},
    launch_seconds=2e-6,
    memory_bytes=24 * 2**30,
    threads=2,
    probed="2026-01-01",
)
_TIMED, _PROBED = Measured.__call__, hardware._measure


@pytest.fixture(autouse=True, scope="session")
def costs_by_roofline() -> Iterator[None]:
    """Price op calls by the roofline of one machine, so that no choice depends on what else runs
    on this one while it is made, and time whole models for a moment only."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hardware, "_measure", lambda *_: FACTS)
        patch.setattr(Measured, "__call__", lambda self, call: self.prior(call))
        patch.setattr(runs, "SECONDS", 0.1)
        yield


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time op calls and probe the device after all."""
    monkeypatch.setattr(Measured, "__call__", _TIMED)
    monkeypatch.setattr(hardware, "_measure", _PROBED)
    monkeypatch.setattr(runs, "SECONDS", 2.0)


@pytest.fixture(scope="module")
def captured_once() -> Iterator[None]:
    """Export a model once for all tests of the module, which give equal shapes equal weights."""
    # not above: kernels may be imported only after `pytest_configure` has spoken to Triton
    from fxopt import subject

    capture = subject.capture
    known: dict[Any, Any] = {}

    def remembered(model: torch.nn.Module, example: Any = None, *, at: str | None = None) -> Any:
        tensors = [*model.named_parameters(), *model.named_buffers(), *_leaves(example)]
        key = (type(model), at, *((name, t.shape, t.dtype) for name, t in tensors))
        if key not in known:
            known[key] = capture(model, example, at=at)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subject, "capture", remembered)
        yield


def _leaves(example: Any) -> list[tuple[str, torch.Tensor]]:
    found, _ = torch.utils._pytree.tree_flatten_with_path(example)
    return [(str(path), leaf) for path, leaf in found if isinstance(leaf, torch.Tensor)]


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> int:
    """Seed all generators from the name of the test: equal in each run, different in each test."""
    value = zlib.crc32(request.node.nodeid.encode())
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)
    return value


def _filled(empty: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(empty)
    def wrapper(*args: object, **kwargs: object) -> torch.Tensor:
        tensor = empty(*args, **kwargs)
        # Looking at frames breaks the graph of a tracer, and what it records is not run here.
        if torch.compiler.is_compiling():
            return tensor
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if caller.split(".")[0] == "fxopt" and tensor.is_floating_point():
            with torch.no_grad():
                tensor.fill_(float("nan"))
        return tensor

    return wrapper


@pytest.fixture(autouse=True)
def nan_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill what fxopt allocates uninitialised with NaN, so that an element never written shows."""
    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, _filled(getattr(torch, name)))
    monkeypatch.setattr(torch.Tensor, "new_empty", _filled(torch.Tensor.new_empty))
