"""Two fingerprints of a model: what it computes, and with which values."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._ops import OpOverload
from torch.utils import _pytree as pytree

SAMPLES = 4096


def structure_fingerprint(graph: fx.GraphModule) -> str:
    """SHA-256 over targets, arguments, shapes and dtypes of a canonical graph, in order.

    Names of nodes and of symbols do not count: they differ between versions of the tracer.
    """
    numbers = {node: i for i, node in enumerate(graph.graph.nodes)}
    digest = hashlib.sha256()
    for node in graph.graph.nodes:
        arguments = pytree.tree_map_only(
            fx.Node, lambda n: _Number(numbers[n]), (node.args, dict(node.kwargs))
        )
        line = f"{node.op}|{_name(node.target)}|{arguments}|{_shape(node.meta.get('val'))}"
        digest.update(line.encode())
    return digest.hexdigest()


def weights_fingerprint(model: nn.Module, moving: Collection[str] = ()) -> str:
    """SHA-256 over names, shapes, dtypes and a strided sample of every parameter and buffer, but
    the `moving` ones, which each forward writes to."""
    digest = hashlib.sha256()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name in moving:
            continue
        flat = tensor.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // SAMPLES)].cpu().contiguous()
        digest.update(f"{name}|{tuple(tensor.shape)}|{tensor.dtype}".encode())
        digest.update(sample.view(torch.uint8).numpy().tobytes() if sample.numel() else b"")
    return digest.hexdigest()


class _Number:
    """An operand by its place in the graph."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __repr__(self) -> str:
        return f"%{self.number}"


def _name(target: Any) -> str:
    if isinstance(target, (str, OpOverload)):
        return str(target)
    return f"{getattr(target, '__module__', '')}.{getattr(target, '__name__', target)}"


def _shape(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype}[{re.sub(r's[0-9]+', 's', str(list(value.shape)))}]"
    return type(value).__name__
