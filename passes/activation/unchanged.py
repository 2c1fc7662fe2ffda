"""What rewrites share after which an output is what it was: nothing is fitted, nothing errs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fxopt.ir.rewrite import Candidate, Match, SiteStatistics


class Unchanged:
    """`prepare` and `emulate` of a rewrite that leaves its site's output as it is."""

    def prepare(
        self, match: Match, candidate: Candidate, statistics: SiteStatistics
    ) -> dict[str, Tensor]:
        return {}

    def emulate(
        self,
        match: Match,
        candidate: Candidate,
        tensors: Mapping[str, Tensor],
        inputs: Mapping[str, Any],
    ) -> Tensor:
        """The recorded output `inputs["y"]`."""
        return inputs["y"]
