"""Attention within windows of a grid of tokens, against loops over places in float64."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fxopt.ir.ops import attend
from fxopt.kernels._triton import AVAILABLE
from fxopt.kernels.attention import attention_reference, attention_traceable, attention_with_lse, op
from fxopt.kernels.attention import grid as grids
from fxopt.kernels.attention.blocks import block_sparse, lists_of_grid
from fxopt.kernels.attention.op import attention, attention_backward
from fxopt.kernels.attention.op import attention_with_lse as op_with_lse
from fxopt.kernels.attention.spec import bind, in_order

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GRIDS = [(1, 14, 14), (0, 37, 37), (5, 12, 40), (1, 41, 9), (0, 6, 10, 11), (2, 300), (70, 20, 20)]
UNEVEN = [((1, 29, 30), (1, 2)), ((0, 6, 17, 18), (1, 2, 3)), ((3, 40, 9), (4, 1))]
SIZES = st.one_of(st.tuples(st.integers(1, 400)), *([st.tuples(*[st.integers(1, m)] * n)
                  for n, m in ((2, 30), (3, 9))]))  # fmt: skip


def by_axis(dilation: grids.Dilation, axes: int) -> tuple[int, ...]:
    return (dilation,) * axes if isinstance(dilation, int) else dilation


def inside(a: Sequence[int], b: Sequence[int], near: int, dilation: grids.Dilation) -> bool:
    """Whether a place lies in the window of another."""
    apart = [divmod(abs(x - y), d) for x, y, d in zip(a, b, by_axis(dilation, len(a)), strict=True)]
    return all(steps < near and not rest for steps, rest in apart)


def windows(grid: Sequence[int], near: int, dilation: grids.Dilation = 1) -> Tensor:
    """Which tokens see each other by their windows alone, [N, N]."""
    prefix, *sizes = grid
    places = list(itertools.product(*map(range, sizes)))
    seen = torch.ones(prefix + len(places), prefix + len(places), dtype=torch.bool)
    for i, a in enumerate(places):
        for j, b in enumerate(places):
            seen[prefix + i, prefix + j] = inside(a, b, near, dilation)
    return seen


def visible(grid: tuple[int, ...], near: int, dilation: grids.Dilation = 1) -> Tensor:
    """Which tokens see each other by the boxes around what their tiles have of a class, [N, N]."""
    prefix, *sizes = grid
    spacings = by_axis(dilation, len(sizes))
    places = [None] * prefix + list(itertools.product(*map(range, sizes)))
    order = list(grids.order(grid, dilation))
    tiles = [order[i : i + grids.TILE] for i in range(0, len(order), grids.TILE)]

    def boxes(tile: list[int]) -> dict[tuple[int, ...], list[tuple[int, int]]]:
        """The first and the last place along each axis, by residues."""
        found: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
        for place in (places[t] for t in tile):
            assert place is not None
            rests = tuple(x % d for x, d in zip(place, spacings, strict=True))
            found.setdefault(rests, []).append(place)
        return {r: [(min(c), max(c)) for c in zip(*box, strict=True)] for r, box in found.items()}

    def close(some: list[int], others: list[int]) -> bool:
        if None in [places[t] for t in (*some, *others)]:
            return True
        mine, theirs = boxes(some), boxes(others)
        return any(
            all(
                max(c - b, a - d) < near * spacing
                for (a, b), (c, d), spacing in zip(mine[r], theirs[r], spacings, strict=True)
            )
            for r in mine.keys() & theirs.keys()
        )

    seen = torch.zeros(len(order), len(order), dtype=torch.bool)
    for some, others in itertools.product(tiles, tiles):
        if close(some, others):
            seen[torch.tensor(some)[:, None], torch.tensor(others)] = True
    return seen


def naive(
    inputs: Sequence[Tensor], grid: tuple[int, ...], near: Sequence[int],
    dilation: Sequence[grids.Dilation] = (1, 1),
) -> Tensor:  # fmt: skip
    """In float64; [B, N, H, Dv]."""
    q, k, v = (x.double() for x in inputs)
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    scores = q @ k.mT * q.shape[3] ** -0.5
    for head, (reach, spacing) in enumerate(zip(near, dilation, strict=True)):
        if reach:
            mine, seen = slice(head * group, (head + 1) * group), visible(grid, reach, spacing)
            scores[:, mine] = scores[:, mine].masked_fill(~seen, -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2)


def random(
    grid: tuple[int, ...], heads: int = 4, kv: int = 2, dtype: Any = torch.float64, batch: int = 2
) -> Any:
    count = grids.tokens(grid)
    return tuple(torch.randn(batch, n, count, 16).to(dtype) for n in (heads, kv, kv))


def call(
    grid: tuple[int, ...], near: Sequence[int], dilation: Sequence[int] = (1,)
) -> tuple[Any, ...]:
    """What follows q, k, v in a call of the op."""
    none = (None, None, None, 0.25, False, [0], 0.0, [0], [0], [0])
    return (*none, list(grid), list(near), list(dilation))


def spacings(most: int) -> st.SearchStrategy[tuple[int, ...]]:
    """Of up to three axes, equal or not."""
    return st.one_of(
        st.integers(1, most).map(lambda d: (d, d, d)), st.tuples(*[st.integers(1, most)] * 3)
    )


@given(sizes=SIZES, prefix=st.integers(0, 130), each=spacings(5))
def test_every_token_has_one_place_and_the_prefix_comes_last(
    sizes: tuple[int, ...], prefix: int, each: tuple[int, ...]
) -> None:
    dilation = each[: len(sizes)]
    order = grids.order((prefix, *sizes), dilation)
    assert sorted(order) == list(range(prefix + math.prod(sizes)))
    assert list(order[math.prod(sizes) :]) == list(range(prefix))


@given(sizes=SIZES, prefix=st.integers(0, 70), near=st.integers(1, 12), each=spacings(4))
def test_tiles_see_each_other_alike_and_more_in_wider_windows(
    sizes: tuple[int, ...], prefix: int, near: int, each: tuple[int, ...]
) -> None:
    grid, dilation = (prefix, *sizes), each[: len(sizes)]
    seen = grids.seen_tiles(grid, near, dilation)
    assert (seen == seen.T).all()
    assert seen.diagonal().all()
    assert not (seen & ~grids.seen_tiles(grid, near + 1, dilation)).any()
    assert grids.density(grid, near, dilation) == seen.sum() / len(seen) ** 2
    tile = np.argsort(grids.order(grid, dilation)) // grids.TILE
    assert torch.equal(torch.from_numpy(seen[tile][:, tile]), visible(grid, near, dilation))
    for number, line in enumerate(seen):
        spans = grids.spans(grid, near, dilation, number)
        columns = [c for begin, end in spans for c in range(begin, end)]
        listed = np.flatnonzero(line.repeat(grids.TILE)[: grids.tokens(grid)])
        assert columns == list(listed)


@pytest.mark.parametrize("grid", [(1, 14, 14), (3, 11, 17), (0, 4, 6, 7), (0, 23)])
@pytest.mark.parametrize(("near", "dilation"), [(1, 1), (3, 1), (6, 1), (1, 2), (3, 2), (2, 4)])
def test_tokens_see_at_least_their_windows(grid: tuple[int, ...], near: int, dilation: int) -> None:
    seen = visible(grid, near, dilation)
    assert not (windows(grid, near, dilation) & ~seen).any()
    assert seen[: grid[0]].all()
    assert seen[:, : grid[0]].all()


@pytest.mark.parametrize(
    ("grid", "dilation"),
    [((1, 8, 33), (1, 2)), ((0, 3, 9, 8), (1, 2, 3)), ((3, 40, 5), (4, 1))],
)
def test_dilated_along_some_axes_tokens_see_at_least_their_windows(
    grid: tuple[int, ...], dilation: tuple[int, ...]
) -> None:
    seen = visible(grid, 2, dilation)
    assert not (windows(grid, 2, dilation) & ~seen).any()
    assert not seen.all()


def test_equal_dilations_of_all_axes_are_one_number() -> None:
    for grid in ((1, 29, 30), (2, 5, 12, 13)):
        alike = (2,) * (len(grid) - 1)
        assert (grids.order(grid, alike) == grids.order(grid, 2)).all()
        assert (grids.seen_tiles(grid, 3, alike) == grids.seen_tiles(grid, 3, 2)).all()


@given(data=st.data(), axes=st.integers(1, 3), heads=st.integers(1, 5))
def test_lists_of_dilations_are_read_as_they_were_written(
    data: st.DataObject, axes: int, heads: int
) -> None:
    lines = data.draw(st.lists(st.tuples(*[st.integers(1, 3)] * axes), min_size=heads,
                               max_size=heads))  # fmt: skip
    alike = [line[0] if len({*line}) == 1 else line for line in lines]
    grid = (0, *[9] * axes)
    assert grids.dilations([d for line in lines for d in line], heads, grid) == alike
    assert grids.dilations(grids.listed(alike, grid), heads, grid) == alike


@pytest.mark.parametrize(
    ("sizes", "most"), [((64, 64), 0.15), ((37, 37), 0.39), ((96, 40), 0.16), ((8, 32, 32), 0.14)]
)
def test_tiles_are_compact_whatever_the_sizes_are(sizes: tuple[int, ...], most: float) -> None:
    """Little more is seen than the three tiles along each axis that an even cut would show."""
    assert 0.05 < grids.density((1, *sizes), 4) < most


@pytest.mark.parametrize(
    ("sizes", "dilation"),
    [((64, 64), 2), ((64, 64), 4), ((16, 32, 32), 2), ((512,), 4), ((64, 64), (1, 4)),
     ((8, 32, 32), (1, 2, 2))],
)  # fmt: skip
def test_dilated_windows_are_whole_tiles(sizes: tuple[int, ...], dilation: grids.Dilation) -> None:
    """As many tiles of a class as in a grid of its size, and none of another class."""
    spacings = by_axis(dilation, len(sizes))
    classes, near = math.prod(spacings), grids.edge((0, *sizes))
    small = (0, *(size // d for size, d in zip(sizes, spacings, strict=True)))
    whole = grids.density(small, near) / classes
    assert grids.density((0, *sizes), near, dilation) == pytest.approx(whole)


@pytest.mark.parametrize("grid", GRIDS)
def test_the_reference_is_attention_over_the_visible_tokens(grid: tuple[int, ...]) -> None:
    inputs, near = random(grid), (4, 1)
    expected = naive(inputs, grid, near)
    assert not visible(grid, 1).all()
    torch.testing.assert_close(attention_reference(*inputs, *call(grid, near)), expected)
    torch.testing.assert_close(attention_traceable(*inputs, *call(grid, near)), expected)
    out, lse = attention_with_lse(*inputs, *call(grid, near))
    torch.testing.assert_close(out, expected)
    ordered = in_order(bind(*inputs, *call(grid, near)))
    lists = lists_of_grid(grid, ordered.near, 1, torch.device("cpu"))
    sparse, sums = block_sparse(ordered.q, ordered.k, ordered.v, lists, scale=0.25, causal=False)
    tokens, places = grids.places(grid, 1, torch.device("cpu"))
    torch.testing.assert_close(sparse[:, places], expected)
    torch.testing.assert_close(sums, lse[:, :, tokens])


@pytest.mark.parametrize("grid", [(1, 29, 30), (0, 7, 11, 10), (2, 300)])
def test_the_reference_is_attention_over_dilated_windows(grid: tuple[int, ...]) -> None:
    inputs, near, dilation = random(grid), (2, 3), (2, 3)
    expected = naive(inputs, grid, near, dilation)
    assert not visible(grid, 2, 2).all()
    options = call(grid, near, dilation)
    torch.testing.assert_close(attention_reference(*inputs, *options), expected)
    torch.testing.assert_close(attention_traceable(*inputs, *options), expected)
    torch.testing.assert_close(attention_with_lse(*inputs, *options)[0], expected)


@pytest.mark.parametrize(("grid", "uneven"), UNEVEN)
def test_the_reference_is_attention_over_windows_dilated_along_some_axes(
    grid: tuple[int, ...], uneven: tuple[int, ...]
) -> None:
    axes = len(grid) - 1
    inputs, near = random(grid), (2, 3)
    expected = naive(inputs, grid, near, (uneven, 2))
    options = call(grid, near, (*uneven, *[2] * axes))
    torch.testing.assert_close(attention_reference(*inputs, *options), expected)
    torch.testing.assert_close(attention_traceable(*inputs, *options), expected)
    torch.testing.assert_close(attention_with_lse(*inputs, *options)[0], expected)


def test_heads_choose_apart_beside_windows_softcap_and_sinks() -> None:
    grid = (1, 20, 21)
    q, k, v = random(grid, heads=6, kv=3)
    sinks = torch.randn(6, dtype=torch.float64)
    options: dict[str, Any] = {"scale": 0.25, "softcap": 5.0, "sinks": sinks}
    out = attend(q, k, v, **options, grid=grid, near=(0, 3, 0), window=(0, 0, 40))
    for head, alone in enumerate(({}, {"grid": grid, "near": (3,)}, {"window": (40,)})):
        mine = slice(2 * head, 2 * head + 2)
        options["sinks"] = sinks[mine]
        one = attend(q[:, mine], k[:, head, None], v[:, head, None], **options, **alone)
        torch.testing.assert_close(out[:, :, mine], one)
    dense = attend(q, k, v, **options | {"sinks": sinks})
    assert (out - dense)[:, :, 2:4].abs().max() > 1e-3
    torch.testing.assert_close(out[:, :1, :4], dense[:, :1, :4])  # the class token sees all


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_dtypes_round_as_dense_attention_does(dtype: torch.dtype) -> None:
    grid = (1, 17, 19)
    inputs = random(grid, dtype=dtype)
    out = attention_reference(*inputs, *call(grid, (2, 0)))
    assert out.dtype == dtype
    error = (out.double() - naive(inputs, grid, (2, 0))).abs().amax(dim=(0, 1, 3))
    assert error[:2].max() < 4 * error[2:].max()


def test_other_lengths_see_all_keys() -> None:
    inputs = random((0, 15, 15))
    dense = attend(*inputs, scale=0.25)
    torch.testing.assert_close(attend(*inputs, scale=0.25, grid=(1, 15, 15), near=(2,)), dense)
    options = call((1, 15, 15), (2,))
    torch.testing.assert_close(attention_traceable(*inputs, *options), dense)


@pytest.mark.parametrize(
    ("near", "dilation"),
    [((4, 2), (1, 1)), ((3, 0), (1, 1)), ((3, 2), (2, 3)), ((3, 2), ((1, 3), 1))],
)
def test_gradients_are_those_of_attention_over_the_visible_tokens(
    near: tuple[int, ...], dilation: tuple[grids.Dilation, ...]
) -> None:
    grid = (1, 14, 15)
    inputs = [x.requires_grad_() for x in random(grid)]
    weight = torch.randn(2, grids.tokens(grid), 4, 16, dtype=torch.float64)
    expected = torch.autograd.grad((naive(inputs, grid, near, dilation) * weight).sum(), inputs)
    out = attention(*inputs, *call(grid, near, grids.listed(dilation, grid)))
    found = torch.autograd.grad((out * weight).sum(), inputs)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_a_first_call_that_only_infers_spoils_no_gradient() -> None:
    grid = (3, 15, 17)
    inputs = random(grid)
    with torch.inference_mode():
        attention(*inputs, *call(grid, (2,)))
    leaves = [x.requires_grad_() for x in inputs]
    attention(*leaves, *call(grid, (2,))).sum().backward()
    assert all(x.grad is not None for x in leaves)


def through_the_op(
    grid: tuple[int, ...], dtype: torch.dtype, device: str, spaced: grids.Dilation = 2
) -> None:
    """Output and gradients of one local, one dilated and one dense head, within the reference's
    rounding."""
    near, dilation = (1, 2, 0), (1, spaced, 1)
    assert not visible(grid, 1).all()
    assert not visible(grid, 2, spaced).all()
    inputs = [x.to(device).requires_grad_() for x in random(grid, 3, 3, dtype, batch=1)]
    options = call(grid, near, grids.listed(dilation, grid))
    out = attention(*inputs, *options)
    gradient = torch.randn_like(out)
    found = [out, *torch.autograd.grad(out, inputs, gradient)]
    wide = [x.detach().double().requires_grad_() for x in inputs]
    exact = attention_reference(*wide, *options)
    torch.testing.assert_close(exact.cpu(), naive([x.cpu() for x in wide], grid, near, dilation))
    expected = [exact, *torch.autograd.grad(exact, wide, gradient.double())]
    plain = attention_reference(*inputs, *options)
    same = [plain, *torch.autograd.grad(plain, inputs, gradient)]
    for mine, theirs, right in zip(found, same, expected, strict=True):
        error, own = ((x.double() - right).abs().max() for x in (mine, theirs))
        assert error < 8 * own + 1e-6


@pytest.mark.skipif(not AVAILABLE, reason="needs triton")
@pytest.mark.parametrize("spaced", [(2, 1), pytest.param(2, marks=pytest.mark.slow)])
def test_the_kernels_walk_the_tiles(
    spaced: grids.Dilation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(op, "_has_kernel", lambda q: q.dtype != torch.float64)
    through_the_op((2, 64, 3), torch.float32, DEVICE, spaced)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("grid", [(1, 37, 37), (5, 64, 64), (0, 8, 24, 25)])
def test_on_a_gpu(grid: tuple[int, ...], dtype: torch.dtype) -> None:
    through_the_op(grid, dtype, "cuda")
    through_the_op(grid, dtype, "cuda", spaced=(1, *[2] * (len(grid) - 2)))


def test_the_ops_are_sound() -> None:
    inputs = random((1, 12, 12), dtype=torch.float32)
    options = call((1, 12, 12), (2, 0))
    torch.library.opcheck(attention, (*inputs, *options))
    out, lse = op_with_lse(*inputs, *options)
    torch.library.opcheck(attention_backward, (torch.randn_like(out), out, lse, *inputs, *options))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"near": (-1,)}, "near is a number of tokens"),
        ({"grid": ()}, "near needs a grid"),
        ({"grid": (1, 0, 12)}, "near needs a grid"),
        ({"causal": True}, "near takes no causal attention, mask or bias"),
        ({"mask": torch.ones(2, 145)}, "near takes no causal attention, mask or bias"),
        ({"bias": torch.zeros(1, 1, 145, 145)}, "near takes no causal attention, mask or bias"),
        ({"window": (9, 0)}, "near and window exclude each other"),
        ({"near": (1, 2, 3)}, "near has 3 entries"),
        ({"dilation": (0,)}, r"near needs a dilation of 1 or more, not \[0, 0\]"),
        ({"dilation": (1, 2, 3)}, "dilation has 3 entries"),
        (
            {"dilation": (1, 2, 0, 1)},
            r"near needs a dilation of 1 or more, not \[\(1, 2\), \(0, 1\)\]",
        ),
    ],
)
def test_wrong_calls_are_refused(change: dict[str, Any], reason: str) -> None:
    options: dict[str, Any] = {"scale": 0.25, "grid": (1, 12, 12), "near": (2,)}
    with pytest.raises(ValueError, match=reason):
        attend(*random((1, 12, 12), dtype=torch.float32), **options | change)


def test_a_cache_has_no_grid() -> None:
    x = random((1, 12, 12), dtype=torch.float32)
    with pytest.raises(ValueError, match="near has no meaning"):
        attend(*x, state=[], start=0, scale=0.25, grid=(1, 12, 12), near=(2,))
