"""The rewrites that fxopt knows, and how they are found."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import cast

from fxopt.ir.errors import PlanError
from fxopt.ir.names import select
from fxopt.ir.rewrite import Rewrite

# In the order of application: exact folds, attention, KV cache, structure, quantisation, and
# what runs inside a call.
REWRITES: tuple[str, ...] = (
    "fxopt.passes.attention.exact:Exact",
    "fxopt.passes.attention.window:Window",
    "fxopt.passes.attention.block_topk:BlockTopk",
    "fxopt.passes.attention.hip:Hip",
    "fxopt.passes.attention.skip_softmax:SkipSoftmax",
    "fxopt.passes.attention.neighborhood:Neighborhood",
    "fxopt.passes.attention.decode_topk:DecodeTopk",
    "fxopt.passes.kv_cache.blocks:Blocks",
    "fxopt.passes.kv_cache.rotated:Rotated",
    "fxopt.passes.linear.channel_pruned:ChannelPruned",
    "fxopt.passes.linear.low_rank_shared:LowRankShared",
    "fxopt.passes.linear.low_rank:LowRank",
    "fxopt.passes.linear.low_rank_pivoted:LowRankPivoted",
    "fxopt.passes.linear.monarch:Monarch",
    "fxopt.passes.linear.quantized:Quantized",
    "fxopt.passes.linear.quantized_tied:QuantizedTied",
    "fxopt.passes.linear.quantized_experts:QuantizedExperts",
    "fxopt.passes.linear.low_rank_quantized:LowRankQuantized",
    "fxopt.passes.linear.quantized_low_rank:QuantizedLowRank",
    "fxopt.passes.activation.chunked:Chunked",
    "fxopt.passes.activation.last_logits:LastLogits",
    "fxopt.passes.activation.cut_cross_entropy:CutCrossEntropy",
    "fxopt.passes.activation.filtered_cross_entropy:FilteredCrossEntropy",
    "fxopt.passes.activation.recompute:Recompute",
    "fxopt.passes.activation.offload:Offload",
    "fxopt.passes.activation.packed_mask:PackedMask",
    "fxopt.passes.activation.approximate_backward:ApproximateBackward",
    "fxopt.passes.activation.shared_norm:SharedNorm",
    "fxopt.passes.activation.quantized_saved:QuantizedSaved",
    "fxopt.passes.activation.quantized_offload:QuantizedOffload",
)
ON_REQUEST = frozenset(
    {
        "activation.filtered_cross_entropy",
        "activation.offload",
        "activation.quantized_offload",
        "activation.shared_norm",
        "linear.channel_pruned",
        "linear.low_rank_shared",
        "linear.low_rank_pivoted",
        "linear.low_rank_quantized",
        "linear.quantized_low_rank",
    }
)
"""Tried only where `rewrites=` selects them: more candidates lengthen every search, and on a GPU
a step with `activation.offload` was measured to take more memory than predicted
(docs/activation-memory.md)."""
ENTRY_POINTS = "fxopt.rewrites"


def available() -> dict[str, str]:
    """Name of every installed rewrite ("linear.quantized") to its "module:Class"; imports none.

    Those of other packages, by the entry point group `fxopt.rewrites`, come after fxopt's own.
    """
    own = {".".join(path.partition(":")[0].split(".")[-2:]): path for path in REWRITES}
    return own | {point.name: point.value for point in entry_points(group=ENTRY_POINTS)}


def load(names: Sequence[str] | None = None) -> list[Rewrite]:
    """The rewrites that `names` select (None: all but those on request), made with default
    options, in the order of application. Only their modules are imported.

    A name is a rewrite's ("linear.quantized"), a family's ("linear"), or `re:` and an expression;
    one that selects nothing raises PlanError.
    """
    installed = available()
    default = [name for name in installed if name not in ON_REQUEST]
    wanted = default if names is None else select(names, installed, "rewrite")
    return [_make(name, installed[name]) for name in wanted]


def _make(name: str, path: str) -> Rewrite:
    if path in REWRITES:
        module, _, attribute = path.partition(":")
        return cast(Rewrite, getattr(import_module(module), attribute)())
    try:
        return cast(Rewrite, EntryPoint(name, path, ENTRY_POINTS).load()())
    except Exception as error:
        raise PlanError(
            f"rewrite {name!r} (entry point {path}) cannot be loaded: {error}; "
            "repair or uninstall the package that brings it"
        ) from error
