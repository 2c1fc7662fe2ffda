"""Plans of models on the meta device: sizes and seconds as predicted, errors as of random numbers.

Nothing of the model is run. What a rewrite takes is counted and priced as ever; what the model
takes beside its sites is what its other nodes move. Errors are `decide/assumed.py`'s.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from functools import cached_property

import torch
from torch import Tensor, fx

from .capture import Captured, capture
from .compiler import Compiler
from .cost_models.memory import live_bytes, tensor_bytes
from .decide.assumed import Assumed, without_weights
from .decide.propose import Proposal, Proposals, total_cost
from .decide.quality import Quality
from .decide.search import Trial
from .decide.statistics import Recorded, Statistics
from .ir.errors import FxoptError, RowResult
from .ir.site import ExpertsInfo, LinearInfo, Site
from .ir.workload import Scenario
from .measure import Measurer
from .passes.baseline import baseline_calls
from .request import Request
from .session import Session

NOTES = (
    "made without weights (meta device): nothing was run, every row is predicted",
    "errors are what rounding loses of random numbers, relative to each site's output: they order "
    "options, and say nothing of the model's own error",
)


class Weightless(Compiler):
    """A captured model without weights, planned for the device of its example inputs."""

    def __init__(self, request: Request) -> None:
        _check(request)
        super().__init__(request)

    def _capture(self) -> Captured:
        shapes = {
            name: value.to("meta") if isinstance(value, Tensor) else value
            for name, value in self.request.example.items()
        }
        return capture(self.request.model, shapes, weights=False)

    @cached_property
    def device(self) -> torch.device:
        given = [v.device for v in self.request.example.values() if isinstance(v, Tensor)]
        real = [device for device in given if device.type != "meta"]
        best = "cuda" if torch.cuda.is_available() else "cpu"
        return real[0] if real else torch.device(best)

    @cached_property
    def quality(self) -> Quality:
        return Quality("relative_error", per_position=False)

    @cached_property
    def weights(self) -> str:
        return ""

    @cached_property
    def proposals(self) -> Proposals:
        return without_weights(super().proposals)

    @cached_property
    def statistics(self) -> Statistics:
        """Weights as shapes: rewrites give the shapes of their tensors."""
        nodes = {node.name: node for node in self.captured.graph.graph.nodes}
        found = {site.node: Recorded() for site in self.sites}
        weighed = [site for site in self.sites if _has_weight(site)]
        return Statistics(found | {s.node: _shapes(s, nodes[s.node]) for s in weighed}, 0, 0)

    @cached_property
    def _assumed(self) -> Assumed:
        return Assumed()

    def _prior(self, proposal: Proposal) -> float:
        return self._assumed(proposal)

    def _is_scored(self, proposal: Proposal) -> bool:
        """Nothing is recorded."""
        return True

    def _save(self) -> None:
        self.costs.save()

    def kept_seconds(self, scenario: Scenario) -> float:
        """One call of the model as it is: its sites as priced, its other nodes by what they
        move."""
        sites = [s for s in self.sites if s.family == "attention" or _has_weight(s)]
        seen = [(site, site.at(scenario)) for site in sites]
        calls = [c for site, at in seen if at is not None for c in baseline_calls(site, at)]
        nodes = {site.node for site in sites}
        others = [node for node in self.captured.graph.graph.nodes if node.name not in nodes]
        moved = list(_moved(others, self.sizes(scenario)))
        seconds = sum(moved) / self.hardware.bandwidth
        seconds += len(moved) * self.hardware.launch_seconds
        return total_cost(calls, self.prices).seconds + seconds


class Predicted(Measurer):
    """Rows as predicted: nothing can be measured."""

    compiler: Weightless

    @cached_property
    def baseline(self) -> dict[str, float]:
        compiler = self.compiler
        graph = compiler.captured.graph
        peak = max(live_bytes(graph.graph, compiler.sizes(compiler.widest)).values())
        rows = {
            "weights": float(compiler.kept_weights),
            "kv_cache": float(compiler.kv_cache_bytes(graph, element_size=2)),
            "kv_cache_now": float(compiler.kv_cache_bytes(graph)),
            "activations": float(peak),
            "temporaries": float(peak),
        }
        rows["memory"] = rows["weights"] + rows["kv_cache_now"] + peak
        if self._timed:
            calls = {s.name: compiler.kept_seconds(s) for s in compiler.scenarios}
            rows |= {f"latency.{name}": seconds for name, seconds in calls.items()}
            for call in compiler.scenarios:
                workload = call.name.rpartition(".")[0]
                for row in {"latency", f"latency.{workload}" if workload else "latency"}:
                    rows[row] = rows.get(row, 0.0) + call.repeats * calls[call.name]
        self._check_shares(rows)
        return rows

    def rows(
        self, predicted: Mapping[str, float], measured: Mapping[str, float]
    ) -> list[RowResult]:
        found = super().rows(predicted, measured)
        return [row for row in found if row.name != self.quality_row]


class Draft(Session):
    """The choice that is predicted to be best, not measured."""

    def __init__(self, compiler: Weightless) -> None:
        super().__init__(compiler, measurer=Predicted(compiler))

    def search_best(self) -> Trial:
        choice = self.search.next() or self.search.nearest()
        assert choice is not None  # nothing was tried that it could be
        predicted = self.search.predict(choice, "weights", "kv_cache")
        value = sum(w * predicted[n] for n, w in self.search.limits.objective.items())
        return Trial(choice, predicted, {}, self.search.limits.excess(predicted), value)

    def _tensors(self, trial: Trial) -> dict[str, Tensor]:
        return {}

    def _notes(self) -> list[str]:
        return [*super()._notes(), *NOTES]


def _check(request: Request) -> None:
    """FxoptError for what cannot be planned without weights."""
    quality = request.budget.quality
    if quality is not None:
        raise FxoptError(
            f"Budget.{quality}: the model is on the meta device, where no error can be measured. "
            "Leave the row out: within the others the least rounding is chosen. Or plan with the "
            "weights once: fxopt.solve(plan, budget) then answers other budgets without them"
        )
    if request.recover is not None:
        raise FxoptError("recover: there are no weights to train (meta device); leave recover out")
    if request.at is not None:
        raise FxoptError(
            f"at={request.at!r}: the model around it is run, and it has no weights (meta device); "
            "plan the model as a whole, or the submodule by itself"
        )


def _shapes(site: Site, node: fx.Node) -> Recorded:
    """Weight and bias of the node of a linear or of experts, on the meta device."""
    if isinstance(info := site.info, ExpertsInfo):
        shape = (info.count, info.out_features, info.in_features)
        return Recorded(weight=torch.empty(shape, dtype=info.dtype, device="meta"))
    operands = [source.meta["val"] for source in node.args[1:] if isinstance(source, fx.Node)]
    weight, *bias = (torch.empty(t.shape, dtype=t.dtype, device="meta") for t in operands)
    return Recorded(weight=weight, bias=bias[0] if bias else None)


def _has_weight(site: Site) -> bool:
    return isinstance(site.info, LinearInfo | ExpertsInfo)


def _is_view(node: fx.Node) -> bool:
    """Whether a call gives its first operand's bytes back, seen otherwise."""
    if node.target is operator.getitem:
        return True
    schema = getattr(node.target, "_schema", None)
    aliases = schema is not None and any(r.alias_info is not None for r in schema.returns)
    values = [n.meta.get("val") for n in (*node.all_input_nodes[:1], node)]
    # a cast is one that aliases where there is nothing to cast
    return aliases and len({getattr(v, "dtype", None) for v in values} - {None}) == 1


def _moved(nodes: list[fx.Node], sizes: Mapping[str, int]) -> Iterator[int]:
    """Bytes that each node reads and writes, views and numbers apart."""
    for node in nodes:
        written = tensor_bytes(node.meta.get("val"), sizes)
        if node.op == "call_function" and written and not _is_view(node):
            yield written + sum(
                tensor_bytes(source.meta.get("val"), sizes) for source in node.all_input_nodes
            )
