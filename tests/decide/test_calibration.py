"""Calibration data is split by sequence, checked, and never shared between its parts."""

from __future__ import annotations

import pytest
import torch

from fxopt.decide.calibration import bind, sequences_of, split
from fxopt.ir.errors import FxoptError

NAMES = ["input_ids", "attention_mask"]


def test_batches_become_single_sequences_in_order() -> None:
    ids = torch.arange(12).reshape(4, 3)
    rows = sequences_of({"input_ids": ids, "flag": True})
    assert [r["input_ids"].tolist() for r in rows] == [[r] for r in ids.tolist()]
    assert all(r["flag"] is True for r in rows)


def test_arguments_without_a_common_batch_stay_whole() -> None:
    batch = {"x": torch.zeros(2, 3), "table": torch.zeros(7, 3)}
    assert sequences_of(batch) == [batch]


@pytest.mark.parametrize("count", [3, 4, 6, 11])
def test_the_parts_are_disjoint_and_cover_everything(count: int) -> None:
    data = [torch.full((1, 4), i) for i in range(count)]
    parts = split(data, NAMES, given=True)
    seen = [[int(b["input_ids"][0, 0]) for b in p] for p in (parts.fit, parts.choose, parts.verify)]
    assert all(seen)
    assert sorted(i for part in seen for i in part) == list(range(count))
    assert not parts.notes


@pytest.mark.parametrize("count", [1, 2])
def test_fewer_than_three_sequences_are_one_note(count: int) -> None:
    parts = split([torch.zeros(count, 4, dtype=torch.long)], NAMES, given=True)
    assert parts.fit
    assert parts.verify
    assert len(parts.notes) == 1
    assert "cannot be split" in parts.notes[0]


def test_empty_calibration_is_an_error_with_a_way_out() -> None:
    with pytest.raises(FxoptError, match="no sequence"):
        split([], NAMES, given=True)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_named(bad: float) -> None:
    good = {"pixel_values": torch.zeros(1, 3)}
    with pytest.raises(FxoptError, match="sequence 1, argument 'pixel_values'"):
        split([good, {"pixel_values": torch.tensor([[0.0, bad, 0.0]])}], NAMES, given=True)


def test_positional_inputs_are_bound_by_name() -> None:
    ids, mask = torch.zeros(1, 2), torch.ones(1, 2)
    assert bind((ids, mask), NAMES) == {"input_ids": ids, "attention_mask": mask}
    with pytest.raises(FxoptError, match="3 positional values"):
        bind((ids, mask, mask), NAMES)
