"""Linear head and cross-entropy of a training step -> one op that stores no logits.

    logits = linear(x, weight); loss = cross_entropy(logits.float().view(-1, V), labels)
    loss = linear_cross_entropy(x, weight, labels)     # logits of `chunk` tokens at a time

Exact up to the order of sums. Pays in nothing where the loss is a mean or a sum: logits are made
once, and their gradient taken to those of x and weight at once. A loss a token, and float16, make
them a second time in the backward, one product more. Where the model returns the logits, None
stands in their place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from fxopt.ir.cost import OpCall
from fxopt.ir.rewrite import (
    Candidate,
    Editor,
    Match,
    Refusal,
    Statistic,
    element_size,
)
from fxopt.ir.site import Family, LossHeadInfo, Site
from fxopt.ir.workload import Scenario
from fxopt.kernels.cut_cross_entropy import cut_cross_entropy, cut_cross_entropy_sum
from fxopt.kernels.cut_cross_entropy import linear_cross_entropy as LOSS
from fxopt.kernels.cut_cross_entropy.op import cut_cross_entropy_backward, scaled
from fxopt.kernels.cut_cross_entropy.reference import workspace
from fxopt.passes.activation.unchanged import Unchanged

__all__ = ["LOSS", "CutCrossEntropy", "filter_eps", "rechunk", "scale_in_place", "workspace_of"]

OPS = (cut_cross_entropy, cut_cross_entropy_sum, cut_cross_entropy_backward)
EARLY = cut_cross_entropy_sum
"""Makes gradients in the forward: to run it again would make them again."""


@dataclass(frozen=True)
class CutCrossEntropy(Unchanged):
    """Chosen where the budget asks for it: bits and the returned logits differ."""

    chunks: tuple[int, ...] = (64, 256, 1024, 4096)

    name: ClassVar[str] = "activation.cut_cross_entropy"
    family: ClassVar[Family] = "activation"
    workloads: ClassVar[frozenset[str]] = frozenset({"train"})
    version: ClassVar[int] = 1
    exact: ClassVar[bool] = True
    paper: ClassVar[str] = "https://arxiv.org/abs/2411.09009"
    needs: ClassVar[frozenset[Statistic]] = frozenset()
    groups: ClassVar[str] = "loss_head"

    def match(self, site: Site) -> Match | Refusal:
        if not isinstance(site.info, LossHeadInfo):
            return Refusal("not the logits of a loss")
        return Refusal(site.blocked) if site.blocked is not None else Match(site)

    def candidates(self, match: Match, scenarios: Sequence[Scenario]) -> list[Candidate]:
        """From the largest chunk, which is fastest, to the smallest."""
        rows = _info(match).rows
        return [
            Candidate(self.name, f"rows{chunk}", {"chunk": chunk})
            for chunk in sorted(self.chunks, reverse=True)
            if 2 * chunk <= rows
        ]

    def refusal(self, match: Match, scenarios: Sequence[Scenario]) -> str | None:
        """Why there is no candidate, in numbers; None if there are some."""
        if self.candidates(match, scenarios):
            return None
        return (
            f"the loss has {_info(match).rows} rows; the smallest chunk, {min(self.chunks)}, pays "
            f"from {2 * min(self.chunks)}"
        )

    def lower(self, match: Match, candidate: Candidate, scenario: Scenario) -> list[OpCall]:
        """Forward and backward of the op, without biases, smoothing and the like."""
        info, chunk = _info(match), _chunk(candidate)
        products = 2 + info.trains + info.again
        passes = -(-info.rows // chunk)
        size = element_size(info.dtype)
        weight, logits = (n * info.classes * size for n in (info.features, info.rows))
        needs = [True, info.trains, False]
        of = torch.empty((info.rows, info.features), dtype=info.dtype, device="meta")
        head = torch.empty((info.classes, info.features), dtype=info.dtype, device="meta")
        return [
            OpCall(
                op="fxopt::cut_cross_entropy",
                key=f"cut_cross_entropy/r{info.rows}d{info.features}v{info.classes}"
                f"{str(info.dtype).removeprefix('torch.')}/c{chunk}"
                f"{'/again' if info.again else ''}{'' if info.trains else '/frozen'}",
                flops=2.0 * products * info.rows * info.features * info.classes,
                bytes_read=float(passes * products * weight + 4 * logits),
                bytes_written=float(2 * logits),
                temporary_bytes=workspace(of, head, 0.0, needs, chunk, filter_eps(candidate)),
                launches=passes * (products + 1),
                run=_runner(info, chunk),
            )
        ]

    def apply(
        self, match: Match, candidate: Candidate, tensors: Mapping[str, Tensor], editor: Editor
    ) -> None:
        """Say the chunk; the loss is put in place while the step is traced."""
        editor.update(match.site, chunk=_chunk(candidate))


def _info(match: Match) -> LossHeadInfo:
    info = match.site.info
    assert isinstance(info, LossHeadInfo)
    return info


def _chunk(candidate: Candidate) -> int:
    return int(candidate.parameters["chunk"])


def filter_eps(candidate: Candidate) -> float:
    """The least gradient of a loss by a logit that counts; 0: all do."""
    return float(candidate.parameters.get("filter_eps", 0.0))


def _runner(info: LossHeadInfo, chunk: int) -> Any:
    def make(device: Any) -> Any:
        kind: dict[str, Any] = {"dtype": info.dtype, "device": device}
        hidden = torch.randn(info.rows, info.features, **kind).requires_grad_()
        weight = torch.randn(info.classes, info.features, **kind).requires_grad_(info.trains)
        labels = torch.zeros(info.rows, dtype=torch.int64, device=device)
        leaves = [hidden, weight] if info.trains else [hidden]

        def call() -> Any:
            with torch.enable_grad():
                reduction = "none" if info.again else "sum"
                loss = LOSS(hidden, weight, labels, reduction=reduction, chunk=chunk)
                return torch.autograd.grad(loss.sum(), leaves)

        return call

    return make


def workspace_of(node: fx.Node) -> int:
    """Bytes that a node of a traced step takes beside its result."""
    if node.target not in OPS:
        return 0
    values: list[Any] = [a.meta["val"] if isinstance(a, fx.Node) else a for a in node.args]
    start = 2 if node.target is cut_cross_entropy_backward else 0
    needs, eps, softcap = values[-2], values[-3], values[-5]
    if node.target is cut_cross_entropy:
        needs, eps, softcap = [False] * 3, 0.0, values[-4]
    return workspace(values[start], values[start + 1], softcap, needs, values[-1], eps)


def rechunk(graph: fx.Graph, chunk: int) -> None:
    """Let the ops of a traced step take `chunk` rows at a time."""
    for op in OPS:
        for node in graph.find_nodes(op="call_function", target=op):
            node.args = (*node.args[:-1], chunk)


def scale_in_place(graph: fx.Graph) -> None:
    """Scale gradients that were made in the forward where they lie.

    A traced graph multiplies them into new memory: as much again as the weight. Where the graph
    is kept for another backward, that is what still happens (`scaled`).
    """
    for op in graph.find_nodes(op="call_function", target=EARLY):
        for part in list(op.users):
            product = next(iter(part.users), None)
            if part.args[1] not in (2, 3, 4) or product is None or len(part.users) > 1:
                continue
            if product.target is torch.ops.aten.mul.Tensor and product.args[0] is part:
                product.target = scaled
                # views of it were traced over this value: they must be seen to share its memory
                part.meta["val"] = product.meta["val"]
