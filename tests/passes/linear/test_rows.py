"""Layers that read several rows of each token are priced by all of them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fxopt.capture import capture
from fxopt.ir.site import LinearInfo, rows_of
from fxopt.ir.workload import Scenario
from fxopt.passes.baseline import baseline_calls

TOKENS, WIDTH, PARTS = 13, 64, 4


class Folded(nn.Module):
    """`part` reads every quarter of a token, `flat` all quarters as rows, `whole` the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.part, self.flat = (nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.whole = nn.Linear(PARTS * WIDTH, 96)

    def forward(self, x: Tensor) -> Tensor:
        y = self.part(x.unflatten(-1, (PARTS, WIDTH)))
        flat = self.flat(y.reshape(-1, WIDTH))
        return self.whole(flat.reshape(x.shape))


def test_every_row_of_a_token_counts() -> None:
    sites = capture(Folded().eval(), torch.randn(2, TOKENS, PARTS * WIDTH)).sites
    found = {site.key: site for site in sites if isinstance(site.info, LinearInfo)}
    each = {key: site.info.rows_each for key, site in found.items()}
    assert each == {"part": PARTS, "flat": PARTS, "whole": 1}
    for scenario in (Scenario("prefill", 3, 40, 0), Scenario("decode", 3, 1, 40)):
        for key, site in found.items():
            rows = scenario.batch * scenario.queries * each[key]
            assert rows_of(site.info, scenario) == rows
            (kept,) = baseline_calls(site, scenario)
            assert kept.flops == 2 * rows * site.info.in_features * site.info.out_features


class Shifted(nn.Module):
    """A buffer of three rows fixes the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.folded = Folded()
        self.register_buffer("shift", torch.randn(3, 1, PARTS * WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.folded(x + self.shift)


def test_rows_of_a_batch_that_the_model_fixes_count_once() -> None:
    sites = capture(Shifted().eval(), torch.randn(3, TOKENS, PARTS * WIDTH)).sites
    each = {s.key: s.info.rows_each for s in sites if isinstance(s.info, LinearInfo)}
    assert each == {"folded.part": PARTS, "folded.flat": PARTS, "folded.whole": 1}
