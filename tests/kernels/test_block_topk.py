"""Attention over the tiles of the most estimated mass: the choice, the op, the kernels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import fxopt.kernels.attention.op  # noqa: F401 (registers the op)
from fxopt.kernels._triton import AVAILABLE
from fxopt.kernels.attention import REFERENCE, attention_with_lse
from fxopt.kernels.attention.op import attention_cuda
from fxopt.kernels.attention.spec import bind
from fxopt.kernels.block_topk import reference
from fxopt.kernels.block_topk.reference import (
    FEWEST,
    LEAST,
    SPARED,
    STRIDE,
    TILE,
    chosen_tiles,
    kept_tiles,
)
from tests.kernels import kept_tiles as kept_tiles_of
from tests.kernels.ahead_of_time import compiled
from tests.kernels.attention_file import AttentionFile
from tests.kernels.kept_tiles import DEVICE, left_padded, listed, make

needs_triton = pytest.mark.skipif(not AVAILABLE, reason="needs triton")


CASES: list[dict[str, Any]] = [
    *kept_tiles_of.CASES,
    # A part of the mass: fewer tiles than any share keeps, bounded by one, and no bound but one.
    {"queries": 1300, "keys": 1300, "batch": 1, "top": [1000, 500], "mass": [600, 950]},
    {"queries": 700, "keys": 1205, "padding": 140, "group": 1, "top": [500, 200], "mass": [500, 0]},
    {"queries": 909, "keys": 909, "batch": 1, "softcap": 3.0, "top": [100], "mass": [700, 1000]},
]


def _kept(
    q: Tensor, k: Tensor, shown: Tensor, start: int, stop: int, call: dict[str, Any]
) -> list[int]:
    """From the words of the docs."""
    top, part = call["top"], call["mass"]
    past = len(k) - len(q)
    candidates = kept_tiles_of.candidates(shown, start, stop, past)
    if not top or kept_tiles_of.is_spared(start, len(q)):
        return candidates
    mass = dict.fromkeys(candidates, 0.0)
    for row in range(start + STRIDE - 1, start + TILE, STRIDE):
        scores = k[: row + past + 1] @ q[row] * call["scale"]
        if call["softcap"]:
            scores = call["softcap"] * (scores / call["softcap"]).tanh()
        scores[~shown[: len(scores)]] = -torch.inf
        weights = scores.softmax(0).nan_to_num(0.0)
        for tile in candidates:
            mass[tile] += float(weights[tile * TILE : tile * TILE + TILE].sum())
    must = set(candidates[:1]) | {t for t in candidates if t >= (start + past) // TILE - 1}
    count = max(FEWEST if part == 1000 else LEAST, -(-len(candidates) * top // 1000))
    kept = sorted(candidates, key=lambda t: (t not in must, -mass[t], t))[:count]
    if not 0 < part < 1000:
        return kept
    held, wanted = 0.0, part / 1000 * sum(mass.values())
    for number, tile in enumerate(kept):
        if held >= wanted and tile not in must:
            return kept[:number]
        held += mass[tile]
    return kept


def kept_keys(call: dict[str, Any]) -> Tensor:
    return kept_tiles_of.kept_keys(call, _kept)


def definition(call: dict[str, Any]) -> Tensor:
    return kept_tiles_of.definition(call, _kept)


def case(number: int, **options: Any) -> dict[str, Any]:
    return kept_tiles_of.case(CASES[number], **options)


@pytest.mark.parametrize("number", range(len(CASES)))
def test_the_op_attends_to_the_tiles_of_most_mass(number: int) -> None:
    call = case(number)
    expected = definition(call)
    dense = definition(call | {"top": [0]})
    assert (expected - dense).abs().max() > 0.01
    for out in (
        torch.ops.fxopt.attention(*call.values()),
        REFERENCE(*call.values()),
        attention_with_lse(*call.values())[0],
    ):
        assert out.is_contiguous()
        torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


def test_the_log_sum_exp_is_of_the_kept_keys() -> None:
    call = case(0, batch=1)
    k = call["k"].double().repeat_interleave(2, 1)
    scores = call["q"].double() @ k.mT * call["scale"]
    expected = scores.masked_fill(~kept_keys(call), -torch.inf).logsumexp(-1)
    lse = attention_with_lse(*call.values())[1]
    torch.testing.assert_close(lse.double(), expected, rtol=1e-5, atol=1e-5)


def test_far_keys_that_all_queries_want_are_kept() -> None:
    """One key in ten thousand, at an odd place; everything else is noise."""
    length, place = 10_000, 4_321
    call = make(length, length, kv=1, group=1, batch=1, top=[20])
    call["k"][0, 0, place] = 0.0
    call["k"][0, 0, place, 0] = 6.0
    call["q"][..., 0] = 8.0
    chosen = chosen_tiles(call["q"], call["k"], None, call["scale"], 0.0, call["top"])
    after = -(-place // TILE)
    assert chosen[0, 0, 0, after:, place // TILE].all()
    *_, row, before, last = chosen[0, 0, 0]
    assert before[:-1].all()
    assert last.all()
    assert int(row.sum()) == kept_tiles(-(-length // TILE) - SPARED, 20) == LEAST
    assert row[[0, place // TILE, -4, -3]].all()
    assert int(chosen.sum()) < LEAST * len(chosen[0, 0, 0]) + 2 * len(row)


def test_a_sharp_head_keeps_few_tiles_for_a_part_of_its_mass() -> None:
    """All queries of the first head want one tile and their own; those of the second all keys."""
    length, place = 4096, 1111
    call = make(length, length, kv=2, group=1, batch=1, top=[500], mass=[900])
    call["q"][:, 0, :, 0], call["q"][:, 1] = 40.0, 0.0
    call["k"][:, 0, :, 0] = 0.0
    call["k"][:, 0, place, 0] = 6.0
    chosen = chosen_tiles(call["q"], call["k"], None, call["scale"], 0.0, [500, 500], [900, 900])
    sharp, flat = chosen[0, :, 0].sum(-1)
    assert sharp[20:-SPARED].max() == FEWEST  # of whole tiles: the first, two at the end, and it
    assert chosen[0, 0, 0, 20:, place // TILE].all()
    assert flat[20:-SPARED].tolist() == [kept_tiles(i + 1, 500, 900) for i in range(20, 30)]
    assert sharp[-SPARED:].tolist() == [31, 32]


@given(part=st.integers(1, 999), more=st.integers(0, 998), top=st.integers(1, 999))
def test_more_mass_keeps_more_tiles(part: int, more: int, top: int) -> None:
    """Tiles for a smaller part are among those for a larger one, these under the same cap among
    those of no part; and what is kept without the cap holds what is wanted."""
    q, k = torch.randn(1, 1, 1000, 4), torch.randn(1, 1, 1000, 4)
    more = min(part + more, 999)

    def kept(top: int, part: int) -> Tensor:
        return chosen_tiles(3 * q, k, None, 0.5, 0.0, [top], [part])

    few, many, every = kept(top, part), kept(top, more), kept(top, 0)
    assert (few <= many).all()
    assert (many <= every).all()
    mass = reference.estimate(3 * q, k, None, 0.5, 0.0)
    held = (mass * kept(1000, part)).sum(-1) / mass.sum(-1)
    assert (held >= part / 1000 - 1e-5).all()


def test_equal_masses_are_kept_in_order() -> None:
    call = make(1500, 1500, kv=1, group=1, batch=1, top=[500])
    chosen = chosen_tiles(torch.zeros_like(call["q"]), call["k"], None, 1.0, 0.0, [500])
    kept = chosen[0, 0, 0, 9].nonzero().flatten().tolist()
    assert kept == [0, 1, 2, 3, 4, 5, 8, 9]


@pytest.mark.parametrize(("queries", "keys"), [(256, 1500), (1024, 1024), (1, 2000)])
def test_short_calls_see_all_keys(queries: int, keys: int) -> None:
    call = make(queries, keys, batch=1, top=[1])
    expected = definition(call | {"top": [0]})
    for spelling in (torch.ops.fxopt.attention, REFERENCE):
        torch.testing.assert_close(
            spelling(*call.values()).double(), expected, rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"top": [1, 2, 3]}, "top has 3 entries; give 1 or 2"),
        ({"top": [1001]}, "per mille of the key tiles, from 0 to 1000"),
        ({"causal": False}, "needs causal attention"),
        ({"bias": torch.zeros(1, 1, 1, 300)}, "does not look at a bias"),
        ({"window": [0, 9], "top": [0, 9]}, "and window exclude each other in one head"),
        ({"mass": [1, 2, 3]}, "mass has 3 entries; give 1 or 2"),
        ({"mass": [1001]}, "needs a mass per mille, not"),
        ({"top": [0, 9], "mass": [950]}, "bounds the tiles that a mass keeps, here"),
    ],
)
def test_misfits_are_named(wrong: dict[str, Any], message: str) -> None:
    call = make(300, 300) | wrong
    with pytest.raises(ValueError, match=message):
        torch.ops.fxopt.attention(*call.values())


def test_gradients_are_those_of_the_kept_keys() -> None:
    call = make(1200, 1200, batch=1, dim=4, dtype=torch.float64, top=[300, 0])
    seen = kept_keys(call)
    leaves = [call[name].clone().requires_grad_() for name in "qkv"]

    def explicit(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (x.repeat_interleave(2, 1) for x in (k, v))
        scores = (q @ k.mT * call["scale"]).masked_fill(~seen, -torch.inf)
        return (scores.softmax(-1) @ v).transpose(1, 2)

    weights = torch.randn(1, 1200, 4, 4, dtype=torch.float64, device=DEVICE)
    expected = torch.autograd.grad((explicit(*leaves) * weights).sum(), leaves)
    named = call | dict(zip("qkv", leaves, strict=True))
    out = torch.ops.fxopt.attention(*named.values())
    found = torch.autograd.grad((out * weights).sum(), leaves)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-11)


def test_opcheck() -> None:
    call = make(1200, 1200, batch=1, kv=1, dim=4, top=[200])
    for name in "qkv":
        call[name] = call[name].detach().requires_grad_()
    torch.library.opcheck(torch.ops.fxopt.attention.default, tuple(call.values()))


@pytest.mark.slow
@pytest.mark.parametrize("number", [2, 3, 5, 6])
def test_onnx_chooses_the_same_tiles(number: int) -> None:
    """One file for prompts, whose tiles follow the data, and for single tokens."""
    batch = 2 if number == 2 else 1
    call = {n: x.cpu() if isinstance(x, Tensor) else x for n, x in case(number, batch=2).items()}
    call["mask"] = torch.ones(2, call["k"].shape[2], dtype=torch.int64)
    file = AttentionFile(call)
    assert file.domains <= {""}
    for queries, keys, hidden in ((1300, 1300, 140), (1, 1301, 140), (350, 1651, 0), (5, 9, 2)):
        new = make(queries, keys, batch=batch, group=call["q"].shape[1] // call["k"].shape[1])
        call |= {name: new[name].cpu() for name in "qkv"}
        call["mask"] = left_padded(batch, keys, hidden).cpu()
        out = file.run(call)
        expected = torch.ops.fxopt.attention(*call.values())
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


@needs_triton
@pytest.mark.parametrize("number", range(len(CASES)))
def test_the_lists_hold_the_chosen_tiles(number: int) -> None:
    from fxopt.kernels.block_topk.triton import kept_lists

    call = bind(**case(number))
    lists = kept_lists(call)
    expected = chosen_tiles(
        call.q, call.k, call.mask, call.scale, call.softcap, call.top, call.mass
    )
    assert listed(lists, call).equal(expected.flatten(1, 2))


@needs_triton
def test_lists_are_made_in_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    from fxopt.kernels.block_topk import triton as kernels

    call = bind(**case(2, kv=1, group=1))
    whole = kernels.kept_lists(call)
    # Room for four of twelve query tiles.
    monkeypatch.setattr(reference, "MOST_SUMS", 4 * 2 * TILE // STRIDE * 12)
    lists = kernels.kept_lists(call)
    for tiles, count in ((lists.full, lists.full_count), (lists.partial, lists.partial_count)):
        room = torch.arange(tiles.shape[3], device=DEVICE) < count[..., None]
        theirs = whole.full if tiles is lists.full else whole.partial
        assert tiles.where(room, -1).equal(theirs.where(room, -1))
    assert lists.full_count.equal(whole.full_count)
    assert lists.partial_count.equal(whole.partial_count)


@needs_triton
@pytest.mark.parametrize(
    ("number", "kv"), [(0, 1), (3, 2), (6, 2), pytest.param(5, 2, marks=pytest.mark.slow)]
)
def test_attention_over_the_lists(number: int, kv: int) -> None:
    """What CUDA runs, interpreted where there is none."""
    call = case(number, batch=1, kv=kv, group=3 - kv)
    out = attention_cuda(**call)
    torch.testing.assert_close(out.double(), definition(call), rtol=1e-5, atol=1e-5)


@needs_triton
def test_dense_and_windowed_heads_beside_kept_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    call = make(1100, 1100, kv=3, group=1, batch=1, top=[0, 200, 0], window=[0, 0, 300])
    out = attention_cuda(**call)
    torch.testing.assert_close(out.double(), definition(call), rtol=1e-5, atol=1e-5)
    plain = attention_cuda(**(call | {"window": [0]}))
    torch.testing.assert_close(plain[:, :, :2], out[:, :, :2], rtol=1e-5, atol=1e-5)


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from fxopt.kernels.block_topk.triton import (
    _select_kernel, _tile_sums_kernel, select_warps, sizes_for, ASKED)

def build(kernel, constants, types, **options):
    signature = {
        name: "constexpr" if name in constants else types.get(name, "i32")
        for name in kernel.arg_names
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    print(built.metadata.shared, built.asm["ptx"].count("wgmma.mma_async"))

for dtype, dim, tma, extras in (("bf16", 128, 1, 0), ("bf16", 64, 0, 1), ("fp16", 256, 1, 1)):
    k = f"tensordesc<{dtype}[1, 1, 128, {dim}]>" if tma else "*" + dtype
    sizes = sizes_for(2)
    options = {name: sizes.pop(name) for name in ("num_warps", "num_stages")}
    constants = dict(k_d=1, HAS_MASK=extras, HAS_SOFTCAP=extras, TMA=tma, EVEN=False, DIM=dim,
                     BLOCK_D=dim, UPCAST=False, **sizes)
    types = dict(asked_ptr="*" + dtype, k_ptr=k, mask_ptr="*u8", sums_ptr="*fp32",
                 scale="fp32", softcap="fp32")
    build(_tile_sums_kernel, constants, types, **options)
types = dict.fromkeys(("state_ptr", "share_ptr", "partial_count_ptr", "partial_ptr",
                       "full_count_ptr", "full_ptr"), "*i32") | {"sums_ptr": "*fp32"}
for block, mass in ((128, False), (1024, True), (8192, True)):
    constants = dict(HAS_MASS=mass, ASKED=ASKED, BLOCK=block)
    build(_select_kernel, constants, types, num_warps=select_warps(block))
"""


@pytest.mark.slow
@needs_triton
def test_compiles_ahead_of_time_for_hopper() -> None:
    built = [list(map(int, line)) for line in compiled(COMPILE)]
    assert len(built) == 6
    assert all(shared <= 227 * 1024 for shared, _ in built)
    assert all((products > 0) == (number < 3) for number, (_, products) in enumerate(built))


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("padding", [0, 700])
def test_long_inputs_on_the_device(dim: int, padding: int) -> None:
    """The kernels choose as float64 does but for tiles at the margin, and lose no more mass."""
    call = make(5000, 5300, kv=2, group=4, dim=dim, dtype=torch.bfloat16, top=[100, 250])
    if padding:
        call["mask"] = left_padded(2, 5300, padding)
    exact = {n: x.double() if isinstance(x, Tensor) and n in "qkv" else x for n, x in call.items()}
    out, wide = torch.ops.fxopt.attention(*call.values()), attention_with_lse(*exact.values())[0]
    whole = attention_with_lse(*(exact | {"top": [0]}).values())[0]
    assert not out.isnan().any()
    assert (out.double() - whole).norm() < 1.02 * (wide - whole).norm() + 0.01 * whole.norm()
    assert (out.double() - wide).norm() < 0.2 * (wide - whole).norm() + 0.01 * whole.norm()
