"""A tensor saved for the backward -> its codes in host memory, saved instead.

    h = gelu(x);  saved: h                     backward: reads h
    h = gelu(x);  codes, top = pack(h)         # the memory of h is free from here
    host = offload(codes), offload(top)        # the copies run beside the next ops
    landed(host, codes, top);  saved: host     backward: codes, top = reload(host), some ops early;
                                               ...; h' = unpack(codes, top); reads h'

Both rewrites in one: the backward reads what `quantized_saved` would give it, nothing stays on the
device, and of 16-bit tensors half as much crosses the link as `offload` sends, so that twice as
many are carried beside the ops; while the copies run, the device holds codes, not tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from fxopt.ir.cost import OpCall
from fxopt.ir.rewrite import Candidate, Editor, Match, Refusal, Statistic
from fxopt.ir.saved import MARK
from fxopt.ir.site import Family, Site
from fxopt.ir.workload import Scenario
from fxopt.passes.activation.offload import Offload, carrier, copies
from fxopt.passes.activation.quantized_saved import QuantizedSaved, packed_size
from fxopt.passes.activation.unchanged import Unchanged


@dataclass(frozen=True)
class QuantizedOffload(Unchanged):
    """The options of both: `bits` are what is offered, `least` bytes the smallest tensor."""

    bits: tuple[int, ...] = (8,)
    least: int = Offload.least

    name: ClassVar[str] = "activation.quantized_offload"
    family: ClassVar[Family] = "activation"
    workloads: ClassVar[frozenset[str]] = frozenset({"train"})
    version: ClassVar[int] = 1
    exact: ClassVar[bool] = False
    paper: ClassVar[str] = "https://arxiv.org/abs/2111.11124"
    needs: ClassVar[frozenset[Statistic]] = frozenset()

    def match(self, site: Site) -> Match | Refusal:
        found = self._codes.match(site)
        return found if isinstance(found, Refusal) else self._host.match(site)

    def candidates(self, match: Match, scenarios: Sequence[Scenario]) -> list[Candidate]:
        return [
            Candidate(
                self.name, f"{codes.label}-{host.label}", {**codes.parameters, **host.parameters}
            )
            for codes in self._codes.candidates(match, scenarios)
            for host in self._host.candidates(match, scenarios)
        ]

    def refusal(self, match: Match, scenarios: Sequence[Scenario]) -> str | None:
        part = self._codes if self._host.candidates(match, scenarios) else self._host
        return part.refusal(match, scenarios)

    def lower(self, match: Match, candidate: Candidate, scenario: Scenario) -> list[OpCall]:
        """Packing and unpacking, and the copies between."""
        return [
            *self._codes.lower(match, candidate, scenario),
            *copies(packed_size(match, candidate)),
        ]

    def apply(
        self, match: Match, candidate: Candidate, tensors: Mapping[str, Tensor], editor: Editor
    ) -> None:
        """Mark the node; what is called where follows from the whole plan."""
        self._codes.apply(match, candidate, tensors, editor)
        meta = editor.node(match.site).meta
        meta[MARK] = replace(meta[MARK], carrier=carrier(candidate))

    @property
    def _codes(self) -> QuantizedSaved:
        return QuantizedSaved(self.bits)

    @property
    def _host(self) -> Offload:
        return Offload(self.least)
