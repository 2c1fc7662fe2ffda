"""Sites: the places of a canonical graph where a cheaper computation can stand."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Literal

import torch

from .cost import OpCall
from .workload import Scenario

Family = Literal["attention", "kv_cache", "linear", "activation"]
FAMILIES: tuple[Family, ...] = ("attention", "kv_cache", "linear", "activation")


@dataclass(frozen=True)
class LinearInfo:
    """`y[..., out] = x[..., in] @ weight.T + bias`; the weight is stored [out, in].

    `transposed` says that the parameter itself is stored [in, out] (GPT-2's Conv1D).
    `shared_with` names other users of the same parameter (tied embeddings). `patch` are the sizes
    of a convolution's kernel, which are its strides: see `patches`. `positions` are the rows of one
    item of the batch where the trace fixes them, or None where each of the call's tokens has
    `rows_each` of them.
    """

    weight: str
    bias: str | None
    in_features: int
    out_features: int
    dtype: torch.dtype
    transposed: bool = False
    shared_with: tuple[str, ...] = ()
    patch: tuple[int, ...] = ()
    positions: int | None = None
    rows_each: int = 1


@dataclass(frozen=True)
class EmbeddingInfo:
    """Rows of the `weight` [rows, features] that indices name; only found where it is tied."""

    weight: str
    rows: int
    features: int
    dtype: torch.dtype


@dataclass(frozen=True)
class ExpertsInfo:
    """`y[r] = x[r] @ weight[expert of r].T` for rows sorted by expert; `count` experts, of which
    each token is given to `chosen`. The parameter is stored [count, out, in], or transposed."""

    weight: str
    count: int
    chosen: int
    in_features: int
    out_features: int
    dtype: torch.dtype
    kind: Literal["experts"] = "experts"


@dataclass(frozen=True)
class AttentionInfo:
    """One attention op; query head h reads KV head h // (num_heads // num_kv_heads).

    `window` 0 means unlimited; `softcap` 0.0 means none. `cross`: keys come from another
    sequence. `cached`: the op can read its keys and values through a cache while generating.
    `grid` (prefix, size, ...): its tokens are `prefix` others, a class token say, and then the
    places of an image or a video, row by row; or () and in `no_grid`, why that cannot be told.
    `top_keys` and `refresh` as in `fxopt.kernels.kv_attention.layout.HeadClass`, where a rewrite
    has chosen them.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_dim: int
    dtype: torch.dtype
    causal: bool
    window: int
    softcap: float
    has_mask: bool
    has_bias: bool
    has_sinks: bool
    cross: bool
    cached: bool
    grid: tuple[int, ...] = ()
    no_grid: str = ""
    top_keys: int = 0
    refresh: int = 1


@dataclass(frozen=True)
class TemporaryInfo:
    """A large intermediate: `nodes` compute it (an MLP's hidden, the logits) token by token.

    `row_bytes` are alive for each token at the widest moment, `out_bytes` are its result.
    `positions` as in `LinearInfo`.
    """

    kind: Literal["mlp", "head"]
    nodes: tuple[str, ...]
    row_bytes: int
    out_bytes: int
    positions: int | None = None


@dataclass(frozen=True)
class Derivative:
    """What alone reads a saved tensor in the backward: `op(gradient, ..., x, ...)`, which is the
    gradient times a function of each x.

    x is argument number `place` and lies in memory without gaps, with the strides `stride`;
    `arguments` are the others, without the gradient. The result is of the gradient's dtype.
    """

    op: str
    place: int
    arguments: tuple[float, ...]
    keywords: tuple[tuple[str, str], ...]
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    gradient: tuple[int, ...]
    """Strides of the gradient."""
    dtype: torch.dtype
    call: OpCall = field(compare=False, repr=False)


@dataclass(frozen=True)
class NormInfo:
    """A norm whose output, in `dtype`, the step saves, and of which a tensor can be made again.

    `weight`, `bias`, `rstd` and `mean` say which of them that takes. `least` is the least magnitude
    of the weight, `most` the sum of the largest of weight and bias; 1 where there is none.
    """

    dtype: torch.dtype
    weight: bool
    bias: bool
    rstd: bool
    mean: bool
    least: float
    most: float


@dataclass(frozen=True)
class SavedInfo:
    """A tensor that the forward of a training step makes and its backward reads.

    `output` is its place among the results of its op. `bytes` of its memory, which is that of this
    tensor alone where `whole`; `calls` are the ops that make it again from what else is saved,
    `blocked` says why they cannot run twice. `derivative` is what alone reads it, if that is one.
    `norm` is the one of which it is the input, or that normalises it, if the step saves the output.
    """

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: str
    bytes: int
    whole: bool
    output: int = 0
    blocked: str | None = None
    calls: tuple[OpCall, ...] = field(default=(), compare=False, repr=False)
    derivative: Derivative | None = None
    norm: NormInfo | None = None


@dataclass(frozen=True)
class LossHeadInfo:
    """Logits [rows, classes] = x [rows, features] @ weight.T that a cross-entropy reads.

    `trains`: the weight has a gradient. `again`: gradients need logits a second time, since the
    loss is one a token, or float16. `returned`: the model hands the logits out as well.
    """

    rows: int
    features: int
    classes: int
    dtype: torch.dtype
    trains: bool = True
    again: bool = False
    returned: bool = False
    kind: Literal["loss_head"] = "loss_head"


@dataclass(frozen=True)
class GroupInfo:
    """Linears that a rewrite of groups decides together, or leaves to be decided apart.

    "shared_input": they read one tensor. "channels": each input channel of the last is made, by
    the nodes `between`, of that channel of the others' outputs alone, and they are read nowhere
    else. Either the group is rewritten or its members are, never both. "tied": embeddings and,
    last, the head that multiplies by their weight; they are no sites by themselves.
    """

    kind: Literal["shared_input", "channels", "tied"]
    members: tuple[Site, ...]
    between: tuple[str, ...] = ()

    @property
    def outputs(self) -> range:
        """Indices of the members whose outputs are seen outside of the group."""
        count = len(self.members)
        return range(count - 1, count) if self.kind == "channels" else range(count)


def rows_of(info: LinearInfo | TemporaryInfo, scenario: Scenario) -> int:
    """Rows that a site computes one by one in a call."""
    each = info.rows_each if isinstance(info, LinearInfo) else 1
    return scenario.batch * (info.positions or each * scenario.queries)


SiteInfo = (
    LinearInfo
    | EmbeddingInfo
    | ExpertsInfo
    | AttentionInfo
    | TemporaryInfo
    | SavedInfo
    | LossHeadInfo
    | GroupInfo
)


@dataclass(frozen=True)
class Site:
    """One decision of a plan.

    `key` is `fqn[#ordinal][/kv=h]`, unique within its family; `node` is the name of the fx node
    in the canonical graph. Attention and KV-cache sites are one a KV head and share `op`, the key
    without the head. `blocked` is the reason when no rewrite is legal here at all. `side` is
    "encoder" where an encoder-decoder model computes from the encoder's inputs alone; `last` where
    only tokens are computed whose logits are wanted.
    """

    family: Family
    key: str
    node: str
    info: SiteInfo
    op: str
    head: int | None = None
    blocked: str | None = None
    side: Literal["", "encoder"] = ""
    last: bool = False

    @property
    def members(self) -> tuple[Site, ...]:
        """The sites of a group; of any other the site alone."""
        return self.info.members if isinstance(self.info, GroupInfo) else (self,)

    def at(self, scenario: Scenario) -> Scenario | None:
        """A call of the workload as this site sees it; None where it does not run in it.

        A grid of tokens is as large as the trace found it, and no cache grows it.
        With an encoder, the encoder's side runs once over the source, and the keys of
        cross-attention are the source: stored by the first call, past ones for the others.
        """
        source = scenario.source
        if isinstance(self.info, AttentionInfo) and self.info.grid and not scenario.past:
            prefix, *sizes = self.info.grid
            return replace(scenario, queries=prefix + math.prod(sizes))
        if self.last and scenario.keep:
            kept = min(scenario.keep, scenario.queries)
            return replace(scenario, queries=kept, past=scenario.length - kept)
        if not source:
            return scenario
        first = replace(scenario, queries=source, past=0)
        if isinstance(self.info, AttentionInfo) and self.info.cross:
            later = replace(scenario, past=source - scenario.queries)
            return later if scenario.past else first
        if self.side != "encoder":
            return scenario
        return None if scenario.past and scenario.repeats else first
