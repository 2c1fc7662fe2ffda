"""The arguments of one attention call, and how it splits by heads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fxopt.kernels.block_topk import reference as topk

from . import grid as grids
from .skip import LEAST_QUERIES


@dataclass(frozen=True)
class Attention:
    """The arguments of `fxopt::attention`; see `fxopt.ir.ops.attend` for shapes and meaning.

    `window`, `sink_tokens`, `top` and `near` have one entry a KV head here, 0 where a head sees all
    keys, `dilation`, `hip` and `mass` as well: 1 where `near` and `window` are 0, 0 where `top` is,
    and 0 where no threshold bounds that. `delta` and `skip` have one a query head.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    bias: Tensor | None
    sinks: Tensor | None
    scale: float
    causal: bool
    window: tuple[int, ...]
    softcap: float
    sink_tokens: tuple[int, ...]
    top: tuple[int, ...]
    delta: tuple[int, ...]
    grid: tuple[int, ...]
    near: tuple[int, ...]
    dilation: tuple[grids.Dilation, ...]
    hip: tuple[int, ...]
    mass: tuple[int, ...]
    skip: tuple[int, ...]

    @property
    def num_kv_heads(self) -> int:
        return self.k.shape[1]

    @property
    def group_size(self) -> int:
        """Query heads a KV head."""
        return self.q.shape[1] // self.num_kv_heads

    @property
    def offset(self) -> int:
        """Position of the first query."""
        return self.k.shape[2] - self.q.shape[2]

    @property
    def dense(self) -> bool:
        """Whether no head has a window."""
        return not any(self.window)

    @property
    def plain(self) -> bool:
        """Whether the call is what libraries call attention: causal from the corner, or full."""
        extras = (self.mask, self.bias, self.sinks)
        aligned = not self.causal or self.offset == 0 or self.q.shape[2] == 1
        return (
            aligned
            and self.dense
            and not any(self.top + self.near + self.skip)
            and not self.softcap
            and all(t is None for t in extras)
        )

    def head_groups(self) -> list[list[int]]:
        """KV heads by equal window, sink, kept tiles and neighbourhood, those that are corrected or
        leave out tiles apart."""
        groups: dict[tuple[object, ...], list[int]] = {}
        fixed = map(self.is_corrected, range(self.num_kv_heads))
        choices = zip(
            self.window,
            self.sink_tokens,
            self.top,
            self.hip,
            self.mass,
            fixed,
            self.near,
            self.dilation,
            map(self.leaves_out, range(self.num_kv_heads)),
            strict=True,
        )
        for head, choice in enumerate(choices):
            groups.setdefault(choice, []).append(head)
        return list(groups.values())

    def is_corrected(self, kv_head: int) -> bool:
        """Whether the rows that miss keys in a KV head make up for some of it; see `delta`."""
        group = self.group_size
        return any(self.delta[kv_head * group : (kv_head + 1) * group])

    def leaves_out(self, kv_head: int) -> bool:
        """Whether some query head of a KV head leaves out what cannot matter; see `skip`."""
        group = self.group_size
        return any(self.skip[kv_head * group : (kv_head + 1) * group])

    def without_limits(self) -> Attention:
        """The same call, all keys seen."""
        none = (0,) * self.num_kv_heads
        limits = ("window", "sink_tokens", "top", "near", "hip", "mass")
        whole = dict.fromkeys(limits, none)
        one = (1,) * self.num_kv_heads
        no_query = (0,) * self.q.shape[1]
        return replace(self, **whole, dilation=one, delta=no_query, skip=no_query)

    def heads(self, chosen: Sequence[int]) -> Attention:
        """The same call on some of the KV heads and their query heads."""
        if len(chosen) == self.num_kv_heads:
            return self
        queries = query_heads(chosen, self.group_size)
        bias = self.bias
        if bias is not None and bias.shape[1] > 1:
            bias = pick(bias, 1, queries)
        return replace(
            self,
            q=pick(self.q, 1, queries),
            k=pick(self.k, 1, chosen),
            v=pick(self.v, 1, chosen),
            bias=bias,
            sinks=None if self.sinks is None else pick(self.sinks, 0, queries),
            window=tuple(self.window[h] for h in chosen),
            sink_tokens=tuple(self.sink_tokens[h] for h in chosen),
            top=tuple(self.top[h] for h in chosen),
            delta=tuple(self.delta[h] for h in queries),
            near=tuple(self.near[h] for h in chosen),
            dilation=tuple(self.dilation[h] for h in chosen),
            hip=tuple(self.hip[h] for h in chosen),
            mass=tuple(self.mass[h] for h in chosen),
            skip=tuple(self.skip[h] for h in queries),
        )


def bind(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    causal: bool,
    window: Sequence[int],
    softcap: float,
    sink_tokens: Sequence[int],
    top: Sequence[int] = (0,),
    delta: Sequence[int] = (0,),
    grid: Sequence[int] = (),
    near: Sequence[int] = (0,),
    dilation: Sequence[int] = (1,),
    hip: Sequence[int] = (0,),
    mass: Sequence[int] = (0,),
    skip: Sequence[int] = (0,),
) -> Attention:
    """Check the arguments of `fxopt::attention` and give each KV head its window, kept tiles or
    neighbourhood.

    Raises ValueError for head counts and list lengths that do not fit, for `top`, `hip`, `near` and
    `skip` beside what the choice of tiles does not know, and for a wrong `delta`.
    """
    heads, kv = q.shape[1], k.shape[1]
    if heads % kv:
        raise ValueError(f"attention: {heads} query heads do not share {kv} KV heads evenly")
    reach = max(q.shape[2], k.shape[2])
    # A window that reaches past both ends hides nothing.
    asked = per_head("window", window, kv)
    windows = [w if 0 < w < reach else 0 for w in asked]
    tokens = per_head("sink_tokens", sink_tokens, kv)
    kept = tops = per_head("top", top, kv)
    halved, parts = per_head("hip", hip, kv), per_head("mass", mass, kv)
    if any(kept) or any(parts):
        _check_top(kept, parts, q, k, bias, causal, asked)
    _check_hip(halved, parts)
    hides = [topk.hides(q.shape[2], k.shape[2], m) for m in parts]
    shares = zip(kept, parts, hides, strict=True)
    kept = [t if may and min(t, m or t) < 1000 else 0 for t, m, may in shares]
    halved = [h if t else 0 for t, h in zip(kept, halved, strict=True)]
    parts = [m if t else 0 for t, m in zip(kept, parts, strict=True)]
    added = per_head("delta", delta, heads, "query heads")
    if any(added):
        _check_delta(added, q, k, bias, causal)
    limits = per_head("skip", skip, heads, "query heads")
    if any(limits):
        _check_skip(limits, tops, added, q, k, bias, causal)
        limits = limits if q.shape[2] > LEAST_QUERIES else [0] * heads
    group, long = heads // kv, topk.tiles(q.shape[2]) > topk.SPARED
    for head in range(kv):
        own = slice(head * group, (head + 1) * group)
        if any(added[own]) and not long:
            windows[head] = 0
        if not long or not (windows[head] or kept[head]):
            added[own] = [0] * group
    grid, reaches = tuple(grid), per_head("near", near, kv)
    spacings = grids.dilations(dilation, kv, grid)
    if any(w and d != 1 for w, d in zip(asked, spacings, strict=True)):
        _check_dilated(asked, spacings, tokens, q, k, bias, causal)
    if any(reaches):
        _check_near(reaches, spacings, grid, mask, bias, causal, asked)
        whole = q.shape[2] == k.shape[2] == grids.tokens(grid)
        pairs = zip(reaches, spacings, strict=True)
        reaches = [n if whole and grids.hides(grid, n, d) else 0 for n, d in pairs]
    limited = zip(reaches, windows, spacings, strict=True)
    spacings = [d if n or w else 1 for n, w, d in limited]
    return Attention(
        q, k, v, mask, bias, sinks, scale, causal,
        tuple(windows), softcap, tuple(s if w else 0 for w, s in zip(windows, tokens, strict=True)),
        tuple(kept), tuple(added),
        grid, tuple(reaches), tuple(spacings), tuple(halved), tuple(parts), tuple(limits),
    )  # fmt: skip


def _check_top(
    top: Sequence[int], mass: Sequence[int], q: Tensor, k: Tensor, bias: Tensor | None,
    causal: bool, window: Sequence[int],
) -> None:  # fmt: skip
    wrong = {
        "is per mille of the key tiles, from 0 to 1000": not all(0 <= t <= 1000 for t in top),
        f"needs a mass per mille, not {list(mass)}": not all(0 <= m <= 1000 for m in mass),
        f"bounds the tiles that a mass keeps, here {list(mass)}": any(
            m and not t for t, m in zip(top, mass, strict=True)
        ),
        "needs causal attention of the last queries": not causal or q.shape[2] > k.shape[2],
        "does not look at a bias": bias is not None,
        "and window exclude each other in one head": any(
            t and w for t, w in zip(top, window, strict=True)
        ),
    }
    for reason, holds in wrong.items():
        if holds:
            raise ValueError(f"attention: top {reason}; got top {list(top)}")


def _check_hip(hip: Sequence[int], mass: Sequence[int]) -> None:
    wrong = {
        "is 0 or 1": any(h not in (0, 1) for h in hip),
        f"and mass exclude each other in one head, here {list(mass)}": any(
            h and m for h, m in zip(hip, mass, strict=True)
        ),
    }
    for reason, holds in wrong.items():
        if holds:
            raise ValueError(f"attention: hip {reason}; got hip {list(hip)}")


def _check_delta(
    delta: Sequence[int], q: Tensor, k: Tensor, bias: Tensor | None, causal: bool
) -> None:
    wrong = {
        "is per mille of what rows that see all keys find, from 0 to 1000": not all(
            0 <= d <= 1000 for d in delta
        ),
        "needs causal attention of the last queries": not causal or q.shape[2] > k.shape[2],
        "does not look at a bias": bias is not None,
    }
    for reason, holds in wrong.items():
        if holds:
            raise ValueError(f"attention: delta {reason}; got delta {list(delta)}")


def _check_skip(
    skip: Sequence[int], top: Sequence[int], delta: Sequence[int], q: Tensor, k: Tensor,
    bias: Tensor | None, causal: bool,
) -> None:  # fmt: skip
    group = len(skip) // len(top)
    both = any(s and (top[h // group] or delta[h]) for h, s in enumerate(skip))
    wrong = {
        "is in hundredths of a nat, 0 or more": min(skip) < 0,
        "needs causal attention of the last queries": not causal or q.shape[2] > k.shape[2],
        "does not look at a bias": bias is not None,
        "and top or delta exclude each other in one head": both,
    }
    for reason, holds in wrong.items():
        if holds:
            raise ValueError(f"attention: skip {reason}; got skip {list(skip)}")


def _check_near(
    near: Sequence[int], dilation: Sequence[grids.Dilation], grid: tuple[int, ...],
    mask: Tensor | None,
    bias: Tensor | None, causal: bool, window: Sequence[int],
) -> None:  # fmt: skip
    wrong = {
        "is a number of tokens, 0 for all": min(near) < 0,
        f"needs a dilation of 1 or more, not {list(dilation)}": _least(dilation) < 1,
        "needs a grid (prefix, size, ...)": len(grid) < 2 or grid[0] < 0 or min(grid[1:]) < 1,
        "takes no causal attention, mask or bias": causal or mask is not None or bias is not None,
        "and window exclude each other in one head": any(
            n and w for n, w in zip(near, window, strict=True)
        ),
    }
    for reason, holds in wrong.items():
        if holds:
            raise ValueError(f"attention: near {reason}; got near {list(near)}, grid {list(grid)}")


def _check_dilated(
    window: Sequence[int], dilation: Sequence[grids.Dilation], sink_tokens: Sequence[int],
    q: Tensor, k: Tensor, bias: Tensor | None, causal: bool,
) -> None:  # fmt: skip
    chosen = [(d, s) for w, d, s in zip(window, dilation, sink_tokens, strict=True) if w]
    wrong = {
        "needs one number, 1 or more": any(not isinstance(d, int) or d < 1 for d, _ in chosen),
        "takes no causal attention, no bias and as many queries as keys": causal
        or bias is not None
        or q.shape[2] != k.shape[2],
        "and sink_tokens exclude each other in one head": any(s and d != 1 for d, s in chosen),
    }
    for reason, holds in wrong.items():
        if holds:
            raise ValueError(f"attention: dilation of a window {reason}; got {list(dilation)}")


def _least(dilation: Sequence[grids.Dilation]) -> int:
    return min(d if isinstance(d, int) else min(d) for d in dilation)


def in_order(call: Attention) -> Attention:
    """A call with neighbourhoods of one dilation whose tokens stand tile after tile; see `grid`."""
    tokens, _ = grids.places(call.grid, call.dilation[0], call.q.device)
    q, k, v = (x.index_select(2, tokens) for x in (call.q, call.k, call.v))
    return replace(call, q=q, k=k, v=v)


def per_head(
    name: str, values: Sequence[int], num_heads: int, heads: str = "KV heads"
) -> list[int]:
    """One value a head from a list with one entry or `num_heads` entries."""
    if len(values) not in (1, num_heads):
        raise ValueError(
            f"attention: {name} has {len(values)} entries; give 1 or {num_heads}, the {heads}"
        )
    return list(values) * (num_heads // len(values))


def query_heads(chosen: Sequence[int], group_size: int) -> list[int]:
    """The query heads that read the KV heads `chosen`."""
    return [head * group_size + i for head in chosen for i in range(group_size)]


def pick(x: Tensor, dim: int, chosen: Sequence[int]) -> Tensor:
    """The ascending entries `chosen` of a dimension; a view where they are neighbours."""
    pieces = [x.narrow(dim, begin, end - begin) for begin, end in _runs(chosen)]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim)


def put(out: Tensor, dim: int, chosen: Sequence[int], part: Tensor) -> None:
    """Write `part` to the entries `chosen` of a dimension of `out`."""
    done = 0
    for begin, end in _runs(chosen):
        out.narrow(dim, begin, end - begin).copy_(part.narrow(dim, done, end - begin))
        done += end - begin


def _runs(chosen: Sequence[int]) -> list[tuple[int, int]]:
    """Neighbours as ranges: slices copy faster than an index, and need none on the device."""
    found: list[tuple[int, int]] = []
    for place in chosen:
        if found and found[-1][1] == place:
            found[-1] = (found[-1][0], place + 1)
        else:
            found.append((place, place + 1))
    return found
