"""Caches that keep which tiles decoded tokens read, by a list kept in Python, whatever was done."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fxopt
from fxopt.emit.cache import Cache
from fxopt.ir.errors import FxoptError
from fxopt.ir.ops import attend
from fxopt.kernels.decode_topk.reference import TILE, estimate, ranges, tiles_read
from fxopt.kernels.kv_attention import parse
from fxopt.kernels.kv_attention.kept import packed_ranges
from fxopt.kernels.kv_attention.layout import CHOICE, Blocks, split_state
from fxopt.kernels.kv_attention.mutating import gather
from fxopt.kernels.kv_attention.pages import stored
from tests.emit.onnx_cases import everywhere, llama

KV, H, DIM, TOP = 2, 4, 8, 96
EXACT, PACKED = f"exact+t{TOP}/5", f"0:k8v8g32r8s4+t{TOP}/7|1:exact+t{TOP}/3"


class Kept:
    """What a head class keeps: of each row and head the first positions of the tiles of a choice,
    up to where tiles were whole, and the position of the token that chose."""

    def __init__(self) -> None:
        self.position, self.end = 0, 0
        self.starts: list[list[list[int]]] = []

    def hidden(self, step: Step, refresh: int) -> Tensor:
        """Which of the positions before a token it does not read, [B, h, length]."""
        bounds, length = step.bounds, step.length
        grown = sum(low >= self.end for low, _ in bounds)
        room = (refresh - 1) // step.size + 1
        if not 0 < self.position < length < self.position + refresh or grown > room:
            self.position, self.end = (length, bounds[-1][1]) if bounds else (0, 0)
            self.starts = [[step.choose(b, h) for h in range(step.heads)] for b in range(step.rows)]
        hidden = torch.zeros(step.rows, step.heads, length, dtype=torch.bool)
        for b, of_heads in enumerate(self.starts):
            for h, starts in enumerate(of_heads):
                for low, high in bounds:
                    hidden[b, h, low:high] = low < self.end and low not in starts
        return hidden


class Step:
    """A class before one new token of queries q: its tiles, keys and values as they are read."""

    def __init__(self, part: dict[str, Tensor], fmt: Blocks | None, q: Tensor, length: int) -> None:
        self.q, self.length, self.size = q, length, fmt.group if fmt else TILE
        if fmt is None:
            self.k, self.v = (part[side][:, :, :length] for side in ("key", "value"))
            self.ends = ranges(self.k)
            self.bounds = [(i * TILE, (i + 1) * TILE) for i in range(length // TILE)]
        else:
            self.k, self.v = (gather(part, s, fmt, length, q.dtype) for s in ("key", "value"))
            starts = [fmt.sink + x for x in part["block_start"].tolist()]
            self.bounds = [(low, high) for low, high in pairwise(starts) if low < high]
            blocks = stored(part, ("key_scale", "key_zero"), len(self.bounds))
            self.ends = packed_ranges(blocks, fmt)
        self.rows, self.heads = self.k.shape[:2]

    def choose(self, row: int, head: int) -> list[int]:
        """The first positions of the tiles that one row's query heads of a KV head choose."""
        q = self.q[row, 2 * head : 2 * head + 2][None]
        mass = estimate(q, *(x[row, head][None, None] for x in self.ends), 0.5)[0, 0, :, 0]
        behind = (mass.amax(1, keepdim=True) - mass).amin(0)
        behind[[0, *range(max(0, len(behind) - 64 // self.size), len(behind))]] = -1
        best = behind.sort(stable=True).indices[: tiles_read(TOP, self.size)]
        return [self.bounds[i][0] for i in best.tolist()]


class Run:
    """A cache, and what is told of its choices."""

    def __init__(self, layout: str, pool_tokens: int | None = None) -> None:
        self.layout = layout
        spec = [(KV, DIM, DIM, layout)]
        self.cache = Cache.allocate(spec, 2, 64, torch.float64, pool_tokens=pool_tokens)
        self.kept = [Kept() for _ in parse(layout).classes]

    def append(self, count: int) -> None:
        """Attend to and store new tokens; a single one is compared."""
        cache, length = self.cache, self.cache.get_seq_length()
        rows = cache.batch_size
        q, k, v = (torch.randn(rows, h, count, DIM, dtype=torch.float64) for h in (H, KV, KV))
        q = 4 * q
        if length + count > cache.capacity:
            cache.reserve(length + count)
        cache.require(count)
        expected = self._expected(q, k, v) if count == 1 else None
        out = attend(
            q, k, v, None, state=cache.states[0], start=cache.start, scale=0.5, causal=True,
            layout=self.layout,
        )  # fmt: skip
        cache.advance(count)
        if expected is not None:
            torch.testing.assert_close(out[:, 0], expected, rtol=1e-8, atol=1e-9)

    def _expected(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        layout, length = parse(self.layout), self.cache.get_seq_length()
        out = torch.zeros(len(q), H, DIM, dtype=q.dtype)
        classes = split_state(layout, KV, self.cache.states[0])
        for (heads, fmt, part), entry, kept in zip(classes, layout.classes, self.kept, strict=True):
            group = [2 * h + i for h in heads for i in range(2)]
            step = Step(part, fmt, q[:, group], length)
            hidden = kept.hidden(step, entry.refresh)
            keys, values = (
                torch.cat([old, new[:, list(heads)]], 2) for old, new in ((step.k, k), (step.v, v))
            )
            hidden = torch.nn.functional.pad(hidden, (0, 1)).repeat_interleave(2, 1)
            keys, values = (x.repeat_interleave(2, 1) for x in (keys, values))
            scores = (step.q @ keys.mT * 0.5)[:, :, 0].masked_fill(hidden, -torch.inf)
            out[:, group] = (scores.softmax(-1)[:, :, None] @ values)[:, :, 0]
        return out

    def crop(self, removed: int) -> None:
        self.cache.crop(-removed)
        for kept in self.kept:
            if kept.position >= self.cache.get_seq_length():
                kept.position = 0

    def select(self, how: str, rows: list[int]) -> None:
        getattr(self.cache, how)(torch.tensor(rows))
        for kept in self.kept:
            kept.starts = [kept.starts[row] for row in rows] if kept.starts else []

    def reset(self) -> None:
        self.cache.reset()
        self.kept = [Kept() for _ in self.kept]


@settings(max_examples=12, deadline=None)
@given(st.data())
@pytest.mark.parametrize(("layout", "pool_tokens"), [(EXACT, None), (PACKED, None), (PACKED, 1200)])
def test_choices_are_kept_whatever_was_done(
    layout: str, pool_tokens: int | None, data: st.DataObject
) -> None:
    run = Run(layout, pool_tokens)
    run.append(data.draw(st.integers(150, 250)))
    for _ in range(data.draw(st.integers(1, 12))):
        action = data.draw(
            st.sampled_from(["decode", "several", "crop", "order", "select", "fork"])
        )
        if action == "decode":
            for _ in range(data.draw(st.integers(1, 9))):
                run.append(1)
        elif action == "several":
            run.append(data.draw(st.integers(2, 40)))
        elif action == "crop":
            run.crop(data.draw(st.integers(1, 9)))
        elif action == "fork":
            run.cache = run.cache.fork()
        else:
            rows = data.draw(st.lists(st.integers(0, 1), min_size=2, max_size=2))
            run.select("reorder_cache" if action == "order" else "batch_select_indices", rows)
    run.append(1)


@pytest.mark.parametrize("layout", [EXACT, PACKED])
def test_a_reset_forgets_the_choice(layout: str) -> None:
    run = Run(layout)
    run.append(200)
    run.append(1)
    run.reset()
    run.append(199)
    for _ in range(4):
        run.append(1)


def test_blocks_cut_again_and_again_are_read() -> None:
    """Crops that cut one block make many short ones, of which a choice has no room: it is made
    anew before, in the same tensors."""
    layout = f"k8v8g32r0s0+t{TOP}/20"
    run = Run(layout)
    run.append(185)
    ((_, _, part),) = split_state(parse(layout), KV, run.cache.states[0])
    assert list(part)[-2:] == list(CHOICE)
    positions: list[int] = []
    for length in (187, 189, 190, 191):
        while run.cache.get_seq_length() < 192:
            run.append(1)
        run.crop(192 - length)
        run.append(1)
        assert (part["chosen_at"][..., 0] == run.kept[0].position).all()
        positions.append(run.kept[0].position)
    assert positions[0] == 185 < positions[-1] < 185 + 20
    addresses = [x.data_ptr() for x in run.cache.states[0][-2:]]
    assert addresses == [part[name].data_ptr() for name in CHOICE]


def test_an_onnx_file_of_decoding_is_refused(tmp_path: Path) -> None:
    work = fxopt.Generate(batch=1, prompt=30_000, new_tokens=90)
    model, example = llama()
    opt, chosen = everywhere("attention.decode_topk", model, example, "top1024/8", work)
    assert [proposal.candidate.label for proposal in chosen] == ["top1024/8"] * 2
    with pytest.raises(FxoptError, match=r"'exact\+t1024/8'\), and the past of an ONNX file"):
        opt.export_onnx(tmp_path / "model.onnx", kind="generate")
    assert not any(tmp_path.iterdir())
