"""One graph for prefill and decoding: attention nodes get a cache to write to and read."""

from __future__ import annotations

import operator
from dataclasses import replace

import torch
from torch import Tensor, fx, nn

from .captured import CACHE_INPUTS, Captured
from .positionwise import LENGTH, why_not_positionwise


def serve_generation(captured: Captured) -> Captured:
    """Pass `past[i]` and `start` to the i-th attention, or say in `reason` why that is wrong."""
    reason = _why_not(captured)
    if reason is not None:
        return replace(captured, reason=reason)
    graph = captured.graph.graph
    last = graph.find_nodes(op="placeholder")[-1]
    root = dict([next(iter(captured.attentions[0].meta["nn_module_stack"].items()))])
    with graph.inserting_after(last):
        past = graph.placeholder(CACHE_INPUTS[0])
    with graph.inserting_after(past):
        start = graph.placeholder(CACHE_INPUTS[1])
    for node in (past, start):
        node.meta |= {"val": None, "nn_module_stack": root, "fqn": ""}
    where = start
    for i, attention in enumerate(captured.attentions):
        with graph.inserting_after(where):
            where = graph.call_function(operator.getitem, (past, i))
        where.meta |= {"val": None, "nn_module_stack": root, "fqn": ""}
        attention.update_kwarg("state", where)
        attention.update_kwarg("start", start)
    captured.graph.recompile()
    return replace(captured, causal_lm=True)


def _why_not(captured: Captured) -> str | None:
    if not captured.attentions:
        return "no attention was found in the graph, so there is nothing to cache"
    for node in captured.attentions:
        where = node.meta["fqn"]
        if not node.kwargs.get("causal", False):
            return f"the attention at {where} is not causal"
        if node.kwargs.get("bias") is not None:
            return f"the attention at {where} adds a bias or a mask of its own to the scores"
    if len(captured.graph.graph.output_node().args[0]) != 1:  # pyright: ignore
        return "the forward returns more than logits (output_hidden_states or a router's losses)"
    stray = [name for name in ("attention_mask",) if name not in captured.optional]
    if stray and stray[0] in captured.inputs:
        return "the forward reads attention_mask outside attention"
    return why_not_positionwise(captured.graph, _vocabulary(captured.graph.graph))


def _vocabulary(graph: fx.Graph) -> int:
    """Rows of the table that input_ids index."""
    ids = next(n for n in graph.find_nodes(op="placeholder") if n.target == "input_ids")
    tables = [user.args[0] for user in ids.users if "embedding" in str(user.target)]
    sizes = [int(t.meta["val"].shape[0]) for t in tables if isinstance(t, fx.Node)]
    return min(sizes, default=2)


def numbered(captured: Captured, model: nn.Module) -> Captured:
    """For a part of a text decoder: how it numbers tokens when it is given no position_ids."""
    if "input_ids" in captured.inputs:
        return with_positions(captured, model)
    return replace(captured, positions="index") if "inputs_embeds" in captured.inputs else captured


def with_positions(captured: Captured, model: nn.Module) -> Captured:
    """Find how the forward numbers tokens when it is given a padding mask and no position_ids.

    The model says: the numbering whose result is nearest to its own on a left-padded batch. By
    index wherever the two agree, as they do for rotary embeddings.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    ids = torch.arange(2 * LENGTH, device=device).view(2, LENGTH)
    ids = ids % _vocabulary(captured.graph.graph)
    mask = torch.ones_like(ids)
    mask[0, : LENGTH // 2] = 0

    def logits(**kwargs: Tensor) -> Tensor:
        out = model(input_ids=ids, attention_mask=mask, use_cache=False, **kwargs)
        return captured.output.leaves_of(out)[0][mask.bool()].float()

    expected = logits()
    counted = (mask.cumsum(-1) - 1).clamp(min=0)
    by_index = logits(position_ids=torch.arange(LENGTH, device=device).expand(2, LENGTH))
    by_mask = logits(position_ids=counted)
    nearer = (by_mask - expected).norm() < 0.1 * (by_index - expected).norm()
    return replace(captured, positions="mask" if nearer else "index")
