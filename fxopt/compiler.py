"""One optimisation from capture to search: what `optimize`, `plan` and `frontier` share."""

from __future__ import annotations

import copy
import hashlib
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache, cached_property, partial
from typing import Any

import torch

from . import __version__
from .cost_models.measured import Measured
from .cost_models.memory import live_bytes
from .decide.distill import Outcome, Trained, distil, find_blocks
from .decide.mass import Densities, Masses
from .decide.options import Options, lowered, promising
from .decide.peaks import Points, points, shifted
from .decide.priors import Priors
from .decide.problem import weighed
from .decide.propose import Proposal, Proposals, propose
from .decide.quality import Measurement
from .decide.refine import Refined, refine
from .decide.search import Choice, Limits, Rows, Search, Trial, improve, measure_swaps
from .decide.table import Column, Swapped, Table, build
from .decide.verify import peak_live_bytes
from .emit.editor import GraphEditor
from .fingerprint import weights_fingerprint
from .ir.budget import Budget
from .ir.cost import CostModel, OpCall
from .ir.decision import KeptMass
from .ir.distill import Distill
from .ir.rewrite import Masking, Varying
from .passes.baseline import baseline_calls
from .progress import stepping
from .request import Request, ends
from .scores import Scores, data_digest, key_of
from .subject import Subject

logger = logging.getLogger("fxopt")

TIMING_SECONDS, MOST_TIMING = {"cpu": 15.0}, 240.0
"""Time for running op calls in all, by kind of device; where kernels are compiled first, more."""
SWAP_SECONDS = 30.0
SWAPS, TRIALS = 96, 8
"""Time for measuring single sites in all, how many at most, and how many whole choices; the rest
keep priors corrected by those measured."""
ALONE = 2
"""Sequences of the `choose` part on which single sites are measured: on one alone, what only others
bring out is taken for no error, and the solver finds it."""
ABOUT, ABOUT_SECONDS = 8, 120.0
"""Sequences of the `choose` part on which choices near the best are measured, where sites interact,
and the time for it in all."""


class Compiler(Subject):
    """Captures once; prices, scores and searches on demand. Holds no result."""

    def __init__(self, request: Request) -> None:
        super().__init__(request)
        self._swap_seconds, self._about_seconds = SWAP_SECONDS, ABOUT_SECONDS
        self.told = (0, 0)
        """Op calls that were not timed for want of time, and all that were meant to be."""

    def under(self, budget: Budget) -> Compiler:
        """The same capture and scores for another budget, whose quality is of the same kind; its
        time begins now."""
        other = copy.copy(self)
        deadline = ends(self.request.time_limit)
        other.request = replace(self.request, budget=budget, deadline=deadline)
        other._swap_seconds, other._about_seconds = SWAP_SECONDS, ABOUT_SECONDS
        return other

    @cached_property
    def proposals(self) -> Proposals:
        return propose(
            self.sites,
            self.rewrites,
            (*self.scenarios, self.final),
            self.workloads[0].kind,
            self.request.keep,
        )

    @cached_property
    def _priors(self) -> Priors:
        return Priors(self.preparer)

    @cached_property
    def scores(self) -> Scores:
        """Errors of this model's candidates on this calibration, as far as they are known."""
        request = self.request
        data = data_digest((request.calibration.fit, request.calibration.choose))
        measured = [str(self.quality), str(request.seed), request.at or ""]
        if self.host is not None:  # errors are of the whole model's output
            measured += [type(request.model).__qualname__, weights_fingerprint(request.model)]
        return Scores((__version__, self.structure, self.weights, data, *measured))

    def _prior(self, proposal: Proposal) -> float:
        return self.scores(key_of([proposal]), lambda: self._priors(proposal))

    def _is_scored(self, proposal: Proposal) -> bool:
        key, rewrite = key_of([proposal]), proposal.rewrite
        mask = isinstance(rewrite, Masking) and rewrite.is_mask(proposal.candidate)
        return key in self.scores and (not mask or f"mass2:{key}" in self.scores)

    @property
    def timed(self) -> bool:
        """Whether seconds decide anything, so that ops are timed."""
        budget = self.request.budget
        rows = any(name.startswith("latency") for name in budget.rows())
        return rows or budget.objective != "error"

    @property
    def prices(self) -> CostModel:
        """What op calls cost: where seconds only break ties, by the roofline, which says the same
        each time."""
        return self.costs if self.timed else self.costs.prior

    @cached_property
    def _masses(self) -> Masses:
        return Masses(self.statistics, seed=self.request.seed)

    def kept_mass(self, proposal: Proposal) -> KeptMass | None:
        """What a mask leaves of a head's attention on the `fit` part; None of what is no mask."""
        rewrite = proposal.rewrite
        if not isinstance(rewrite, Masking) or not rewrite.is_mask(proposal.candidate):
            return None
        low, mean, high = (
            self.scores(f"mass{i}:{key_of([proposal])}", lambda i=i: self._masses(proposal)[i])
            for i in range(3)
        )
        return KeptMass(mean=mean, low=low, high=high, near=rewrite.near)

    def _informed(self) -> Proposals:
        """The proposals, those whose cost follows from the data with what the `fit` part says. Such
        as do all of the work there are refused."""
        offered = [p for found in self.proposals.by_site.values() for p in found]
        names = {id(p): f"density:{key_of([p])}" for p in offered if _varies(p)}
        waiting = [p for p in offered if id(p) in names and names[id(p)] not in self.scores]
        if waiting:
            self.statistics.passes(p.site for p in waiting)
            densities = Densities(self.statistics)
            for proposal in self.request.progress.track("counting", waiting):
                self.scores(names[id(proposal)], partial(densities, proposal))

        def told(proposal: Proposal) -> Proposal:
            if id(proposal) not in names:
                return proposal
            found = {"density": self.scores[names[id(proposal)]]}
            match = replace(proposal.match, extra={**proposal.match.extra, **found})
            return replace(proposal, match=match)

        known = {where: list(map(told, p)) for where, p in self.proposals.by_site.items()}
        for where, found in known.items():
            idle = [p for p in found if p.match.extra.get("density", 0.0) >= 1.0]
            known[where] = [p for p in found if p not in idle]
            for proposal in idle:
                assert isinstance(proposal.rewrite, Varying)
                self.proposals.refuse(proposal, proposal.rewrite.idle)
        return replace(self.proposals, by_site=known)

    @cached_property
    def costs(self) -> Measured:
        """Op calls as timed on the device."""
        return self._measured()

    def _measured(self, **options: Any) -> Measured:
        dtype = next((p.dtype for p in self.request.model.parameters()), torch.float32)
        return Measured(
            self.hardware,
            str(dtype).removeprefix("torch."),
            working_set=self.kept_weights,
            peak=peak_live_bytes,
            **options,
        )

    def table(self) -> Table:
        """Every option priced: statistics, priors and measured costs."""
        try:
            proposals = self._informed()
            options = lowered(proposals, (*self.scenarios, self.final), baseline_calls)
            passes = self._passes(options)
            if passes:
                self.statistics.at(passes[0][0][0].site)
            if self.timed:
                self._time(promising(options, self.costs.prior))
            with torch.no_grad():
                self._score(passes)
                return build(proposals, options, self.prices, self._prior)
        finally:  # an interrupted scoring goes on where it stopped
            self._save()

    def _passes(self, options: Iterable[Options]) -> list[list[list[Proposal]]]:
        """The options whose errors are not known, by site, and these by what is recorded at a
        time."""
        offered = (p for _, made in options for option in made for p in option.proposals)
        waiting: dict[tuple[str, str], dict[int, Proposal]] = {}
        for proposal in offered:
            if not (proposal.rewrite.exact or self._is_scored(proposal)):
                waiting.setdefault(proposal.where, {})[id(proposal)] = proposal
        sites = [next(iter(found.values())).site for found in waiting.values()]
        return [
            [list(waiting[site.family, site.key].values()) for site in together]
            for together in self.statistics.passes(sites)
        ]

    def _score(self, passes: Sequence[Sequence[Sequence[Proposal]]]) -> None:
        """Record a pass, a stage of its own, then score what it is of."""
        for i, sites in enumerate(passes, 1):
            self.statistics.at(sites[0][0].site)
            of = f" {i} of {len(passes)}" if len(passes) > 1 else ""
            for proposals in self.request.progress.track(f"scoring{of}", sites):
                for proposal in proposals:
                    self._prior(proposal)
                    self.kept_mass(proposal)
            self._priors.forget()

    def _time(self, calls: Sequence[OpCall]) -> None:
        """Time `calls` on the device in their order, as long as there is time for it."""
        most = TIMING_SECONDS.get(self.device.type, MOST_TIMING)
        self.costs.left = min(most, self.request.deadline - time.monotonic())
        for call in self.request.progress.track("timing", calls):
            self.costs(call)
        self.costs.left = 0.0
        told = sum(call.key not in self.costs.measured for call in calls)
        self.told = (told, len(calls))
        if told:
            logger.info("%d of %d op calls were not timed: others tell of them", told, len(calls))

    def _save(self) -> None:
        self.costs.save()
        self.scores.save()

    def distil(self, editor: GraphEditor, trained: Trained, how: Distill) -> Outcome:
        """Train parameters of a realised graph, in place, to the blocks of the original."""
        original = self.captured.graph
        now = {site.node: editor.node(site).name for site in self.captured.sites}
        blocks, left_out = find_blocks(original, editor.graph, now, trained)
        outcome = distil(
            original,
            editor.graph,
            blocks,
            self.request.calibration.fit,
            self._run,
            self.quality,
            how,
            until=self.request.deadline,
            watch=partial(self.request.progress.track, "distilling"),
        )
        outcome.left_out = left_out
        return outcome

    def limits(self, baseline: Mapping[str, float], table: Table) -> Limits:
        """The budget as rows over the table's columns, relative rows made absolute."""
        budget = self.request.budget
        rows = dict(budget.absolute(baseline))
        if budget.quality is not None:
            rows["error"] = self.quality.additive(rows.pop(budget.quality))
        kept = [column[0].cost for column in table.columns]
        seconds = sum(c.seconds for c in kept)
        baseline = {**baseline, "latency": baseline.get("latency", seconds)}
        constants = {
            "weights": baseline["weights"] - sum(c.weight_bytes for c in kept),
            "kv_cache": baseline["kv_cache_now"] - sum(c.state_bytes for c in kept),
            "latency": baseline.get("kept.latency", baseline["latency"]) - seconds,
            **self._call_constants(baseline, table),
        }
        constants["memory"] = constants["weights"] + constants["kv_cache"]
        at = self._points(baseline["temporaries"], table) if "temporaries" in baseline else {}
        return Limits(rows, constants, self._objective(baseline, seconds), at)

    def _points(self, measured: float, table: Table) -> Points:
        """Temporaries of the kept graph at each of its points in the workload's largest call.

        Liveness knows the graph; callers' frames hold more, which `measured` tells.
        """
        live = live_bytes(self.captured.graph.graph, self.sizes(self.widest))
        wanted = {site.key for sites in table.keys for site in sites}
        at = points(live, self.captured.sites, wanted)
        return shifted(at, measured - max(at.values()))

    def _call_constants(self, baseline: Mapping[str, float], table: Table) -> dict[str, float]:
        """For latency rows of single calls, and of named workloads: what they take beyond the
        sites' own ops."""
        constants: dict[str, float] = {}
        for row in baseline:
            of, _, name = row.partition(".")
            if of == "latency" and name:
                kept = (columns[0].seconds.get(name, 0.0) for columns in table.columns)
                constants[row] = baseline.get(f"kept.{row}", baseline[row]) - sum(kept)
        return constants

    def _objective(self, baseline: Mapping[str, float], seconds: float) -> dict[str, float]:
        """What is minimised, weighed as a share of the original: of its memory, and of the
        `seconds` of its sites as priced, which are the same the next time. What the whole takes
        is measured anew each time."""
        scale = {
            "latency": 1 / max(seconds, 1e-9),
            "memory": 1 / max(baseline["weights"] + baseline["kv_cache_now"], 1.0),
        }
        return weighed(self.request.budget.objective, scale)

    def measure_column(self, column: Column) -> Swapped:
        """Additive error of one swapped site, on the `choose` part."""

        @cache
        def measured() -> Measurement:
            graph = self.realise(column.proposals).graph
            return self.choose_reference.measure(graph, batches=ALONE)

        key = key_of(column.proposals)
        error = self.scores(f"swap{ALONE}:{key}", lambda: self.quality.additive(measured().mean))
        within = self.scores(f"within{ALONE}:{key}", lambda: measured().within)
        return Swapped(error, within)

    def scored(
        self, proposals: Sequence[Proposal], measure: Callable[[], float], on: str = "whole"
    ) -> float:
        """The error of a whole choice `on` the `choose` part, measured once; a metric, which may be
        another function each time, always."""
        if self.quality.kind == "metric":
            return measure()
        names = hashlib.sha256(key_of(proposals).encode()).hexdigest()
        return self.scores(f"{on}:{self._choosing}:{names}", measure)

    @cached_property
    def _choosing(self) -> str:
        return data_digest(self.request.calibration.choose)

    def search(self, search: Search, measure: Any, rounds: int = TRIALS) -> Trial | None:
        """Measure what the solver takes, solve again, measure whole choices."""
        began = time.monotonic()
        enough = min(self.request.deadline, began + self._swap_seconds)
        stage = self.request.progress.stage
        with stage("comparing", min(SWAPS, len(search.table.keys))) as advance:
            column = stepping(advance, self.measure_column)
            measure_swaps(search, column, deadline=enough, limit=SWAPS, expect=self._expect)
        self.scores.save()
        self._swap_seconds -= time.monotonic() - began
        with stage("searching", rounds) as advance:
            trial = stepping(advance, measure)
            try:
                return improve(search, trial, deadline=self.request.deadline, rounds=rounds)
            finally:
                self.scores.save()

    def _expect(self, columns: Sequence[Column]) -> None:
        """Have what single sites need recorded in as few passes as it fits in."""
        known = (f"within{ALONE}:{key_of(column.proposals)}" in self.scores for column in columns)
        waiting = [c for c, found in zip(columns, known, strict=True) if not found]
        self.preparer.expect(p for column in waiting for p in column.proposals)

    def refine(self, search: Search, measure: Callable[[Choice], Rows]) -> Refined | None:
        """Choose again by errors measured about the best trial, where sites interact."""
        if self.quality.kind == "metric":  # single sites are measured in KL
            return None
        began = time.monotonic()
        try:
            return refine(
                search,
                partial(self.measure_about, search),
                measure,
                deadline=min(self.request.deadline, began + self._about_seconds),
                watch=partial(self.request.progress.track, "refining"),
            )
        finally:
            self.scores.save()
            self._about_seconds -= time.monotonic() - began

    def measure_about(self, search: Search, choice: Choice) -> float:
        """Additive error of a whole choice on the first sequences of the `choose` part."""
        proposals = self.chosen(search, choice)

        def measured() -> float:
            graph = self.realise(proposals).graph
            return self.quality.additive(self.choose_reference.measure(graph, batches=ABOUT).mean)

        return self.scored(proposals, measured, on=f"first{ABOUT}")

    def chosen(self, search: Search, choice: Choice) -> list[Proposal]:
        """The proposals of a choice, in the order of the graph."""
        return [p for column in search.columns(choice) for p in column.proposals]


def _varies(proposal: Proposal) -> bool:
    """Whether the data say what a proposal costs."""
    rewrite = proposal.rewrite
    return isinstance(rewrite, Varying) and rewrite.varies(proposal.candidate)
