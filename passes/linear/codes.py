"""What the rewrites share that make one decision of several weights: the same codes for all."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from fxopt.ir.rewrite import Candidate, Match, Refusal, Statistic
from fxopt.ir.site import ExpertsInfo, Family, LinearInfo, Site
from fxopt.ir.workload import Scenario
from fxopt.passes.linear import dense, formats
from fxopt.passes.linear.formats import Integer


@dataclass(frozen=True)
class Codes(ABC):
    """`bits` and `group_sizes` as those of `linear.quantized`."""

    bits: tuple[int, ...] = (8, 4)
    group_sizes: tuple[int, ...] = (64, 128)

    name: ClassVar[str]
    family: ClassVar[Family] = "linear"
    workloads: ClassVar[frozenset[str]] = dense.WORKLOADS
    version: ClassVar[int] = 1
    exact: ClassVar[bool] = False
    paper: ClassVar[str] = "https://arxiv.org/abs/2210.17323"
    needs: ClassVar[frozenset[Statistic]] = frozenset({Statistic.GRAM})

    @abstractmethod
    def sizes(self, site: Site) -> LinearInfo | ExpertsInfo | Refusal:
        """Of the weight that is stored, or why it is left alone."""

    def match(self, site: Site) -> Match | Refusal:
        info = self.sizes(site)
        if isinstance(info, Refusal):
            return info
        if not formats.integers(self.bits, self.group_sizes, info.in_features):
            return Refusal(
                f"no group size of {self.group_sizes} divides the {info.in_features} input features"
            )
        return Match(site)

    def candidates(self, match: Match, scenarios: Sequence[Scenario]) -> list[Candidate]:
        info = self.sizes(match.site)
        assert not isinstance(info, Refusal)
        found = formats.integers(self.bits, self.group_sizes, info.in_features)
        return [Candidate(self.name, f.label, f.parameters) for f in found]

    def refusal(self, match: Match, scenarios: Sequence[Scenario]) -> str | None:
        """None: what matches has candidates."""
        return None


def format_of(candidate: Candidate) -> Integer:
    """The format that a candidate of `Codes` names."""
    stored = formats.of(candidate.parameters)
    assert isinstance(stored, Integer)
    return stored
