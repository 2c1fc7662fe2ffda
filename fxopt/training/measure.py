"""Steps that are really run: their peak, seconds and results, with nothing left behind."""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..decide.verify import Timing, compare, peak_live_bytes
from .capture import scalar_loss
from .watched import Probe

Inputs = Mapping[str, Any]
SEED = 0
GRADIENT = "gradient of "
PIECE = 1 << 24
"""Elements that are compared at a time."""


@dataclass(frozen=True)
class Outcome:
    """What a step leaves: its outputs, gradients, changed buffers and random state, on the host."""

    tensors: dict[str, Tensor]
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    """Where they were made."""

    @property
    def outputs(self) -> frozenset[str]:
        """Names of the tensors that the model returned."""
        return frozenset(name for name in self.tensors if name.startswith("output "))

    def without(self, names: Collection[str]) -> Outcome:
        """The same but for some tensors."""
        kept = {n: t for n, t in self.tensors.items() if n not in names}
        return Outcome(kept, self.device)

    def difference(self, other: Outcome, *, gradients: bool = True) -> tuple[str, float]:
        """The tensor that differs most, relative to its norm, and by how much; 0.0: bit-equal.

        A gradient that is nothing but rounding, as that of an attention's key bias, is compared
        with the rounding of all gradients instead. Without `gradients` those are left out.
        """
        worst = ("", 0.0)
        rounding: float | None = None
        for name in self.tensors.keys() | other.tensors.keys():
            if name.startswith(GRADIENT) and not gradients:
                continue
            mine, theirs = self.tensors.get(name), other.tensors.get(name)
            if mine is None or theirs is None or mine.shape != theirs.shape:
                return name, float("inf")
            if not torch.equal(mine, theirs):
                least = 0.0
                if name.startswith(GRADIENT):
                    rounding = self._rounding() if rounding is None else rounding
                    least = rounding * mine.numel() ** 0.5
                off, norm = self._norms(mine, theirs)
                share = off / max(norm, least, 1e-30)
                worst = max(worst, (name, share), key=lambda found: found[1])
        return worst

    def _rounding(self) -> float:
        """Root mean square of all gradients' elements, times the spacing of their dtype."""
        gradients = [t for name, t in self.tensors.items() if name.startswith(GRADIENT)]
        count = sum(t.numel() for t in gradients)
        if not count:
            return 0.0
        squares = sum(self._norms(t, t)[1] ** 2 for t in gradients)
        return (squares / count) ** 0.5 * max(torch.finfo(t.dtype).eps for t in gradients)

    def gradient_error(self, other: Outcome) -> float:
        """The norm of the difference of all gradients, relative to the norm of these."""
        names = [name for name in self.tensors if name.startswith(GRADIENT)]
        pairs = [self._norms(self.tensors[name], other.tensors[name]) for name in names]
        off, norm = (sum(pair[i] ** 2 for pair in pairs) for i in range(2))
        return (off / max(norm, 1e-60)) ** 0.5

    def _norms(self, a: Tensor, b: Tensor) -> tuple[float, float]:
        """Norms of a - b and of a's finite elements, summed in float64 where the step ran, since a
        host is slow at a billion gradients, and piece by piece, since that device may be full.
        Infinite or undefined elements differ infinitely from any others but their like."""
        off = norm = 0.0
        pieces = (_real(t).flatten().split(PIECE) for t in (a, b))
        for mine, theirs in zip(*pieces, strict=True):
            x, y = (piece.to(self.device).double() for piece in (mine, theirs))
            alike = (x == y) | (x.isnan() & y.isnan())
            apart = torch.where(alike, 0.0, x - y).nan_to_num(nan=torch.inf)
            off += apart.square().sum().item()
            norm += torch.where(x.isfinite(), x, 0.0).square().sum().item()
        return off**0.5, norm**0.5


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def step(module: nn.Module, inputs: Inputs) -> Any:
    """Forward and backward: of the `loss` if there is one, else of ones for every output."""
    output = module(**inputs)
    loss = scalar_loss(output)
    leaves = [loss] if loss is not None else _differentiable(output)
    torch.autograd.backward(leaves, [torch.ones_like(leaf) for leaf in leaves])
    return output


def outcome(module: nn.Module, inputs: Inputs) -> Outcome:
    """One step from fixed random state; parameters, buffers and gradients are as before after."""
    with untouched(module):
        torch.manual_seed(SEED)
        output = step(module, inputs)
        found = {f"output {name}": t for name, t in _named(output)}
        gradients = ((n, p.grad) for n, p in module.named_parameters())
        found |= {f"{GRADIENT}{n}": g for n, g in gradients if g is not None}
        found |= {f"buffer {n}": b for n, b in module.named_buffers()}
        found["random state"] = torch.get_rng_state()
        kept = {name: t.detach().to("cpu", copy=True) for name, t in found.items()}
        return Outcome(kept, device_of(module))


def peak(module: nn.Module, inputs: Inputs) -> int:
    """Most bytes alive in one step beyond what was alive before it, gradients included."""
    with untouched(module):
        step(module, inputs)
        _clear(module)
        return peak_live_bytes(lambda: step(module, inputs), device_of(module))


def libraries(module: nn.Module, inputs: Inputs) -> int:
    """Bytes that a step leaves to the libraries it called: on CUDA cuBLAS keeps a workspace for
    each stream and thread that multiplied matrices on it. 0 on a CPU."""
    device = device_of(module)
    if device.type != "cuda":
        return 0
    with untouched(module):
        give_back(device)
        before = torch.cuda.memory_allocated(device)
        step(module, inputs)
        _clear(module)
        torch.cuda.synchronize(device)
        return max(0, torch.cuda.memory_allocated(device) - before)


def give_back(device: torch.device) -> None:
    """Free the workspaces that libraries keep, of streams and threads that are used no more too;
    the next product on each makes its own again."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch._C._cuda_clearCublasWorkspaces()  # pyright: ignore[reportPrivateUsage]


def watched(module: nn.Module, inputs: Inputs, probe: Probe) -> None:
    """One more step, op by op, of which `probe` remembers how many bytes were alive when."""
    with untouched(module), probe.watching(device_of(module)):
        step(module, inputs)


def seconds(first: nn.Module, second: nn.Module, inputs: Inputs) -> Timing:
    """Steps of two modules over the same parameters, in turn."""

    def run(module: nn.Module) -> Callable[[], None]:
        def call() -> None:
            _clear(module)
            step(module, inputs)

        return call

    with untouched(first), untouched(second):
        return compare(run(first), run(second), device_of(first), seconds=1.0, least=3)


@contextmanager
def untouched(module: nn.Module) -> Generator[None]:
    """Put buffers, gradients and the random state back."""
    device = device_of(module)
    devices = [device] if device.type == "cuda" else []
    buffers = [(b, b.clone()) for b in module.buffers()]
    gradients = [(p, p.grad) for p in module.parameters()]
    _clear(module)
    try:
        with torch.random.fork_rng(devices=devices), torch.enable_grad():
            yield
    finally:
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
        for parameter, gradient in gradients:
            parameter.grad = gradient


def device_of(module: nn.Module) -> torch.device:
    """Where the first parameter lies."""
    first = next(module.parameters(), None)
    return torch.device("cpu") if first is None else first.device


def _clear(module: nn.Module) -> None:
    for parameter in module.parameters():
        parameter.grad = None


def _tensors(output: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


def _named(output: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Tensors of an output by keys and places, so that one that is None shifts no other."""
    items: Any = None
    if isinstance(output, Mapping):
        items = output.items()
    elif isinstance(output, list | tuple):
        items = enumerate(output)
    if items is not None:
        for key, value in items:
            yield from _named(value, f"{name}.{key}" if name else str(key))
        return
    leaves = [output] if isinstance(output, Tensor) else _tensors(output)
    for i, leaf in enumerate(leaves):
        yield (f"{name}.{i}" if name and len(leaves) > 1 else name or str(i)), leaf


def _differentiable(output: Any) -> list[Tensor]:
    return [leaf for leaf in _tensors(output) if leaf.requires_grad]
