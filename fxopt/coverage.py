"""Whether calibration reached what it certifies: packed tokens that are read, windows that hide.

An error measured on sequences that a rewrite leaves exact says nothing of longer ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from .compiler import Compiler
from .decide.quality import first_tensor
from .ir.ops import attend
from .kernels.attention import attention_reference
from .kernels.attention.delta import corrected_rows
from .kernels.attention.grid import hides, tokens
from .kernels.attention.spec import per_head
from .kernels.block_topk.reference import hides_some
from .kernels.kv_attention.layout import left_out, parse

ROWS = 8
"""Queries a sequence whose attention is looked at."""
SEQUENCES = 2
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
            self._look(n.name, *args, **kwargs)
        return super().run_node(n)

    def _look(
        self,
        name: str,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None = None,
        bias: Tensor | None = None,
        sinks: Tensor | None = None,
        state: Any = None,
        start: Any = None,
        *,
        scale: float,
        causal: bool = False,
        window: Sequence[int] = (0,),
        softcap: float = 0.0,
        sink_tokens: Sequence[int] = (0,),
        top: Sequence[int] = (0,),
        delta: Sequence[int] = (0,),
        layout: str = "",
        grid: Sequence[int] = (),
        near: Sequence[int] = (0,),
    ) -> None:
        heads, length = k.shape[1], k.shape[2]
        prompt, group = self.prompt or q.shape[2], q.shape[1] // heads
        deltas = per_head("delta", delta, q.shape[1], "query heads")
        windows = per_head("window", window, heads)
        hidden = zip(windows, per_head("sink_tokens", sink_tokens, heads), strict=True)
        for h, (w, s) in enumerate(hidden):
            # a window that is corrected is one of prompts without their last rows
            rows = corrected_rows(prompt) if any(deltas[h * group :][:group]) else length
            if w:
                self.left[name, h] = rows > w + s
        tops = enumerate(per_head("top", top, heads))
        self.left |= {(name, h): hides_some(prompt, prompt, t) for h, t in tops if t}
        reaches = enumerate(per_head("near", near, heads))
        same = bool(grid) and tokens(tuple(grid)) == length
        self.left |= {(name, h): same and hides(tuple(grid), n) for h, n in reaches if n}
        parsed = parse(layout)
        formats = parsed.formats(heads)
        read = zip(formats, parsed.top_keys(heads), strict=True)
        self.left |= {
            (name, h): left_out(f, length - 1, t) > 0 for h, (f, t) in enumerate(read) if t
        }
        if not any(formats):
            return
        shares: list[Tensor] = []
        for row in _sampled(self.prompt if causal else 0, q.shape[2]):
            seen = row + 1 if causal else length
            # attention over marks of packed keys as values is the share that falls on them
            marks = k.new_zeros(k.shape[0], heads, seen, 1)
            for head, fmt in enumerate(formats):
                stored = fmt.packed(row if causal else length) if fmt else 0
                marks[:, head, fmt.sink if fmt else 0 :][:, :stored] = 1
            share = attention_reference(
                q[:, :, row : row + 1], k[:, :, :seen], marks,
                None if mask is None else mask[:, :seen], _row(bias, row, seen), sinks,
                scale, causal, window, softcap, sink_tokens, delta=delta,
            )  # fmt: skip
            shares.append(share.flatten().view(heads, -1).mean(1))
        mean = torch.stack(shares).mean(0).tolist()
        self.packed |= {(name, h): mean[h] for h, fmt in enumerate(formats) if fmt is not None}


def _row(bias: Tensor | None, row: int, seen: int) -> Tensor | None:
    """The bias of one query row."""
    if bias is None:
        return None
    rows = bias if bias.shape[2] == 1 else bias[:, :, row : row + 1]
    return rows[..., :seen]


def _sampled(first: int, queries: int) -> Iterator[int]:
    """Some query rows from `first` on, evenly spread, the last among them."""
    count = min(ROWS, queries - first)
    for i in range(count):
        yield queries - 1 - (queries - 1 - first) * i // max(count - 1, 1)
