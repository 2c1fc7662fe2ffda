"""A head that multiplies by the weight of embeddings: all of them are one decision."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import fx

from ..ir.site import EmbeddingInfo, GroupInfo, LinearInfo, Site
from .names import site_keys

EMBEDDING = torch.ops.aten.embedding.default


def with_embeddings(head: Site, readers: Sequence[fx.Node]) -> Site:
    """The group of `head` and the `readers` of its weight, named after the head; `head` itself
    where not all of them are embeddings or its weight is stored otherwise."""
    info = head.info
    if not isinstance(info, LinearInfo) or info.transposed or info.patch:
        return head
    if not readers or any(reader.target is not EMBEDDING for reader in readers):
        return head
    alone = replace(head, info=replace(info, shared_with=()), blocked=None)
    tables = [_site(node, key, info) for node, key in site_keys(list(readers)).items()]
    return replace(head, info=GroupInfo("tied", (*tables, alone)), blocked=None)


def _site(node: fx.Node, key: str, head: LinearInfo) -> Site:
    held = node.args[0]
    assert isinstance(held, fx.Node)
    info = EmbeddingInfo(str(held.target), head.out_features, head.in_features, head.dtype)
    return Site("linear", key, node.name, info, key, side=node.meta.get("side", ""))
