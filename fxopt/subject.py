"""One model under one request: captured once, run on data, rewritten, emitted."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from . import passes
from .capture import Captured, capture
from .cost_models.hardware import Device, probe
from .cost_models.memory import symbols_of, tensor_bytes
from .decide.calibration import Batch
from .decide.evaluate import run_as_decoded
from .decide.priors import Preparer
from .decide.propose import Prepare, Proposal, Remade
from .decide.quality import QUALITIES, Kind, Quality, Reference, class_axis
from .decide.recorder import Call, Run, collect
from .decide.statistics import Statistics
from .decide.streamed import BEYOND, Record, Streamed, footprints
from .decide.verify import weight_bytes
from .emit.editor import GraphEditor
from .emit.module import OptimizedModule, emit
from .emit.targets import written
from .fingerprint import structure_fingerprint, weights_fingerprint
from .host import Host
from .hosted import Optimized
from .ir.errors import FxoptError
from .ir.rewrite import Rewrite
from .ir.site import Site
from .ir.workload import Forward, Generate, Scenario, Train, parts, scenarios
from .passes.baseline import cache_bytes
from .progress import stepping
from .request import Request
from .state import State


class Subject:
    """A captured model: its calls and sites, what was recorded of it, how its outputs err, and the
    graphs and modules that proposals make of it."""

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

    def _capture(self) -> Captured:
        return capture(self.request.model, self.request.example, at=self.request.at)

    @cached_property
    def workloads(self) -> list[Forward | Generate | Train]:
        """The workloads, of one kind, that the module serves."""
        return list(parts(self.request.workload).values())

    @property
    def generates(self) -> bool:
        """Whether the workloads decode tokens one by one, and keep a cache."""
        return isinstance(self.workloads[0], Generate)

    def check_workload(self) -> None:
        """FxoptError for a workload of tokens that are decoded, of a model that decodes none."""
        captured = self.captured
        serves = captured.causal_lm or captured.encoder_decoder or captured.reason
        # a row of a cache that is not there has an error of its own
        if self.generates and not serves and "kv_cache" not in self.request.budget.cost_rows:
            raise FxoptError(
                f"workload: fxopt.Generate is of language models that decode token by token, which "
                f"{type(self.request.model).__name__} does not; pass workload=fxopt.Forward()"
            )

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
    def statistics(self) -> Statistics:
        """What is recorded of sites on the `fit` part, when it is asked for."""
        captured, longest = self.captured, self._longest
        found = footprints(
            captured.graph,
            captured.sites,
            lambda node: tensor_bytes(node.meta.get("val"), longest),
            len(self.request.calibration.fit),
        )
        return Streamed(found, self._recorded(), BEYOND // 2)

    def _recorded(self) -> Record:
        """Runs one pass; all passes draw the same random numbers."""
        states: dict[str, Tensor] = {}

        def record(nodes: Collection[str], of: str) -> Statistics:
            fit = self.request.calibration.fit
            if not fit:
                raise FxoptError(
                    "calibration: there are tensors to fit, and the example inputs hold no "
                    "sequence to fit them on; pass calibration"
                )
            run, output, quality = self._differentiated
            with self.request.progress.stage(f"recording {of}".strip(), len(fit)) as advance:
                return collect(
                    self.captured.graph,
                    self.captured.sites,
                    fit,
                    stepping(advance, run),
                    output,
                    quality,
                    seed=self.request.seed,
                    wanted=nodes,
                    states=states,
                )

        return record

    @cached_property
    def _differentiated(self) -> tuple[Run, int, Quality]:
        """What is run to record, which of its outputs is differentiated, and how."""
        host, quality = self.host, self.quality
        if host is not None and not host.differentiable(self.looked_at):
            # No gradient says what matters further on: the submodule's own error ranks its sites,
            # and what is measured of the whole model scales that.
            return host.inner, 0, replace(quality, kind="relative_error")
        return self._run, self.looked_at, quality

    @property
    def _longest(self) -> Mapping[str, int]:
        """The graph's symbols as numbers, each as large as the `fit` part makes it; those that no
        input has are as many as tokens."""
        given = [self.host.inputs] if self.host else self.request.calibration.fit
        tensors = [(n, v) for batch in given for n, v in batch.items() if isinstance(v, Tensor)]
        tokens = max((t.shape[1] for _, t in tensors if t.ndim > 1), default=1)
        sizes: dict[str, int] = defaultdict(lambda: tokens)
        for name, dim in self.captured.symbols.items():
            seen = [t.shape[dim.dim] for n, t in tensors if n == dim.input and t.ndim > dim.dim]
            sizes[name] = max(seen, default=tokens)
        return sizes

    @cached_property
    def preparer(self) -> Preparer:
        return Preparer(self.statistics, limit=BEYOND // 2)

    def in_turn(self, proposals: Iterable[Proposal], tensors: Prepare) -> list[Proposal]:
        """`proposals` in the order in which to ask for their tensors, which are kept until those of
        other proposals are asked for so: sites are recorded in passes."""
        made = tensors.anew if isinstance(tensors, Remade) else {}
        proposals = list(proposals)
        waiting = [p for p in proposals if p.where not in made]
        if not waiting:
            return proposals
        return [*(p for p in proposals if p.where in made), *self.preparer.chosen(waiting)]

    def realise(self, proposals: Iterable[Proposal], tensors: Prepare | None = None) -> GraphEditor:
        """A copy of the graph with `proposals` applied in the order of the rewrites.

        `tensors` gives what they register; by default it is prepared from the statistics.
        """
        tensors, proposals = tensors or self.preparer, list(proposals)
        made = {p.where: tensors(p) for p in self.in_turn(proposals, tensors)}
        order = {rewrite.name: i for i, rewrite in enumerate(self.rewrites)}
        editor = GraphEditor(self.captured)
        for proposal in sorted(proposals, key=lambda p: order[p.rewrite.name]):
            with editor.applying(proposal.rewrite.name):
                proposal.rewrite.apply(
                    proposal.match, proposal.candidate, made.pop(proposal.where), editor
                )
        editor.finish()
        return editor

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


def _keep(batch: Batch, positions: Tensor | None, causal_lm: bool) -> Batch:
    return {**batch, "logits_to_keep": positions} if causal_lm else batch


def _length(batch: Batch) -> int:
    first = next(v for v in batch.values() if isinstance(v, Tensor))
    return first.shape[1] if first.ndim > 1 else 1
