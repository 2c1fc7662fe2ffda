"""A graph is walked on the arguments that the model around it would give."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fxopt.capture import capture
from fxopt.decide.quality import Quality
from fxopt.decide.walk import Walk


def test_a_model_around_that_catches_errors_does_not_catch_the_walk() -> None:
    part = nn.Sequential(nn.Linear(4, 8), nn.ReLU())
    graph = capture(part, torch.randn(2, 4)).graph

    def run(call: Any, batch: Any, positions: Tensor | None) -> Sequence[Any]:
        try:
            return call([batch["x"] + 1])
        except Exception:  # as a model with a fallback would
            return [batch["x"]]

    x = torch.randn(3, 4)
    walk = Walk(graph, [{"x": x}], run, Quality("relative_error", per_position=False))
    walk.upto(len(walk.nodes) - 1)
    output: Any = graph.graph.output_node().args[0]
    assert torch.equal(walk.values(output[0])[0], part(x + 1))
