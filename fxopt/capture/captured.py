"""What capture hands over: the canonical graph and how to call it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, fx

from ..ir.errors import CaptureError
from ..ir.site import Site
from .output import OutputSpec
from .request import flattened
from .shapes import fixed

# What the graph of a causal language model takes beside the user's inputs.
CACHE_INPUTS = ("past", "start")
# What a Hugging Face forward takes for granted: without a mask all tokens are seen.
MASK_OF = {"input_ids": "attention_mask", "decoder_input_ids": "decoder_attention_mask"}


class Dimension(NamedTuple):
    """Where a symbol of the graph's shapes is read: dimension `dim` of placeholder `input`.

    `role` is "batch", "length" (new tokens), "total" (the mask's, past and new), "keep"
    (positions whose logits are computed) or "" for a dimension that fxopt attaches no meaning to.
    """

    input: str
    dim: int
    role: str


@dataclass(frozen=True)
class Captured:
    """A model as a canonical graph. Parameters are get_attr nodes with their original names.

    `graph` is forward-only and returns a flat tuple of tensors; `inputs` names the placeholders
    that the user fills, in the order of the original forward, and `optional` those of them that
    may be None. With `causal_lm` the graph also takes `past`, a list with the cache tensors of
    each attention op (or None for each), and `start`, how many tokens they hold (0-d int64 or
    None): one graph then serves prefill and decoding. Of an encoder-decoder model the graph is the
    whole forward, whose nodes are marked with what a decoding step needs (`capture/seq2seq.py`).
    `reason` says why a model that generates has no such graph. `symbols` maps the symbols of the
    shapes in `node.meta["val"]` to the input dimension that they stand for; `static_dims` says
    which ones the model fixed.
    `positions` says how a text decoder's forward numbers tokens without position_ids: by
    "index", or by "mask" (the first token that is not padding is 0). `constants` are the
    arguments that are no tensors: their values are part of the graph.
    """

    graph: fx.GraphModule
    inputs: tuple[str, ...]
    output: OutputSpec
    signature: inspect.Signature
    sites: tuple[Site, ...] = ()
    causal_lm: bool = False
    reason: str | None = None
    symbols: Mapping[str, Dimension] = field(default_factory=dict[str, Dimension])
    static_dims: tuple[str, ...] = ()
    optional: frozenset[str] = frozenset()
    positions: Literal["index", "mask"] | None = None
    constants: Mapping[str, Any] = field(default_factory=dict[str, Any])
    at: str | None = None

    @property
    def attentions(self) -> tuple[fx.Node, ...]:
        """The attention nodes in order: `past[i]` belongs to the i-th one that has a state."""
        return tuple(n for n in self.graph.graph.nodes if n.meta.get("op") == "attention")

    def shape(self, index: int) -> tuple[int | torch.SymInt, ...]:
        """The shape of an output, with its symbols; () where it is no tensor."""
        outputs: Any = self.graph.graph.output_node().args[0]
        value = outputs[index].meta.get("val") if isinstance(outputs[index], fx.Node) else None
        return tuple(value.shape) if isinstance(value, Tensor) else ()

    @property
    def notes(self) -> list[str]:
        """What the graph serves no more of what the model does."""
        notes: list[str] = []
        if self.static_dims:
            sizes = ", ".join(self.static_dims)
            notes.append(f"capture: the graph takes these sizes of inputs and no others: {sizes}")
        if self.reason is not None:
            notes.append(f"capture: no generate and no KV cache, as {self.reason}")
        return notes

    @property
    def encoder_decoder(self) -> bool:
        """Whether the graph holds an encoder and a decoder that runs in steps, with a cache."""
        return any("cache" in node.meta for node in self.attentions)

    @property
    def source(self) -> int | None:
        """How many tokens the encoder's result has, where the model fixed that."""
        cross = [n for n in self.attentions if n.meta.get("cache") == "cross"]
        return fixed(cross[0].args[1].meta["val"].shape[2]) if cross else None  # pyright: ignore

    def with_sites(self, sites: tuple[Site, ...]) -> Captured:
        return replace(self, sites=sites)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Run the graph as the original forward would be called; returns its output class.

        For causal language models `position_ids` counts from `start` when not given (by
        `positions`), `logits_to_keep` (an int, an index tensor or None) is all positions, and
        there is no cache unless `past` and `start` are given.
        """
        # fx's own __call__ prints over errors of the model and hides some.
        return self.output.build(self.graph.forward(*self.arguments(*args, **kwargs)))

    def arguments(self, *args: Any, **kwargs: Any) -> list[Any]:
        """The values of the graph's placeholders, in order, for a call like that of `run`."""
        cache = {name: kwargs.pop(name, None) for name in CACHE_INPUTS}
        bound = self._bind(args, kwargs)
        if self.causal_lm:
            bound |= cache
        if self.positions:
            self._fill(bound)
        names = [str(n.target) for n in self.graph.graph.find_nodes(op="placeholder")]
        return [bound.get(name) for name in names]

    def _bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        given = dict(self.signature.bind_partial(*args, **kwargs).arguments)
        for parameter in self.signature.parameters.values():
            if parameter.kind is parameter.VAR_KEYWORD:
                given |= given.pop(parameter.name, {})
        for name, value in list(given.items()):
            if isinstance(value, dict | list | tuple) and name not in self.inputs:
                given |= flattened(name, given.pop(name))
        for ids, mask in MASK_OF.items():
            if ids in given and mask in self.inputs and mask not in self.optional:
                given.setdefault(mask, torch.ones_like(given[ids]))
        missing = [n for n in self.inputs if n not in given and n not in self._filled]
        missing = [n for n in missing if n not in self.optional]
        if missing:
            raise CaptureError(f"forward() lacks {', '.join(missing)}, which the graph reads")
        unknown = [n for n, v in given.items() if n not in self.inputs and isinstance(v, Tensor)]
        if unknown:
            raise CaptureError(
                f"The graph was captured without {', '.join(unknown)}: give it in example_inputs"
            )
        self._check_sizes(given)
        return given

    def _check_sizes(self, given: dict[str, Any]) -> None:
        for node in self.graph.graph.find_nodes(op="placeholder"):
            value, traced = given.get(str(node.target)), node.meta.get("val")
            if not isinstance(value, Tensor) or not isinstance(traced, Tensor):
                continue
            sizes = [fixed(size) for size in traced.shape]
            wrong = [
                s for s, given in zip(sizes, value.shape, strict=False) if s not in (None, given)
            ]
            if wrong or value.dim() != traced.dim():
                raise CaptureError(
                    f"{node.target} has shape {tuple(value.shape)}, but the graph takes "
                    f"({', '.join('any' if s is None else str(s) for s in sizes)}): "
                    "the model fixed these sizes while it was captured"
                )

    @property
    def _filled(self) -> frozenset[str]:
        """Inputs of a text decoder that have a value when the caller gives none."""
        return frozenset(("position_ids", "logits_to_keep") if self.positions else ())

    def _fill(self, bound: dict[str, Any]) -> None:
        mask, start = bound.get("attention_mask"), bound.get("start")
        ids = bound["input_ids"] if "input_ids" in self.inputs else bound["inputs_embeds"]
        batch, length = ids.shape[:2]
        positions = bound.get("position_ids")
        if positions is None and self.positions == "mask" and mask is not None:
            positions = (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -length:]
        elif positions is None:
            positions = torch.arange(length, device=ids.device) + (0 if start is None else start)
        bound["position_ids"] = positions.expand(batch, length)
        keep = bound.get("logits_to_keep")
        if not isinstance(keep, Tensor):
            bound["logits_to_keep"] = torch.arange(length, device=ids.device)[-(keep or 0) :]
        if self.causal_lm and bound["past"] is None:
            states = sum(n.kwargs.get("state") is not None for n in self.attentions)
            bound["past"] = [None] * states
