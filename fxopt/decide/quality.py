"""The quality row: how far a rewritten model is from the original, on given sequences.

Every measure has an additive form, in which independent errors add up, so that the solver can
work with it: KL and loss as they are, the relative error squared.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..ir.errors import FxoptError
from .calibration import Batch, padding_of

Kind = Literal["kl", "loss_increase", "relative_error", "metric"]
QUALITIES: dict[str, Kind] = {
    "kl": "kl",
    "loss_increase": "loss_increase",
    "relative_error": "relative_error",
    "metric_drop": "metric",
}
"""By the budget's row."""
Evaluate = Callable[[Any, Batch, Tensor | None], Tensor]
"""(module, batch, positions [P] or None) -> output of interest; logits of those positions."""


@dataclass(frozen=True)
class Quality:
    """What is measured and where: `prompt` > 0 counts only positions from there on (a share of
    the sequence where it is shorter), because those are the ones that are generated."""

    kind: Kind
    per_position: bool
    prompt: int = 0
    new_tokens: int = 0

    def additive(self, measured: float) -> float:
        """The measure in the form in which independent errors add."""
        return measured**2 if self.kind == "relative_error" else measured

    def measured(self, additive: float) -> float:
        """Inverse of `additive`."""
        return math.sqrt(max(additive, 0.0)) if self.kind == "relative_error" else additive

    def prompt_of(self, length: int) -> int:
        """Tokens of a sequence of `length` that count as its prompt: at most what the workload
        says, and few enough to leave what is generated (at least half of a short sequence)."""
        if self.prompt == 0 or length < 2:
            return 0
        return max(1, min(self.prompt, length - min(self.new_tokens, length // 2)))

    def positions(self, batch: Batch) -> Tensor | None:
        """Indices of the positions that count in this sequence; None for whole outputs."""
        if not self.per_position:
            return None
        mask, ids = padding_of(batch), first_tensor(batch)
        length = ids.shape[1]
        start = self.prompt_of(length)
        chosen = torch.arange(start, length, device=ids.device)
        return chosen if mask is None else chosen[mask[0, start:length]]


@dataclass(frozen=True)
class Measurement:
    """A quality measurement: `mean` is the row's value; `p99` over positions where there are
    any; `count` of positions or sequences."""

    mean: float
    p99: float
    count: int


def first_tensor(batch: Batch) -> Tensor:
    """The first tensor argument: its dimension 1 is the sequence."""
    return next(v for v in batch.values() if isinstance(v, Tensor))


class Reference:
    """Outputs of the original on a set of sequences, computed once and kept while they fit.

    `limit` is the number of bytes worth keeping; beyond it they are computed again. `watch`
    iterates over the sequences of a measurement, and may count them.
    """

    def __init__(
        self,
        quality: Quality,
        evaluate: Evaluate,
        original: Any,
        batches: Sequence[Batch],
        *,
        limit: int = 2**30,
        watch: Callable[[Sequence[Batch]], Iterable[Batch]] = iter,
    ) -> None:
        self.quality = quality
        self.batches = tuple(batches)
        self._evaluate = evaluate
        self._original = original
        self._limit = limit
        self._watch = watch
        self._kept: dict[int, Tensor] = {}

    def measure(self, module: Any, batches: int | None = None) -> Measurement:
        """How far `module` is from the original over the first `batches` sequences."""
        errors: list[Tensor] = []
        for i, batch in enumerate(self._watch(self.batches[:batches])):
            positions = self.quality.positions(batch)
            if positions is not None and positions.numel() == 0:
                continue
            target = self._target(i)
            output = self._evaluate(module, batch, positions)
            errors.append(divergence(self.quality.kind, target, output, batch, positions))
        values = torch.cat(errors).double() if errors else torch.zeros(1, dtype=torch.float64)
        mean = self.quality.measured(values.mean().item())
        p99 = self.quality.measured(values.quantile(0.99).item()) if len(values) > 1 else mean
        return Measurement(mean, p99, len(values))

    def _target(self, i: int) -> Tensor:
        if i in self._kept:
            return self._kept[i]
        batch = self.batches[i]
        output = self._evaluate(self._original, batch, self.quality.positions(batch))
        if output.isnan().any():
            raise FxoptError(
                f"calibration: the model itself returns NaN for sequence {i} of the part that is "
                "measured; remove the sequence, or see which layer makes it (float16 overflows)"
            )
        if sum(t.nbytes for t in self._kept.values()) + output.nbytes <= self._limit:
            self._kept[i] = output
        return output


def divergence(
    kind: Kind, target: Tensor, output: Tensor, batch: Batch, positions: Tensor | None
) -> Tensor:
    """Additive error for each position (or one for the sequence), in nats or squared ratio."""
    if kind == "relative_error":
        difference = (output.double() - target.double()).square().sum()
        return (difference / target.double().square().sum().clamp_min(1e-300)).reshape(1)
    if kind == "loss_increase":
        labels = _labels(batch, positions)
        count = labels.shape[0]
        return _loss(output, labels, count) - _loss(target, labels, count)
    return kl_divergence(target.flatten(0, -2), output.flatten(0, -2))


def kl_divergence(target: Tensor, output: Tensor) -> Tensor:
    """KL(target || output) in nats for logits [P, classes], in float32, a few rows at a time."""
    rows = max(1, 2**24 // max(target.shape[-1], 1))
    parts: list[Tensor] = []
    for p, q in zip(target.split(rows), output.split(rows), strict=True):
        log_p, log_q = p.float().log_softmax(-1), q.float().log_softmax(-1)
        # what the model rules out (a logit of -inf) has no share in the sum
        terms = torch.where(log_p == -torch.inf, 0.0, log_p.exp() * (log_p - log_q))
        parts.append(terms.sum(-1))
    return torch.cat(parts)


def _labels(batch: Batch, positions: Tensor | None) -> Tensor:
    labels = batch.get("labels")
    ids = labels if isinstance(labels, Tensor) else first_tensor(batch)
    if positions is None:
        return ids.flatten()
    return ids[0, 1:][positions[positions < ids.shape[1] - 1]]


def _loss(logits: Tensor, labels: Tensor, count: int) -> Tensor:
    flat = logits.flatten(0, -2)[:count].float()
    return torch.nn.functional.cross_entropy(flat, labels, reduction="none")
