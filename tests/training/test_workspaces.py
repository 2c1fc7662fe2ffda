"""What ops take beside their results counts while they run."""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fxopt
from fxopt.training import measure, workspaces
from fxopt.training.alive import live
from fxopt.training.holders import held
from fxopt.training.schedule import schedule
from fxopt.training.step import Step
from tests.training.test_images import taken_apart

CPU = torch.device("cpu")
TAKEN = 1 << 20
SUM = torch.ops.aten.sum.dim_IntList


@pytest.fixture
def step() -> Step:
    layers = [layer for _ in range(3) for layer in (nn.Linear(64, 64), nn.Tanh())]
    return taken_apart((nn.Sequential(*layers), {"input": torch.randn(512, 64)}))


def summing(step: Step) -> list[fx.Node]:
    return [node for node in step.backward if node.target is SUM]


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """As on a GPU: sums take memory of their own, other results but that of the allocator's
    rounding. The calls that were run, by their result's shape."""
    ran: list[str] = []

    def peak(call: Callable[[], Any], device: torch.device) -> int:
        with Seen() as seen:
            call()
        target, result = seen.calls[-1]
        ran.append(f"{target} {tuple(result.shape)}")
        return result.nbytes + (TAKEN if "sum" in target else 512)

    monkeypatch.setattr(workspaces, "peak_live_bytes", peak)
    return ran


class Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.calls.append((str(func), result))
        return result


def test_each_distinct_call_is_run_once(step: Step, runs: list[str]) -> None:
    taken = workspaces.workspaces(step, CPU)
    assert len(summing(step)) == 3
    assert taken == dict.fromkeys(summing(step), TAKEN)
    assert len(runs) == len({*runs})
    assert any("mm" in run for run in runs)
    assert any("tanh_backward" in run for run in runs)


def test_what_a_device_cannot_hold_is_not_known(
    step: Step, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> int:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(workspaces, "peak_live_bytes", full)
    assert workspaces.workspaces(step, CPU) == {}


def test_a_workspace_is_alive_at_its_op_alone(step: Step) -> None:
    laid = schedule(step, ())
    before, first = live(laid), summing(step)[0]
    place = [*step.forward, *step.backward].index(first)
    step.__dict__.pop("lifetimes")
    step.temporary = {first: TAKEN}
    more = live(schedule(step, ())) - before
    assert more[place] == TAKEN
    assert more.sum() == TAKEN
    assert sum(part.max() for part in held(schedule(step, ())).values()) >= TAKEN


def test_random_numbers_of_the_user_are_not_drawn(runs: list[str]) -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Dropout(0.5))
    step = taken_apart((model, {"input": torch.randn(512, 64)}))
    state = torch.get_rng_state()
    workspaces.workspaces(step, CPU)
    assert torch.equal(torch.get_rng_state(), state)


class Device:
    """The allocator and cuBLAS of a GPU: a workspace for each thread that multiplied."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.held: dict[str, int] = {"another stream": TAKEN}
        self.other = 12345
        monkeypatch.setattr(measure, "device_of", lambda module: torch.device("cuda"))
        monkeypatch.setattr(measure, "untouched", lambda module: nullcontext())
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
        allocated = lambda device: self.other + sum(self.held.values())  # noqa: E731
        monkeypatch.setattr(torch.cuda, "memory_allocated", allocated)
        clear = "_cuda_clearCublasWorkspaces"
        monkeypatch.setattr(torch._C, clear, lambda: self.held.clear(), raising=False)

    def product(self, thread: str) -> None:
        self.held[thread] = TAKEN


class Multiplies(nn.Module):
    def __init__(self, device: Device) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, 3))
        self.device = device

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.device.product("forward")
        y = x @ self.weight
        y.register_hook(lambda gradient: self.device.product("backward"))
        return y


def test_what_libraries_keep_is_that_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """One workspace for each thread of the step, whatever was there before, and none twice."""
    device = Device(monkeypatch)
    model, inputs = Multiplies(device), {"x": torch.ones(2, 3)}
    for _ in range(2):
        assert measure.libraries(model, inputs) == 2 * TAKEN
        assert set(device.held) == {"forward", "backward"}
        assert model.weight.grad is None


def test_on_a_cpu_libraries_keep_nothing() -> None:
    assert measure.libraries(nn.Linear(2, 2), {"input": torch.ones(2, 2)}) == 0


def test_the_memory_row_counts_what_libraries_keep(monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as a plan is concerned it is there as parameters are; `activations` knows nothing of
    it."""
    monkeypatch.setattr(measure, "libraries", lambda module, inputs: TAKEN)
    model, inputs = nn.Sequential(nn.Linear(8, 8)), {"input": torch.randn(4, 8)}
    more = fxopt.plan(model, fxopt.Budget(memory="2MiB"), inputs, workload=fxopt.Train(4, 8))
    monkeypatch.undo()
    plain = fxopt.plan(model, fxopt.Budget(memory="2MiB"), inputs, workload=fxopt.Train(4, 8))
    for (name, counted), (_, without) in zip(rows(more), rows(plain), strict=True):
        extra = TAKEN if name == "memory" else 0
        assert counted == [value + extra for value in without]


def rows(plan: fxopt.Plan) -> list[tuple[str, list[float]]]:
    return [(row.name, [row.predicted, row.before]) for row in plan.totals]


@pytest.mark.gpu
def test_the_memory_row_is_what_the_process_holds() -> None:
    gc.collect()
    measure.give_back(torch.device("cuda"))
    before = torch.cuda.memory_allocated()  # by other tests
    layers = [layer for _ in range(4) for layer in (nn.Linear(1024, 1024), nn.GELU())]
    model = nn.Sequential(*layers).cuda()
    inputs = {"input": torch.randn(4096, 1024, device="cuda")}
    opt = fxopt.optimize(
        model, fxopt.Budget(memory="90%"), inputs, workload=fxopt.Train(4096, 1024)
    )
    torch.cuda.reset_peak_memory_stats()
    measure.step(opt, inputs)
    torch.cuda.synchronize()
    held = torch.cuda.max_memory_allocated() - before - inputs["input"].nbytes
    row = {row.name: row for row in opt.plan.totals}["memory"]
    assert held == pytest.approx(row.measured, rel=0.01)
    assert held == pytest.approx(row.predicted, rel=0.02)
