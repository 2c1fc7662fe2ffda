"""Attention over the tiles that halving chunks of keys finds: the choice, the op, the kernels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fxopt.kernels.attention.op  # noqa: F401 (registers the op)
from fxopt.kernels._triton import AVAILABLE
from fxopt.kernels.attention import REFERENCE, attention_traceable, attention_with_lse
from fxopt.kernels.attention.op import attention_cuda
from fxopt.kernels.attention.spec import bind
from fxopt.kernels.block_topk import reference as topk
from fxopt.kernels.block_topk.reference import LEAST, TILE, kept_tiles
from fxopt.kernels.hip.reference import BOXES, STRIDE, chosen_tiles, halvings
from tests.kernels import kept_tiles as kept_tiles_of
from tests.kernels.ahead_of_time import compiled
from tests.kernels.attention_file import AttentionFile
from tests.kernels.kept_tiles import DEVICE, candidates, is_spared, left_padded, listed, make

needs_triton = pytest.mark.skipif(not AVAILABLE, reason="needs triton")


def _kept(
    q: Tensor, k: Tensor, shown: Tensor, start: int, stop: int, call: dict[str, Any]
) -> list[int]:
    """From the words of the docs, one chunk after another."""
    top, past = call["top"], len(k) - len(q)
    seen = candidates(shown, start, stop, past)
    if not top or is_spared(start, len(q)):
        return seen
    count = max(LEAST, -(-len(seen) * top // 1000))
    level = 0
    while 2 ** (level + 1) * 2 * top <= 1000:
        level += 1
    near = {t for t in seen if t >= (start + past) // TILE - 1}
    must = {*seen[:1]} | near
    live = sorted({t >> level for t in seen})
    while True:
        mass = dict.fromkeys(live, 0.0)
        apart = [c for c in live if c not in {t >> level for t in near}]
        for row in range(start + STRIDE - 1, start + TILE, STRIDE):
            scores = [_scores(q[row] * call["scale"], k, shown, c << level, level) for c in apart]
            found = torch.tensor(scores, dtype=torch.float64)
            if call["softcap"]:
                found = call["softcap"] * (found / call["softcap"]).tanh()
            weights = found.nan_to_num(-torch.inf, neginf=-torch.inf).flatten().softmax(0)
            for c, part in zip(apart, weights.nan_to_num(0.0).view(-1, BOXES).sum(1), strict=True):
                mass[c] += float(part)
        forced = {t >> level for t in must}
        live = sorted(sorted(live, key=lambda c: (c not in forced, -mass[c], c))[:count])
        if not level:
            return live
        level -= 1
        live = [h for c in live for h in (2 * c, 2 * c + 1) if h in {t >> level for t in seen}]


def _scores(q: Tensor, k: Tensor, shown: Tensor, tile: int, level: int) -> list[float]:
    """Of the runs of a chunk of 2**level tiles: what ranges of their channels say of q . k."""
    size = TILE * 2**level // BOXES
    scores: list[float] = []
    for begin in range(tile * TILE, (tile + 2**level) * TILE, size):
        keys = k[begin : begin + size][shown[begin : begin + size]]
        if not len(keys):
            scores.append(-torch.inf)
            continue
        low, high = keys.amin(0), keys.amax(0)
        scores.append(float(q @ (low + high) / 2 + q**2 @ (high - low) ** 2 / 12))
    return scores


CASES: list[dict[str, Any]] = [
    {"queries": 2300, "keys": 2300, "kv": 1, "group": 1, "batch": 1},
    {"queries": 1500, "keys": 1500, "kv": 1, "padding": 301, "softcap": 3.0, "group": 1},
    # After a past whose length is no multiple of a tile; chunks of four and eight tiles.
    {"queries": 400, "keys": 5001, "padding": 727, "top": [100, 50], "group": 1},
    {
        "queries": 1536,
        "keys": 1536,
        "top": [0, 50],
        "window": [200, 0],
        "batch": 1,
        "group": 1,
    },
    {"queries": 390, "keys": 2537, "top": [200, 10], "sinks": True, "group": 1},
]


def case(number: int, **options: Any) -> dict[str, Any]:
    return kept_tiles_of.case(CASES[number] | {"hip": [1]}, **options)


def definition(call: dict[str, Any]) -> Tensor:
    return kept_tiles_of.definition(call, _kept)


@pytest.mark.parametrize("number", range(len(CASES)))
def test_the_op_attends_to_the_tiles_that_halving_finds(number: int) -> None:
    call = case(number)
    expected = definition(call)
    dense = REFERENCE(*(call | {"top": [0]}).values()).double()
    asked_all = REFERENCE(*(call | {"hip": [0]}).values()).double()
    assert (expected - dense).abs().max() > 0.01
    assert (expected - asked_all).abs().max() > 0.01
    for spelling in (torch.ops.fxopt.attention, attention_traceable):
        out = spelling(*call.values())
        assert out.is_contiguous()
        torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


def test_heads_find_their_tiles_each_in_its_way() -> None:
    ways = {"top": [100, 100, 200, 0, 400], "hip": [1, 0, 1, 1, 0], "mass": [0, 0, 0, 0, 600]}
    call = make(1400, 2700, kv=5, group=1, **ways)
    out = torch.ops.fxopt.attention(*call.values())
    for head in range(5):
        one = {n: x[:, head, None] if n in "qkv" else x for n, x in call.items()}
        one |= {name: [values[head]] for name, values in ways.items()}
        alone = torch.ops.fxopt.attention(*one.values())
        torch.testing.assert_close(out[:, :, head], alone[:, :, 0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(attention_traceable(*call.values()), out, rtol=1e-4, atol=1e-5)


@given(
    queries=st.integers(1, 1200), past=st.integers(0, 5000), padding=st.integers(0, 1500),
    top=st.lists(st.integers(1, 999), min_size=2, max_size=2),
)  # fmt: skip
@settings(max_examples=30, deadline=None)
def test_laws_of_the_choice(queries: int, past: int, padding: int, top: list[int]) -> None:
    """Whatever the data: the tiles that have to be there are, as many as the share says, and no
    choice looks at later keys."""
    keys = queries + past
    q, k = torch.randn(1, 2, queries, 3), torch.randn(1, 2, keys, 3)
    mask = left_padded(1, keys, min(padding, keys - 1)).cpu()
    chosen = chosen_tiles(q, k, mask, 1.0, 0.0, top)
    for number in range(topk.tiles(queries)):
        start, end = number * TILE, min((number + 1) * TILE, queries)
        seen = candidates(mask[0] != 0, start, end, past)
        must = {*seen[:1]} | {t for t in seen if t >= (start + past) // TILE - 1}
        for head, share in enumerate(top):
            kept = chosen[0, head, 0, number].nonzero().flatten().tolist()
            assert must <= {*kept} <= {*seen}
            count = len(seen) if is_spared(start, queries) else kept_tiles(len(seen), share)
            assert len(kept) == count
    number = topk.tiles(queries) // 2
    start, end = number * TILE, min((number + 1) * TILE, queries)
    if not is_spared(start, queries):
        earlier = q[:, :, start:end], k[:, :, : end + past], mask[:, : end + past]
        alone = chosen_tiles(*earlier, 1.0, 0.0, top, 0)[:, :, :, 0]
        assert chosen[:, :, :, number, : alone.shape[-1]].equal(alone)


def test_far_keys_that_all_queries_want_are_found() -> None:
    """One key in ten thousand, at an odd place; everything else is noise."""
    length, place = 10_000, 4_321
    call = make(length, length, kv=1, group=1, batch=1, dim=64)
    call["k"][0, 0, place] = 0.0
    call["k"][0, 0, place, 0] = 8.0
    call["q"][..., 0] = 10.0
    assert halvings(20) == 4  # chunks of 16 tiles
    chosen = chosen_tiles(call["q"], call["k"], None, call["scale"], 0.0, [20])
    assert chosen[0, 0, 0, -(-place // TILE) :, place // TILE].all()


def test_far_neighbours_that_all_queries_want_are_found() -> None:
    """A tile of keys that point the same way, few of them larger than others."""
    length, tile = 10_000, 21
    call = make(length, length, kv=1, group=1, batch=1, dim=64)
    call["k"][0, 0, tile * TILE : (tile + 1) * TILE, 0] += 2.0
    call["q"][..., 0] = 10.0
    chosen = chosen_tiles(call["q"], call["k"], None, call["scale"], 0.0, [200])
    assert chosen[0, 0, 0, tile + 1 :, tile].all()


def test_chunks_are_at_least_twice_the_tiles_that_are_kept() -> None:
    assert [halvings(top) for top in (0, 50, 100, 125, 126, 200, 250, 251, 999)] == [
        0, 3, 2, 2, 1, 1, 1, 0, 0,
    ]  # fmt: skip
    for top in range(1, 251):
        assert 2 * top * 2 ** halvings(top) <= 1000 < 4 * top * 2 ** halvings(top)


def test_misfits_are_named() -> None:
    call = make(300, 300, hip=[2])
    with pytest.raises(ValueError, match="hip is 0 or 1; got hip"):
        torch.ops.fxopt.attention(*call.values())
    with pytest.raises(ValueError, match="hip has 3 entries; give 1 or 2, the KV heads"):
        torch.ops.fxopt.attention(*(call | {"hip": [1, 0, 1]}).values())
    with pytest.raises(ValueError, match="hip and mass exclude each other in one head, here"):
        torch.ops.fxopt.attention(*(call | {"hip": [1, 0], "mass": [900]}).values())


def test_gradients_are_those_of_the_kept_keys() -> None:
    call = make(300, 2200, batch=1, dim=4, dtype=torch.float64, top=[100, 0], hip=[1])
    seen = kept_tiles_of.kept_keys(call, _kept)
    leaves = [call[name].clone().requires_grad_() for name in "qkv"]

    def explicit(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (x.repeat_interleave(2, 1) for x in (k, v))
        scores = (q @ k.mT * call["scale"]).masked_fill(~seen, -torch.inf)
        return (scores.softmax(-1) @ v).transpose(1, 2)

    weights = torch.randn(1, 300, 4, 4, dtype=torch.float64, device=DEVICE)
    expected = torch.autograd.grad((explicit(*leaves) * weights).sum(), leaves)
    out = torch.ops.fxopt.attention(*(call | dict(zip("qkv", leaves, strict=True))).values())
    found = torch.autograd.grad((out * weights).sum(), leaves)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-11)


def test_opcheck() -> None:
    call = make(400, 2200, batch=1, kv=1, dim=4, top=[200], hip=[1])
    for name in "qkv":
        call[name] = call[name].detach().requires_grad_()
    torch.library.opcheck(torch.ops.fxopt.attention.default, tuple(call.values()))


@pytest.mark.slow
@pytest.mark.parametrize(("number", "hip"), [(1, [1]), (2, [0, 1]), (4, [1])])
def test_onnx_chooses_the_same_tiles(number: int, hip: list[int]) -> None:
    """One file for prompts, whose tiles follow the data, and for single tokens."""
    batch = 2 if number == 1 else 1
    call = {n: x.cpu() if isinstance(x, Tensor) else x for n, x in case(number, hip=hip).items()}
    call["mask"] = torch.ones(2, call["k"].shape[2], dtype=torch.int64)
    file = AttentionFile(call)
    assert file.domains <= {""}
    for queries, keys, hidden in ((1300, 1300, 140), (1, 1301, 140), (350, 4651, 0), (5, 9, 2)):
        heads, kv = call["q"].shape[1], call["k"].shape[1]
        new = make(queries, keys, kv=kv, group=heads // kv, batch=batch)
        call |= {name: new[name].cpu() for name in "qkv"}
        call["mask"] = left_padded(batch, keys, hidden).cpu()
        out = file.run(call)
        expected = torch.ops.fxopt.attention(*call.values())
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


SMALL: list[dict[str, Any]] = [
    {"queries": 390, "keys": 2300, "kv": 1, "batch": 1, "top": [200]},
    {"queries": 300, "keys": 1501, "padding": 301, "softcap": 3.0, "group": 1, "top": [100]},
    {"queries": 390, "keys": 5001, "kv": 1, "batch": 1, "padding": 1727, "top": [50]},
    {"queries": 300, "keys": 2300, "kv": 1, "group": 1, "batch": 1, "top": [400]},
    {
        "queries": 512, "keys": 2560, "kv": 1, "group": 1, "batch": 1, "top": [200],
        "dtype": torch.bfloat16,
    },
]  # fmt: skip
"""Few queries: the interpreter takes long."""


def small(number: int) -> dict[str, Any]:
    return kept_tiles_of.case(SMALL[number] | {"hip": [1]})


@needs_triton
@pytest.mark.parametrize("number", range(len(SMALL)))
def test_the_lists_hold_the_chosen_tiles(number: int) -> None:
    from fxopt.kernels.hip.triton import kept_lists

    call = bind(**small(number))
    expected = chosen_tiles(call.q, call.k, call.mask, call.scale, call.softcap, call.top)
    found, expected = listed(kept_lists(call), call), expected.flatten(1, 2)
    if call.q.dtype == torch.float32:
        assert found.equal(expected)
        return
    # Middles and widths of ranges are rounded: tiles at the margin may change.
    assert found.sum(-1).equal(expected.sum(-1))
    assert (found & expected).sum() > 0.9 * expected.sum()


@needs_triton
def test_lists_are_made_in_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    from fxopt.kernels.hip import triton as kernels

    call = bind(**small(2))
    whole = listed(kernels.kept_lists(call), call)
    # Room for three of four query tiles, of 16 halves each.
    monkeypatch.setattr(topk, "MOST_SUMS", 3 * 2 * TILE // STRIDE * 16)
    assert listed(kernels.kept_lists(call), call).equal(whole)


@needs_triton
def test_attention_over_the_lists() -> None:
    """What CUDA runs, interpreted where there is none: shares and ways of finding tiles apart."""
    ways = {"top": [200, 100, 100, 400], "hip": [1, 1, 0, 0], "mass": [0, 0, 0, 600]}
    call = make(300, 2200, kv=4, group=1, batch=1, **ways)
    out = attention_cuda(**call)
    torch.testing.assert_close(out, REFERENCE(*call.values()), rtol=1e-4, atol=1e-5)


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from fxopt.kernels.block_topk.triton import select_warps
from fxopt.kernels.hip.triton import BLOCK_C, _halve_kernel, _score_kernel

def build(kernel, constants, types, **options):
    signature = {
        name: "constexpr" if name in constants else types.get(name, "i32")
        for name in kernel.arg_names
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    print(built.metadata.shared, built.asm["ptx"].count("mma.sync"))

for dtype, dim, first, cap in (("bf16", 128, 1, 0), ("bf16", 64, 0, 1), ("fp32", 64, 0, 0)):
    types = dict(asked_ptr="*" + dtype, middle_ptr="*" + dtype, width_ptr="*" + dtype,
                 shown_ptr="*u8", list_ptr="*i32", count_ptr="*i32", scores_ptr="*fp32",
                 scale="fp32", softcap="fp32")
    constants = dict(FIRST=bool(first), HAS_SOFTCAP=bool(cap), DIM=dim, BLOCK_D=dim,
                     BLOCK_C=BLOCK_C, UPCAST=False)
    build(_score_kernel, constants, types, num_warps=4)
pointers = [name for name in _halve_kernel.arg_names if name.endswith("_ptr")]
types = dict.fromkeys(pointers, "*i32") | {"scores_ptr": "*fp32"}
for step, first, block in ((1, False, 256), (4, True, 1024), (1, True, 4096)):
    build(_halve_kernel, dict(STEP=step, FIRST=first, BLOCK=block), types,
          num_warps=select_warps(block))
"""


@pytest.mark.slow
@needs_triton
def test_compiles_ahead_of_time_for_hopper() -> None:
    built = [list(map(int, line)) for line in compiled(COMPILE)]
    assert len(built) == 6
    assert all(shared <= 227 * 1024 for shared, _ in built)
    assert all((products > 0) == (number < 2) for number, (_, products) in enumerate(built))


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("padding", [0, 700])
def test_long_inputs_on_the_device(dim: int, padding: int) -> None:
    """The kernels choose as float64 does but for tiles at the margin, and lose no more mass."""
    call = make(
        5000, 5300, kv=2, group=4, dim=dim, dtype=torch.bfloat16, top=[100, 200], hip=[1]
    )  # fmt: skip
    if padding:
        call["mask"] = left_padded(2, 5300, padding)
    exact = {n: x.double() if isinstance(x, Tensor) and n in "qkv" else x for n, x in call.items()}
    out, wide = torch.ops.fxopt.attention(*call.values()), attention_with_lse(*exact.values())[0]
    whole = attention_with_lse(*(exact | {"top": [0]}).values())[0]
    assert not out.isnan().any()
    assert (out.double() - whole).norm() < 1.02 * (wide - whole).norm() + 0.01 * whole.norm()
    assert (out.double() - wide).norm() < 0.3 * (wide - whole).norm() + 0.01 * whole.norm()
