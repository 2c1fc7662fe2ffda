"""Plans: the whole decision as data that can be read, edited, locked, saved and replayed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, PrivateAttr, ValidationError, model_validator
from torch import Tensor

from .budget import Budget
from .changes import PlanDiff
from .decision import KEEP, Alternative, Decision, PlanModel, Refused
from .distill import Distill
from .errors import PlanError, RowResult
from .evidence import Block, Distilled, Generated, Looser, Memory, Pair, Price, Trial
from .names import hint, select
from .store import read_plan, read_tensors, tensors_path, write_plan, write_text
from .workload import Forward, Generate, Several, Train

if TYPE_CHECKING:
    from networkx import DiGraph

__all__ = ["KEEP", "Alternative", "Decision", "Plan", "PlanDiff", "Refused"]

SCHEMA_VERSION = 1
EDITED = (
    "decisions were edited since: the totals are those of before, and of what was edited in the "
    "file costs and reasons too (Plan.lock takes costs along); fxopt.solve counts totals again"
)


def _version() -> str:
    return f"fxopt {import_module(__name__.partition('.')[0]).__version__}"


class Plan(PlanModel):
    """Every decision for one model, one workload and one budget, with its costs and reasons.

    `at` names the submodule that alone is rewritten, if any: keys and fingerprints are of that
    one. `fingerprint_structure` names the graph (always checked by `apply`), `fingerprint_weights`
    the values (checked where prepared `tensors` exist). `totals` are the rows of the budget, in
    the units that `RowResult` names, `baseline` what shares refer to; `outside` is what the model
    takes in a row beyond its sites, and the whole erred `error_scale` times as much as its sites
    added up: with these `fxopt.solve` decides again. `tensors` is what calibrated
    choices prepared, by choice and name; it is stored beside the JSON, and `prepared` is the
    SHA-256 of that file; `choices` is that of what was decided when the totals were counted, by
    which edits are noticed (`said`); `recover` is how they were trained after they were fitted, and
    `distilled` what that did to each block.
    `trials`, `prices`, `looser`, `untried` (installed rewrites that only `rewrites=` brings in),
    `blocks`, `sources`, `pairs` and `memory` (of a training step) are for readers: nothing of them
    is replayed.
    """

    schema_version: Literal[1] = SCHEMA_VERSION
    created_by: str = Field(default_factory=_version)
    budget: Budget
    workload: Annotated[Forward | Generate | Train | Several, Field(discriminator="kind")]
    hardware: dict[str, Any] = Field(default_factory=dict)
    at: str | None = None
    fingerprint_structure: str = ""
    fingerprint_weights: str = ""
    decisions: list[Decision] = Field(default_factory=list[Decision])
    refusals: list[Refused] = Field(default_factory=list[Refused])
    totals: list[RowResult] = Field(default_factory=list[RowResult])
    baseline: dict[str, float] = Field(default_factory=dict[str, float])
    outside: dict[str, float] = Field(default_factory=dict[str, float])
    error_scale: float = 1.0
    notes: list[str] = Field(default_factory=list[str])
    prepared: str | None = None
    choices: str = ""
    recover: Distill | None = None
    distilled: list[Distilled] = Field(default_factory=list[Distilled])
    trials: list[Trial] = Field(default_factory=list[Trial])
    prices: list[Price] = Field(default_factory=list[Price])
    looser: list[Looser] = Field(default_factory=list[Looser])
    untried: list[str] = Field(default_factory=list[str])
    blocks: list[Block] = Field(default_factory=list[Block])
    sources: list[Generated] = Field(default_factory=list[Generated])
    pairs: list[Pair] = Field(default_factory=list[Pair])
    memory: Memory | None = None
    _tensors: dict[str, Tensor] = PrivateAttr(default_factory=dict[str, Tensor])

    @model_validator(mode="after")
    def _check_keys(self) -> Plan:
        seen: set[tuple[str, str]] = set()
        for decision in self.decisions:
            site = decision.family, decision.key
            if site in seen:
                raise ValueError(f"two decisions for the {site[0]} site {site[1]!r}")
            seen.add(site)
        return self

    @property
    def tensors(self) -> dict[str, Tensor]:
        return self._tensors

    @tensors.setter
    def tensors(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = dict(tensors)

    @property
    def rewritten(self) -> list[Decision]:
        """The decisions that change the model."""
        return [decision for decision in self.decisions if decision.rewritten]

    def settle(self) -> None:
        """Note that totals, costs and reasons are those of the decisions as they are now."""
        self.choices = self._digest()

    def _digest(self) -> str:
        made = [(d.family, d.key, d.rewrite, d.label, d.parameters) for d in self.decisions]
        return hashlib.sha256(json.dumps(made, sort_keys=True).encode()).hexdigest()

    @property
    def said(self) -> list[str]:
        """The notes, and that the decisions are others than those that were counted, if so."""
        edited = self.choices and self.choices != self._digest()
        return [*self.notes, *([EDITED] if edited else [])]

    def find(self, key: str, family: str | None = None) -> Decision:
        """The decision at a site; PlanError with near names, or when two families have the key."""
        found = [d for d in self.decisions if d.key == key and family in (None, d.family)]
        if len(found) == 1:
            return found[0]
        if found:
            raise PlanError(
                f"{key!r} is a site of {' and '.join(d.family for d in found)}: name one"
            )
        known = [d.key for d in self.decisions if family in (None, d.family)]
        raise PlanError(f"the plan has no site {key!r}.{hint(key, known)}")

    def lock(
        self,
        pattern: str,
        rewrite: str | None = None,
        label: str | None = None,
        *,
        family: str | None = None,
    ) -> list[Decision]:
        """Lock the decisions that a name or `re:` pattern covers: as the plan has them, or as
        `rewrite`, "keep" being the original.

        With `rewrite` only sites of its family are meant ("keep": of all, or of `family`), and
        each must list it, and `label` where several fit, among its alternatives. Nothing changes
        when any of them refuses (PlanError).
        """
        if rewrite and rewrite != KEEP:
            family = family or rewrite.partition(".")[0]
        known = [d for d in self.decisions if family in (None, d.family)]
        names = set(select(pattern, (d.key for d in known), "site"))
        chosen = [d for d in known if d.key in names]
        if rewrite:
            for decision in chosen:
                decision.model_copy(deep=True).choose(rewrite, label)
        for decision in chosen:
            if rewrite:
                decision.choose(rewrite, label)
            decision.locked = True
        return chosen

    def check_rewrites(self, installed: Mapping[str, int]) -> None:
        """PlanError when a chosen rewrite is not installed (by name), or is another version."""
        for decision in self.rewritten:
            name, at = decision.rewrite, f"at {decision.key!r}"
            if name not in installed:
                raise PlanError(
                    f"the plan uses the rewrite {name!r} {at}, which is not installed."
                    f"{hint(name, installed)}"
                )
            if installed[name] != decision.version:
                raise PlanError(
                    f"the plan uses version {decision.version} of {name!r} {at}; version "
                    f"{installed[name]} is installed: make the plan again"
                )

    def diff(self, other: Plan) -> PlanDiff:
        """What changes from this plan to `other`."""
        return PlanDiff.between(self, other)

    def save(self, path: str | Path) -> Path:
        """Write the plan, and `tensors` beside it as `.safetensors`; each file in one step."""
        path = Path(path)
        tensors_path(path)  # refuses a name that is the tensors' own

        def text(digest: str | None) -> str:
            self.prepared = digest
            return self.model_dump_json(indent=2) + "\n"

        return write_plan(path, text, self._tensors)

    @classmethod
    def load(cls, path: str | Path, rewrites: Mapping[str, int] | None = None) -> Plan:
        """Read a plan, and its tensors where their file is; PlanError says what is wrong.

        `rewrites` maps the installed rewrites to their versions, to refuse others by name.
        """
        path = Path(path)
        data = read_plan(path, SCHEMA_VERSION)
        try:
            plan = cls.model_validate_json(data)
        except ValidationError as error:
            raise PlanError(_readable(path, error)) from None
        plan._tensors = read_tensors(tensors_path(path), plan.prepared) if plan.prepared else {}
        if rewrites is not None:
            plan.check_rewrites(rewrites)
        return plan

    @classmethod
    def json_schema(cls) -> dict[str, Any]:
        """The JSON Schema of plan.json, as published in `docs/plan.schema.json`."""
        schema = cls.model_json_schema()
        return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}

    @classmethod
    def schema_text(cls) -> str:
        """The text of that file; `python -m fxopt.ir.schema` writes it."""
        return json.dumps(cls.json_schema(), indent=2) + "\n"

    def to_html(self, path: str | Path) -> Path:
        """Write the plan as one self-contained page: it loads nothing and opens from a disk."""
        return write_text(Path(path), _view("html", self))

    def to_markdown(self) -> str:
        """The plan for a pull request, in the Markdown of GitHub and GitLab."""
        return _view("markdown", self)

    def explain(self, site: str, family: str | None = None) -> str:
        """Why this and not that at the sites that a name or `re:` pattern covers: an op with its
        heads, a module with all below it.

        PlanError, with near names, when nothing is decided there.
        """
        return _view("explain", self, site, family)

    def to_dot(self) -> str:
        """`graph()` in the language of Graphviz; `dot -Tsvg plan.dot` draws it."""
        return _view("dot", self)

    def report(self, *notes: str) -> Any:
        """The rows as they were measured when the plan was made, for a module that was not."""
        kind = import_module("..show.report", __package__).Report
        return kind(
            list(self.totals), [*self.said, *notes], memory=self.memory, distilled=self.distilled
        )

    def graph(self) -> DiGraph[str]:
        """The calls of the model before and after, as one networkx graph; see `show.network`.

        PlanError when the plan holds no graph.
        """
        return _view("network", self)

    def __str__(self) -> str:
        return _view("text", self)

    def __eq__(self, other: object) -> bool:
        # What is written, so that tensors (by their digest) and functions (by name) compare.
        return isinstance(other, Plan) and self.model_dump() == other.model_dump()


View = Literal["text", "html", "markdown", "network", "dot", "explain"]


def _view(kind: View, *arguments: Any) -> Any:
    # Pages know plans, plans do not know pages: only this call finds them.
    return import_module(f"..show.{kind}", __package__).render(*arguments)


def _readable(path: Path, error: ValidationError) -> str:
    """The first few mistakes of a plan that was edited or damaged, by where they stand."""
    mistakes = error.errors()
    lines = [
        f"  {'.'.join(map(str, mistake['loc'])) or 'plan'}: "
        f"{mistake['msg'].removeprefix('Value error, ')}"
        for mistake in mistakes[:5]
    ]
    if len(mistakes) > len(lines):
        lines.append(f"  and {len(mistakes) - len(lines)} more")
    return "\n".join([f"{path} is not a plan of schema version {SCHEMA_VERSION}:", *lines])
