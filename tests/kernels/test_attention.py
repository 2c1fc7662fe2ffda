"""The attention op against its definition, its gradients, its tracers and ONNX."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fxopt.kernels.attention.op  # noqa: F401 (registers the op)
from fxopt.ir.ops import attend
from fxopt.kernels.attention import (
    REFERENCE,
    attention_reference,
    attention_with_lse,
    tiles,
)

NAMES = (
    "q", "k", "v", "mask", "bias", "sinks", "scale", "causal", "window", "softcap", "sink_tokens",
)  # fmt: skip


def definition(call: dict[str, Any]) -> Tensor:
    """Row by row in float64, with Python lists of visible keys."""
    q, k, v = (call[name].double() for name in "qkv")
    batch, heads, queries, _ = q.shape
    kv, keys = k.shape[1:3]
    out = torch.zeros(batch, queries, heads, v.shape[3], dtype=torch.float64)
    for b in range(batch):
        unmasked = [j for j in range(keys) if call["mask"] is None or call["mask"][b, j]]
        for h in range(heads):
            g = h // (heads // kv)
            window = call["window"][g % len(call["window"])]
            first = unmasked[: call["sink_tokens"][g % len(call["sink_tokens"])]]
            for i in range(queries):
                position = i + keys - queries
                seen = [
                    j
                    for j in unmasked
                    if (not call["causal"] or j <= position)
                    and (not window or abs(position - j) < window or j in first)
                ]
                scores = (k[b, g, seen] @ q[b, h, i]) * call["scale"]
                if call["softcap"]:
                    scores = call["softcap"] * torch.tanh(scores / call["softcap"])
                if call["bias"] is not None:
                    full = call["bias"].double().expand(batch, heads, queries, keys)
                    scores = scores + full[b, h, i, seen]
                if call["sinks"] is not None:
                    scores = torch.cat([scores, call["sinks"][h : h + 1].double()])
                out[b, i, h] = scores.softmax(0)[: len(seen)] @ v[b, g, seen]
    return out


def make(
    batch: int = 2,
    kv: int = 2,
    group: int = 2,
    queries: int = 7,
    keys: int = 7,
    dim: int = 8,
    value_dim: int = 8,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> dict[str, Any]:
    call: dict[str, Any] = {
        "q": torch.randn(batch, queries, kv * group, dim, dtype=dtype).transpose(1, 2),
        "k": torch.randn(batch, kv, keys, dim, dtype=dtype),
        "v": torch.randn(batch, keys, kv, value_dim, dtype=dtype).transpose(1, 2),
        "mask": None, "bias": None, "sinks": None, "scale": dim**-0.5, "causal": True,
        "window": [0], "softcap": 0.0, "sink_tokens": [0],
    }  # fmt: skip
    assert options.keys() <= call.keys()
    return call | options


def draw(number: int) -> dict[str, Any]:
    pick = random.Random(number).choice
    kv, group, keys, batch = pick([1, 2, 3]), pick([1, 3]), pick([1, 7, 33]), pick([1, 2])
    queries = pick([1, keys, keys // 2 + 1])
    return make(
        batch, kv, group, queries, keys, pick([4, 10]), pick([4, 6]),
        mask=pick([None, (torch.rand(batch, keys) > 0.4).long()]),
        bias=pick([None, torch.randn(1, kv * group, 1, keys),
                   torch.randn(batch, 1, queries, keys)]),
        sinks=pick([None, torch.randn(kv * group)]),
        causal=pick([True, False]),
        window=pick([[0], [3], [pick([0, 2, 5]) for _ in range(kv)]]),
        softcap=pick([0.0, 2.0]),
        sink_tokens=pick([[0], [2], [pick([0, 1, 4]) for _ in range(kv)]]),
    )  # fmt: skip


def op(call: dict[str, Any]) -> Tensor:
    return torch.ops.fxopt.attention(*call.values())


@pytest.mark.parametrize("number", range(40))
def test_all_spellings_follow_the_definition(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    call = draw(number)
    expected = definition(call)
    # Small tiles, so that short inputs have several.
    monkeypatch.setattr(tiles, "TILE_ELEMENTS", random.Random(number).choice([1, 200, 2**22]))
    for spelling in (op(call), REFERENCE(*call.values()), attention_with_lse(*call.values())[0]):
        torch.testing.assert_close(spelling.double(), expected, rtol=1e-5, atol=1e-5)
        assert spelling.is_contiguous()


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("length", [63, 500])
def test_long_windows_cross_tiles(length: int, causal: bool) -> None:
    mask = torch.ones(2, length)
    mask[0, :17] = 0
    call = make(2, 2, 1, length, length, mask=mask, causal=causal, window=[0, 40], sink_tokens=[3])
    position = torch.arange(length)
    distance = position[:, None] - position
    rank = mask.cumsum(1).masked_fill(mask == 0, length)[:, None, None, :]
    near = torch.stack([torch.ones_like(distance, dtype=torch.bool), distance.abs() < 40])
    seen = (near | (rank <= 3)) & (mask[:, None, None, :] != 0)
    seen = seen & (distance >= 0) if causal else seen
    q, k, v = (call[name].double() for name in "qkv")
    expected = F.scaled_dot_product_attention(q, k, v, seen).transpose(1, 2)
    torch.testing.assert_close(op(call).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "options", [{}, {"causal": False}, {"softcap": 5.0}, {"window": [20], "sink_tokens": [2]}]
)
def test_rounding_is_that_of_the_library(dtype: torch.dtype, options: dict[str, Any]) -> None:
    call = make(2, 2, 2, 63, 63, 64, 64, dtype=dtype, **options)
    exact = {n: x.double() if isinstance(x, Tensor) else x for n, x in call.items()}
    q, k, v = (call[name] for name in "qkv")
    library = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    library64 = F.scaled_dot_product_attention(
        q.double(), k.double(), v.double(), is_causal=True, enable_gqa=True
    )
    own = (library.double() - library64).abs().max()
    error = (op(call).double() - op(exact)).abs().max()
    assert error <= 2 * own


def test_plain_calls_equal_the_library_to_the_bit() -> None:
    call = make(2, 2, 3, 63, 63, 16, 16)
    q, k, v = (call[name] for name in "qkv")
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    assert torch.equal(op(call), expected.transpose(1, 2))
    assert torch.equal(op(call | {"mask": torch.ones(2, 63)}), expected.transpose(1, 2))
    assert torch.equal(op(call | {"window": [63]}), expected.transpose(1, 2))


def test_rows_that_see_nothing_are_zero() -> None:
    mask = torch.ones(2, 9)
    mask[0, :4], mask[1] = 0, 0
    for options in ({}, {"softcap": 2.0}, {"sinks": torch.randn(4)}, {"window": [2]}):
        call = make(queries=9, keys=9, mask=mask, **options)
        for out in (op(call), REFERENCE(*call.values())):
            assert not out.isnan().any()
            assert (out[0, :4] == 0).all()
            assert (out[1] == 0).all()
            assert (out[0, 4:] != 0).any()


@pytest.mark.parametrize("shape", [{"batch": 0}, {"queries": 0}, {"keys": 0, "queries": 0}])
def test_empty_inputs(shape: dict[str, int]) -> None:
    call = make(**shape, causal=False)
    assert op(call).shape == (call["q"].shape[0], call["q"].shape[2], 4, 8)
    no_keys = make(queries=3, keys=0, causal=False)
    assert (op(no_keys) == 0).all()
    assert (attention_with_lse(*no_keys.values())[1] == -torch.inf).all()


@pytest.mark.parametrize(
    "options",
    [
        {"top": (100,)},
        {"top": (100,), "hip": (1,)},
        {"top": (400,), "mass": (900,)},
        {"top": (100,), "delta": (500,)},
        {"skip": (300,)},
    ],
)
def test_a_batch_of_no_rows(options: dict[str, Sequence[int]]) -> None:
    q = torch.randn(0, 4, 700, 16, requires_grad=True)
    k, v = torch.randn(2, 0, 2, 1500, 16)
    for mask in (None, torch.ones(0, 1500, dtype=torch.int64)):
        out = attend(q, k, v, mask, scale=0.3, causal=True, **options)
        assert out.shape == (0, 700, 4, 16)
        out.sum().backward()


def test_dropped_mass_times_distance_of_means_is_the_error() -> None:
    call = make(2, 2, 2, 65, 65, 16, 16, dtype=torch.float64)
    whole, lse = attention_with_lse(*call.values())
    kept, lse_kept = attention_with_lse(*(call | {"window": [9], "sink_tokens": [2]}).values())
    dropped = -torch.expm1(lse_kept - lse).transpose(1, 2)[..., None]
    bias = torch.zeros(1, 1, 65, 65, dtype=torch.float64)
    distance = torch.arange(65)[:, None] - torch.arange(65)
    bias[0, 0, (distance < 9) | (torch.arange(65) < 2)] = -torch.inf
    tail, lse_tail = attention_with_lse(*(call | {"bias": bias}).values())
    torch.testing.assert_close(whole - kept, dropped * (tail - kept), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(torch.logaddexp(lse_kept, lse_tail), lse, rtol=1e-12, atol=1e-12)
    assert dropped[:, -1].min() > 0.1


def test_lse_counts_sinks_and_keeps_float32() -> None:
    call = make(dtype=torch.bfloat16, sinks=torch.randn(4))
    q, k = call["q"].double(), call["k"].double().repeat_interleave(2, 1)
    scores = (q @ k.mT * call["scale"]).masked_fill(~torch.ones(7, 7).tril().bool(), -torch.inf)
    extra = call["sinks"].double()[None, :, None, None].expand(2, 4, 7, 1)
    expected = torch.cat([scores, extra], -1).logsumexp(-1)
    lse = attention_with_lse(*call.values())[1]
    assert lse.dtype == torch.float32
    torch.testing.assert_close(lse.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"window": [1, 2, 3]}, "window has 3 entries; give 1 or 2"),
        ({"sink_tokens": []}, "sink_tokens has 0 entries"),
        ({"q": torch.randn(2, 5, 7, 8)}, "5 query heads do not share 2 KV heads"),
    ],
)
def test_misfits_are_named(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attention_reference(*(make() | wrong).values())


GRADIENT_CASES: list[dict[str, Any]] = [
    {},
    {"causal": False, "bias": True},
    {"window": [0, 2], "sink_tokens": [1], "mask": True},
    {"softcap": 2.0, "sinks": True},
    {"queries": 3, "window": [2], "sinks": True, "bias": True, "mask": True},
    {"queries": 1},
]


def differentiable(options: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """A call whose floating inputs want gradients."""
    options = dict(options)
    if options.get("mask"):
        options["mask"] = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    if options.get("bias"):
        options["bias"] = torch.randn(1, 4, 1, 6, dtype=dtype)
    if options.get("sinks"):
        options["sinks"] = torch.randn(4, dtype=dtype)
    call = make(keys=6, queries=options.pop("queries", 6), dtype=dtype, **options)
    return {
        name: value.detach().requires_grad_()
        if isinstance(value, Tensor) and value.is_floating_point()
        else value
        for name, value in call.items()
    }


@pytest.mark.parametrize("options", GRADIENT_CASES)
def test_gradients(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "TILE_ELEMENTS", 100)
    call = differentiable(options, torch.float64)
    names = [name for name, value in call.items() if isinstance(value, Tensor) and name != "mask"]

    def function(*tensors: Tensor) -> Tensor:
        return op(call | dict(zip(names, tensors, strict=True)))

    assert torch.autograd.gradcheck(function, [call[name] for name in names], fast_mode=True)


@pytest.mark.parametrize("options", GRADIENT_CASES)
def test_opcheck(options: dict[str, Any]) -> None:
    call = differentiable(options, torch.float32)
    torch.library.opcheck(torch.ops.fxopt.attention.default, tuple(call.values()))


def test_inductor() -> None:
    call = make(queries=9, keys=9, mask=torch.ones(2, 9), window=[0, 3], sink_tokens=[1])
    q = call["q"].detach().requires_grad_()

    def function(q: Tensor) -> Tensor:
        return op(call | {"q": q * 2}).flatten(2) + 1

    compiled = torch.compile(function, fullgraph=True)
    torch.testing.assert_close(compiled(q), function(q))
    (expected,) = torch.autograd.grad(function(q).square().sum(), q)
    (actual,) = torch.autograd.grad(compiled(q).square().sum(), q)
    torch.testing.assert_close(actual, expected)


def key_bias(k: Tensor) -> Tensor:
    return k.mean((1, 3))[:, None, None]


class Module(torch.nn.Module):
    def __init__(self, options: dict[str, Any]) -> None:
        super().__init__()
        self.options = options

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        call = {"q": q, "k": k, "v": v, "mask": mask} | self.options
        if call["bias"] == "keys":
            call["bias"] = key_bias(k)
        return REFERENCE(*(call[name] for name in NAMES))


@pytest.mark.parametrize(
    ("options", "masked"),
    [
        ({}, False),
        ({"window": [0, 4], "sink_tokens": [0, 2]}, True),
        ({"causal": False, "softcap": 3.0, "sinks": torch.randn(4), "bias": "keys"}, True),
    ],
)
def test_onnx(options: dict[str, Any], masked: bool) -> None:
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    call = make(2, 2, 2, 5, 9, 8, 6, **options)
    call["mask"] = torch.ones(2, 9, dtype=torch.int64) if masked else None
    module = Module({name: call[name] for name in NAMES[4:]}).eval()
    dynamic, names = torch.export.Dim.DYNAMIC, NAMES[: 4 if masked else 3]
    program = torch.onnx.export(
        module,
        tuple(call[name] for name in NAMES[:4]),
        dynamo=True,
        opset_version=23,
        dynamic_shapes=(
            {0: dynamic, 2: dynamic}, {0: dynamic, 2: dynamic}, {0: dynamic, 2: dynamic},
            {0: dynamic, 1: dynamic} if masked else None,
        ),
        verbose=False,
    )  # fmt: skip
    assert program is not None
    assert {node.domain for node in program.model.graph.all_nodes()} <= {""}
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    for batch, queries, keys in ((2, 5, 9), (3, 13, 13), (1, 1, 6)):
        call = make(batch, 2, 2, queries, keys, 8, 6, **options)
        if masked:
            call["mask"] = (torch.rand(batch, keys) > 0.3).long()
        inputs = {
            i.name: call[name].contiguous().numpy()
            for i, name in zip(session.get_inputs(), names, strict=True)
        }
        (out,) = session.run(None, inputs)
        if call["bias"] == "keys":
            call["bias"] = key_bias(call["k"])
        torch.testing.assert_close(torch.from_numpy(out), op(call), rtol=1e-5, atol=1e-5)


def test_a_second_derivative_is_refused() -> None:
    q, k, v = (torch.randn(1, 2, 5, 8, requires_grad=True) for _ in range(3))
    out = torch.ops.fxopt.attention(q, k, v, None, None, None, 0.3, True, [0], 0.0, [0])
    with pytest.raises(NotImplementedError, match="no second derivative"):
        torch.autograd.grad(out.square().sum(), q, create_graph=True)
