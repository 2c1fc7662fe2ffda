"""What a plan carries beside its decisions, for those who read it; nothing of it is replayed."""

from __future__ import annotations

from pydantic import Field

from .decision import PlanModel
from .errors import RowResult


class Trial(PlanModel):
    """A whole choice that the search realised and measured; `taken` is the one that became the
    plan. The quality of trials is measured on another part of the calibration data than the
    plan's totals."""

    rows: list[RowResult]
    holds: bool
    taken: bool = False


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
