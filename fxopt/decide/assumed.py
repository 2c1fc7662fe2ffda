"""Errors of a model that has no weights: what rounding loses of random numbers.

A low-rank fit or a window loses what depends on the weights, so that nothing can be said of it.
Rounding loses about the same of all numbers of one distribution: here it rounds normal ones.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..ir.ops import attend
from ..ir.rewrite import Rewrite
from ..ir.site import AttentionInfo, ExpertsInfo, LinearInfo, Site
from .propose import Proposal, Proposals
from .statistics import Recorded

ROWS, LENGTH, PROMPT = 32, 1024, 896
"""Rows of a weight and of its inputs; tokens of a sequence, and how many of them are its prompt."""
UNKNOWN = "what it loses depends on the weights, and the model has none (meta device)"


def without_weights(proposals: Proposals) -> Proposals:
    """The proposals that can be judged without weights; the others are refused with that reason."""
    for where, found in proposals.by_site.items():
        unknown = [p.rewrite for p in found if not _known(p.rewrite)]
        proposals.by_site[where] = [p for p in found if _known(p.rewrite)]
        refused = proposals.refused.setdefault(where, []) if unknown else []
        refused += [(name, UNKNOWN) for name in dict.fromkeys(r.name for r in unknown)]
    return proposals


def _known(rewrite: Rewrite) -> bool:
    return rewrite.exact or bool(getattr(rewrite, "rounds", False))


class Assumed:
    """‖y - ŷ‖² / ‖y‖² of a site's output, by the kind of candidate and the size of the site.

    Heads of one attention share its output, so that each has its share of the error.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[object, ...], float] = {}

    def __call__(self, proposal: Proposal) -> float:
        site, candidate = proposal.site, proposal.candidate
        key = (site.info, candidate.rewrite, *sorted(candidate.parameters.items()))
        if isinstance(site.info, LinearInfo | ExpertsInfo):
            key = (site.info.in_features, site.info.dtype, *key[1:])
        if key not in self._known:
            self._known[key] = self._error(proposal)
        return self._known[key]

    def _error(self, proposal: Proposal) -> float:
        with torch.random.fork_rng([]), torch.no_grad():
            torch.manual_seed(0)
            recorded, exact = _stand_in(proposal.site)
            weights = Recorded(weight=recorded.weight)
            tensors = proposal.rewrite.prepare(proposal.match, proposal.candidate, weights)
            y = proposal.rewrite.emulate(
                proposal.match, proposal.candidate, tensors, recorded.inputs
            )
        return _squares(y.double() - exact.double()) / _squares(exact) / _shares(proposal.site)


def _stand_in(site: Site) -> tuple[Recorded, Tensor]:
    """What is recorded of a site of this size with normal numbers, and what it returns."""
    info = site.info
    if isinstance(info, LinearInfo):
        weight = torch.randn(ROWS, info.in_features).to(info.dtype)
        recorded = Recorded(weight=weight, inputs={"x": torch.randn_like(weight)})
        return recorded, recorded.exact()
    if isinstance(info, ExpertsInfo):
        weight = torch.randn(1, ROWS, info.in_features).to(info.dtype)
        rows = {"x": torch.randn_like(weight[0]), "expert": torch.zeros(ROWS, dtype=torch.int64)}
        recorded = Recorded(weight=weight, inputs=rows)
        return recorded, recorded.exact()
    assert isinstance(info, AttentionInfo)
    group = info.num_heads // info.num_kv_heads
    heads = (group, 1, 1)
    sizes = (info.head_dim, info.head_dim, info.value_dim)
    q, k, v = (
        torch.randn(1, n, LENGTH, size).to(info.dtype) for n, size in zip(heads, sizes, strict=True)
    )
    options: dict[str, Any] = {"scale": info.head_dim**-0.5, "causal": info.causal}
    inputs: dict[str, Any] = {"q": q, "k": k, "v": v, **options}
    return Recorded(inputs={**inputs, "prompt": PROMPT}), attend(**inputs)


def _shares(site: Site) -> int:
    """How many sites make the output that this one is a part of."""
    return site.info.num_kv_heads if isinstance(site.info, AttentionInfo) else 1


def _squares(y: Tensor) -> float:
    return y.double().square().sum().item()
