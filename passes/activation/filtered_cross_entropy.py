"""`cut_cross_entropy` whose backward leaves out the classes that get next to nothing.

    loss = linear_cross_entropy(x, weight, labels, filter_eps=2**-12)

The loss is exact. Of the gradient of a chunk's logits the classes that are below `filter_eps` in
every row take no part in the two products of the backward; what they add up to is kept as the
outer product of its sums. Pays where the model is sure of itself, as trained ones are: how many
classes that leaves is known on the batch alone, so no seconds are promised. The budget needs a row
for it (`relative_error`, measured against eager's gradients).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from fxopt.ir.rewrite import Candidate, Match
from fxopt.ir.workload import Scenario
from fxopt.passes.activation.cut_cross_entropy import CutCrossEntropy


@dataclass(frozen=True)
class FilteredCrossEntropy(CutCrossEntropy):
    """On request: `filter_eps` is the least gradient of a loss by a logit that counts."""

    filter_eps: float = 2.0**-12

    name: ClassVar[str] = "activation.filtered_cross_entropy"
    exact: ClassVar[bool] = False

    def candidates(self, match: Match, scenarios: Sequence[Scenario]) -> list[Candidate]:
        """Those of `cut_cross_entropy`, filtered."""
        more = {"filter_eps": self.filter_eps}
        return [
            replace(c, label=f"{c.label}-filtered", parameters={**c.parameters, **more})
            for c in super().candidates(match, scenarios)
        ]
