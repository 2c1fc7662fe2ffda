"""One pass forward and one backward over the fit part: what every score is made from.

The backward pass starts from labels sampled from the model itself, so that the squared
directional derivatives estimate the Fisher information (Fisher-Taylor).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, fx

from ..ir.errors import FxoptError
from ..ir.ops import attend
from ..ir.patches import output_rows, to_rows
from ..ir.site import EmbeddingInfo, ExpertsInfo, GroupInfo, LinearInfo, Site
from . import shrinkage
from .calibration import Batch, padding_of
from .quality import Quality, by_row

T = TypeVar("T")
Call = Callable[[list[Any]], Sequence[Any]]
"""The graph's inputs in order -> its outputs."""
Run = Callable[[Call, Batch, Tensor | None], Sequence[Any]]
"""(call, batch, positions that count) -> the outputs of the model that `call` computes."""

ROWS = 1024
"""Rows of a linear's input (and gradient) that are kept, over all sequences."""


@dataclass
class Recorded:
    """Recordings at one node. `gradients` are of the sampled log-likelihood, by `inputs`' rows
    (linear [T, out], scaled so that the sum of their squares stands for that over all positions) or
    whole (attention [B, N, H, Dv])."""

    weight: Tensor | None = None
    bias: Tensor | None = None
    inputs: dict[str, Any] = field(default_factory=dict)
    outputs: Tensor | None = None
    gradients: Tensor | None = None
    gram_sum: Tensor | None = None
    gram_rows: int = 0
    members: tuple[Recorded, ...] = ()
    made: dict[str, Any] = field(default_factory=dict)

    def once(self, name: str, make: Callable[[], T]) -> T:
        """`make()` of the first call under this name."""
        if name not in self.made:
            self.made[name] = make()
        return self.made[name]

    @property
    def gram(self) -> Tensor:
        """E[x xT] in float64, [in, in], shrunk as far as the rows that were seen are few."""
        if self.gram_sum is None:
            raise ValueError("no input was recorded at this site")
        rows = max(self.gram_rows, 1)
        seen = self.gram_sum / rows
        return shrinkage.shrunk(seen, shrinkage.intensity(seen, rows))

    def exact(self) -> Tensor:
        """What a linear, an embedding, or an expert each returns for the rows in `inputs`."""
        assert self.weight is not None
        if not self.inputs["x"].is_floating_point():
            return self.weight[self.inputs["x"][:, 0]]
        if "expert" in self.inputs:
            return _by_expert(self.inputs["x"], self.weight, self.inputs["expert"])
        y = self.inputs["x"] @ self.weight.T
        return y if self.bias is None else y + self.bias


@dataclass
class Statistics:
    """Recordings by node name; `positions` that counted in all; see `second_order`."""

    nodes: dict[str, Recorded]
    positions: int
    attention_positions: int

    def at(self, site: Site) -> Recorded:
        """What was recorded at the node of `site`; a group has its members' as well."""
        recorded = self.nodes[site.node]
        if not isinstance(site.info, GroupInfo):
            return recorded
        return replace(recorded, members=tuple(map(self.at, site.info.members)))

    def second_order(self, site: Site, change: Tensor) -> float:
        """Fisher-Taylor estimate of the additive error that `change` of the site's recorded
        output makes: 1/2 sum_t <g_t, change_t>^2 over the positions that count.

        `change` has the shape of the recorded gradients; attention sites count their head only.
        """
        recorded = self.at(site)
        if recorded.gradients is None:
            return 0.0
        product = recorded.gradients.float() * change.float()
        if site.head is not None:
            info = site.info
            group = info.num_heads // info.num_kv_heads  # type: ignore[union-attr]
            heads = slice(site.head * group, (site.head + 1) * group)
            product = product[:, :, heads].flatten(2)
            count = max(self.attention_positions, 1)
        else:
            count = max(self.positions, 1)
        inner = product.sum(-1)
        return 0.5 * inner.square().sum().item() / count


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
) -> Statistics:
    """Run `graph` over `batches` and record every linear and attention site.

    `run` runs the model around the graph, which it may call several times; `logits` is the index
    of the output that quality looks at. No parameter gets a gradient.
    """
    recorder = _Recorder(graph, sites, quality)
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
        counted += count
        attended += count if keep else 0
        recorder.end(score, len(batches), generator)
    recorder.spread(generator)
    return Statistics(recorder.nodes, counted, attended)


def _check_output(output: Tensor, sequence: int) -> None:
    if output.isnan().any():
        raise FxoptError(
            f"calibration: the model itself returns NaN for sequence {sequence}; see whether its "
            "weights are finite, and which layer overflows"
        )


def _sampled_score(output: Tensor, quality: Quality, generator: torch.Generator) -> Any:
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


def _by_expert(x: Tensor, weight: Tensor, expert: Tensor) -> Tensor:
    """Each row times the transposed weight of its expert."""
    y = x.new_empty((len(x), weight.shape[1]))
    for e in expert.unique().tolist():
        y[expert == e] = x[expert == e] @ weight[e].T
    return y


def _given(inputs: Mapping[str, Tensor], name: str) -> list[Tensor]:
    return [inputs[name]] if name in inputs else []


class _Recorder(fx.Interpreter):
    def __init__(self, graph: fx.GraphModule, sites: Sequence[Site], quality: Quality) -> None:
        super().__init__(graph)
        sites = [one for site in sites for one in site.members]
        self.nodes: dict[str, Recorded] = {
            s.node: Recorded() for s in sites if s.family in ("linear", "attention")
        }
        self.linear = {s.node: s.info for s in sites if isinstance(s.info, LinearInfo)}
        self.experts = {s.node for s in sites if isinstance(s.info, ExpertsInfo)}
        self.tables = {s.node for s in sites if isinstance(s.info, EmbeddingInfo)}
        self.rows = {*self.linear, *self.experts, *self.tables}
        self.quality = quality
        self.mask: Tensor | None = None
        self.keep_attention = False
        self._live: list[tuple[str, Tensor, Tensor]] = []
        self._expert: dict[str, Tensor] = {}
        self._grams: dict[tuple[str, tuple[int, ...]], Tensor] = {}

    def begin(self, batch: Batch, *, keep_attention: bool) -> None:
        self.mask = padding_of(batch)
        self.keep_attention = keep_attention
        self._live.clear()

    def call(self, arguments: list[Any]) -> Sequence[Any]:
        """Run the graph once, recording."""
        self._grams.clear()
        return self.run(*arguments)

    def run_node(self, n: fx.Node) -> Any:
        if n.name not in self.nodes:
            return super().run_node(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        output = super().run_node(n)
        if n.name in self.linear:
            self._linear(n, args, output)
        elif n.name in self.experts:
            self._experts(n, args, kwargs, output)
        elif n.name in self.tables:
            self._embedding(n, args, output)
        elif n.target is attend and self.keep_attention:
            self._attention(n, args, kwargs, output)
        return output

    def _track(self, n: fx.Node, x: Tensor, output: Tensor) -> None:
        if not output.requires_grad:
            output.requires_grad_()
        self._live.append((n.name, x, output))

    def _linear(self, n: fx.Node, args: tuple[Any, ...], output: Tensor) -> None:
        patch, recorded = self.linear[n.name].patch, self.nodes[n.name]
        x = to_rows(args[0].detach(), patch)
        recorded.weight = args[1].detach().flatten(1)
        recorded.bias = args[2].detach() if len(args) > 2 and args[2] is not None else None
        source = n.all_input_nodes[0].name, patch
        if source not in self._grams:
            rows = self._unpadded(x).float()
            self._grams[source] = (rows.T @ rows).double()
        gram = self._grams[source]
        # sites that share an input share one matrix until another sequence comes
        recorded.gram_sum = gram if recorded.gram_sum is None else recorded.gram_sum + gram
        recorded.gram_rows += self._unpadded(x).shape[0]
        self._track(n, x, output)

    def _embedding(self, n: fx.Node, args: tuple[Any, ...], output: Tensor) -> None:
        """Indices are rows of one number."""
        self.nodes[n.name].weight = args[0].detach()
        self._track(n, args[1].detach().unsqueeze(-1), output)

    def _experts(
        self, n: fx.Node, args: Sequence[Any], kwargs: Mapping[str, Any], output: Tensor
    ) -> None:
        """Rows of all experts, with the expert of each; one gram for all of them."""
        x, recorded = args[0].detach(), self.nodes[n.name]
        offsets: Tensor = args[2] if len(args) > 2 else kwargs["offs"]
        places = torch.arange(len(x), device=x.device, dtype=offsets.dtype)
        found = torch.searchsorted(offsets, places, right=True)
        self._expert[n.name] = found.clamp(max=len(offsets) - 1)
        recorded.weight = args[1].detach().mT
        rows = x.float()
        gram = (rows.T @ rows).double()
        recorded.gram_sum = gram if recorded.gram_sum is None else recorded.gram_sum + gram
        recorded.gram_rows += len(x)
        self._track(n, x, output)

    def _attention(
        self, n: fx.Node, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor
    ) -> None:
        recorded = self.nodes[n.name]
        names = ("q", "k", "v", "mask", "bias", "sinks")
        inputs = {**dict(zip(names, args, strict=False)), **kwargs}
        inputs = {k: v.detach() if isinstance(v, Tensor) else v for k, v in inputs.items()}
        inputs.pop("state", None)
        inputs.pop("start", None)
        recorded.inputs = {**inputs, "prompt": self.quality.prompt_of(inputs["k"].shape[2])}
        recorded.outputs = output.detach()
        self._track(n, output, output)

    def end(self, score: Tensor, sequences: int, generator: torch.Generator) -> None:
        """Take the gradients of this sequence's `score` and keep a sample of rows."""
        for (name, x, _), gradient in zip(self._live, self._gradients(score), strict=True):
            recorded = self.nodes[name]
            if name not in self.rows:
                recorded.gradients = gradient
                continue
            if name in self.linear:
                gradient = output_rows(gradient, self.linear[name].patch)
            # rows of experts are in another order than the mask
            padded = name not in self.experts
            rows, grads = (self._unpadded(t) if padded else t for t in (x, gradient))
            count = min(len(rows), max(1, ROWS // sequences))
            pick = torch.randperm(len(rows), generator=generator)[:count].to(rows.device)
            before = recorded.inputs.get("x")
            rows, grads = rows[pick], grads[pick] * (len(rows) / max(count, 1)) ** 0.5
            recorded.inputs["x"] = rows if before is None else torch.cat([before, rows])
            if name in self.experts:
                drawn = [self._expert[name][pick], *_given(recorded.inputs, "expert")]
                recorded.inputs["expert"] = torch.cat(drawn[::-1])
            kept = recorded.gradients
            recorded.gradients = grads if kept is None else torch.cat([kept, grads])
        self._live.clear()

    def spread(self, generator: torch.Generator) -> None:
        """Give the rows that were kept of linears the moments that their gram is shrunk to."""
        for name in (*self.linear, *self.experts):
            recorded = self.nodes[name]
            if recorded.gram_sum is not None and "x" in recorded.inputs:
                rows = max(recorded.gram_rows, 1)
                seen = recorded.gram_sum / rows
                x = recorded.inputs["x"]
                recorded.inputs["x"] = shrinkage.spread(x, seen, rows, generator)

    def _gradients(self, score: Tensor) -> list[Tensor]:
        outputs = [output for _, _, output in self._live]
        if not outputs or not score.requires_grad:
            return [torch.zeros_like(output) for output in outputs]
        found: Any = torch.autograd.grad(score, outputs, allow_unused=True)
        pairs = zip(outputs, found, strict=True)
        return [torch.zeros_like(o) if g is None else g for o, g in pairs]

    def _unpadded(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        if self.mask is not None and rows.shape[0] == self.mask.numel():
            return rows[self.mask.flatten()]
        return rows
