"""Planned steps on several processes: equal to the original's, and what they refuse."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import fxopt

ROOT = Path(__file__).parents[2]
CHECKS = ["DDP", "fully_shard", "fully_shard, bfloat16", "fully_shard by layers"]


def processes(folder: Path, device: str) -> list[list[str]]:
    """The table that two processes print, without its head."""
    script = str(Path(__file__).with_name("processes.py"))
    command = [sys.executable, script, "--device", device, "--store", f"file://{folder}/store"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "WORLD_SIZE": "2"}
    started = [
        subprocess.Popen(
            command, env={**environment, "RANK": str(rank)}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for rank in range(2)
    ]  # fmt: skip
    done = [process.communicate(timeout=300) for process in started]
    assert all(process.returncode == 0 for process in started), [error for _, error in done]
    return [line.split(" | ") for line in done[0][0].splitlines()[1:]]


@pytest.mark.slow
def test_two_processes_train_as_the_original_does(tmp_path: Path) -> None:
    table = processes(tmp_path, "cpu")
    assert [row[:3] for row in table] == [[p, name, "0"] for p in "01" for name in CHECKS]


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_train_as_the_original_does(tmp_path: Path) -> None:
    table = processes(tmp_path, "cuda")
    assert [row[1] for row in table] == 2 * CHECKS
    assert max(float(row[2]) for row in table) < 1e-4


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    """This process alone."""
    dist.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        dist.destroy_process_group()


def layers() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))


def optimised(model: nn.Module) -> Any:
    x, work = torch.randn(64, 8), fxopt.Train(64, 8)
    return fxopt.optimize(model, fxopt.Budget(activations="110%"), x, workload=work)


def test_what_is_sharded_is_held_once(mesh: DeviceMesh) -> None:
    model = layers()
    held = [weakref.ref(p) for p in model.parameters()]
    opt = optimised(model)
    fully_shard(opt, mesh=mesh)
    del model
    gc.collect()
    opt(torch.randn(64, 8)).sum().backward()
    assert [ref() for ref in held] == [None] * 4
    assert all(p.grad is not None for p in opt.parameters())


def test_models_are_optimised_before_they_are_wrapped(mesh: DeviceMesh) -> None:
    with pytest.raises(fxopt.FxoptError, match=r"DistributedDataParallel wraps.*model.module"):
        optimised(DistributedDataParallel(layers()))
    sharded = layers()
    fully_shard(sharded, mesh=mesh)
    with pytest.raises(fxopt.FxoptError, match=r"0.weight is a DTensor.*optimise first"):
        optimised(sharded)


def test_parts_of_a_step_are_not_sharded(mesh: DeviceMesh) -> None:
    opt = optimised(layers())
    fully_shard(opt.get_submodule("2"), mesh=mesh)
    with pytest.raises(fxopt.FxoptError, match=r"2.weight is a DTensor.*not on parts"):
        opt(torch.randn(64, 8))
