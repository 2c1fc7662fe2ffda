"""Embeddings and the head that share a weight -> the same codes for both.

    x = embedding(weight, ids)              y = linear(h, weight)
    x = fxopt.quantized_embedding(packed, ids, scale, zero, bits, group_size)
    y = fxopt.quantized_linear(h, packed, scale, zero, bias, bits, group_size)

The embedding restores the rows that it reads; the head multiplies by the codes. Pays in weight
bytes, and in decoding, which reads the head whole for every token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fxopt.ir.cost import OpCall
from fxopt.ir.rewrite import Candidate, Editor, Match, Refusal, SiteStatistics
from fxopt.ir.site import EmbeddingInfo, GroupInfo, LinearInfo, Site
from fxopt.ir.workload import Scenario
from fxopt.kernels import quantized_embedding as embedding
from fxopt.kernels.quantized_linear import quantize
from fxopt.passes.linear import dense, formats, groups
from fxopt.passes.linear.codes import Codes, format_of
from fxopt.passes.linear.formats import Integer
from fxopt.passes.linear.rounding import Rounding


@dataclass(frozen=True)
class QuantizedTied(Codes):
    """`bits` and `group_sizes` as those of `linear.quantized`."""

    name: ClassVar[str] = "linear.quantized_tied"
    groups: ClassVar[str] = "tied"

    def sizes(self, site: Site) -> LinearInfo | Refusal:
        if not isinstance(site.info, GroupInfo) or site.info.kind != self.groups:
            return Refusal(f"{site.family} site: the rewrite serves tied embeddings and heads")
        head = site.info.members[-1]
        return dense.refusal(head) or dense.linear_info(Match(head))

    def lower(self, match: Match, candidate: Candidate, scenario: Scenario) -> list[OpCall]:
        *tables, head = groups.group_info(match).members
        stored = format_of(candidate)
        rows = [_rows_call(table, stored, scenario) for table in tables]
        return [*rows, stored.cost(dense.linear_info(Match(head)), scenario)]

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

        tensors = format_of(candidate).fit(weight, statistics.once("tied rounding", both))
        return dense.with_bias(tensors, head)

    def emulate(
        self,
        match: Match,
        candidate: Candidate,
        tensors: Mapping[str, Tensor],
        inputs: Mapping[str, Any],
    ) -> Tensor:
        x, stored = inputs["x"], format_of(candidate)
        if inputs["member"] == len(groups.group_info(match).members) - 1:
            return stored.run(x, tensors, tensors.get("bias"))
        packed, scale, zero = (tensors[name] for name in stored.names)
        ids = x[..., 0]
        return embedding.REFERENCE(packed, ids, scale, zero, stored.bits, stored.group_size)

    def apply(
        self, match: Match, candidate: Candidate, tensors: Mapping[str, Tensor], editor: Editor
    ) -> None:
        stored = format_of(candidate)
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
