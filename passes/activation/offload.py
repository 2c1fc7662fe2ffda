"""A tensor saved for the backward -> a copy in host memory, saved instead.

    h = gelu(x);  saved: h                     backward: reads h
    h = gelu(x);  host = offload(h)            # after the last op of the forward that reads h
    ...                                        # the copy runs beside these
    landed(host, h);  saved: host              # the memory of h is free from here
                                               backward: h' = reload(host), some ops early;
                                               ...; arrived(h'); reads h'

Exact. Pays where the link to the host has time left: what it carries beside the ops between costs
nothing, the rest is waited for. Over a slow link `landed` and `reload` meet at the border, and h is
there all the time; a bound on the copies under way puts one earlier and the other later, at the
price of waiting. Not on a CPU, whose memory is the host's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from fxopt.ir.cost import OpCall
from fxopt.ir.rewrite import Candidate, Editor, Match, Refusal, Statistic
from fxopt.ir.saved import MARK, Carrier, Image
from fxopt.ir.site import Family, SavedInfo, Site
from fxopt.ir.workload import Scenario
from fxopt.kernels.offload_activation import arrived, landed, offload, reload
from fxopt.passes.activation.unchanged import Unchanged

HOST = Carrier(offload, landed, reload, arrived)


@dataclass(frozen=True)
class Offload(Unchanged):
    """`least` is the smallest tensor, in bytes, that is worth the launch of its copies; `depth`,
    how many copies each way are under way at most, are the bounds that are offered."""

    least: int = 2**20
    depth: tuple[int, ...] = (1, 0)

    name: ClassVar[str] = "activation.offload"
    family: ClassVar[Family] = "activation"
    workloads: ClassVar[frozenset[str]] = frozenset({"train"})
    version: ClassVar[int] = 1
    exact: ClassVar[bool] = True
    paper: ClassVar[str] = "https://arxiv.org/abs/2407.12117"
    needs: ClassVar[frozenset[Statistic]] = frozenset()

    def match(self, site: Site) -> Match | Refusal:
        info = site.info
        if not isinstance(info, SavedInfo):
            return Refusal("not a tensor that is saved for the backward")
        if info.device == "cpu":
            return Refusal("it lies in host memory: a copy there would free nothing")
        if not info.whole:
            return Refusal("its memory is more than the tensor, and the rest may be read as well")
        return Match(site)

    def candidates(self, match: Match, scenarios: Sequence[Scenario]) -> list[Candidate]:
        if _info(match).bytes < self.least:
            return []
        bounded = [Candidate(self.name, f"host{n}", {"depth": n}) for n in self.depth]
        return [Candidate(self.name, "host", {}), *bounded]

    def refusal(self, match: Match, scenarios: Sequence[Scenario]) -> str | None:
        return f"{_info(match).bytes} bytes: less than {self.least} are not worth two copies"

    def lower(self, match: Match, candidate: Candidate, scenario: Scenario) -> list[OpCall]:
        """The copies there and back."""
        return copies(_info(match).bytes)

    def apply(
        self, match: Match, candidate: Candidate, tensors: Mapping[str, Tensor], editor: Editor
    ) -> None:
        """Mark the node; where copies begin and end follows from the whole plan."""
        editor.node(match.site).meta[MARK] = Image(carrier=carrier(candidate))


def carrier(candidate: Candidate) -> Carrier:
    """What takes a tensor to the host and back as `candidate` says."""
    return replace(HOST, depth=candidate.parameters.get("depth"))


def copies(count: int) -> list[OpCall]:
    """The copies of so many bytes to the host and back."""
    size = float(count)
    return [
        OpCall("offload", f"offload[{count}]", 0.0, size, 0.0, host_bytes=size),
        OpCall("reload", f"reload[{count}]", 0.0, 0.0, size, host_bytes=size),
    ]


def _info(match: Match) -> SavedInfo:
    assert isinstance(match.site.info, SavedInfo)
    return match.site.info
