"""The Triton kernels for gradients of attention, interpreted, compiled for sm_90, on a GPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fxopt.kernels.attention import op
from fxopt.kernels.attention.blocks import TileLists, lists_from_map
from fxopt.kernels.attention.reference import gradients
from fxopt.kernels.attention.spec import Attention, bind
from tests.crossed import crossed
from tests.kernels.ahead_of_time import compiled
from tests.kernels.window_lists import lists_of_window

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = {"BLOCK_M": 32, "BLOCK_N": 32, "num_warps": 4, "num_stages": 1, "TMA": 0}


def make(
    queries: int, keys: int, dim: int = 16, value_dim: int | None = None, kv: int = 2,
    group: int = 2, batch: int = 2, dtype: torch.dtype = torch.float32, **options: Any,
) -> Attention:  # fmt: skip
    sizes = ((queries, kv * group, dim), (keys, kv, dim), (keys, kv, value_dim or dim))
    q, k, v = (
        torch.randn(batch, n, h, d, device=DEVICE).to(dtype).transpose(1, 2) for n, h, d in sizes
    )
    given: dict[str, Any] = {
        "mask": None, "bias": None, "sinks": None, "scale": dim**-0.5, "causal": True,
        "window": [0], "softcap": 0.0, "sink_tokens": [0], "top": [0],
    }  # fmt: skip
    if options.pop("masked", False):
        options["mask"] = torch.rand(batch, keys, device=DEVICE) > 0.2
        options["mask"][0, : keys // 2] = False
    if options.pop("logits", False):
        options["sinks"] = torch.randn(kv * group, device=DEVICE)
    assert options.keys() <= given.keys()
    return bind(q, k, v, **given | options)


def wide(call: Attention) -> Attention:
    sinks = None if call.sinks is None else call.sinks.double()
    return replace(call, q=call.q.double(), k=call.k.double(), v=call.v.double(), sinks=sinks)


def kernel(
    gradient: Tensor, call: Attention, lists: TileLists | None = None, **sizes: int
) -> dict[str, Tensor]:
    from fxopt.kernels.attention.triton import attention_forward
    from fxopt.kernels.attention_backward.triton import attention_gradients

    out, lse = attention_forward(call, lists)
    chosen = SMALL | sizes
    given = (chosen, chosen) if DEVICE == "cpu" else None
    return attention_gradients(gradient, out, lse, call, lists, given)


def check(actual: dict[str, Tensor], plain: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
    """Within a small multiple of the same dtype's own rounding."""
    assert actual.keys() == exact.keys()
    for name, found in actual.items():
        assert found.is_contiguous()
        assert found.dtype == plain[name].dtype
        own = (plain[name].double() - exact[name]).abs().max()
        if name == "sinks":  # in float32, but of the output as it was rounded
            own += torch.finfo(actual["q"].dtype).eps * exact[name].abs().max()
        error = (found.double() - exact[name]).abs().max()
        assert error <= 8 * own + 1e-6, name


def against_reference(call: Attention, **sizes: int) -> None:
    gradient = torch.randn_like(call.q[..., :1]).transpose(1, 2)
    gradient = torch.randn(*gradient.shape[:3], call.v.shape[3], device=DEVICE).to(call.q.dtype)
    exact, plain = gradients(gradient.double(), wide(call)), gradients(gradient, call)
    check(kernel(gradient, call, **sizes), plain, exact)


@pytest.mark.parametrize(
    ("options", "masked"),
    crossed(
        [
            {"window": [9], "sink_tokens": [3], "logits": True},
            {},
            {"causal": False, "softcap": 2.0},
            {"causal": False, "window": [9]},
            {"causal": False, "window": [9], "sink_tokens": [20]},
            {"window": [0, 20], "sink_tokens": [5, 2], "softcap": 2.0},
        ],
        [False, True],
    ),
)
def test_masks(options: dict[str, Any], masked: bool) -> None:
    sizes = {"batch": 2, "group": 1} if masked else {"batch": 1}
    against_reference(make(69, 69, masked=masked, **sizes, **options))


@pytest.mark.parametrize(
    ("queries", "keys", "options"),
    [
        (1, 63, {"kv": 1, "group": 4}),
        (40, 101, {"window": [30], "sink_tokens": [4], "group": 1}),
        (33, 101, {"dim": 80, "value_dim": 48, "kv": 1, "group": 3, "logits": True}),
        (63, 63, {"dim": 64, "scale": -0.2, "softcap": 3.0, "batch": 1}),
        (101, 40, {"causal": False, "batch": 1}),
    ],
)
def test_shapes(queries: int, keys: int, options: dict[str, Any]) -> None:
    against_reference(make(queries, keys, **options))


def test_some_heads_of_a_call() -> None:
    """What the op hands over where a library computes the other heads: views."""
    call = make(69, 69, window=[0, 20])
    gradient = torch.randn_like(call.q).transpose(1, 2)
    from fxopt.kernels.attention.triton import attention_forward
    from fxopt.kernels.attention_backward.triton import attention_gradients

    whole, lse = attention_forward(call)
    sizes = (SMALL, SMALL) if DEVICE == "cpu" else None
    parts = attention_gradients(
        gradient[:, :, 2:], whole[:, :, 2:], lse[:, 2:], call.heads([1]), None, sizes
    )
    for name, found in kernel(gradient, call).items():
        torch.testing.assert_close(parts[name], found[:, 2 if name == "q" else 1 :])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision(dtype: torch.dtype) -> None:
    against_reference(make(63, 63, 64, dtype=dtype, window=[20], sink_tokens=[2]))


def test_through_tensor_descriptors() -> None:
    against_reference(make(63, 70, 80, 48, kv=1, window=[20], sink_tokens=[2]), TMA=1)


def draw(call: Attention, heads: int, query_tile: int, key_tile: int) -> tuple[TileLists, Tensor]:
    """Lists with rows and columns of tiles that nobody visits, and what they let through."""
    batch, queries, keys = call.q.shape[0], call.q.shape[2], call.k.shape[2]
    shape = batch, heads, -(-queries // query_tile), -(-keys // key_tile)
    visited = torch.rand(shape, device=DEVICE) < 0.6
    visited[0, 0, -1], visited[-1, -1, 0], visited[:, 0, :, 1] = True, False, False
    lists = lists_from_map(visited, queries, keys, call.causal, query_tile, key_tile)
    seen = visited.repeat_interleave(query_tile, 2).repeat_interleave(key_tile, 3)
    seen = seen[:, :, :queries, :keys].repeat_interleave(call.q.shape[1] // heads, 1)
    if call.causal:
        seen = seen & torch.ones(queries, keys, device=DEVICE).tril(keys - queries).bool()
    return lists, seen


def formula(gradient: Tensor, call: Attention, seen: Tensor) -> dict[str, Tensor]:
    """By autograd, from a mask of all pairs."""
    q, k, v = (t.detach().requires_grad_() for t in (call.q, call.k, call.v))
    scores = q @ k.repeat_interleave(call.group_size, 1).mT * call.scale
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1).masked_fill(~seen, 0.0)
    out = (weights @ v.repeat_interleave(call.group_size, 1)).transpose(1, 2)
    return dict(zip("qkv", torch.autograd.grad(out, (q, k, v), gradient), strict=True))


@pytest.mark.parametrize(
    ("options", "heads", "query_tile", "key_tile"),
    [
        ({"queries": 101, "keys": 101, "group": 1}, 2, 32, 32),
        ({"queries": 63, "keys": 130, "kv": 1, "group": 3, "dim": 64}, 1, 16, 64),
        ({"queries": 65, "keys": 130, "batch": 1, "causal": False}, 2, 64, 64),
    ],
)
def test_lists(options: dict[str, Any], heads: int, query_tile: int, key_tile: int) -> None:
    call = make(**options)
    lists, seen = draw(call, heads, query_tile, key_tile)
    gradient = torch.randn_like(call.q).transpose(1, 2)
    actual = kernel(gradient, call, lists)
    exact = formula(gradient.double(), wide(call), seen)
    check(actual, formula(gradient, call, seen), exact)


def test_lists_are_turned_around(monkeypatch: pytest.MonkeyPatch) -> None:
    from fxopt.kernels.turned_lists import triton

    monkeypatch.setattr(triton, "TURNED_AT_ONCE", 3)
    call = make(200, 333)
    lists, _ = draw(call, 4, 16, 32)
    turned = triton.turned(lists, 333)
    found = [turned.begin.flatten(), turned.end.flatten()]
    for line, (begin, end) in enumerate(zip(*(x.tolist() for x in found), strict=True)):
        head, key_tile = divmod(line, 11)
        expected: list[int] = []
        for query_tile in range(13):
            for hidden, (count, listed) in enumerate(
                ((lists.full_count, lists.full), (lists.partial_count, lists.partial))
            ):
                here = count.flatten(0, 1)[head, query_tile], listed.flatten(0, 1)[head, query_tile]
                if key_tile in here[1][: here[0]]:
                    expected.append(2 * query_tile + hidden)
        assert turned.visitor[begin:end].tolist() == expected


def test_lists_of_a_wide_window_need_no_square() -> None:
    from fxopt.kernels.turned_lists.triton import turned

    tiles = 2**9
    lists = lists_of_window(128 * tiles, 128 * tiles, [512], [64], True, 128, 128, DEVICE)
    found = turned(lists, 128 * tiles)
    counts = (found.end - found.begin)[0]
    assert found.visitor.numel() < 12 * tiles
    assert int(counts[0]) == tiles
    assert int(counts[1:].max()) == 5


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from fxopt.kernels.attention_backward import triton as module

TYPES = dict(lse_ptr="*fp32", delta_ptr="*fp32", scale="fp32", softcap="fp32") | dict.fromkeys(
    ("rank_ptr", "window_ptr", "span_ptr", "partial_count_ptr", "partial_ptr", "full_count_ptr",
     "full_ptr", "begin_ptr", "end_ptr", "visitor_ptr"), "*i32")
FLAGS = ("HAS_MASK", "HAS_WINDOW", "HAS_SOFTCAP")

def build(dtype, dim, flags, lists, hopper, causal=True, ones=()):
    chosen = module.sizes_for(dim, dim, 4 if dtype == "fp32" else 2, hopper)
    for kernel, sizes in zip((module._query_gradient, module._key_gradients), chosen):
        options = {name: sizes.pop(name) for name in ("num_warps", "num_stages")}
        constants = dict(CAUSAL=causal, DIM=dim, VALUE_DIM=dim, BLOCK_D=dim, BLOCK_V=dim,
                         UPCAST=False, q_d=1, k_d=1, v_d=1, EVEN=False, LIST_M=128 * lists,
                         LIST_N=128 * lists, **{name: name in flags for name in FLAGS}, **sizes,
                         **{name: 1 for name in ones if name in kernel.arg_names})
        signature = {
            name: "constexpr" if name in constants
            else TYPES.get(name, "*" + dtype if name.endswith("_ptr") else "i32")
            for name in kernel.arg_names
        }
        if sizes["TMA"]:
            queries = kernel is module._key_gradients
            block = sizes["BLOCK_M" if queries else "BLOCK_N"]
            rows = f"tensordesc<{dtype}[1, 1, {block}, {dim}]>"
            signature |= dict.fromkeys(("q_ptr", "grad_ptr") if queries else ("k_ptr", "v_ptr"),
                                       rows)
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
        built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        print(dtype, dim, built.metadata.shared, built.asm["ptx"].count("wgmma.mma_async"))

build("bf16", 64, FLAGS, 0, True)
build("bf16", 128, ("HAS_WINDOW",), 0, True)
build("bf16", 128, (), 1, True)
build("bf16", 256, (), 1, True)
build("fp32", 64, FLAGS, 1, False)
# What is 1 in a call is a constant of its kernel.
build("bf16", 64, FLAGS, 0, True, False, ("queries", "batches", "num_heads", "num_kv_heads"))
build("bf16", 64, (), 1, True, False, ("list_group", "list_tiles", "list_h", "full_max"))
"""


TURN = """
from fxopt.kernels.turned_lists.triton import _turn

for write in (False, True):
    constants = dict(WRITE=write, CHUNK=64, BLOCK=128)
    signature = {name: "constexpr" if name in constants else "*i32" if name.endswith("_ptr")
                 else "i32" for name in _turn.arg_names}
    source = ASTSource(fn=_turn, signature=signature, constexprs=constants)
    triton.compile(source, target=GPUTarget("cuda", 90, 32), options=dict(num_warps=4))
"""


@pytest.mark.slow
def test_compiles_ahead_of_time_for_hopper() -> None:
    built = compiled(COMPILE + TURN)
    assert len(built) == 14
    assert all(int(shared) <= 227 * 1024 for *_, shared, _ in built)
    assert all((int(products) > 0) == (dtype == "bf16") for dtype, *_, products in built)


@pytest.mark.parametrize(
    "options",
    [
        {"window": [0, 20], "sink_tokens": [0, 3], "logits": True},
        pytest.param(
            {"top": [100], "kv": 1, "group": 1, "batch": 1, "queries": 300, "keys": 1250},
            marks=pytest.mark.slow,
        ),
        {"window": [20], "queries": 40},
        {},
    ],
)
def test_the_op(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads of one call go different ways; autograd reaches the kernels through the op."""
    monkeypatch.setattr(op, "_has_kernel", lambda q: q.dtype != torch.float64)
    call = make(**({"queries": 63, "keys": 63} | options))
    arguments = [call.mask, None, call.sinks, call.scale, call.causal, list(call.window), 0.0,
                 list(call.sink_tokens), list(call.top)]  # fmt: skip
    leaves = [t.detach().requires_grad_() for t in (call.q, call.k, call.v)]
    out = torch.ops.fxopt.attention(*leaves, *arguments)
    gradient = torch.randn_like(out)
    found = torch.autograd.grad(out, leaves, gradient)
    exact, plain = gradients(gradient.double(), wide(call)), gradients(gradient, call)
    for name in {*exact} - set("qkv"):
        exact.pop(name)
    check(dict(zip("qkv", found, strict=True)), plain, exact)


def test_gradients_of_sink_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op, "_has_kernel", lambda q: q.dtype != torch.float64)
    call = make(63, 63, kv=1, logits=True)
    assert call.sinks is not None
    sinks = call.sinks.detach().requires_grad_()
    out = torch.ops.fxopt.attention(
        call.q, call.k, call.v, None, None, sinks, call.scale, True, [9], 0.0, [2]
    )
    gradient = torch.randn_like(out)
    (found,) = torch.autograd.grad(out, sinks, gradient)
    expected = gradients(gradient.double(), replace(wide(call), window=(9,), sink_tokens=(2,)))
    torch.testing.assert_close(found.double(), expected["sinks"], rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize(
    "options",
    [
        {"masked": True, "window": [300], "sink_tokens": [16]},
        {"window": [0, 100], "softcap": 20.0},
        {"window": [200], "causal": False, "logits": True},
    ],
)
def test_long_inputs_on_the_device(dim: int, options: dict[str, Any]) -> None:
    against_reference(make(1500, 1500, dim, dtype=torch.bfloat16, **options))
    against_reference(make(701, 1501, dim, dtype=torch.bfloat16, **options))


@pytest.mark.gpu
def test_half_precision_on_the_device() -> None:
    against_reference(make(1500, 1500, 128, dtype=torch.float16, window=[300]))


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [64, 80, 128, 256])
@pytest.mark.parametrize("key_tile", [64, 128])
def test_lists_on_the_device(dim: int, key_tile: int) -> None:
    call = make(1500, 1700, dim, dtype=torch.bfloat16)
    lists, seen = draw(call, 4, 128, key_tile)
    gradient = torch.randn_like(call.q).transpose(1, 2)
    actual = kernel(gradient, call, lists)
    check(actual, formula(gradient, call, seen), formula(gradient.double(), wide(call), seen))
    for _ in range(3):
        assert all(actual[n].equal(x) for n, x in kernel(gradient, call, lists).items())


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{"window": [300], "sink_tokens": [4]}, {"window": [0, 100]}])
def test_the_op_on_the_device(options: dict[str, Any]) -> None:
    call = make(3000, 3000, 128, dtype=torch.bfloat16, **options)
    gradient = torch.randn_like(call.q).transpose(1, 2)
    exact, plain = gradients(gradient.double(), wide(call)), gradients(gradient, call)
    for by_compiler in (False, True):
        check(through_the_op(gradient, call, by_compiler), plain, exact)


@pytest.mark.gpu
def test_kept_tiles_on_the_device() -> None:
    from fxopt.kernels.block_topk.triton import kept_lists

    call = make(3000, 3000, 128, dtype=torch.bfloat16, top=[0, 150])
    gradient = torch.randn_like(call.q).transpose(1, 2)
    lists = kept_lists(call.heads([1]))
    kept = torch.zeros(2, 2, 24, 25, dtype=torch.bool, device=DEVICE)
    for count, tiles in (lists.tensors()[:2], lists.tensors()[2:]):
        room = torch.arange(tiles.shape[3], device=DEVICE) < count[..., None]
        kept.scatter_(3, tiles.long().where(room, 24), True)
    kept = torch.cat([torch.ones_like(kept), kept], 1)[..., :24]
    seen = kept.repeat_interleave(128, 2).repeat_interleave(128, 3)[:, :, :3000, :3000].tril()
    exact, plain = formula(gradient.double(), wide(call), seen), formula(gradient, call, seen)
    check(through_the_op(gradient, call, False), plain, exact)


def through_the_op(gradient: Tensor, call: Attention, compiled: bool) -> dict[str, Tensor]:
    arguments = (None, None, None, call.scale, True, list(call.window), call.softcap,
                 list(call.sink_tokens), list(call.top))  # fmt: skip
    leaves = [t.detach().requires_grad_() for t in (call.q, call.k, call.v)]

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.ops.fxopt.attention(q, k, v, *arguments)

    run = torch.compile(function, fullgraph=True) if compiled else function
    return dict(zip("qkv", torch.autograd.grad(run(*leaves), leaves, gradient), strict=True))


def test_the_op_keeps_its_promises_to_tracers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op, "_has_kernel", lambda q: q.dtype != torch.float64)
    call = make(19, 23, kv=1, batch=1, logits=True)
    q, k, v, sinks = (
        t.detach().requires_grad_() for t in (call.q, call.k, call.v, call.sinks) if t is not None
    )
    options = (0.25, True, [9], 0.0, [2])
    torch.library.opcheck(torch.ops.fxopt.attention.default, (q, k, v, None, None, sinks, *options))
    plain = (*(t.detach() for t in (q, k, v)), None, None, sinks.detach(), *options)
    torch.library.opcheck(torch.ops.fxopt.attention_with_lse.default, plain)
    saved = torch.ops.fxopt.attention_with_lse(*plain)
    torch.library.opcheck(
        torch.ops.fxopt.attention_backward.default, (torch.randn_like(saved[0]), *saved, *plain)
    )
