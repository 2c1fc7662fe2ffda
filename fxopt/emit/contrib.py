"""onnxruntime's own operators, where they compute a node faster than what it traces to."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import fx, nn

from ..ir.ops import arguments_of_attend, attend
from .attributes import attribute
from .facts import tensor_facts

Target = Literal["portable", "ort"]


def packed_products(
    graph: fx.Graph, root: nn.Module, decodes: bool
) -> tuple[dict[fx.Node, list[str]], list[str]]:
    """The nodes that `MatMulNBits` computes, with the names of its weights, and why others stay.

    The weights become buffers of `root`, beside those that they stand for.
    """
    from ..kernels.quantized_linear import onnx as nbits

    found: dict[fx.Node, list[str]] = {}
    reasons: list[str] = []
    for node in graph.nodes:
        if node.target is not torch.ops.fxopt.quantized_linear.default:
            continue
        _, packed, scale, zero, _, bits, group_size = node.args
        names = [str(weight.target) for weight in (packed, scale, zero)]
        weight: list[Any] = [attribute(root, name) for name in names]
        reason = nbits.refusal(bits, group_size, weight[1].dtype)
        if reason is None and not decodes:
            reason = 'it is faster for one row, which kind="generate" decodes, and not for many'
        if reason is not None:
            reasons.append(f"MatMulNBits: {reason}")
            continue
        stored = nbits.blocks(weight[0], weight[1], weight[2], group_size)
        for name, value in zip(names, stored, strict=True):
            owner, _, local = name.rpartition(".")
            root.get_submodule(owner).register_buffer(f"{local}_nbits", value)
        found[node] = [f"{name}_nbits" for name in names]
    if not found and not reasons:
        reasons.append("MatMulNBits: no layer has integer weights (linear.quantized)")
    return found, list(dict.fromkeys(reasons))


def causal_attentions(
    graph: fx.Graph, dtype: torch.dtype, decodes: bool
) -> tuple[set[fx.Node], list[str]]:
    """The calls of `attend` that `GroupQueryAttention` computes, and why others stay."""
    from ..kernels.attention import ort

    found: set[fx.Node] = set()
    reasons: list[str] = []
    for node in graph.find_nodes(op="call_function", target=attend):
        call = arguments_of_attend(*node.args, **node.kwargs)
        known = [tensor_facts(call[name]) for name in "qkv"]
        shapes = [each.shape for each in known if each is not None]
        reason = ort.refusal(call, shapes, dtype)
        if reason is None and decodes:
            reason = 'it is slower for one row, which kind="generate" decodes'
        if reason is None:
            found.add(node)
        else:
            reasons.append(f"GroupQueryAttention: {reason}")
    return found, list(dict.fromkeys(reasons))
