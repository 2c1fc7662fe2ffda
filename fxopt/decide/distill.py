"""Distillation: what rewrites of linears registered, trained block by block to the original.

Both graphs are walked once, all sequences together. Where the rewritten one comes to a block with
tensors to train, it holds the block's inputs as the rewritten blocks before it make them, and the
original has walked on to what the block should return.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..ir.distill import Distill
from ..ir.evidence import Distilled
from ..ir.site import GroupInfo, Site
from .calibration import Batch, padding_of
from .quality import Quality
from .recorder import Run
from .walk import Walk

CHECKS = 20
"""Times that a block is measured on the sequences held out, over all of its steps."""

Trained = Sequence[tuple[Site, Sequence[nn.Parameter]]]
"""Sites with the parameters that their rewrites registered in the rewritten graph."""


@dataclass(frozen=True)
class Block:
    """A module whose `trained` parameters the nodes `start` to `end` (not included) of the
    rewritten graph read. `outputs` are pairs of a node of the original, which is alive where the
    node at `border` comes next, and the node that stands for it."""

    name: str
    trained: list[nn.Parameter]
    start: int
    end: int
    border: int
    outputs: list[tuple[fx.Node, fx.Node]]


@dataclass
class Outcome:
    """The blocks that were reached, of `count` with anything to train; whether Ctrl-C ended it;
    how many others were `left_out`."""

    count: int
    blocks: list[Distilled] = field(default_factory=list[Distilled])
    interrupted: bool = False
    left_out: int = 0


def trains(site: Site) -> bool:
    """Whether what is registered at `site` may be trained: a table that embeddings read as well
    belongs to two blocks."""
    tied = isinstance(site.info, GroupInfo) and site.info.kind == "tied"
    return site.family == "linear" and not tied


def find_blocks(
    original: fx.GraphModule, rewritten: fx.GraphModule, now: Mapping[str, str], trained: Trained
) -> tuple[list[Block], int]:
    """The blocks of `trained`, in the order of the graph, and how many more there would be.

    `now` names the nodes that stand for nodes of the original; others of equal name are the same.
    A block none of whose outputs is there in both graphs is left out, as is one that begins before
    another ends.
    """
    before: list[fx.Node] = list(original.graph.nodes)
    after: list[fx.Node] = list(rewritten.graph.nodes)
    by_name, stand_in = ({n.name: n for n in nodes} for nodes in (before, after))
    modules = [_module([_fqn(by_name[m.node]) for m in site.members]) for site, _ in trained]
    by_module: dict[str, list[nn.Parameter]] = {}
    for module, (_, parameters) in zip(modules, trained, strict=True):
        outermost = min((m for m in modules if _below(module, m)), key=len)
        by_module.setdefault(outermost, []).extend(parameters)
    found: list[Block] = []
    for name, parameters in by_module.items():
        names = _names(rewritten, parameters)
        start = min(i for i, n in enumerate(after) if _reads(n, names))
        end, border = (_end(nodes, name) for nodes in (after, before))
        computed, later = set(after[start:end]), set(before[border:])
        outputs = [
            (old, new)
            for old in before[:border]
            if _below(_fqn(old), name) and _is_real(old) and not later.isdisjoint(old.users)
            for new in [stand_in.get(now.get(old.name, old.name))]
            if new in computed
        ]
        if outputs:
            found.append(Block(name, parameters, start, end, border, outputs))
    apart = _apart(sorted(found, key=lambda block: block.start))
    return apart, len(by_module) - len(apart)


def _end(nodes: Sequence[fx.Node], module: str) -> int:
    """Behind the last node of a module; what returns is behind the model itself."""
    own = (i for i, n in enumerate(nodes) if n.op != "output" and _below(_fqn(n), module))
    return 1 + max(own)


def _apart(blocks: Iterable[Block]) -> list[Block]:
    """Without those that begin before the one before them ends, in either graph."""
    found: list[Block] = []
    for block in blocks:
        if not found or (block.start >= found[-1].end and block.border >= found[-1].border):
            found.append(block)
    return found


def distil(
    original: fx.GraphModule,
    rewritten: fx.GraphModule,
    blocks: Sequence[Block],
    batches: Sequence[Batch],
    run: Run,
    quality: Quality,
    how: Distill,
    *,
    until: float = float("inf"),
    watch: Callable[[Sequence[Block]], Iterable[Block]] = iter,
) -> Outcome:
    """Train the parameters of `blocks`, in place, one block after another.

    The last `how.holdout` of `batches`, at least one and not all, are held out. What is reached by
    the time `until` (of `time.monotonic`), or by Ctrl-C, stays; every block is at least as good on
    what is held out as it was. Holds what both graphs have alive between two blocks for all
    batches.
    """
    outcome = Outcome(len(blocks))
    if not blocks or time.monotonic() > until:
        return outcome
    held = min(max(1, round(how.holdout * len(batches))), len(batches) - 1)
    masks = [padding_of(batch) for batch in batches]
    try:
        with torch.no_grad():
            old, new = (Walk(graph, batches, run, quality) for graph in (original, rewritten))
            for block in watch(blocks):
                if time.monotonic() > until:
                    break
                old.upto(block.border)
                new.upto(block.start)
                # bound to no name: it ends before the next one is made
                found = _train(
                    _Segment(rewritten, block, old, new, masks), len(batches) - held, how, until
                )
                if found.steps:
                    outcome.blocks.append(found)
                elif time.monotonic() <= until:
                    outcome.count -= 1  # codes, without a gradient
    except KeyboardInterrupt:
        outcome.interrupted = True
    return outcome


def _train(segment: _Segment, count: int, how: Distill, until: float) -> Distilled:
    """Train on the first `count` sequences, and keep what is best on the others."""
    training, held = range(count), range(count, len(segment))
    steps = _Steps(segment.block.trained, how)
    before = best = segment.error(held)
    kept, waited, taken = steps.parameters(), 0, 0
    every = max(1, how.steps // CHECKS)
    generator = torch.Generator().manual_seed(how.seed)
    try:
        while taken < how.steps and waited < how.patience and time.monotonic() <= until:
            drawn = torch.randperm(count, generator=generator)[: how.batch].tolist()
            if not steps.take(segment, [training[i] for i in drawn], taken):
                break
            taken += 1
            if taken % every and taken < how.steps:
                continue
            error = segment.error(held)
            waited = 0 if error < best else waited + 1
            if error < best:
                best, kept = error, steps.parameters()
    finally:
        steps.restore(kept)
    name = segment.block.name or "(model)"
    return Distilled(block=name, before=before, after=best, steps=taken)


class _Steps:
    """Adam on wider copies of parameters, so that small steps are not lost to rounding."""

    def __init__(self, parameters: Sequence[nn.Parameter], how: Distill) -> None:
        self._parameters = parameters
        self._how = how
        self._wide = [p.detach().to(_wide(p.dtype), copy=True) for p in parameters]
        self._shares = [w.square().mean().sqrt().item() for w in self._wide]
        groups = [{"params": [wide]} for wide in self._wide]
        self._adam = torch.optim.Adam(groups, betas=(0.9, 0.99))

    def take(self, segment: _Segment, sequences: Sequence[int], taken: int) -> bool:
        """One step for these sequences; False where none of the parameters has a gradient."""
        gradients = segment.gradients(sequences, self._parameters)
        part = self._how.learning_rate * _schedule(taken, self._how.steps)
        for wide, share, group, gradient in zip(
            self._wide, self._shares, self._adam.param_groups, gradients, strict=True
        ):
            group["lr"] = part * share
            wide.grad = None if gradient is None else gradient.to(wide.dtype)
        self._adam.step()
        self.restore(self._wide)
        return any(gradient is not None for gradient in gradients)

    def parameters(self) -> list[Tensor]:
        """Copies of the parameters as they are."""
        return [p.detach().clone() for p in self._parameters]

    def restore(self, values: Sequence[Tensor]) -> None:
        """Let the parameters have these values."""
        for parameter, value in zip(self._parameters, values, strict=True):
            parameter.detach().copy_(value)


def _schedule(taken: int, steps: int) -> float:
    """The size of the next step, as a part of the largest: up over a tenth of the steps, since the
    first of Adam's know no scale, then down to 0."""
    return min(1.0, 10 * (taken + 1) / steps) * (1 - taken / steps)


class _Segment:
    """The nodes of one block with their inputs and the original's outputs, for each sequence."""

    def __init__(
        self,
        graph: fx.GraphModule,
        block: Block,
        old: Walk,
        new: Walk,
        masks: Sequence[Tensor | None],
    ) -> None:
        self.block = block
        self._graph = graph
        self._nodes = new.nodes[block.start : block.end]
        self._inputs = new.alive()
        targets = zip(*(old.values(node) for node, _ in block.outputs), strict=True)
        self._targets = [
            [_rows(y, mask) for y in ys] for ys, mask in zip(targets, masks, strict=True)
        ]
        self._masks = masks
        self._energy = [sum(_energy(y) for y in ys) for ys in self._targets]

    def __len__(self) -> int:
        return len(self._inputs)

    def error(self, sequences: Iterable[int]) -> float:
        """Σ‖y - ŷ‖² / Σ‖y‖² over these sequences."""
        off = sum(float(self._off(i)) for i in sequences)
        return off / max(sum(float(self._energy[i]) for i in sequences), 1e-300)

    def gradients(
        self, sequences: Sequence[int], parameters: Sequence[nn.Parameter]
    ) -> list[Tensor | None]:
        """Of the error over these sequences, times their number of rows: half precision holds
        no smaller numbers. None where a parameter has no gradient."""
        scale = sum(len(self._targets[i][0]) for i in sequences)
        scale /= max(sum(float(self._energy[i]) for i in sequences), 1e-300)
        total: list[Tensor | None] = [None] * len(parameters)
        for i in sequences:
            with torch.enable_grad():
                off = self._off(i) * scale
            if not off.requires_grad:
                continue
            found = torch.autograd.grad(off, parameters, allow_unused=True)
            total = [_sum(a, b) for a, b in zip(total, found, strict=True)]
        return total

    def _off(self, sequence: int) -> Tensor:
        interpreter = fx.Interpreter(self._graph)
        interpreter.env = dict(self._inputs[sequence])
        for node in self._nodes:
            interpreter.env[node] = interpreter.run_node(node)
        mask, targets = self._masks[sequence], self._targets[sequence]
        made = [_rows(interpreter.env[node], mask) for _, node in self.block.outputs]
        return torch.stack([_energy(y - t) for y, t in zip(made, targets, strict=True)]).sum()


def _rows(y: Any, mask: Tensor | None) -> Tensor:
    """The rows of an output that are no padding, where its rows are those of the mask."""
    rows = y.reshape(-1, y.shape[-1])
    return rows[mask.flatten()] if mask is not None and len(rows) == mask.numel() else rows


def _energy(y: Tensor) -> Tensor:
    return y.to(_wide(y.dtype)).square().sum()


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _sum(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    return other if one is None else one if other is None else one + other


def _fqn(node: fx.Node) -> str:
    return str(node.meta.get("fqn", ""))


def _module(names: Sequence[str]) -> str:
    """What holds all of these modules, up to its first number if it has one."""
    levels = zip(*(name.split(".") for name in names), strict=False)
    shared = [level[0] for level in takewhile(lambda level: len(set(level)) == 1, levels)]
    ends = [i for i, part in enumerate(shared, 1) if part.partition("@")[0].isdigit()]
    return ".".join(shared[: ends[0]] if ends else shared)


def _below(name: str, module: str) -> bool:
    return not module or name == module or name.startswith((f"{module}.", f"{module}@"))


def _is_real(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 0


def _reads(node: fx.Node, names: Collection[str]) -> bool:
    return any(n.op == "get_attr" and str(n.target) in names for n in node.all_input_nodes)


def _names(graph: fx.GraphModule, parameters: Sequence[nn.Parameter]) -> set[str]:
    wanted = {id(p) for p in parameters}
    return {n for n, p in graph.named_parameters(remove_duplicate=False) if id(p) in wanted}
