"""The loss head alone: seconds and bytes of cross-entropy over a linear head, forward and backward.

    python benchmarks/loss_head.py [--rows 8192] [--features 2048] [--classes 128256] [--sweep]

One JSON line a way to compute it. `above` is the peak beyond the inputs, less the bytes of the
gradients; `seconds` the median of interleaved rounds, `ratio` to compiled cross-entropy in the
same rounds; `off` how far loss and gradients are from a float32 computation over the same inputs,
relative to their norms, the worst of them (`eager` shows what bf16 itself is off by). `compiled`
is `torch.compile` of linear and cross-entropy, without and with Inductor's auto-chunker; other
peers run where they are installed. `--sweep` adds chunk sizes and the loss a token, which makes
logits twice. Inputs are random: speed and bytes, never quality. `--trained 600` takes the head of a
small model that is trained for so many steps first, as the share of classes that gradient filtering
(`filtered`, cut-cross-entropy's default) leaves out is one of the data.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fxopt.decide.verify import peak_live_bytes
from fxopt.kernels.cut_cross_entropy import linear_cross_entropy

sys.path.insert(0, str(Path(__file__).parent))
from trained_head import trained_head

Way = Callable[[Tensor, Tensor, Tensor], Tensor]
"""hidden [N, D], weight [V, D], labels [N] -> the mean loss."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--features", type=int, default=2048)
    parser.add_argument("--classes", type=int, default=128256)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--trained", type=int, default=0, help="steps; 0: a random head")
    parser.add_argument("--ways", nargs="*", help="run these alone, by the names of their lines")
    args = parser.parse_args()

    torch.manual_seed(0)
    kind: dict[str, Any] = {"device": args.device, "dtype": getattr(torch, args.dtype)}
    shape = args.rows, args.features, args.classes
    if args.trained:
        hidden, weight, labels = trained_head(*shape, args.trained, args.device)
    else:
        hidden = torch.randn(args.rows, args.features, **kind)
        weight = torch.randn(args.classes, args.features, **kind) / args.features**0.5
        labels = torch.randint(args.classes, (args.rows,), device=args.device)
    labels[::10] = -100
    hidden, weight = (t.to(kind["dtype"]).requires_grad_() for t in (hidden, weight))
    inputs = hidden, weight, labels

    exact = in_float32(*inputs)
    found: dict[str, dict[str, Any]] = {}
    steps: dict[str, Callable[[], Any]] = {}
    for name, way in ways(args.sweep).items():
        if args.ways and name not in args.ways:
            continue
        try:
            found[name] = {"way": name, **facts(way, inputs, exact)}
            steps[name] = step(way, inputs)
        except Exception as error:  # a peer that does not run here is a line as well
            print(json.dumps({"way": name, "error": f"{type(error).__name__}: {error}"[:300]}))
    seconds = timed(steps, args.device, args.rounds)
    for name, line in found.items():
        ratio = seconds[name] / seconds["compiled"] if "compiled" in seconds else None
        print(json.dumps({**line, "seconds": seconds[name], "ratio": ratio}), flush=True)


def ways(sweep: bool) -> dict[str, Way]:
    found: dict[str, Way] = {
        "eager": plain,
        "compiled": torch.compile(plain),
        "compiled, auto-chunker": torch.compile(plain, options={"auto_chunker.enable": True}),
        "fxopt": linear_cross_entropy,
        "fxopt, filtered": partial(linear_cross_entropy, filter_eps=2.0**-12),
    }
    if sweep:
        for chunk in (256, 512, 2048, 4096):
            found[f"fxopt, {chunk} rows"] = chunked(chunk)
        found["fxopt, a token"] = lambda h, w, y: (
            linear_cross_entropy(h, w, y, reduction="none").sum() / (y != -100).sum()
        )
    peers = {
        "F.linear_cross_entropy": lambda: F.linear_cross_entropy,  # pyright: ignore
        "cut-cross-entropy": lambda: import_module("cut_cross_entropy").linear_cross_entropy,
        "cut-cross-entropy, exact": lambda: exact_peer,
        "liger-kernel": liger,
    }
    for name, load in peers.items():
        try:
            found[name] = load()
        except (AttributeError, ImportError) as error:
            print(json.dumps({"way": name, "absent": str(error)}))
    return found


def plain(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight).float(), labels)


def chunked(chunk: int) -> Way:
    return lambda h, w, y: linear_cross_entropy(h, w, y, chunk=chunk)


def exact_peer(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Without leaving out small gradients."""
    function = import_module("cut_cross_entropy").linear_cross_entropy
    return function(hidden, weight, labels, impl="cce_exact")


def liger() -> Way:
    loss = import_module("liger_kernel.transformers").LigerFusedLinearCrossEntropyLoss()
    return lambda h, w, y: loss(w, h, y)


def step(way: Way, inputs: tuple[Tensor, Tensor, Tensor]) -> Callable[[], Any]:
    def call() -> Any:
        return torch.autograd.grad(way(*inputs), inputs[:2])

    return call


def facts(
    way: Way, inputs: tuple[Tensor, Tensor, Tensor], exact: list[Tensor]
) -> dict[str, float | str]:
    """Bytes above inputs and gradients, and the worst relative distance from `exact`."""
    call = step(way, inputs)
    results = [way(*inputs).detach(), *call()]
    off = [distance(mine, truth) for mine, truth in zip(results, exact, strict=True)]
    del results
    gradients = sum(t.nbytes for t in inputs[:2])
    above = peak_live_bytes(call, inputs[0].device) - gradients
    return {"above": above, "off": float(f"{max(off):.2g}"), "GiB": round(above / 2**30, 3)}


def distance(mine: Tensor, truth: Tensor) -> float:
    """||mine - truth|| / ||truth||, in slices, so that no second float32 copy exists."""
    off = norm = 0.0
    for a, b in zip(mine.reshape(-1).split(1 << 26), truth.reshape(-1).split(1 << 26), strict=True):
        off += (a.float() - b).square().sum().item()
        norm += b.square().sum().item()
    return (off / max(norm, 1e-30)) ** 0.5


def in_float32(hidden: Tensor, weight: Tensor, labels: Tensor) -> list[Tensor]:
    wide = [t.detach().float().requires_grad_() for t in (hidden, weight)]
    loss = linear_cross_entropy(wide[0], wide[1], labels, reduction="mean")
    return [loss.detach(), *torch.autograd.grad(loss, wide)]


def timed(steps: dict[str, Callable[[], Any]], device: str, rounds: int) -> dict[str, float]:
    """Median seconds of each, in turn."""
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for i in range(rounds + 3):
        for name, call in steps.items():
            seconds = once(call, device)
            if i >= 3:
                taken[name].append(seconds)
    return {name: statistics.median(found) for name, found in taken.items()}


def once(call: Callable[[], Any], device: str) -> float:
    if not device.startswith("cuda"):
        begin = time.perf_counter()
        call()
        return time.perf_counter() - begin
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


if __name__ == "__main__":
    main()
