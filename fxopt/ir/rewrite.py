"""The contract of a rewrite: match, propose, price, prepare, emulate, apply."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, fx

from .cost import OpCall
from .site import Family, Site
from .workload import Scenario

T = TypeVar("T")
Parameters = Mapping[str, int | float | str | bool]


class Statistic(Enum):
    """What a rewrite needs to know of a site's calibration data."""

    GRAM = "gram"
    INPUTS = "inputs"


@dataclass(frozen=True)
class Match:
    """A site that a rewrite can serve; `extra` carries what matching found."""

    site: Site
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Refusal:
    """Why a rewrite does not serve a site."""

    reason: str


@dataclass(frozen=True)
class Candidate:
    """One way to rewrite one site. `label` is short and unique among the site's candidates."""

    rewrite: str
    label: str
    parameters: Parameters
    touches: tuple[str, ...] = ()


class SiteStatistics(Protocol):
    """What was recorded at one site on the `fit` part of the calibration data.

    Linear: `inputs` {"x": [T, in]} a sample of unpadded rows, `gram` E[x xT] as float64 [in, in]
    over all of them. A group of linears: those of its last member, and `members`. Attention:
    `inputs` holds the arguments of `attend` by name for a few sequences, "prompt" the number of
    tokens processed before decoding begins.
    """

    @property
    def weight(self) -> Tensor | None: ...
    @property
    def bias(self) -> Tensor | None: ...
    @property
    def inputs(self) -> Mapping[str, Any]: ...
    @property
    def gram(self) -> Tensor: ...
    @property
    def members(self) -> Sequence[SiteStatistics]: ...

    def once(self, name: str, make: Callable[[], T]) -> T:
        """`make()` of the first call: what candidates of one site share, a decomposition say. It
        is kept until another site is prepared."""
        ...


class Editor(Protocol):
    """The only way to change a graph; every edit is recorded for the diff."""

    def node(self, site: Site) -> fx.Node:
        """The node of `site` in the graph being edited."""
        ...

    def tensor(self, site: Site, name: str, value: Tensor) -> fx.Node:
        """Register `value` as `<module of the site>.<name>` (a Parameter if floating, else a
        buffer) and return a get_attr node that reads it."""
        ...

    def amend(self, site: Site, node: fx.Node, change: Callable[[Tensor], Tensor]) -> None:
        """Let `node`, which `tensor` returned, read what `change` makes of the value that it reads,
        of the same dtype and number of axes."""
        ...

    def call(
        self, site: Site, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> fx.Node:
        """Insert a call before the site's node; it inherits the site's module."""
        ...

    def replace(self, site: Site, new: fx.Node) -> None:
        """Let `new` stand for the site's node; parameters that nothing reads any more go."""
        ...

    def update(self, site: Site, **arguments: Any) -> None:
        """Change arguments of the site's node in place, by name; positional ones (`q` and `k` of
        an attention) where the node calls a Python function."""
        ...


class Rewrite(Protocol):
    """A frozen dataclass whose fields are its options. Nothing is kept on `self` between calls.

    One of groups has a class variable `groups` besides, the kind of `GroupInfo` that it serves
    (also the kind of `LossHeadInfo`: the others are not asked about it). Its
    `emulate` is called for each output of the group, with the inputs of that member and its index
    as `inputs["member"]`.

    One that rounds numbers and does nothing else says so with a class variable `rounds = True`:
    what it loses is about the same whatever the numbers are, so that it serves models without
    weights as well. Its `prepare` then gets a weight alone, no `inputs` and no `gram`: that on
    the meta device, whose tensors are shapes, or one of random numbers.
    """

    @property
    def name(self) -> str: ...
    @property
    def family(self) -> Family: ...
    @property
    def workloads(self) -> frozenset[str]: ...
    @property
    def version(self) -> int: ...
    @property
    def exact(self) -> bool: ...
    @property
    def paper(self) -> str: ...
    @property
    def needs(self) -> frozenset[Statistic]: ...

    def match(self, site: Site) -> Match | Refusal: ...

    def candidates(self, match: Match, scenarios: Sequence[Scenario]) -> list[Candidate]: ...

    def refusal(self, match: Match, scenarios: Sequence[Scenario]) -> str | None:
        """Why a match has no candidate for these scenarios, in numbers; None if it has some."""
        ...

    def lower(self, match: Match, candidate: Candidate, scenario: Scenario) -> list[OpCall]:
        """The op calls that stand at this site under the candidate, for the cost models."""
        ...

    def prepare(
        self, match: Match, candidate: Candidate, statistics: SiteStatistics
    ) -> dict[str, Tensor]:
        """Projection, packing, fit: the tensors that `apply` registers. Deterministic."""
        ...

    def emulate(
        self,
        match: Match,
        candidate: Candidate,
        tensors: Mapping[str, Tensor],
        inputs: Mapping[str, Any],
    ) -> Tensor:
        """What the site's node would return for its recorded `inputs` under the candidate."""
        ...

    def apply(
        self, match: Match, candidate: Candidate, tensors: Mapping[str, Tensor], editor: Editor
    ) -> None: ...


@runtime_checkable
class Masking(Protocol):
    """What a rewrite of attention that hides keys may have besides."""

    @property
    def near(self) -> bool:
        """Whether keys are hidden by how far they are, not by what they hold."""
        ...

    @property
    def decoding(self) -> bool:
        """Whether keys are hidden from decoded tokens alone, so that of these is said what is
        kept."""
        ...

    def is_mask(self, candidate: Candidate) -> bool:
        """Whether the candidate hides keys and changes nothing else: others have no kept mass."""
        ...

    def kept_mass(
        self, match: Match, candidate: Candidate, inputs: Mapping[str, Any], rows: Tensor
    ) -> Tensor:
        """The part of the attention of the queries `rows` [R] of the recorded `inputs` that falls
        on keys which they still see, exp(lse_S - lse) for what is left S: [B, H, R] in 0 to 1,
        every head of the op under the candidate."""
        ...


@runtime_checkable
class Varying(Protocol):
    """What a rewrite of attention whose cost follows from the data may have besides.

    Of its candidates for which `varies` holds, `density` is asked before anything is priced, and
    `lower` finds it of the site's head as `match.extra["density"]`, or nothing where there are no
    data. Where it is 1, the candidate is refused with the words of `idle`.
    """

    @property
    def idle(self) -> str:
        """Why a candidate under which nothing of the data is left out is none."""
        ...

    def varies(self, candidate: Candidate) -> bool:
        """Whether shapes alone do not say what the candidate costs."""
        ...

    def density(self, match: Match, candidate: Candidate, inputs: Mapping[str, Any]) -> Tensor:
        """The part of its work that the candidate does on the recorded `inputs`, as `lower` takes
        it: [KV], every head of the op under the candidate."""
        ...


def element_size(dtype: torch.dtype) -> int:
    """Bytes of one element of `dtype`."""
    return torch.empty((), dtype=dtype).element_size()
