"""The price of keeping a site as it is, and what a graph's caches hold."""

from __future__ import annotations

from torch import fx

from fxopt.ir.cost import OpCall
from fxopt.ir.rewrite import Candidate, Match
from fxopt.ir.site import (
    AttentionInfo,
    EmbeddingInfo,
    ExpertsInfo,
    GroupInfo,
    LinearInfo,
    Site,
    TemporaryInfo,
    rows_of,
)
from fxopt.ir.workload import Scenario
from fxopt.kernels.kv_attention.filled import filled_bytes
from fxopt.kernels.kv_attention.layout import parse
from fxopt.kernels.kv_attention.layout import state_bytes as layout_bytes

from .activation.calls import temporary_call
from .attention.exact import Exact
from .kv_cache.blocks import exact_calls
from .linear.dense import dense_call, rows_call
from .linear.quantized_experts import grouped_call


def baseline_calls(site: Site, scenario: Scenario) -> list[OpCall]:
    """The op calls of the unrewritten site; a KV-cache site's hold only its bytes."""
    if isinstance(site.info, GroupInfo):
        return [call for member in site.info.members for call in baseline_calls(member, scenario)]
    if isinstance(site.info, LinearInfo):
        return [dense_call(site.info, scenario)]
    if isinstance(site.info, ExpertsInfo):
        return [grouped_call(site.info, scenario)]
    if isinstance(site.info, EmbeddingInfo):
        return [rows_call(site.info, scenario)]
    if site.family == "kv_cache" and isinstance(site.info, AttentionInfo):
        return exact_calls(site.info, scenario)
    if isinstance(site.info, AttentionInfo):
        return Exact().lower(Match(site), Candidate("attention.exact", "exact", {}), scenario)
    if isinstance(site.info, TemporaryInfo):
        return [temporary_call(site.info, rows_of(site.info, scenario))]
    return []


def cache_bytes(graph: fx.GraphModule, scenario: Scenario, element_size: int | None = None) -> int:
    """Bytes of all caches of a graph once `scenario` is done.

    `element_size` 2 with exact layouts is the 16-bit baseline; None takes each op's own dtype.
    """
    total = 0
    for node in graph.graph.nodes:
        cross = node.meta.get("cache") == "cross"
        if node.kwargs.get("state") is None and "cache" not in node.meta:
            continue
        k, v = node.args[1].meta["val"], node.args[2].meta["val"]
        size_of = filled_bytes if cross else layout_bytes
        total += size_of(
            parse(node.kwargs.get("layout", "")),
            scenario.batch,
            k.shape[1],
            k.shape[3],
            v.shape[3],
            scenario.source if cross else scenario.length,
            element_size or k.element_size(),
        )
    return total
