"""One run of a planned step, op by op, that tells how many bytes are alive at each."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from ..decide.verify import Watch

POINT = "fxopt_point"
"""Where a node's metadata say which item of the schedule it carries out."""


@dataclass
class Probe:
    """Watches the two halves of a step while it is `on`; `found` is the most bytes alive during
    each item of the schedule, beyond those before the step."""

    found: dict[int, int] = field(default_factory=dict[int, int])
    _watch: Watch | None = None

    @property
    def on(self) -> bool:
        return self._watch is not None

    @contextmanager
    def watching(self, device: torch.device) -> Generator[None]:
        """Count what is alive at each item of the steps that run meanwhile."""
        self.found.clear()
        try:
            with Watch(device) as self._watch:
                yield
        finally:
            self._watch = None

    def run(self, gm: fx.GraphModule, arguments: list[Any]) -> Any:
        """The graph's results. Arguments are taken out of the list, and die at their last use, as
        when the graph runs as Python."""
        assert self._watch is not None
        return _Watched(gm, self._watch, self.found).boxed_run(arguments)


class _Watched(fx.Interpreter):
    def __init__(self, gm: fx.GraphModule, watch: Watch, found: dict[int, int]) -> None:
        super().__init__(gm)
        self._watch, self._found = watch, found

    def run_node(self, n: fx.Node) -> Any:
        point = n.meta.get(POINT)
        if point is None:
            return super().run_node(n)
        self._watch.mark()
        result = super().run_node(n)
        self._found[point] = max(self._watch.peak, self._found.get(point, 0))
        return result
