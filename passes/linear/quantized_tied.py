"""Embeddings and the head that share a weight -> the same codes for both.

    x = embedding(weight, ids)              y = linear(h, weight)
    x = fxopt.quantized_embedding(packed, ids, scale, zero, bits, group_size)
    y = fxopt.quantized_linear(h, packed, scale, zero, bias, bits, group_size)

The embedding restores the rows that it reads; the head multiplies by the codes. Pays in weight
bytes, and in decoding, which reads the head whole for every token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fxopt.ir.cost import OpCall
from fxopt.ir.rewrite import Candidate, Editor, Match, Refusal, SiteStatistics, Statistic
from fxopt.ir.site import EmbeddingInfo, Family, GroupInfo, LinearInfo, Site
from fxopt.ir.workload import Scenario
from fxopt.kernels import quantized_embedding as embedding
from fxopt.kernels.quantized_linear import quantize
from fxopt.passes.linear import dense, formats, groups
from fxopt.passes.linear.formats import Integer
from fxopt.passes.linear.rounding import Rounding


@dataclass(frozen=True)
class QuantizedTied:
    """`bits` and `group_sizes` as those of `linear.quantized`."""

    bits: tuple[int, ...] = (8, 4)
    group_sizes: tuple[int, ...] = (64, 128)

    name: ClassVar[str] = "linear.quantized_tied"
    family: ClassVar[Family] = "linear"
    groups: ClassVar[str] = "tied"
    workloads: ClassVar[frozenset[str]] = dense.WORKLOADS
    version: ClassVar[int] = 1
    exact: ClassVar[bool] = False
    paper: ClassVar[str] = "https://arxiv.org/abs/2210.17323"
    needs: ClassVar[frozenset[Statistic]] = frozenset({Statistic.GRAM})

    def match(self, site: Site) -> Match | Refusal:
        if not isinstance(site.info, GroupInfo) or site.info.kind != self.groups:
            return Refusal(f"{site.family} site: the rewrite serves tied embeddings and heads")
        if reason := dense.refusal(site.info.members[-1]):
            return reason
        features = _head(site).in_features
        if not formats.integers(self.bits, self.group_sizes, features):
            return Refusal(f"no group size of {self.group_sizes} divides the {features} features")
        return Match(site)

    def candidates(self, match: Match, scenarios: Sequence[Scenario]) -> list[Candidate]:
        features = _head(match.site).in_features
        found = formats.integers(self.bits, self.group_sizes, features)
        return [Candidate(self.name, f.label, f.parameters) for f in found]

    def refusal(self, match: Match, scenarios: Sequence[Scenario]) -> str | None:
        """None: what matches has candidates."""
        return None

    def lower(self, match: Match, candidate: Candidate, scenario: Scenario) -> list[OpCall]:
        head, stored = _head(match.site), _format(candidate)
        rows = [_rows_call(m, stored, scenario) for m in groups.group_info(match).members[:-1]]
        return [*rows, stored.cost(head, scenario)]

    def prepare(
        self, match: Match, candidate: Candidate, statistics: SiteStatistics
    ) -> dict[str, Tensor]:
        """Codes for the sum of both relative errors, all rows read equally often: with the head's
        gram C, that of embedding and head is the error for C / tr(W C WT) + I / tr(W WT)."""
        head = statistics.members[-1]
        weight = dense.weight_of(head)

        def both() -> Rounding:
            gram = head.gram
            energy = (weight.double().T @ weight.double() * gram).sum()
            ratio = weight.double().square().sum() / energy.clamp_min(1e-300)
            eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
            return Rounding.of(gram * ratio + eye)

        tensors = _format(candidate).fit(weight, statistics.once("tied rounding", both))
        return dense.with_bias(tensors, head)

    def emulate(
        self,
        match: Match,
        candidate: Candidate,
        tensors: Mapping[str, Tensor],
        inputs: Mapping[str, Any],
    ) -> Tensor:
        x, stored = inputs["x"], _format(candidate)
        if inputs["member"] == len(groups.group_info(match).members) - 1:
            return stored.run(x, tensors, tensors.get("bias"))
        packed, scale, zero = (tensors[name] for name in stored.names)
        ids = x[..., 0]
        return embedding.REFERENCE(packed, ids, scale, zero, stored.bits, stored.group_size)

    def apply(
        self, match: Match, candidate: Candidate, tensors: Mapping[str, Tensor], editor: Editor
    ) -> None:
        stored = _format(candidate)
        *tables, head = groups.group_info(match).members
        # one Parameter under each of their names: tied as the weight was, wherever it is moved
        held = {n: nn.Parameter(tensors[n], requires_grad=False) for n in stored.names}
        for table in tables:
            ids: Any = editor.node(table).args[1]
            packed, scale, zero = (editor.tensor(table, n, held[n]) for n in stored.names)
            arguments = (packed, ids, scale, zero, stored.bits, stored.group_size)
            target = torch.ops.fxopt.quantized_embedding.default
            editor.replace(table, editor.call(table, target, arguments, {}))
        x, bias = dense.input_and_bias(editor.node(head))
        editor.replace(head, formats.insert(editor, head, stored, x, held, bias))


def _head(site: Site) -> LinearInfo:
    assert isinstance(site.info, GroupInfo)
    return dense.linear_info(Match(site.info.members[-1]))


def _format(candidate: Candidate) -> Integer:
    stored = formats.of(candidate.parameters)
    assert isinstance(stored, Integer)
    return stored


def _rows_call(table: Site, stored: Integer, scenario: Scenario) -> OpCall:
    """Reading rows of the codes; the bytes of all are the head's."""
    info = table.info
    assert isinstance(info, EmbeddingInfo)
    bits, group = stored.bits, stored.group_size
    scales = 2 * info.dtype.itemsize * (info.features // group)

    def make(random: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
        packed, scale, zero = quantize(random(info.rows, info.features), bits, group)
        return lambda ids: embedding.quantized_embedding(packed, ids, scale, zero, bits, group)

    return dense.embedding_call(
        "fxopt::quantized_embedding",
        f"b{bits}g{group}",
        info,
        scenario,
        row_bytes=info.features * bits // 8 + scales,
        make=make,
    )
