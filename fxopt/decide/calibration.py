"""Calibration data: one sequence an item, split into fit, choose and verify."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..ir.errors import FxoptError
from ..ir.units import so_many

logger = logging.getLogger("fxopt")

Batch = dict[str, Any]
"""Arguments of the model's forward by name, batch size 1 wherever they have a batch."""


@dataclass(frozen=True)
class Calibration:
    """`fit` feeds statistics, `choose` the measured errors; `verify` is what the contract is
    measured on and is not looked at before. `given` is False where the example inputs stand in
    for calibration data; `notes` go to the report."""

    fit: tuple[Batch, ...]
    choose: tuple[Batch, ...]
    verify: tuple[Batch, ...]
    notes: tuple[str, ...] = ()
    given: bool = True

    def warn(self) -> None:
        """Say in the log, before anything is measured, what the data cannot tell."""
        for note in self.notes:
            logger.warning(note)


def split(items: Iterable[Any], names: Sequence[str], *, given: bool) -> Calibration:
    """Split inputs (tensors, tuples or dicts, of any batch size) by sequence.

    `names` are the forward's arguments in order; `given` is False when the example inputs stand
    in for calibration data. Sequences go round: one to verify, one to choose, the rest to fit.
    """
    sequences = [one for item in items for one in sequences_of(bind(item, names))]
    if not sequences:
        raise FxoptError(
            "calibration: no sequence in it; pass an iterable of inputs such as "
            "[{'input_ids': ids}, ...], or omit it to use example_inputs"
        )
    for i, sequence in enumerate(sequences):
        _check_values(sequence, i)
    notes = [] if given else ["calibration: none given, so the example inputs were used"]
    if len(sequences) < 3:
        notes.append(
            f"calibration: {so_many(len(sequences), 'sequence')} cannot be split in three; "
            "the parts overlap, so what was measured says less about other data"
        )
        first, last = sequences[0], sequences[-1]
        return Calibration((first,), (first,), (last,), tuple(notes), given)
    third = max(1, len(sequences) // 3)
    fit, choose = sequences[: -2 * third], sequences[-2 * third : -third]
    return Calibration(tuple(fit), tuple(choose), tuple(sequences[-third:]), tuple(notes), given)


def bind(item: Any, names: Sequence[str]) -> Batch:
    """One input as keyword arguments: a tensor is the first argument, a tuple the first few."""
    if isinstance(item, Mapping):
        return dict(item)
    values = item if isinstance(item, (tuple, list)) else (item,)
    if len(values) > len(names):
        raise FxoptError(
            f"an input has {so_many(len(values), 'positional value')}, the model takes "
            f"{len(names)}: {', '.join(names)}"
        )
    return dict(zip(names, values, strict=False))


def sequences_of(batch: Batch) -> list[Batch]:
    """The rows of a batch, each with batch size 1; as it is where arguments disagree."""
    sizes = {v.shape[0] for v in batch.values() if isinstance(v, Tensor) and v.ndim > 0}
    if len(sizes) != 1:
        return [batch]
    (size,) = sizes
    return [
        {
            name: value[i : i + 1] if isinstance(value, Tensor) and value.ndim > 0 else value
            for name, value in batch.items()
        }
        for i in range(size)
    ]


def _check_values(batch: Batch, index: int) -> None:
    for name, value in batch.items():
        if not isinstance(value, Tensor):
            continue
        if not value.numel():
            raise FxoptError(
                f"calibration: sequence {index}, argument {name!r} is empty (shape "
                f"{tuple(value.shape)}): nothing can be measured on it; leave it out"
            )
        if value.is_floating_point() and not value.isfinite().all():
            raise FxoptError(
                f"calibration: sequence {index}, argument {name!r} holds NaN or infinite values; "
                "remove the sequence or mend its preprocessing"
            )


def padding_of(batch: Batch) -> Tensor | None:
    """The 2-D padding mask [1, T] as booleans, if the batch has one."""
    mask = batch.get("attention_mask")
    if isinstance(mask, Tensor) and mask.ndim == 2:
        return mask.to(torch.bool)
    return None
