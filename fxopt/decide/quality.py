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
from scipy.special import stdtrit
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
IGNORED = -100
"""A label that does not count, as in torch's own cross entropy."""
RUNS, LEAST_RUNS, SHORTEST = 16, 4, 4
"""Runs of positions that an interval is told by, at best and at least; positions of one."""
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
    encoder_decoder: bool = False

    def additive(self, measured: float) -> float:
        """The measure in the form in which independent errors add."""
        return measured**2 if self.kind == "relative_error" else measured

    def measured(self, additive: float) -> float:
        """Inverse of `additive`."""
        return math.sqrt(max(additive, 0.0)) if self.kind == "relative_error" else additive

    def step(self, additive: float, more: float) -> float:
        """By how much an error of `additive` measures more where `more`, or less, is added."""
        if self.kind != "relative_error" or not more:
            return more
        # the difference of both roots, where it would be lost to rounding
        return more / (math.sqrt(max(additive + more, 0.0)) + math.sqrt(max(additive, 0.0)))

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

    def mask(self, batch: Batch, shape: Sequence[int]) -> Tensor | None:
        """What is no padding of an output [B, T, ...] of this `shape` [B, T], where that is known:
        the output is the decoder's where there is one."""
        mask = batch.get("decoder_attention_mask" if self.encoder_decoder else "attention_mask")
        return mask.bool() if isinstance(mask, Tensor) and mask.shape == shape else None

    def labels(self, batch: Batch, positions: Tensor | None) -> tuple[Tensor, Tensor]:
        """Indices of the rows of an output, flat, that have a label, and their labels.

        A causal model's are the tokens that follow, unless the batch has `labels`; a decoder's
        with an encoder likewise, of `decoder_input_ids`. FxoptError where there are none.
        """
        if positions is None:
            labels = self._whole(batch)
            rows = torch.arange(len(labels), device=labels.device)
        else:
            given, mask = batch.get("labels"), padding_of(batch)
            tokens = given if isinstance(given, Tensor) else _ids(batch, "input_ids")
            rows = (positions < tokens.shape[1] - 1).nonzero().flatten()
            labels = tokens[0, 1:][positions[rows]]
            if mask is not None:  # what follows the last token is padding
                labels = labels.where(mask[0, 1:][positions[rows]], IGNORED)
        counted = labels != IGNORED
        return rows[counted], labels[counted]

    def _whole(self, batch: Batch) -> Tensor:
        """The labels of a whole output, flat and without padding, as `Compiler.evaluate` has it."""
        given = batch.get("labels")
        if isinstance(given, Tensor):
            return _unpadded(given, self.mask(batch, given.shape[:2]))
        if not self.encoder_decoder:
            raise FxoptError(
                "Budget.loss_increase: the calibration data has no labels; add `labels` to its "
                "inputs, or use kl, relative_error or a metric"
            )
        tokens = _ids(batch, "decoder_input_ids")
        labels = torch.cat([tokens[:, 1:], torch.full_like(tokens[:, :1], IGNORED)], 1)
        mask = self.mask(batch, labels.shape)
        if mask is None:
            return labels.flatten()
        after = torch.cat([mask[:, 1:], torch.zeros_like(mask[:, :1])], 1)
        return labels.where(after, IGNORED)[mask]


def _ids(batch: Batch, name: str) -> Tensor:
    found = batch.get(name)
    return found if isinstance(found, Tensor) else first_tensor(batch)


def _unpadded(labels: Tensor, mask: Tensor | None) -> Tensor:
    return labels.flatten() if mask is None else labels[mask]


@dataclass(frozen=True)
class Measurement:
    """A quality measurement: `mean` is the row's value; `p99` over positions where there are
    any; `count` of positions or sequences. `upper` is what the mean of other data like this is
    below with 95 % confidence, by how the `sequences` differ; None of a single one. `within` is
    half of the 95 % interval of the mean in its additive form, by how `runs` of positions differ;
    None of too few."""

    mean: float
    p99: float
    count: int
    upper: float | None
    sequences: int
    within: float | None = None


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
        """How far `module` is from the original over the first `batches` sequences that count."""
        errors: list[Tensor] = []
        for i, batch in enumerate(self._watch(self.batches)):
            positions = self.quality.positions(batch)
            if positions is not None and positions.numel() == 0:
                continue
            if len(errors) == batches:
                break
            target = self._target(i)
            output = self._evaluate(module, batch, positions)
            found = divergence(self.quality, target, output, batch, positions)
            if len(found):
                errors.append(found)
        if not errors:
            raise FxoptError(self._nothing())
        values = torch.cat(errors).double()
        mean = self.quality.measured(values.mean().item())
        p99 = self.quality.measured(values.quantile(0.99).item()) if len(values) > 1 else mean
        upper = upper_bound([(e.double().mean().item(), len(e)) for e in errors])
        if upper is not None:
            upper = self.quality.measured(upper)
        parts = [(run.mean().item(), len(run)) for run in runs(errors)]
        within = half_width(parts) if len(parts) >= LEAST_RUNS else None
        return Measurement(mean, p99, len(values), upper, len(errors), within)

    def _nothing(self) -> str:
        if self.quality.kind == "loss_increase":
            return "calibration: no position of a part of it has a label; give more labelled data"
        return (
            f"calibration: no sequence of a part of it has a token past the prompt of "
            f"{self.quality.prompt} tokens, so nothing can be measured; give longer sequences, "
            "with less padding, or a workload with a shorter prompt"
        )

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


def upper_bound(parts: Sequence[tuple[float, int]], confidence: float = 0.95) -> float | None:
    """The one-sided bound of a mean over sequences of (mean, count of positions) each.

    Positions of one sequence err alike, so that sequences are what was drawn: the variance is that
    of a mean of clusters, and Student's t accounts for how few they are.
    """
    if len(parts) < 2:
        return None
    mean, error = _clustered(parts)
    return mean + float(stdtrit(len(parts) - 1, confidence)) * error


def half_width(parts: Sequence[tuple[float, int]], confidence: float = 0.95) -> float | None:
    """Half of the two-sided interval of such a mean."""
    if len(parts) < 2:
        return None
    return float(stdtrit(len(parts) - 1, (1 + confidence) / 2)) * _clustered(parts)[1]


def _clustered(parts: Sequence[tuple[float, int]]) -> tuple[float, float]:
    """The mean over at least two clusters of (mean, count), and its standard error."""
    count = sum(n for _, n in parts)
    mean = sum(value * n for value, n in parts) / count
    squares = sum((n / count) ** 2 * (value - mean) ** 2 for value, n in parts)
    return mean, math.sqrt(squares * len(parts) / (len(parts) - 1))


def runs(errors: Sequence[Tensor]) -> list[Tensor]:
    """Errors by position as runs of neighbours, about `RUNS` in all and none across sequences.

    Neighbours err alike, so that means of runs are what tells how a mean varies (batch means;
    Schmeiser, Batch size effects, 1982).
    """
    parts = max(1, RUNS // max(len(errors), 1))
    return [
        run
        for found in errors
        for run in found.double().tensor_split(max(1, min(parts, len(found) // SHORTEST)))
    ]


def divergence(
    quality: Quality, target: Tensor, output: Tensor, batch: Batch, positions: Tensor | None
) -> Tensor:
    """Additive error for each position (or one for the sequence), in nats or squared ratio."""
    kind = quality.kind
    if kind == "relative_error":
        difference = (output.double() - target.double()).square().sum()
        return (difference / target.double().square().sum().clamp_min(1e-300)).reshape(1)
    if kind == "loss_increase":
        rows, labels = quality.labels(batch, positions)
        return _loss(output, rows, labels) - _loss(target, rows, labels)
    return kl_divergence(by_row(target), by_row(output))


def class_axis(dimensions: int) -> int:
    """Where the classes of logits are: those of an image's points come as [B, classes, H, W]."""
    return 1 if dimensions == 4 else -1


def by_row(logits: Tensor) -> Tensor:
    """Logits as [rows, classes]."""
    return logits.movedim(class_axis(logits.ndim), -1).flatten(0, -2)


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


def _loss(logits: Tensor, rows: Tensor, labels: Tensor) -> Tensor:
    flat = by_row(logits)
    if len(rows) and int(rows[-1]) >= len(flat):
        raise FxoptError(
            f"Budget.loss_increase: labels for {int(rows[-1]) + 1} positions, but the model "
            f"returns logits of {len(flat)}; give one label for each"
        )
    return torch.nn.functional.cross_entropy(flat[rows].float(), labels, reduction="none")
