"""One optimisation from capture to verified module: what `optimize`, `plan` and `apply` share."""

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
from torch import Tensor, fx, nn

from . import __version__, passes
from .capture import Captured, capture
from .cost_models.hardware import Device, probe
from .cost_models.measured import Measured
from .cost_models.memory import live_bytes, symbols_of
from .decide.calibration import Batch
from .decide.distill import Outcome, Trained, distil, find_blocks
from .decide.evaluate import run_as_decoded
from .decide.mass import Masses
from .decide.peaks import Points, points, shifted
from .decide.propose import Proposal, Proposals, propose
from .decide.quality import QUALITIES, Kind, Measurement, Quality, Reference, class_axis
from .decide.search import Choice, Limits, Search, Trial, improve, measure_swaps
from .decide.solve import weighed
from .decide.statistics import Call, Statistics, collect
from .decide.table import Column, Preparer, Priors, Swapped, Table, build, lowered, promising
from .decide.verify import peak_live_bytes, weight_bytes
from .emit.editor import GraphEditor
from .emit.module import OptimizedModule, emit
from .emit.targets import written
from .fingerprint import structure_fingerprint, weights_fingerprint
from .host import Host
from .hosted import Optimized
from .ir.budget import Budget
from .ir.cost import CostModel, OpCall
from .ir.decision import KeptMass
from .ir.distill import Distill
from .ir.errors import FxoptError
from .ir.rewrite import Masking, Rewrite
from .ir.site import Site
from .ir.workload import Forward, Generate, Scenario, Train, parts, scenarios
from .passes.baseline import baseline_calls, cache_bytes
from .progress import stepping
from .request import Request, ends
from .scores import Scores, data_digest, key_of
from .state import State

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


class Compiler:
    """Captures once; scores, searches and realises on demand. Holds no result."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.state = State(request.model)
        self.captured = self._capture()
        loaded = passes.load(request.rewrites)
        self.rewrites: list[Rewrite] = [r for r in loaded if set(r.workloads) != {"train"}]
        self.host: Host | None = None
        if request.at is not None:
            self.host = Host(request.model, request.at, self.captured, request.example)
            self.host.check(self._module(GraphEditor(self.captured)))
        self._swap_seconds = SWAP_SECONDS

    def _capture(self) -> Captured:
        return capture(self.request.model, self.request.example, at=self.request.at)

    def under(self, budget: Budget) -> Compiler:
        """The same capture and scores for another budget, whose quality is of the same kind; its
        time begins now."""
        other = copy.copy(self)
        deadline = ends(self.request.time_limit)
        other.request = replace(self.request, budget=budget, deadline=deadline)
        other._swap_seconds = SWAP_SECONDS
        return other

    @cached_property
    def workloads(self) -> list[Forward | Generate | Train]:
        """The workloads, of one kind, that the module serves."""
        return list(parts(self.request.workload).values())

    @property
    def generates(self) -> bool:
        """Whether the workloads decode tokens one by one, and keep a cache."""
        return isinstance(self.workloads[0], Generate)

    @cached_property
    def scenarios(self) -> tuple[Scenario, ...]:
        """The calls of the workloads."""
        work = self.request.workload
        return scenarios(self.host.workload(work) if self.host else work, self.source)

    @cached_property
    def source(self) -> int:
        """Tokens that an encoder makes of the workload's prompt; 0 where there is no encoder."""
        work = self.workloads[0]
        if not (isinstance(work, Generate) and self.captured.encoder_decoder):
            return 0
        if len(self.workloads) > 1:
            raise FxoptError(
                "workload: an encoder-decoder model is planned for one fxopt.Generate at a time"
            )
        return self.captured.source or work.prompt

    @cached_property
    def final(self) -> Scenario:
        """The last call of the workload whose cache is the largest."""
        calls = [
            Scenario("final", work.batch, 1, self._past(work), 0, self.source, keep=1)
            for work in self.workloads
            if isinstance(work, Generate)
        ]
        return max(calls, key=lambda call: call.batch * call.length, default=self.widest)

    def _past(self, work: Generate) -> int:
        return work.new_tokens - 1 + (0 if self.source else work.prompt)

    @property
    def widest(self) -> Scenario:
        """The call of the most tokens at once, not counted: its temporaries are the largest."""
        return replace(max(self.scenarios, key=lambda s: s.batch * s.queries), repeats=0)

    @cached_property
    def device(self) -> torch.device:
        first = next(iter(self.request.model.parameters()), None)
        return torch.device("cpu") if first is None else first.device

    @cached_property
    def hardware(self) -> Device:
        return probe(self.device)

    @cached_property
    def quality(self) -> Quality:
        """How errors are measured: the budget's row, or KL (outputs without logits: relative)."""
        row = self.request.budget.quality
        otherwise: Kind = "kl" if self.logits is not None else "relative_error"
        kind = QUALITIES.get(row or "", otherwise)
        if kind in ("kl", "loss_increase") and self.logits is None:
            raise FxoptError(
                f"Budget.{row}: the model returns no logits of two classes or more; use "
                "relative_error or a metric"
            )
        made = [work for work in self.workloads if isinstance(work, Generate)]
        prompt = min((work.prompt for work in made), default=0)
        new = max((work.new_tokens for work in made), default=0)
        # a decoder that follows an encoder begins with one token
        prompt = 1 if self.source else prompt
        return Quality(kind, self.captured.causal_lm, prompt, new, self.captured.encoder_decoder)

    @cached_property
    def logits(self) -> int | None:
        """Index of the model's output that holds logits, if any does. One logit alone is a number
        that was regressed: its softmax would be the same whatever it is."""
        names = self.host.names if self.host else self.captured.output.leaf_names()
        if "logits" not in names:
            return None
        index = names.index("logits")
        shape = () if self.host else self.captured.shape(index)
        classes = shape[class_axis(len(shape))] if shape else None
        return None if isinstance(classes, int) and classes == 1 else index

    @cached_property
    def looked_at(self) -> int:
        """Index of the output that quality looks at: that named logits, or the first."""
        names = self.host.names if self.host else self.captured.output.leaf_names()
        return names.index("logits") if "logits" in names else 0

    def evaluate(self, graph: fx.GraphModule, batch: Batch, positions: Tensor | None) -> Tensor:
        """The output that quality looks at, over the positions that count, for one sequence."""
        generates = self.captured.causal_lm or self.source > 0
        prompt = self.quality.prompt_of(_length(batch)) if generates else 0

        def call(arguments: list[Any]) -> Sequence[Any]:
            return run_as_decoded(graph, arguments, prompt)

        with torch.no_grad():
            output = self._run(call, batch, positions)[self.looked_at]
        mask = self.quality.mask(batch, output.shape[:2]) if positions is None else None
        return output if mask is None else output[mask]

    def outputs(self, call: Call, batch: Batch) -> Sequence[Any]:
        """The model's outputs over the positions that count, `call` computing those of its
        graph."""
        return self._run(call, batch, self.quality.positions(batch))

    def _run(self, call: Call, batch: Batch, positions: Tensor | None) -> Sequence[Any]:
        """The model's outputs for one sequence, `call` computing those of its graph."""
        self.state.rewind()
        if self.host is not None:
            return self.host.outputs(call, batch)
        return call(self.captured.arguments(**_keep(batch, positions, self.captured.causal_lm)))

    @cached_property
    def sites(self) -> tuple[Site, ...]:
        """The sites of the workload: where nothing is generated, no cache is kept."""
        kept = {n for n, dim in self.captured.symbols.items() if dim.role == "keep"}
        last = {n.name for n in self.captured.graph.graph.nodes if kept & symbols_of(n)}
        return tuple(
            replace(s, last=s.family == "linear" and s.node in last)
            for s in self.captured.sites
            if self.generates or s.family != "kv_cache"
        )

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
    def statistics(self) -> Statistics:
        run, output, quality = self._run, self.looked_at, self.quality
        host = self.host
        if host is not None and not host.differentiable(output):
            # No gradient says what matters further on: the submodule's own error ranks its sites,
            # and what is measured of the whole model scales that.
            run, output, quality = host.inner, 0, replace(quality, kind="relative_error")
        fit = self.request.calibration.fit
        if not fit:
            raise FxoptError(
                "calibration: there are tensors to fit, and the example inputs hold no sequence to "
                "fit them on; pass calibration"
            )
        with self.request.progress.stage("recording", len(fit)) as advance:
            return collect(
                self.captured.graph,
                self.captured.sites,
                fit,
                stepping(advance, run),
                output,
                quality,
                seed=self.request.seed,
            )

    @cached_property
    def preparer(self) -> Preparer:
        return Preparer(self.statistics)

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
            self._record()
            options = lowered(self.proposals, (*self.scenarios, self.final), baseline_calls)
            if self.timed:
                self._time(promising(options, self.costs.prior))
            with torch.no_grad():
                return build(
                    self.proposals,
                    options,
                    self.prices,
                    self._prior,
                    partial(self.request.progress.track, "scoring"),
                )
        finally:  # an interrupted scoring goes on where it stopped
            self._save()

    def _record(self) -> None:
        """Record where something will be scored: a stage of its own, not within that of scoring."""
        every = (p for found in self.proposals.by_site.values() for p in found)
        if self.scores.empty and not all(p.rewrite.exact for p in every):
            _ = self.statistics

    def _time(self, calls: Sequence[OpCall]) -> None:
        """Time `calls` on the device in their order, as long as there is time for it."""
        most = TIMING_SECONDS.get(self.device.type, MOST_TIMING)
        self.costs.left = min(most, self.request.deadline - time.monotonic())
        for call in self.request.progress.track("timing", calls):
            self.costs(call)
        self.costs.left = 0.0
        told = sum(call.key not in self.costs.measured for call in calls)
        if told:
            logger.info("%d of %d op calls were not timed: others tell of them", told, len(calls))

    def _save(self) -> None:
        self.costs.save()
        self.scores.save()

    def realise(
        self,
        proposals: Iterable[Proposal],
        tensors: Callable[[Proposal], Mapping[str, Tensor]] | None = None,
    ) -> GraphEditor:
        """A copy of the graph with `proposals` applied in the order of the rewrites.

        `tensors` gives what they register; by default it is prepared from the statistics.
        """
        tensors = tensors or self.preparer
        order = {rewrite.name: i for i, rewrite in enumerate(self.rewrites)}
        editor = GraphEditor(self.captured)
        for proposal in sorted(proposals, key=lambda p: order[p.rewrite.name]):
            with editor.applying(proposal.rewrite.name):
                proposal.rewrite.apply(
                    proposal.match, proposal.candidate, tensors(proposal), editor
                )
        editor.finish()
        return editor

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

    def emit(self, editor: GraphEditor) -> Optimized:
        """The module that people get: generated classes around the edited graph."""
        module = self._module(editor)
        return self.host.around(module) if self.host else module

    def _module(self, editor: GraphEditor) -> OptimizedModule:
        return emit(self.captured, editor, self.host.part if self.host else self.request.model)

    def whole(self, graph: fx.GraphModule) -> nn.Module:
        """The model with the tensors of an edited graph for those that it replaces."""
        return self.host.holding(graph) if self.host else graph

    @cached_property
    def structure(self) -> str:
        """Fingerprint of names, ops, shapes and dtypes of the canonical graph."""
        return structure_fingerprint(self.captured.graph)

    @cached_property
    def weights(self) -> str:
        """Fingerprint of the values of parameters and buffers."""
        model = self.host.part if self.host else self.request.model
        return weights_fingerprint(model, written(self.captured.graph.graph))

    def facts(self) -> dict[str, Any]:
        """The device and the library versions a plan was made with."""
        return {
            "device": self.hardware.name,
            "kind": self.hardware.kind,
            "torch": str(torch.__version__),
        }

    def sizes(self, scenario: Scenario) -> dict[str, int]:
        """The graph's symbols as numbers at a scenario's sizes."""
        roles = {
            "batch": scenario.batch,
            "length": scenario.source or scenario.queries,
            "total": scenario.length,
            "keep": scenario.keep or scenario.queries,
        }
        inputs = self.host.inputs if self.host else self.request.example
        shapes = {n: v.shape for n, v in inputs.items() if isinstance(v, Tensor)}
        return {
            name: roles.get(dim.role) or shapes.get(dim.input, {dim.dim: 1})[dim.dim]
            for name, dim in self.captured.symbols.items()
        }

    @cached_property
    def choose_reference(self) -> Reference:
        return self._reference(self.request.calibration.choose)

    @cached_property
    def verify_reference(self) -> Reference:
        verifying = partial(self.request.progress.track, "verifying")
        return self._reference(self.request.calibration.verify, verifying)

    def _reference(
        self, batches: Sequence[Batch], watch: Callable[[Sequence[Batch]], Iterable[Batch]] = iter
    ) -> Reference:
        graph = self.captured.graph
        return Reference(self.quality, self.evaluate, graph, batches, watch=watch)

    @cached_property
    def kept_weights(self) -> int:
        """Bytes of the weights of the model as it is."""
        return weight_bytes(self.request.model)

    def kv_cache_bytes(self, graph: fx.GraphModule, *, element_size: int | None = None) -> int:
        """Bytes of the cache at the workload's final length; `element_size` 2 gives the
        16-bit baseline that ratios refer to."""
        if not self.generates:
            return 0
        return cache_bytes(graph, self.final, element_size)

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

    def scored(self, proposals: Sequence[Proposal], measure: Callable[[], float]) -> float:
        """The error of a whole choice on the `choose` part, measured once; a metric, which may be
        another function each time, always."""
        if self.quality.kind == "metric":
            return measure()
        names = hashlib.sha256(key_of(proposals).encode()).hexdigest()
        return self.scores(f"whole:{self._choosing}:{names}", measure)

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
            measure_swaps(search, column, deadline=enough, limit=SWAPS)
        self.scores.save()
        self._swap_seconds -= time.monotonic() - began
        with stage("searching", rounds) as advance:
            trial = stepping(advance, measure)
            try:
                return improve(search, trial, deadline=self.request.deadline, rounds=rounds)
            finally:
                self.scores.save()

    def chosen(self, search: Search, choice: Choice) -> list[Proposal]:
        """The proposals of a choice, in the order of the graph."""
        return [p for column in search.columns(choice) for p in column.proposals]


def _keep(batch: Batch, positions: Tensor | None, causal_lm: bool) -> Batch:
    return {**batch, "logits_to_keep": positions} if causal_lm else batch


def _length(batch: Batch) -> int:
    first = next(v for v in batch.values() if isinstance(v, Tensor))
    return first.shape[1] if first.ndim > 1 else 1
