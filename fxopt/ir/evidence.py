"""What a plan carries beside its decisions, for those who read it; nothing of it is replayed."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from .decision import Alternative, PlanModel, RewriteName
from .errors import RowResult


class Trial(PlanModel):
    """A whole choice that the search realised and measured; `taken` is the one that became the
    plan. The quality of trials is measured on another part of the calibration data than the
    plan's totals."""

    rows: list[RowResult]
    holds: bool
    taken: bool = False


class Distilled(PlanModel):
    """A block that was trained: ‖y − ŷ‖² / ‖y‖² of its outputs, ŷ for the inputs that the rewritten
    blocks before it make, on sequences that no step of its training saw. `steps` were taken."""

    block: str
    before: float
    after: float
    steps: int


class Looser(PlanModel):
    """What the solver would choose if `row` were allowed `limit` and all else stayed.

    In `rows`, `before` is what this plan measured (predicted, where nothing was measured), and
    `predicted` that value changed as the prediction changes. `solved` is False, and `rows` empty,
    where the solver found nothing better and did not prove that there is nothing, in its time.
    """

    row: str
    limit: float
    unit: str
    rows: list[RowResult]
    solved: bool = True


class Pair(PlanModel):
    """What attention and KV cache of the KV head `key` are as a whole, since they were chosen as
    one. Costs and errors of their two decisions hold with the other as chosen, and add up.

    `kept` is both as they were; `choices` are the two that `reason` (where both are rewritten) and
    `error_measured` (whether the error of both was, with this head alone changed) speak of.
    """

    key: str
    choices: list[str]
    kept: Alternative
    reason: str = ""
    error_measured: bool | None = None


class Price(PlanModel):
    """The shadow price of a limit: the fall of `objective`, for one `unit` more of `row`.

    From the relaxation of the program in which the plan was chosen, so it holds for small
    changes; 0 where the row does not bind. `used` is the share of the limit that the solver
    counted as taken when it chose.
    """

    row: str
    unit: str
    price: float
    objective: str
    objective_unit: str
    used: float


class Block(PlanModel):
    """A part of the graph before and after, as a unified diff of its calls.

    Lines read "<mark>%name = op(arguments) -> type at module", where the mark is " ", "-" or "+";
    a name that has a "-" and a "+" was rewritten. "at" is said of the node of a site, "in" of
    others. Modules and parameters are named within the block, so that equal layers are one block:
    `modules` lists them ("" is the model itself). `inputs` says for each of them in turn where a
    name that the block does not define comes from, as "module/name".
    """

    modules: list[str]
    lines: list[str]
    inputs: dict[str, list[str]] = Field(default_factory=dict)


class Generated(PlanModel):
    """The generated class that stands for `modules` in the rewritten model."""

    modules: list[str]
    text: str


Holder = Literal["gradients", "outputs", "kept", "codes", "offloaded", "again", "temporary"]
"""Who holds bytes in a training step: gradients of parameters, what the caller gets, tensors kept
for the backward, codes in their place, what is on its way to the host or back, what the backward
has made again, and all that is soon gone: results that no backward reads, workspaces."""


class Span(PlanModel):
    """Consecutive points of one layer, or of one module outside of layers, from `start` on."""

    name: str
    start: int


class Policy(PlanModel):
    """What happens to some of a step's saved tensors ("keep": nothing), and what that costs.

    `bytes` are theirs, of which `waiting` stay on the device in any form and `host` wait in host
    memory; `seconds` is what a step takes longer for all of them together.
    """

    rewrite: RewriteName
    label: str = ""
    tensors: int
    bytes: int
    waiting: int
    host: int = 0
    seconds: float = 0.0


class Memory(PlanModel):
    """Bytes alive over a training step, beyond the `weights` (parameters and buffers).

    Points are in the order of the program, the backward from point `border` on; each stands for a
    few ops in a row, and is the one of them with most bytes alive. `holders` has a value a point
    for each of those who hold any, as predicted; their sum is what is alive while the op runs.
    `measured` is the most alive meanwhile in one run (None: not measured). `limit` is what the
    budget allows of the sum, by its row `limited_by`; `peak_at` names the op of the largest.
    """

    weights: int
    border: int
    holders: dict[Holder, list[int]]
    spans: list[Span]
    policies: list[Policy]
    measured: list[int] | None = None
    limit: float | None = None
    limited_by: str = ""
    peak_at: str = ""

    @model_validator(mode="after")
    def _check_lengths(self) -> Memory:
        known = [*self.holders.values(), *([self.measured] if self.measured is not None else [])]
        lengths = {len(values) for values in known}
        if len(lengths) > 1:
            raise ValueError(f"holders and measured have {sorted(lengths)} points")
        return self

    @property
    def predicted(self) -> list[int]:
        """Bytes alive at each point, without the weights."""
        return [sum(values) for values in zip(*self.holders.values(), strict=True)]
