"""Planned steps on several processes beside the original's, wrapped alike.

    torchrun --nproc-per-node 2 tests/training/processes.py --layers 8 --hidden 1024 --tokens 8192

Run by test_parallel.py. On GPUs, one a process, it prints bytes and seconds beside differences.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

import fxopt

CLASSES, STEPS = 96, 3


class Block(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.norm, self.drop = nn.LayerNorm(hidden), nn.Dropout(0.1)
        self.up, self.down = nn.Linear(hidden, 4 * hidden), nn.Linear(4 * hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(self.down(nn.functional.gelu(self.up(self.norm(x)))))


class Model(nn.Module):
    """Tied embeddings, dropout, and where asked running statistics."""

    def __init__(self, layers: int, hidden: int, statistics: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(CLASSES, hidden)
        self.layers = nn.ModuleList(Block(hidden) for _ in range(layers))
        self.last = nn.BatchNorm1d(hidden) if statistics else nn.LayerNorm(hidden)
        self.head = nn.Linear(hidden, CLASSES, bias=False)
        self.head.weight = self.embed.weight
        nn.init.normal_(self.embed.weight, std=hidden**-0.5)  # so that steps converge at any size

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids.flatten())
        for layer in self.layers:
            x = layer(x)
        return nn.functional.cross_entropy(self.head(self.last(x)), ids.flatten())


@dataclass(frozen=True)
class Setting:
    """What all checks share on one process."""

    rank: int
    device: torch.device
    layers: int
    hidden: int
    tokens: int

    @property
    def gpu(self) -> bool:
        return self.device.type == "cuda"

    def model(self, statistics: bool = False) -> Model:
        torch.manual_seed(0)
        return Model(self.layers, self.hidden, statistics).to(self.device).train()

    def ids(self) -> Tensor:
        """This process's part of the batch."""
        generator = torch.Generator().manual_seed(self.rank)
        ids = torch.randint(CLASSES, (4, self.tokens // 4), generator=generator)
        return ids.to(self.device)

    def optimised(self, model: nn.Module) -> nn.Module:
        """Planned by the first process alone, so that all run the same plan."""
        ids = self.ids()
        plans: list[Any] = [None]
        if self.rank == 0:
            work = fxopt.Train(*ids.shape)
            budget = fxopt.Budget(activations="75%")
            plans = [fxopt.plan(model, budget, ids, workload=work, rewrites=RECOMPUTE)]
        dist.broadcast_object_list(plans)
        assert plans[0].rewritten
        return fxopt.apply(model, plans[0], example_inputs=ids)


RECOMPUTE = ["activation.recompute"]


def data_parallel(setting: Setting, model: nn.Module) -> nn.Module:
    ids = [setting.rank] if setting.gpu else None
    return DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)


def sharded(setting: Setting, model: nn.Module, **options: Any) -> nn.Module:
    mesh = init_device_mesh(setting.device.type, (dist.get_world_size(),))
    return fully_shard(model, mesh=mesh, reshard_after_forward=True, **options)


def sharded_by_layers(setting: Setting, model: nn.Module) -> nn.Module:
    for layer in model.get_submodule("layers").children():
        sharded(setting, layer)
    return sharded(setting, model)


def whole(setting: Setting, model: nn.Module) -> nn.Module:
    return setting.optimised(model)


def by_layers(setting: Setting, model: nn.Module) -> nn.Module:
    """Each layer its own planned step, of one plan."""
    assert isinstance(model, Model)
    x = torch.randn(setting.tokens, setting.hidden, device=setting.device, requires_grad=True)
    plans: list[Any] = [None]
    if setting.rank == 0:
        budget, work = fxopt.Budget(activations="80%"), fxopt.Train(*x.shape)
        plans = [fxopt.plan(model.layers[0], budget, x, workload=work)]
    dist.broadcast_object_list(plans)
    for i, layer in enumerate(model.layers):
        model.layers[i] = fxopt.apply(layer, plans[0], example_inputs=x)
    return model


def steps(module: nn.Module, setting: Setting) -> tuple[list[float], float, float]:
    """Train a little; losses, the most bytes that were alive on a GPU, and seconds of the last."""
    optimiser = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    torch.manual_seed(setting.rank)
    losses, begun = list[float](), 0.0
    for _ in range(STEPS):
        if setting.gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        begun = time.perf_counter()
        loss = module(setting.ids())
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
        optimiser.zero_grad()
    peak = torch.cuda.max_memory_allocated() if setting.gpu else 0
    return losses, peak, time.perf_counter() - begun


def compared(
    setting: Setting,
    wrap: Callable[[Setting, nn.Module], nn.Module],
    plan: Callable[[Setting, nn.Module], nn.Module],
    statistics: bool,
) -> tuple[float, str]:
    """By how much the worst parameter, buffer or loss is off after a few steps; bytes and times."""
    first, second = setting.model(statistics), setting.model(statistics)
    planned = plan(setting, first)
    mine, ours, seconds = steps(wrap(setting, planned), setting)
    eager, theirs, took = steps(wrap(setting, second), setting)
    off = max(abs(a - b) for a, b in zip(mine, eager, strict=True))
    there = dict(_state(second))
    for name, value in _state(planned):
        off = max(off, (value - there.pop(name)).abs().max().item())
    assert not there
    assert len(set(mine)) == STEPS
    figures = f"{theirs / 2**20:.0f} MiB {took:.3f} s | {ours / 2**20:.0f} MiB {seconds:.3f} s"
    return off, figures if setting.gpu else "on a CPU"


def _state(model: nn.Module) -> list[tuple[str, Tensor]]:
    """What a process holds, by name."""
    named = [*model.named_parameters(), *model.named_buffers()]
    return [(n, t.to_local() if hasattr(t, "to_local") else t.detach()) for n, t in named]


HALF = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
CHECKS: dict[str, tuple[Any, Any, bool]] = {
    "DDP": (data_parallel, whole, True),
    "fully_shard": (sharded, whole, False),
    "fully_shard, bfloat16": (partial(sharded, mp_policy=HALF), whole, False),
    "fully_shard by layers": (sharded_by_layers, by_layers, False),
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=256)
    found = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=found)
    parser.add_argument("--store", default="env://", help="where the processes meet")
    given = parser.parse_args()
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    gpu = given.device == "cuda"
    device = torch.device("cuda", rank) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    backend = "nccl" if gpu else "gloo"
    dist.init_process_group(backend, init_method=given.store, rank=rank, world_size=world)
    setting = Setting(rank, device, given.layers, given.hidden, given.tokens)
    lines: list[str] = []
    for name, check in CHECKS.items():
        off, figures = compared(setting, *check)
        lines.append(f"{name} | {off:.2g} | {figures}")
    every: list[Any] = [None] * world
    dist.all_gather_object(every, lines)
    if rank == 0:
        print("process | wrapped in | off by | original | planned")
        for process, found in enumerate(every):
            print("\n".join(f"{process} | {line}" for line in found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
