"""What one backward pass says, whatever the lengths of the sequences that it saw."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fxopt.capture import capture
from fxopt.decide import recorder
from fxopt.decide.quality import Quality


@pytest.mark.parametrize("lengths", [(600, 30), (30, 600), (200, 200)])
def test_a_sample_of_rows_stands_for_all_of_them(
    lengths: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64)).eval()
    captured = capture(model, torch.randn(1, 20, 64))
    (name,) = captured.inputs
    batches = [{name: torch.randn(1, length, 64)} for length in lengths]
    site = next(s for s in captured.sites if s.op == "0")

    def estimate(rows: int) -> float:
        def run(call: Any, batch: Any, _: Any) -> Any:
            return call(captured.arguments(**batch))

        monkeypatch.setattr(recorder, "ROWS", rows)
        quality = Quality("relative_error", per_position=False)
        found = recorder.collect(captured.graph, captured.sites, batches, run, 0, quality)
        return found.second_order(site, found.at(site).exact() * 0.01)

    whole = estimate(10_000)
    assert whole > 0
    # single draws of labels and rows: the rows' share is 64 of 630
    assert estimate(64) == pytest.approx(whole, rel=0.6)
