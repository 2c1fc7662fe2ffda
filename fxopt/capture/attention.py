"""Attention spelled with `scaled_dot_product_attention` or with matmul, softmax, matmul."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import fx

from .evaluate import Sizes, Unknown, evaluate, shape_at
from .masks import Meaning, meaning
from .nodes import CASTS, COPIES, PRODUCTS, VIEWS, attention_node, call, padding_source, value
from .scores import Scores
from .shapes import fixed, symbol_sources

aten = torch.ops.aten
SOFTMAX = {aten.softmax.int, aten._softmax.default}
REPEATS = VIEWS | COPIES | {
    aten.expand.default, aten.unsqueeze.default, aten.repeat_interleave.self_int,
    aten.repeat.default, aten.slice.Tensor, aten.flatten.using_ints,
}  # fmt: skip


@dataclass
class Found:
    """One attention in another spelling: [batch, heads, tokens, features] each.

    `terms` are the masks and biases as (node, hides): `hides` says that true means hidden, for a
    boolean, and is None for what is added to the scores.
    """

    q: fx.Node
    k: fx.Node
    v: fx.Node
    result: fx.Node
    scale: float
    causal: bool = False
    softcap: float = 0.0
    terms: list[tuple[fx.Node, bool]] = field(default_factory=list[tuple[fx.Node, bool]])


def match_attention(graph: fx.GraphModule) -> None:
    """Replace every attention in the graph by the canonical call; others stay as they are."""
    sources = symbol_sources(graph.graph)
    # One batch size for all inputs: where the model needs them equal it does not always say so.
    sizes = {name: 4 + i if dim else 3 for i, (name, (_, dim)) in enumerate(sources.items())}
    masks = _Masks(graph, sizes)
    for node in list(graph.graph.nodes):
        if node.target is aten.scaled_dot_product_attention.default:
            found = _sdpa(node)
        elif node.target in SOFTMAX:
            found = _eager(graph, node, sizes)
        else:
            continue
        if found is not None and _fits(found):
            _replace(graph, found, masks)


def _sdpa(node: fx.Node) -> Found | None:
    arguments = dict(zip(("q", "k", "v", "mask", "dropout", "causal"), node.args, strict=False))
    given = {**arguments, **node.kwargs}
    q, k, v, mask = cast(Any, [given.get(name) for name in ("q", "k", "v", "mask")])
    if not all(isinstance(n, fx.Node) for n in (q, k, v)) or given.get("dropout", 0.0):
        return None
    causal = bool(given.get("causal", given.get("is_causal", False)))
    # PyTorch aligns the first query with the first key, `attend` the last with the last.
    if causal and str(value(q).shape[-2]) != str(value(k).shape[-2]):
        return None
    scale: Any = given.get("scale")
    scale = float(value(q).shape[-1] ** -0.5 if scale is None else scale)
    mask = mask if isinstance(mask, fx.Node) else given.get("attn_mask")
    terms = [(mask, False)] if isinstance(mask, fx.Node) else []
    return Found(q, k, v, node, scale, causal, terms=terms)


def _eager(graph: fx.GraphModule, softmax: fx.Node, sizes: Sizes) -> Found | None:
    rank = value(softmax).dim()
    if softmax.args[1] not in (-1, rank - 1):
        return None
    result = softmax
    while True:
        if len(result.users) != 1:
            return None
        user = next(iter(result.users))
        if user.target in PRODUCTS and user.args[0] is result:
            break
        if user.target not in CASTS | COPIES:
            return None
        result = user
    scores = Scores(graph, sizes)
    product = scores.walk(softmax.args[0])
    if product is None or not isinstance(user.args[1], fx.Node):
        return None
    q, transposed = cast(tuple[fx.Node, fx.Node], product.args)
    with graph.graph.inserting_before(product):
        k = _transposed(graph.graph, transposed)
    v, found = user.args[1], scores
    return Found(q, k, v, user, found.scale, softcap=found.softcap, terms=found.terms)


def _transposed(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """The keys of `keys.transpose(-2, -1)`."""
    rank = value(node).dim()
    if node.target is aten.transpose.int:
        source, *dims = node.args
        if {d % rank for d in dims} == {rank - 2, rank - 1}:  # pyright: ignore
            return source  # pyright: ignore
    new = graph.call_function(aten.transpose.int, (node, rank - 2, rank - 1))
    new.meta = {**node.meta, "val": value(node).transpose(-2, -1)}
    return new


def _fits(found: Found) -> bool:
    shapes = [value(n).shape for n in (found.q, found.k, found.v)]
    if any(len(shape) == 4 and fixed(shape[1]) is None for shape in shapes):
        return False  # attention over something else than tokens, as its heads vary with an input
    return {len(shape) for shape in shapes} <= {3} or {len(shape) for shape in shapes} <= {4}


def _replace(graph: fx.GraphModule, found: Found, masks: _Masks) -> None:
    with graph.graph.inserting_before(found.result):
        heads = value(found.q).dim() == 4
        q, k, v = (n if heads else call(n, aten.unsqueeze.default, n, 1)
                   for n in (found.q, found.k, found.v))  # fmt: skip
        k, v = _without_repeats(graph, q, k, v, masks.sizes)
        if not _groups(q, k, v):
            return
        terms = _Terms(found, masks)
        new = attention_node(
            graph.graph, q, k, v, scale=found.scale, softcap=found.softcap,
            causal=found.causal or terms.causal, window=terms.window, mask=terms.mask,
            bias=terms.bias,
        )  # fmt: skip
        batch, num_heads, length = value(q).shape[:3]
        shape = (batch, length, num_heads, value(v).shape[3])
        new.meta = {**found.result.meta, "op": "attention", "val": value(q).new_empty(shape)}
        out = call(new, aten.transpose.int, new, 1, 2)
        if not heads:
            out = call(out, aten.squeeze.dim, out, 1)
    found.result.replace_all_uses_with(out)
    # Random ops survive dead-code elimination, and this one is taken for such.
    graph.graph.erase_node(found.result)
    _undo_transposes(new, out)


def _undo_transposes(attention: fx.Node, out: fx.Node) -> None:
    """What transposes the result back to [batch, tokens, heads, features] reads it directly."""
    for user in list(out.users):
        dims: list[Any] = list(user.args[1:])
        swaps = user.target is aten.transpose.int and {d % 4 for d in dims} == {1, 2}
        if swaps or (user.target is aten.permute.default and list(dims[0]) == [0, 2, 1, 3]):
            user.replace_all_uses_with(attention)
    for user in list(attention.users):
        if user.target in COPIES:
            user.replace_all_uses_with(attention)


def _without_repeats(
    graph: fx.GraphModule, q: fx.Node, k: fx.Node, v: fx.Node, sizes: Sizes
) -> tuple[fx.Node, fx.Node]:
    """Keys and values before each was repeated for the query heads that share it."""
    bases = [_base(graph, node, sizes) for node in (k, v)]
    counts = {value(base).shape[1] for base in bases}
    return (bases[0], bases[1]) if len(counts) == 1 else (k, v)


def _base(graph: fx.GraphModule, node: fx.Node, sizes: Sizes) -> fx.Node:
    best = current = node
    heads = value(node).shape[1]
    while current.target in REPEATS and isinstance(current.args[0], fx.Node):
        current = current.args[0]
        shape = value(current).shape
        if len(shape) != 4 or fixed(shape[1]) is None or heads % shape[1]:
            continue
        if _repeats(graph, current, node, sizes):
            best = current
    return best


def _repeats(graph: fx.GraphModule, base: fx.Node, node: fx.Node, sizes: Sizes) -> bool:
    """Whether `node` is `base` with each head repeated, by trying it."""
    generator = torch.Generator().manual_seed(0)
    value = torch.rand(shape_at(base, sizes), generator=generator)
    try:
        result = evaluate(graph, node, sizes, {base: value})
    except (Unknown, RuntimeError):
        return False
    group = result.shape[1] // value.shape[1]
    return torch.equal(result, value.repeat_interleave(group, 1))


def _groups(q: fx.Node, k: fx.Node, v: fx.Node) -> bool:
    num_heads, num_kv_heads = value(q).shape[1], value(k).shape[1]
    return num_heads % num_kv_heads == 0 and value(v).shape[1] == num_kv_heads


class _Masks:
    """What each mask of the graph means, computed once: layers share them."""

    def __init__(self, graph: fx.GraphModule, sizes: Sizes) -> None:
        self.graph, self.sizes = graph, sizes
        self._known: dict[tuple[fx.Node, bool], Meaning | None] = {}

    def meaning(self, term: fx.Node, hides: bool) -> Meaning | None:
        if (term, hides) not in self._known:
            self._known[term, hides] = meaning(self.graph, term, self.sizes, hides)
        return self._known[term, hides]


class _Terms:
    """Masks and biases as arguments of `attend`."""

    def __init__(self, found: Found, masks: _Masks) -> None:
        self.causal, self.window = False, 0
        self.mask: fx.Node | None = None
        self.bias: fx.Node | None = None
        self.dtype, self.rank = value(found.q).dtype, value(found.q).dim()
        for term, hides in found.terms:
            known = masks.meaning(term, hides)
            if known is None or (known.padding is not None and self.mask is not None):
                self._add(term, hides)
            else:
                self._understood(known)

    def _understood(self, known: Meaning) -> None:
        self.causal |= known.causal
        windows = [w for w in (self.window, known.window) if w]
        self.window = min(windows, default=0)
        if known.padding is not None:
            node = known.padding
            self.mask = call(node, aten.eq.Scalar, node, 0) if known.inverted else node
            if not known.inverted:
                self.mask = padding_source(node)

    def _add(self, term: fx.Node, hides: bool) -> None:
        held = value(term)
        if held.dtype == torch.bool:
            shown = call(term, aten.logical_not.default, term) if hides else term
            zeros = call(term, aten.zeros_like.default, term)
            zeros.kwargs = {"dtype": self.dtype}
            zeros.meta["val"] = torch.zeros_like(held, dtype=self.dtype)
            term = call(term, aten.where.ScalarOther, shown, zeros, float("-inf"))
        elif held.dtype != self.dtype:
            term = call(term, aten.to.dtype, term, self.dtype)
        while value(term).dim() < 4:
            place = 1 if self.rank == 3 and value(term).dim() == 3 else 0
            term = call(term, aten.unsqueeze.default, term, place)
        self.bias = term if self.bias is None else call(term, aten.add.Tensor, self.bias, term)
