"""Whether calibration reached what it certifies: packed tokens that are read, windows that hide.

An error measured on sequences that a rewrite leaves exact says nothing of longer ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from .compiler import Compiler
from .decide.quality import first_tensor
from .ir.ops import arguments_of_attend, attend
from .kernels.attention.delta import corrected_rows
from .kernels.attention.grid import dilations, hides, tokens
from .kernels.attention.skip import LEAST_QUERIES
from .kernels.attention.spec import per_head
from .kernels.block_topk.reference import hides_some
from .kernels.kv_attention.decoded import keys_read
from .kernels.kv_attention.layout import left_out, parse
from .passes.attention import mass

ROWS = 8
"""Queries a sequence whose attention is looked at."""
SEQUENCES = 2
OPTIONS = ("window", "sink_tokens", "top", "near", "mass")
"""Those of `attend` that hide keys from KV heads."""
LEAST = 0.01
"""The least share of attention that must fall on packed tokens for an error to speak of them."""


@dataclass
class Seen:
    """What the sequences of the verify part showed of the rewritten heads."""

    packed: list[float] = field(default_factory=list[float])
    """For each packed head: the mean share of attention that fell on packed tokens."""
    idle: int = 0
    """Heads with a window, or a share of tiles, under which no sequence lost a key."""
    windowed: int = 0


def notes(compiler: Compiler, graph: fx.GraphModule) -> list[str]:
    """What the report has to say of the cache's and the windows' share in what was measured."""
    seen = look(compiler, graph)
    longest = max(first_tensor(batch).shape[-1] for batch in _looked_at(compiler))
    said: list[str] = []
    if seen.packed:
        said.append(_of_cache(seen.packed, longest))
    if seen.idle:
        said.append(
            f"calibration: {seen.idle} of {seen.windowed} heads with a window or a share of tiles "
            f"were measured on sequences of at most {longest} tokens, of which they see every key: "
            "the quality row says nothing of longer ones; pass longer sequences"
        )
    return said


def look(compiler: Compiler, graph: fx.GraphModule) -> Seen:
    """Run `graph` over some sequences of the verify part and look at its attention."""
    return _joined([_walk(compiler, graph, batch) for batch in _looked_at(compiler)])


def _looked_at(compiler: Compiler) -> list[dict[str, Any]]:
    return list(compiler.request.calibration.verify[:SEQUENCES])


def _of_cache(shares: Sequence[float], longest: int) -> str:
    mean, idle = sum(shares) / len(shares), sum(share < LEAST for share in shares)
    said = f"{mean:.1%} of the attention of packed heads fell on packed tokens in the verify part"
    if not idle:
        return f"kv_cache: {said}"
    return (
        f"calibration: {said}, and less than {LEAST:.0%} in {idle} of {len(shares)} heads: at "
        f"most {longest} tokens are hardly more than what the plan keeps unpacked, so the quality "
        "row says little of longer texts; pass longer sequences"
    )


def _joined(walks: Sequence[_Walk]) -> Seen:
    keys = list(walks[0].packed)
    packed = [sum(walk.packed[key] for walk in walks) / len(walks) for key in keys]
    idle = [key for key in walks[0].left if not any(walk.left[key] for walk in walks)]
    return Seen(packed, len(idle), len(walks[0].left))


def _walk(compiler: Compiler, graph: fx.GraphModule, batch: dict[str, Any]) -> _Walk:
    walk = _Walk(graph, compiler.quality.prompt_of(first_tensor(batch).shape[-1]))
    compiler.outputs(walk.run_flat, batch)
    return walk


class _Walk(fx.Interpreter):
    """Runs a graph and looks at its attention calls: by (node, KV head), the share on packed
    tokens, and whether a query lost a key to a window or to tiles that are left out."""

    def __init__(self, graph: fx.GraphModule, prompt: int) -> None:
        super().__init__(graph, garbage_collect_values=True)
        self.prompt = prompt
        self.packed: dict[tuple[str, int], float] = {}
        self.left: dict[tuple[str, int], bool] = {}

    def run_flat(self, arguments: list[Any]) -> Sequence[Any]:
        with torch.no_grad():
            return self.run(*arguments)

    def run_node(self, n: fx.Node) -> Any:
        if n.target is attend:
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            self._look(n.name, arguments_of_attend(*args, **kwargs))
        return super().run_node(n)

    def _look(self, name: str, call: Mapping[str, Any]) -> None:
        self.left |= {(name, head): lost for head, lost in _losses(call, self.prompt)}
        self.packed |= {(name, head): share for head, share in _packed_shares(call, self.prompt)}


def _losses(call: Mapping[str, Any], prompt: int) -> Iterator[tuple[int, bool]]:
    """KV heads from which an option of `attend` may hide keys, and whether a query lost some."""
    (heads, length), queries, grid = call["k"].shape[1:3], call["q"].shape[2], tuple(call["grid"])
    prompt = prompt or queries
    per_kv = (per_head(name, call[name], heads) for name in OPTIONS)
    window, sink_tokens, top, near, part = per_kv
    dilation = dilations(call["dilation"], heads, grid)
    fixed, leaves_out = (_of_queries(call, name) for name in ("delta", "skip"))
    stored = parse(call["layout"])
    read = list(zip(stored.formats(heads), stored.top_keys(heads), strict=True))
    for h in range(heads):
        if window[h]:
            # a window that is corrected is one of prompts without their last rows
            rows = corrected_rows(prompt) if fixed[h] else length
            yield h, rows > window[h] + sink_tokens[h]
        if top[h]:
            yield h, hides_some(prompt, prompt, top[h], part[h])
        if leaves_out[h]:
            yield h, prompt > LEAST_QUERIES
        if near[h]:
            yield h, tokens(grid) == length and hides(grid, near[h], dilation[h])
        fmt, top_keys = read[h]
        if top_keys:
            yield h, left_out(fmt, length - 1, top_keys) > 0


def _packed_shares(call: Mapping[str, Any], prompt: int) -> Iterator[tuple[int, float]]:
    """Packed KV heads, and how much of the attention of some decoded tokens fell on what was
    packed when they came, of the keys that they read."""
    q, k, causal, layout = call["q"], call["k"], call["causal"], parse(call["layout"])
    (heads, length), group = k.shape[1:3], q.shape[1] // k.shape[1]
    formats = layout.formats(heads)
    if not any(formats):
        return
    rows = torch.tensor([*_sampled(prompt if causal else 0, q.shape[2])], device=k.device)
    read = torch.ones(k.shape[0], heads, len(rows), length, dtype=torch.bool, device=k.device)
    packed = torch.zeros_like(read)
    of_heads = zip(formats, layout.top_keys(heads), layout.refresh(heads), strict=True)
    for h, (fmt, top_keys, refresh) in enumerate(of_heads):
        if fmt is None:
            continue
        for i, row in enumerate(rows.tolist()):
            packed[:, h, i, fmt.sink :][:, : fmt.packed(row if causal else length)] = True
        if top_keys:
            own, keys, scale = q[:, h * group :][:, :group], k[:, h, None], call["scale"]
            read[:, h, None] = keys_read(
                own, keys, call["mask"], rows, fmt, top_keys, scale, refresh, prompt
            )
    window = per_head("window", call["window"], heads)
    window = [
        0 if fixed else w for w, fixed in zip(window, _of_queries(call, "delta"), strict=True)
    ]
    # What is left with sinks of logits, which are no tokens, is what is not packed.
    rest, whole = (
        mass.kept({**call, "window": window}, rows, seen.repeat_interleave(group, 1))
        for seen in (read & ~packed, read)
    )
    shares = (1 - rest / whole).unflatten(1, (heads, group)).mean((0, 2, 3)).tolist()
    yield from ((h, shares[h]) for h, fmt in enumerate(formats) if fmt)


def _of_queries(call: Mapping[str, Any], name: str) -> list[bool]:
    """Whether an option of query heads, `delta` or `skip`, serves one of each KV head."""
    given = per_head(name, call[name], call["q"].shape[1], "query heads")
    group = len(given) // call["k"].shape[1]
    return [any(given[first : first + group]) for first in range(0, len(given), group)]


def _sampled(first: int, queries: int) -> Iterator[int]:
    """Some query rows from `first` on, evenly spread, the last among them."""
    count = min(ROWS, queries - first)
    for i in range(count):
        yield queries - 1 - (queries - 1 - first) * i // max(count - 1, 1)
