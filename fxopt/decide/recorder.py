"""One pass forward and one backward over the fit part, in which sites are recorded.

The backward pass starts from labels sampled from the model itself, so that the squared
directional derivatives estimate the Fisher information (Fisher-Taylor).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from ..ir.errors import FxoptError
from ..ir.ops import attend
from ..ir.patches import output_rows, to_rows
from ..ir.site import EmbeddingInfo, ExpertsInfo, LinearInfo, Site
from . import shrinkage
from .calibration import Batch, padding_of
from .quality import Quality, by_row
from .statistics import Recorded, Statistics

Call = Callable[[list[Any]], Sequence[Any]]
"""The graph's inputs in order -> its outputs."""
Run = Callable[[Call, Batch, Tensor | None], Sequence[Any]]
"""(call, batch, positions that count) -> the outputs of the model that `call` computes."""

ROWS = 1024
"""Rows of a linear's input (and gradient) that are kept, over all sequences."""


def collect(
    graph: fx.GraphModule,
    sites: Sequence[Site],
    batches: Sequence[Batch],
    run: Run,
    logits: int,
    quality: Quality,
    *,
    seed: int = 0,
    attention_sequences: int = 1,
    wanted: Collection[str] | None = None,
    states: dict[str, Tensor] | None = None,
) -> Statistics:
    """Run `graph` over `batches` and record the linear and attention sites at the nodes `wanted`,
    by default all.

    `run` runs the model around the graph, which it may call several times; `logits` is the index
    of the output that quality looks at. No parameter gets a gradient. What is recorded of a site
    does not depend on which others are wanted: random numbers are drawn for all. `states` takes
    those of the generator before the last draws for each site; with it, another call draws them
    for the wanted sites alone.
    """
    recorder = _Recorder(graph, sites, quality, wanted)
    generator = torch.Generator().manual_seed(seed)
    counted = attended = kept = 0
    for i, batch in enumerate(batches):
        positions = quality.positions(batch)
        counts = positions is None or positions.numel() > 0
        keep = counts and kept < attention_sequences
        kept += keep
        recorder.begin(batch, keep_attention=keep)
        with torch.enable_grad():
            outputs = run(recorder.call, batch, positions)
            _check_output(outputs[logits], i)
            score, count = _sampled_score(outputs[logits], quality, generator)
        recorder.end(score, len(batches), generator)
        del outputs, score  # what the backward did not reach is held until here
        counted += count
        attended += count if keep else 0
    recorder.spread(generator, {} if states is None else states)
    return Statistics(recorder.nodes, counted, attended)


def _check_output(output: Tensor, sequence: int) -> None:
    if output.isnan().any():
        raise FxoptError(
            f"calibration: the model itself returns NaN for sequence {sequence}; see whether its "
            "weights are finite, and which layer overflows"
        )


def _sampled_score(
    output: Tensor, quality: Quality, generator: torch.Generator
) -> tuple[Tensor, int]:
    """(scalar to differentiate, number of positions): log p of sampled labels, or for relative
    errors a random projection of the output, scaled by its norm."""
    if quality.kind == "relative_error":
        noise = torch.randn(output.shape, generator=generator).to(output)
        # 1/2 <g, d>^2 estimates half of |J d|^2 / |y|^2: sqrt(2) makes it whole
        scale = 2**0.5 / output.detach().float().norm().clamp_min(1e-30)
        return (output * noise).sum() * scale, 1
    log_p = by_row(output).float().log_softmax(-1)
    labels = torch.multinomial(log_p.detach().exp().cpu(), 1, generator=generator)
    return log_p.gather(1, labels.to(log_p.device)).sum(), log_p.shape[0]


class _Live(NamedTuple):
    """A call of a node in this sequence: how many rows of it count, and what it took and returned
    if it is recorded."""

    name: str
    rows: int
    taken: tuple[Tensor, Tensor] | None


class _Recorder(fx.Interpreter):
    def __init__(
        self,
        graph: fx.GraphModule,
        sites: Sequence[Site],
        quality: Quality,
        wanted: Collection[str] | None,
    ) -> None:
        super().__init__(graph)
        sites = [one for site in sites for one in site.members]
        placed = [s.node for s in sites if s.family in ("linear", "attention")]
        self.nodes = {n: Recorded() for n in placed if wanted is None or n in wanted}
        self.linear = {s.node: s.info for s in sites if isinstance(s.info, LinearInfo)}
        self.experts = {s.node: s.info for s in sites if isinstance(s.info, ExpertsInfo)}
        self.tables = {s.node for s in sites if isinstance(s.info, EmbeddingInfo)}
        self.rows = {*self.linear, *self.experts, *self.tables}
        self.quality = quality
        self.mask: Tensor | None = None
        self.unpadded = 0
        self.keep_attention = False
        self._live: list[_Live] = []
        self._kept: dict[str, int] = {}
        self._expert: dict[str, Tensor] = {}
        self._grams: dict[tuple[Any, ...], Tensor] = {}
        self._added: set[tuple[Any, ...]] = set()

    def begin(self, batch: Batch, *, keep_attention: bool) -> None:
        self.mask = padding_of(batch)
        self.unpadded = 0 if self.mask is None else int(self.mask.sum())
        self.keep_attention = keep_attention
        self._live.clear()

    def call(self, arguments: list[Any]) -> Sequence[Any]:
        """Run the graph once, recording."""
        self._added.clear()
        return self.run(*arguments)

    def run_node(self, n: fx.Node) -> Any:
        if n.name not in self.rows and not (n.target is attend and self.keep_attention):
            return super().run_node(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        output = super().run_node(n)
        if n.name in self.linear:
            self._linear(n, args, output)
        elif n.name in self.experts:
            self._experts(n, args, kwargs, output)
        elif n.name in self.tables:
            self._embedding(n, args, output)
        else:
            self._attention(n, args, kwargs, output)
        return output

    def _track(self, n: fx.Node, rows: int, x: Tensor, output: Tensor) -> None:
        """Note a call. All outputs have gradients, so that the model runs alike whatever is
        recorded."""
        if not output.requires_grad:
            output.requires_grad_()
        self._live.append(_Live(n.name, rows, (x, output) if n.name in self.nodes else None))

    def _linear(self, n: fx.Node, args: Sequence[Any], output: Tensor) -> None:
        patch, x = self.linear[n.name].patch, args[0].detach()
        if recorded := self.nodes.get(n.name):
            x = to_rows(x, patch)
            recorded.weight = args[1].detach().flatten(1)
            recorded.bias = args[2].detach() if len(args) > 2 and args[2] is not None else None
            # sites that share an input share one matrix
            self._moments(recorded, (n.all_input_nodes[0].name, patch), self._unpadded(x))
        rows = output.numel() // max(args[1].shape[0], 1)
        self._track(n, self._counted(rows), x, output)

    def _embedding(self, n: fx.Node, args: tuple[Any, ...], output: Tensor) -> None:
        """Indices are rows of one number."""
        if recorded := self.nodes.get(n.name):
            recorded.weight = args[0].detach()
        x = args[1].detach().unsqueeze(-1)
        self._track(n, self._counted(x.numel()), x, output)

    def _experts(
        self, n: fx.Node, args: Sequence[Any], kwargs: Mapping[str, Any], output: Tensor
    ) -> None:
        """Rows of all experts, with the expert of each; one gram for all of them. They are in
        another order than the mask."""
        x = args[0].detach()
        if recorded := self.nodes.get(n.name):
            offsets: Tensor = args[2] if len(args) > 2 else kwargs["offs"]
            places = torch.arange(len(x), device=x.device, dtype=offsets.dtype)
            found = torch.searchsorted(offsets, places, right=True)
            self._expert[n.name] = found.clamp(max=len(offsets) - 1)
            recorded.weight = args[1].detach().mT
            self._moments(recorded, (n.name,), x)
        self._track(n, len(x), x, output)

    def _moments(self, recorded: Recorded, source: tuple[Any, ...], x: Tensor) -> None:
        """Add the rows of a call to the matrix of their source, which all its sites hold."""
        if source not in self._added:
            self._added.add(source)
            rows = x.float()
            seen, total = rows.T @ rows, self._grams.get(source)
            self._grams[source] = seen.double() if total is None else total.add_(seen)
        recorded.gram_sum = self._grams[source]
        recorded.gram_rows += len(x)

    def _attention(
        self, n: fx.Node, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor
    ) -> None:
        if recorded := self.nodes.get(n.name):
            names = ("q", "k", "v", "mask", "bias", "sinks")
            inputs = {**dict(zip(names, args, strict=False)), **kwargs}
            inputs = {k: v.detach() if isinstance(v, Tensor) else v for k, v in inputs.items()}
            inputs.pop("state", None)
            inputs.pop("start", None)
            prompt = self.quality.prompt_of(inputs["k"].shape[2])
            recorded.inputs = {**inputs, "prompt": prompt}
            recorded.outputs = output.detach()
        self._track(n, 0, output, output)

    def end(self, score: Tensor, sequences: int, generator: torch.Generator) -> None:
        """Take the gradients of this sequence's `score` and keep a sample of rows."""
        gradients = iter(self._gradients(score))
        for name, rows, taken in self._live:
            if name not in self.rows:
                if taken is not None:
                    self.nodes[name].gradients = next(gradients)
                continue
            count = min(rows, max(1, ROWS // sequences))
            pick = torch.randperm(rows, generator=generator)[:count]
            self._kept[name] = self._kept.get(name, 0) + count
            if taken is not None:
                scale = (rows / max(count, 1)) ** 0.5
                self._keep(name, taken[0], next(gradients), pick, scale)
        self._live.clear()

    def _keep(self, name: str, x: Tensor, gradient: Tensor, pick: Tensor, scale: float) -> None:
        """Keep the rows `pick` of an input and of the gradient of its output, the latter scaled."""
        recorded = self.nodes[name]
        if name in self.linear:
            gradient = output_rows(gradient, self.linear[name].patch)
        padded = name not in self.experts
        rows, grads = (self._unpadded(t) if padded else t for t in (x, gradient))
        pick = pick.to(rows.device)
        _append(recorded.inputs, "x", rows[pick])
        if name in self.experts:
            _append(recorded.inputs, "expert", self._expert[name][pick])
        grads, kept = grads[pick] * scale, recorded.gradients
        recorded.gradients = grads if kept is None else torch.cat([kept, grads])

    def spread(self, generator: torch.Generator, states: dict[str, Tensor]) -> None:
        """Give the rows that were kept of linears the moments that their gram is shrunk to.

        `states` are filled in where they are empty.
        """
        known, found = bool(states), dict[str, Tensor]()
        for name, info in {**self.linear, **self.experts}.items():
            recorded = self.nodes.get(name)
            if name not in self._kept or (known and recorded is None):
                continue
            if known:
                generator.set_state(states[name])
            else:
                found[name] = generator.get_state()
            if recorded is None:
                torch.randn(self._kept[name], info.in_features, generator=generator)
                continue
            assert recorded.gram_sum is not None
            rows = max(recorded.gram_rows, 1)
            seen = recorded.gram_sum / rows
            x = recorded.inputs["x"]
            recorded.inputs["x"] = shrinkage.spread(x, seen, rows, generator)
        states.update(found)  # all or none, if this is interrupted

    def _gradients(self, score: Tensor) -> list[Tensor]:
        outputs = [live.taken[1] for live in self._live if live.taken is not None]
        if not outputs or not score.requires_grad:
            return [torch.zeros_like(output) for output in outputs]
        found: Any = torch.autograd.grad(score, outputs, allow_unused=True)
        pairs = zip(outputs, found, strict=True)
        return [torch.zeros_like(o) if g is None else g for o, g in pairs]

    def _counted(self, rows: int) -> int:
        """How many of so many rows are no padding."""
        padded = self.mask is not None and rows == self.mask.numel()
        return self.unpadded if padded else rows

    def _unpadded(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        if self.mask is not None and rows.shape[0] == self.mask.numel():
            return rows[self.mask.flatten()]
        return rows


def _append(inputs: dict[str, Any], name: str, rows: Tensor) -> None:
    inputs[name] = torch.cat([inputs[name], rows]) if name in inputs else rows
