"""Encoder-decoder models: which attentions of the decoder keep a cache, and what counts positions.

Nothing is rewritten. The nodes are marked, so that emission can take the decoder's step out of the
graph: `meta["cache"]` is "self" (grows with each token) or "cross" (filled once, from the
encoder's result), `meta["positions"]` of an `arange` is "queries" or "keys".
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from ..ir.errors import CaptureError
from ..ir.ops import attend
from .captured import Captured
from .nodes import value

aten = torch.ops.aten
IDS, MASK = "decoder_input_ids", "decoder_attention_mask"
BATCH, LENGTH, CUT = 2, 9, 5


def serve_decoding(captured: Captured) -> Captured:
    """Mark what a decoding step needs, or say in `reason` why the decoder cannot run in steps."""
    graph = captured.graph.graph
    decoding = _decoding(graph)
    marks: dict[fx.Node, tuple[str, str]] = {}
    reason = _mark_attentions(captured, decoding, marks) or _mark_positions(graph, marks)
    for node, (kind, what) in marks.items():
        node.meta[kind] = what
    reason = reason or _why_not_in_steps(captured)
    for node in graph.nodes:
        if reason is None and node not in decoding and node.op == "call_function":
            node.meta["side"] = "encoder"
        for kind, _ in marks.values() if reason is not None else ():
            node.meta.pop(kind, None)
    return replace(captured, reason=reason)


def _decoding(graph: fx.Graph) -> set[fx.Node]:
    """The nodes whose values depend on the decoder's inputs (not on their sizes alone)."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder":
            reads = str(node.target).startswith("decoder_")
        else:
            reads = isinstance(node.meta.get("val"), Tensor) or node.op == "output"
            reads = reads and any(source in found for source in node.all_input_nodes)
        if reads:
            found.add(node)
    return found


def _mark_attentions(
    captured: Captured, decoding: set[fx.Node], marks: dict[fx.Node, tuple[str, str]]
) -> str | None:
    for node in captured.attentions:
        q, k, v = (arg in decoding for arg in node.args[:3])
        where = node.meta["fqn"]
        if not q:
            continue
        if k != v:
            return f"the attention at {where} takes keys and values from different sides"
        if k and not node.kwargs.get("causal", False):
            return f"the attention at {where} is not causal, so the past changes with each token"
        if not k and (node.kwargs.get("causal", False) or node.kwargs.get("bias") is not None):
            return f"the cross-attention at {where} depends on the positions of its queries"
        marks[node] = ("cache", "self" if k else "cross")
    kinds = {what for _, what in marks.values()}
    if kinds != {"self", "cross"}:
        return "its decoder has no self-attention or no cross-attention to cache"
    return None


def _mark_positions(graph: fx.Graph, marks: dict[fx.Node, tuple[str, str]]) -> str | None:
    """Mark every count of the decoder's tokens; what else reads the length is tried afterwards."""
    ids = next(n for n in graph.find_nodes(op="placeholder") if n.target == IDS)
    length = str(value(ids).shape[1])
    for node in graph.nodes:
        held = node.meta.get("val")
        if not isinstance(held, Tensor) or "arange" not in str(node.target):
            continue
        if str(held.shape[0]) != length:
            continue
        from_zero = node.target is aten.arange.default or node.args[0] == 0
        if not from_zero or len(node.args) > 2 or held.dtype != torch.int64:
            return f"{node.name} counts the decoder's tokens in a way of its own"
        marks[node] = ("positions", "keys" if _along_keys(node, length) else "queries")
    return None


def _along_keys(count: fx.Node, length: str) -> bool:
    """Whether a count of tokens runs along the last dimension of a [.., tokens, tokens] table."""
    waiting = [count]
    for node in waiting:
        own = [str(size) == length for size in value(node).shape]
        for user in node.users:
            held = user.meta.get("val")
            if not isinstance(held, Tensor) or user in waiting or user.target is attend:
                continue
            if sum(str(size) == length for size in held.shape) > 1:
                return own[-1]
            waiting.append(user)
    return False


class _Steps(fx.Interpreter):
    """Runs a marked graph for the decoder's tokens from `start` on; `kept` are earlier keys."""

    def __init__(self, graph: fx.GraphModule, start: int, kept: dict[str, tuple[Tensor, Tensor]]):
        super().__init__(graph)
        self.start, self.kept = start, kept

    def run_node(self, n: fx.Node) -> Any:
        if n.target is attend:
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            return self._attend(n, args[0], args[1], args[2], kwargs)
        out = super().run_node(n)
        if n.meta.get("positions") == "keys":
            return torch.arange(self.start + len(out), device=out.device)
        return out + self.start if n.meta.get("positions") == "queries" else out

    def _attend(self, n: fx.Node, q: Tensor, k: Tensor, v: Tensor, given: Any) -> Tensor:
        """Attention without what makes no difference to whether pieces give the whole."""
        if n.meta.get("cache") == "self":
            if n.name in self.kept:
                k, v = (
                    torch.cat([a, b], 2) for a, b in zip(self.kept[n.name], (k, v), strict=True)
                )
            self.kept[n.name] = k, v
        group = q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(group, 1) for x in (k, v))
        scores = q @ k.mT * given["scale"]
        if given.get("bias") is not None:
            scores = scores + given["bias"]
        if given.get("causal"):
            seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device)
            scores = scores.where(seen.tril(k.shape[2] - q.shape[2]), -torch.inf)
        return (scores.softmax(-1) @ v).transpose(1, 2).contiguous()


def _why_not_in_steps(captured: Captured) -> str | None:
    """None if the decoder, run on two pieces of a sequence, gives what the whole gives."""
    given = _inputs(captured)
    try:
        (whole,) = _run(captured, given, [LENGTH])
        pieces = _run(captured, given, [CUT, LENGTH - CUT])
    except (RuntimeError, IndexError, TypeError, CaptureError) as error:
        return f"its decoder does not run on a piece of a sequence: {str(error).splitlines()[0]}"
    for i, out in enumerate(whole):
        parts = [piece[i] for piece in pieces]
        if all(part.shape == out.shape and torch.equal(part, out) for part in parts):
            continue
        if out.dim() < 2 or out.shape[1] != LENGTH:
            return "the forward returns more than logits and the encoder's result"
        change = (torch.cat(parts, 1).double() - out.double()).abs().max()
        rounding = max(1e-3, 4 * torch.finfo(out.dtype).eps)
        if change > rounding * out.double().abs().max().clamp(min=1e-30):
            return "the decoder's result for a token depends on where its piece begins"
    return None


def _run(captured: Captured, given: dict[str, Any], lengths: list[int]) -> list[list[Tensor]]:
    names = [str(n.target) for n in captured.graph.graph.find_nodes(op="placeholder")]
    kept: dict[str, tuple[Tensor, Tensor]] = {}
    results: list[list[Tensor]] = []
    start = 0
    for length in lengths:
        step = {**given, IDS: given[IDS][:, start : start + length]}
        step[MASK] = torch.ones_like(given[IDS][:, : start + length])
        steps = _Steps(captured.graph, start, kept)
        found = steps.run(*(step[name] for name in names), enable_io_processing=False)
        results.append(list(found))
        start += length
    return results


def _inputs(captured: Captured) -> dict[str, Any]:
    """Random inputs of the sizes that the graph was traced with, for a batch of `BATCH`."""
    generator = torch.Generator().manual_seed(0)
    device = next((p.device for p in captured.graph.parameters()), torch.device("cpu"))
    found: dict[str, Any] = {}
    for node in captured.graph.graph.find_nodes(op="placeholder"):
        held, name = value(node), str(node.target)
        shape = [BATCH, *(int(s.node.hint) if isinstance(s, torch.SymInt) else s
                          for s in held.shape[1:])]  # fmt: skip
        if name == IDS:
            shape = [BATCH, LENGTH]
        if held.is_floating_point():
            made = torch.randn(shape, generator=generator).to(held.dtype)
        elif "mask" in name:
            made = torch.ones(shape, dtype=held.dtype)
        else:
            made = torch.randint(_rows(node), shape, generator=generator).to(held.dtype)
        found[name] = made.to(device)
    return found


def _rows(node: fx.Node) -> int:
    """Rows of the smallest table that an input indexes."""
    tables = [user.args[0] for user in node.users if "embedding" in str(user.target)]
    return min((int(value(t).shape[0]) for t in tables if isinstance(t, fx.Node)), default=2)
