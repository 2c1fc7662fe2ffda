"""The rows of a budget, measured: before, of a trial, and for the contract."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, partial
from typing import Any

from torch import nn

from . import coverage
from .compiler import Compiler
from .decide import disturbed, runs
from .decide.propose import Proposal
from .decide.quality import Measurement
from .decide.runs import Latency, measure_latency, peak_temporaries
from .decide.verify import Timing, weight_bytes
from .emit.editor import GraphEditor
from .hosted import Optimized
from .ir.errors import FxoptError, RowResult
from .ir.units import format_value

UNITS = {
    "latency": "s",
    "memory": "bytes",
    "weights": "bytes",
    "kv_cache": "bytes",
    "activations": "bytes",
    "kl": "nats",
    "loss_increase": "nats",
    "relative_error": "",
    "metric_drop": "",
}

APART = 0.05
"""Seconds that differ by less are about the same."""
BRIEF = 0.25
"""The share of its time that the original is timed for where no row limits what that says."""


class Measurer:
    """Measures what the budget speaks of, and reports weights and cache beside it.

    Rows that take long (latency, memory) are measured only when the budget has them.
    """

    def __init__(self, compiler: Compiler) -> None:
        compiler.check_workload()
        self.compiler = compiler
        self.budget = compiler.request.budget
        self.wanted = set(self.budget.rows())
        self.notes: list[str] = []
        self.timings: dict[str, Timing] = {}

    @cached_property
    def baseline(self) -> dict[str, float]:
        """What the original measures, by row name; "kv_cache" in 16-bit, as ratios refer to it,
        "kv_cache_now" in the model's own dtype."""
        compiler = self.compiler
        graph = compiler.captured.graph
        rows: dict[str, float] = {
            "weights": float(compiler.kept_weights),
            "kv_cache": float(compiler.kv_cache_bytes(graph, element_size=2)),
            "kv_cache_now": float(compiler.kv_cache_bytes(graph)),
        }
        if self._timed or self.budget.objective == "latency":
            # where no row limits it, it decides nothing
            latency = self._latency(self._kept, share=1.0 if self._timed else BRIEF)
            rows["latency"] = latency.before
            rows |= {f"latency.{name}": t.first for name, t in latency.calls.items()}
            # of the module that keeps every site, as a trial measures it: what predictions
            # count from
            rows["kept.latency"] = latency.ratio_upper * latency.before
            rows |= {f"kept.latency.{n}": t.ratio_upper * t.first for n, t in latency.calls.items()}
        if self._sized:
            rows["activations"] = self.temporaries(compiler.request.model)
            rows["temporaries"] = self.temporaries(self._kept)  # what the solver counts from
            rows["memory"] = rows["weights"] + rows["kv_cache_now"] + rows["activations"]
        if compiler.quality.kind == "metric":
            rows["metric"] = self._metric(compiler.request.model)
            if not math.isfinite(rows["metric"]):
                raise FxoptError(
                    f"Budget.metric: it returned {rows['metric']} for the original model; a "
                    "metric returns a number, larger is better"
                )
        self._check_shares(rows)
        return rows

    @cached_property
    def _kept(self) -> Optimized:
        """The module that keeps every site."""
        return self.compiler.emit(self.compiler.realise([]))

    def _check_shares(self, rows: Mapping[str, float]) -> None:
        """FxoptError for a share of what the model has none of."""
        for name, limit in self.budget.rows().items():
            if limit.relative and rows.get(name) == 0:
                what = "no parameters" if name == "weights" else self._no_cache()
                raise FxoptError(f"Budget.{name}: {limit.text} of nothing: the model has {what}")

    def _no_cache(self) -> str:
        if not self.compiler.generates:
            return (
                f"no KV cache in the workload {self.compiler.workloads[0].kind!r}; pass "
                "workload=fxopt.Generate(batch=, prompt=, new_tokens=)"
            )
        return f"no KV cache: {self.compiler.captured.reason or 'it is no causal language model'}"

    @property
    def _timed(self) -> bool:
        return any(name.startswith("latency") for name in self.wanted)

    @property
    def _sized(self) -> bool:
        return bool(self.wanted & {"memory", "activations"})

    def trial(self, editor: GraphEditor, proposals: Sequence[Proposal]) -> dict[str, float]:
        """Solver rows of a graph in which `proposals` were realised, quality on the `choose` part:
        from an earlier search, where one measured the same."""
        rows = self._bytes(editor)
        module = self.compiler.emit(editor) if self._timed or self._sized else None
        rows |= self._slow(editor, module)
        rows["error"] = self.compiler.scored(proposals, partial(self.error, editor))
        return rows

    def error(self, editor: GraphEditor) -> float:
        """Additive error of a realised graph on the `choose` part."""
        return self._error(editor, self.compiler.choose_reference)

    def contract(self, editor: GraphEditor, module: Optimized) -> dict[str, float]:
        """Rows by their names in the budget, quality on the `verify` part."""
        rows = self._bytes(editor)
        rows["weights"] = float(weight_bytes(module))
        rows |= self._slow(editor, module)
        self.notes = coverage.notes(self.compiler, editor.graph)
        error = self._error(editor, self.compiler.verify_reference)
        rows[self.quality_row] = self.compiler.quality.measured(error)
        return rows

    def minimised(self, module: Optimized) -> dict[str, float]:
        """What is minimised though nothing limits it, of a module that is handed out."""
        if "latency" not in self.baseline or self._timed:
            return {}
        found = self._latency(module)
        # in turn with the original: the machine may be busier now than when that was timed first
        return {"latency": self.baseline["latency"] * found.after / found.before}

    @property
    def quality_row(self) -> str:
        kind = self.compiler.quality.kind
        return "metric_drop" if kind == "metric" else kind

    def solver_name(self, row: str) -> str:
        """The solver's name of a budget row."""
        return "error" if row == self.quality_row else row

    def _error(self, editor: GraphEditor, reference: Any) -> float:
        """Additive error of a realised graph; a metric is asked of the emitted module."""
        quality = self.compiler.quality
        if quality.kind == "metric":
            return self.baseline["metric"] - self._metric(self.compiler.emit(editor))
        measured = reference.measure(editor.graph)
        if reference is self.compiler.verify_reference:
            self.notes += [f"{self.quality_row}: {text}" for text in self._spread(measured)]
        return quality.additive(measured.mean)

    def _spread(self, measured: Measurement) -> Iterator[str]:
        """What the mean of a quality row leaves out."""
        unit = UNITS[self.quality_row]
        if self.compiler.quality.per_position and measured.p99:
            yield f"99% of {measured.count} positions < {format_value(measured.p99, unit)}"
        if measured.upper:
            bound = format_value(measured.upper, unit)
            limit = self.budget.absolute(self.baseline).get(self.quality_row, math.inf)
            over = ": over the limit, which is one of the mean measured"
            yield (
                f"the mean is < {bound} with 95% confidence, by {measured.sequences} sequences"
                f"{over if measured.mean <= limit < measured.upper else ''}"
            )

    def _metric(self, module: nn.Module) -> float:
        assert self.budget.metric is not None
        self.compiler.state.rewind()
        return float(self.budget.metric(module))

    def _bytes(self, editor: GraphEditor) -> dict[str, float]:
        weights = weight_bytes(self.compiler.whole(editor.graph))
        cache = self.compiler.kv_cache_bytes(editor.graph)
        return {
            "weights": float(weights),
            "kv_cache": float(cache),
            "memory": float(weights + cache) + self.baseline.get("temporaries", 0.0),
        }

    def _slow(self, editor: GraphEditor, module: Optimized | None) -> dict[str, float]:
        rows: dict[str, float] = {}
        if module is not None and self._timed:
            latency = self._latency(module)
            # what counts is the upper bound of the ratio, interleaved with the original
            rows["latency"] = latency.ratio_upper * self.baseline["latency"]
            for name, timing in latency.calls.items():
                before = self.baseline[f"latency.{name}"]
                rows[f"latency.{name}"] = timing.ratio_upper * before
        if module is not None and self._sized:
            rows["activations"] = self.temporaries(module)
            bytes_ = weight_bytes(module) + self.compiler.kv_cache_bytes(editor.graph)
            rows["memory"] = rows["activations"] + bytes_
        return rows

    def _latency(self, module: nn.Module, share: float = 1.0) -> Latency:
        request = self.compiler.request
        self.compiler.state.rewind()
        found = measure_latency(
            request.model,
            module,
            request.workload,
            request.example,
            self.compiler.device,
            seconds=share * runs.SECONDS,
        )
        self.timings = found.calls
        return found

    def said(self) -> list[str]:
        """What is to be said of what was measured last: on which data, how surely, of what."""
        compiler = self.compiler
        of_data, of_model = compiler.request.calibration.notes, compiler.captured.notes
        around = compiler.host.notes() if compiler.host is not None else []
        untimed = disturbed.untimed(*compiler.told)
        return [*of_data, *self.notes, *untimed, *self.disturbance(), *of_model, *around]

    def counted_from(self) -> list[str]:
        """What predicted seconds begin with, where that is not about the original's."""
        before, kept = (self.baseline.get(n, 0.0) for n in ("latency", "kept.latency"))
        if not kept or abs(kept / before - 1) < APART:
            return []
        return [
            f"latency: with every site kept the rewritten module takes {format_value(kept, 's')} "
            f"at most, the original {format_value(before, 's')}; predictions count from the former"
        ]

    def disturbance(self) -> list[str]:
        """That what was timed last was not left alone, if so."""
        spreads = {name: timing.spreads for name, timing in self.timings.items()}
        costs = self.compiler.costs
        return disturbed.notes(spreads, len(costs.disturbed), len(costs.measured))

    def temporaries(self, module: nn.Module) -> float:
        """Peak bytes of one call of the workload beyond weights and cache."""
        request = self.compiler.request
        self.compiler.state.rewind()
        return float(
            peak_temporaries(module, request.workload, request.example, self.compiler.device)
        )

    def rows(
        self, predicted: Mapping[str, float], measured: Mapping[str, float]
    ) -> list[RowResult]:
        """One result for each row of the budget, and for weights and cache in any case."""
        limits = self.budget.absolute(self.baseline)
        always = ["weights", *(["kv_cache"] if self.baseline["kv_cache"] else [])]
        always += ["latency"] if "latency" in self.baseline and not self._timed else []
        names = [*limits, *(n for n in (*always, self.quality_row) if n not in limits)]
        return [self._row(name, limits.get(name), predicted, measured) for name in names]

    def _row(
        self,
        name: str,
        limit: float | None,
        predicted: Mapping[str, float],
        measured: Mapping[str, float],
    ) -> RowResult:
        guess = predicted.get(self.solver_name(name))
        if name == self.quality_row and guess is not None:
            guess = self.compiler.quality.measured(guess)
        before = 0.0 if name == self.quality_row else self.baseline.get(name)
        if name == "kv_cache" and limit is None:
            before = self.baseline["kv_cache_now"]  # no ratio refers to 16 bits here
        unit = UNITS[name.partition(".")[0]]
        return RowResult(name, limit, guess, measured.get(name), unit, before)
