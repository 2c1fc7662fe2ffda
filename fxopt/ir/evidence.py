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

    In `rows`, `before` is predicted of this plan and `predicted` of that choice.
    """

    row: str
    limit: float
    unit: str
    rows: list[RowResult]


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
