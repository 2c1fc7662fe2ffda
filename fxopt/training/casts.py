"""Casts of one tensor to one dtype, made once in a forward."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from .lifetimes import storage_of

aten = torch.ops.aten
EQUAL = (aten.view.default, aten._to_copy.default)


def merge_casts(graph: fx.Graph, forward: set[fx.Node], results: Collection[Any]) -> None:
    """Let equal casts, and the views that they are made of, be one.

    Under autocast each linear layer casts its input itself, and saves it: queries, keys and values
    three times the same. Neither results nor nodes of the backward are merged: gradients are
    summed as they were.
    """
    first: dict[Any, fx.Node] = {}
    moved: set[int] = set()
    for node in list(graph.nodes):
        if moved & _storages(node):
            _again(node)  # what is a view of merged memory
        if node.target not in EQUAL or node not in forward or node in results:
            continue
        said = node.args, tuple(sorted(node.kwargs.items(), key=str))
        same = first.setdefault((node.target, str(said[0][1:]), str(said[1]), node.args[0]), node)
        if same is node:
            continue
        if node.target is aten._to_copy.default:
            moved |= _storages(node)
        node.replace_all_uses_with(same)
        graph.erase_node(node)
        forward.discard(node)


def _storages(node: fx.Node) -> set[int]:
    leaves = pytree.tree_leaves(node.meta.get("val"))
    return {storage_of(t) for t in leaves if isinstance(t, Tensor)}


def _again(node: fx.Node) -> None:
    """Let the fake value of a node follow from its arguments as they are now."""
    args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda n: n.meta["val"])
    with torch.no_grad():
        node.meta["val"] = node.target(*args, **kwargs)  # pyright: ignore
