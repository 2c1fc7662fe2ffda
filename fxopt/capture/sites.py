"""The places of a canonical graph where a cheaper computation can stand."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..ir.site import AttentionInfo, LinearInfo, Site
from .captured import Captured
from .experts import behind, experts_site, is_experts
from .grids import Grids
from .groups import group_sites
from .linears import TRANSPOSES, patch_of, stored
from .names import attribute, site_keys
from .rows import Rows
from .temporaries import temporary_sites
from .tied import with_embeddings

aten = torch.ops.aten
TIED = "tied weight"


def find_sites(captured: Captured) -> tuple[Site, ...]:
    """All sites of all families, in the order of the graph within each family."""
    graph = captured.graph
    attention = _attention_sites(captured)
    sides = {node.name: node.meta.get("side", "") for node in graph.graph.nodes}
    found = (
        *(site for site in attention if site.family == "attention"),
        *(site for site in attention if site.family == "kv_cache"),
        *_linear_sites(captured),
        *temporary_sites(captured),
    )
    placed = [replace(site, side=sides[site.node]) for site in found]
    groups = group_sites(graph.graph, placed)
    return (*placed, *(replace(site, side=sides.get(site.node, "")) for site in groups))


def _attention_sites(captured: Captured) -> list[Site]:
    sites: list[Site] = []
    keys = site_keys(list(captured.attentions))
    grids = Grids(captured.graph.graph)
    for node in captured.attentions:
        grid, no_grid = grids.at(node)
        info = replace(attention_info(node), grid=grid, no_grid=no_grid)
        for head in range(info.num_kv_heads):
            key = f"{keys[node]}/kv={head}"
            site = Site("attention", key, node.name, info, op=keys[node], head=head)
            sites.append(site)
            if info.cached:
                sites.append(Site("kv_cache", key, node.name, info, op=keys[node], head=head))
    return sites


def attention_info(node: fx.Node) -> AttentionInfo:
    """The facts of an `attend` node, from its arguments and their traced shapes."""
    q, k, v = (arg.meta["val"] for arg in node.args[:3])  # pyright: ignore
    given = node.kwargs
    window: Any = given.get("window", (0,))
    return AttentionInfo(
        num_heads=int(q.shape[1]),
        num_kv_heads=int(k.shape[1]),
        head_dim=int(q.shape[3]),
        value_dim=int(v.shape[3]),
        dtype=q.dtype,
        causal=bool(given.get("causal", False)),
        window=max(int(w) for w in window),
        softcap=float(given.get("softcap", 0.0)),  # pyright: ignore
        has_mask=given.get("mask") is not None,
        has_bias=given.get("bias") is not None,
        has_sinks=given.get("sinks") is not None,
        cross=str(q.shape[2]) != str(k.shape[2]) or node.meta.get("cache") == "cross",
        cached=given.get("state") is not None or "cache" in node.meta,
    )


def _linear_sites(captured: Captured) -> list[Site]:
    graph = captured.graph
    rows = Rows(captured)
    nodes = [n for n in graph.graph.nodes if _is_linear(n) or is_experts(n)]
    keys = site_keys(nodes)
    users = _readers(graph)
    sites: list[Site] = []
    for node in nodes:
        experts = is_experts(node)
        if served := experts_site(graph, node, keys[node]):
            sites.append(served)
            continue
        info, blocked = _expert_info(node) if experts else _linear_info(graph, node, users, rows)
        site = Site("linear", keys[node], node.name, info, op=keys[node], blocked=blocked)
        tied = blocked is not None and blocked.startswith(TIED)
        others = _others(graph, info.weight, node, users) if tied else []
        sites.append(with_embeddings(site, [user for _, user in others]))
    return sites


def _is_linear(node: fx.Node) -> bool:
    return node.target is aten.linear.default or patch_of(node) is not None


def _expert_info(node: fx.Node) -> tuple[LinearInfo, str]:
    x, weight = (arg.meta["val"] for arg in node.args[:2])  # pyright: ignore
    count, rows, columns = weight.shape
    held = behind(node.args[1])
    info = LinearInfo(str(held.target), None, int(rows), int(columns), x.dtype)
    return info, (
        f"mixture experts: the weights of {count} experts are stacked in {held.target}, which is "
        "not rewritten yet"
    )


def _readers(graph: fx.GraphModule) -> dict[int, list[tuple[str, fx.Node]]]:
    """Parameter -> (name, node) of each reader."""
    readers: dict[int, list[tuple[str, fx.Node]]] = {}
    for node in graph.graph.nodes:
        if node.op == "get_attr":
            held = attribute(graph, str(node.target))
            found = readers.setdefault(id(held), [])
            found += [(str(node.target), user) for user in node.users]
    return readers


def _others(
    graph: fx.GraphModule,
    weight: str,
    node: fx.Node,
    readers: dict[int, list[tuple[str, fx.Node]]],
) -> list[tuple[str, fx.Node]]:
    """(name, node) of each reader of a linear's weight that is not the linear itself."""
    own = {node, *(n for n in node.all_input_nodes if n.target in TRANSPOSES)}
    found = readers[id(attribute(graph, weight))]
    return [(name, user) for name, user in found if user not in own]


def _linear_info(
    graph: fx.GraphModule,
    node: fx.Node,
    readers: dict[int, list[tuple[str, fx.Node]]],
    rows: Rows,
) -> tuple[LinearInfo, str | None]:
    weight, bias = node.args[1], node.args[2] if len(node.args) > 2 else None
    x, w = node.args[0].meta["val"], weight.meta["val"]  # pyright: ignore
    patch = patch_of(node) or ()
    columns = math.prod(int(size) for size in w.shape[1:])
    found = stored(weight)
    if found is None:
        info = LinearInfo("", None, columns, int(w.shape[0]), x.dtype, patch=patch)
        return info, "the weight is computed in the forward: there is no parameter to replace"
    held, flipped = found
    name = str(held.target)
    tensor = attribute(graph, name)
    others = [
        f"{other} in {user.meta['fqn'] or 'the root'}"
        for other, user in _others(graph, name, node, readers)
    ]
    info = LinearInfo(
        weight=name,
        bias=str(bias.target) if isinstance(bias, fx.Node) and bias.op == "get_attr" else None,
        in_features=columns,
        out_features=int(w.shape[0]),
        dtype=x.dtype,
        transposed=flipped,
        shared_with=tuple(dict.fromkeys(others)),
        patch=patch,
        positions=_positions(node, patch, rows),
        rows_each=1 if patch else rows.of_token(node.meta["val"].shape[:-1]),
    )
    return info, _why_blocked(tensor, bias, others)


def _positions(node: fx.Node, patch: tuple[int, ...], rows: Rows) -> int | None:
    """Rows of one item of the batch: of a convolution at the traced sizes, of a linear only where
    no token of the call adds any (the patches of an image; one, where items are rows)."""
    shape = node.meta["val"].shape
    if patch:
        return rows.of_item((shape[0], *shape[2:]), traced=True)
    return rows.of_item(shape[:-1])


def _why_blocked(tensor: Tensor, bias: Any, others: list[str]) -> str | None:
    if not isinstance(tensor, nn.Parameter):
        return "the weight is a buffer or a constant, not a parameter"
    if others:
        return f"{TIED}: also read as {', '.join(dict.fromkeys(others))}"
    if bias is not None and not (isinstance(bias, fx.Node) and bias.op == "get_attr"):
        return "the bias is computed in the forward: there is no parameter to keep"
    return None
