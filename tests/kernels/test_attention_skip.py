"""Attention that leaves out tiles whose scores cannot matter: the op, its spellings, the kernel."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxopt.kernels._triton import AVAILABLE
from fxopt.kernels.attention import REFERENCE, attention_with_lse, op
from fxopt.kernels.attention.op import attention_cuda
from fxopt.kernels.attention.spec import bind
from fxopt.kernels.kv_attention import allocate, cached_attention, decoded_attention, parse
from tests.kernels.ahead_of_time import compiled
from tests.kernels.attention_file import INPUTS, AttentionFile

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_triton = pytest.mark.skipif(not AVAILABLE, reason="needs triton")
QUERIES, KEYS = 128, 64
NEVER = 10**6
"""Hundredths of a nat that no scores lie apart."""


def make(
    queries: int, keys: int, kv: int = 2, group: int = 2, batch: int = 2, dim: int = 16,
    dtype: torch.dtype = torch.float32, padding: int = 0, sinks: bool = False, **options: Any,
) -> dict[str, Any]:  # fmt: skip
    """Queries want one of four topics, of which a stretch of 64 keys has one."""
    q, k, v = (
        torch.randn(batch, n, h, dim, device=DEVICE)
        for n, h in ((queries, kv * group), (keys, kv), (keys, kv))
    )
    topics = torch.randint(0, 4, (batch, -(-keys // KEYS), kv), device=DEVICE)
    k[..., :4] = 4.0 * torch.eye(4, device=DEVICE)[topics].repeat_interleave(KEYS, 1)[:, :keys]
    q[..., :4] = torch.tensor([0.0, 9.0, 3.0, 6.0], device=DEVICE)
    q, k, v = (x.to(dtype).transpose(1, 2) for x in (q, k, v))
    call: dict[str, Any] = {
        "q": q, "k": k, "v": v, "mask": None, "bias": None, "sinks": None,
        "scale": dim**-0.5, "causal": True, "window": [0], "softcap": 0.0, "sink_tokens": [0],
        "top": [0], "delta": [0], "grid": [], "near": [0], "dilation": [1], "hip": [0],
        "mass": [0], "skip": [100],
    }  # fmt: skip
    if padding:
        call["mask"] = torch.ones(batch, keys, dtype=torch.int64, device=DEVICE)
        call["mask"][0, :padding] = 0
    if sinks:
        call["sinks"] = torch.randn(kv * group, device=DEVICE)
    assert options.keys() <= call.keys()
    return call | options


def attend(call: dict[str, Any], **options: Any) -> Tensor:
    return torch.ops.fxopt.attention(*(call | options).values())


def per_head(values: list[int], heads: int) -> list[int]:
    return values * (heads // len(values))


def masked(call: dict[str, Any]) -> Tensor:
    """Scores [B, H, N, T] in float64, -inf where a key is hidden by anything but its tile."""
    q, k = call["q"].double(), call["k"].double()
    (_, heads, queries, _), (kv, keys) = q.shape, k.shape[1:3]
    scores = q @ k.repeat_interleave(heads // kv, 1).mT * call["scale"]
    if call["softcap"]:
        scores = call["softcap"] * torch.tanh(scores / call["softcap"])
    distance = torch.arange(queries)[:, None] + keys - queries - torch.arange(keys)
    shown = torch.ones(q.shape[0], keys) if call["mask"] is None else call["mask"].cpu()
    rank = shown.cumsum(1)
    for head in range(heads):
        window, first = (
            per_head(call[name], kv)[head // (heads // kv)] for name in ("window", "sink_tokens")
        )
        for b in range(q.shape[0]):
            seen = (distance >= 0) & (shown[b] != 0)
            if window:
                seen &= (distance < window) | (rank[b] <= first)
            scores[b, head].masked_fill_(~seen.to(scores.device), -torch.inf)
    return scores


def left_out(call: dict[str, Any], scores: Tensor) -> Tensor:
    """bool [B, H, query tiles, key tiles], one tile after the other, from the words of the docs."""
    (batch, heads, queries, keys), kv = scores.shape, call["k"].shape[1]
    out = torch.zeros(batch, heads, -(-queries // QUERIES), -(-keys // KEYS), dtype=torch.bool)
    if queries <= 256:
        return out
    shown = torch.ones(batch, keys) if call["mask"] is None else call["mask"].cpu()
    for b in range(batch):
        places = shown[b].nonzero()
        # Padding with holes in it: all tiles are seen in part.
        low, high = int(places[0]), int(places[-1]) + 1
        low = low if high - low == len(places) else high
        for h in range(heads):
            limit = per_head(call["skip"], heads)[h] / 100
            window = per_head(call["window"], kv)[h // (heads // kv)]
            for tile in range(out.shape[2]):
                rows = scores[b, h, tile * QUERIES : tile * QUERIES + QUERIES].cpu()
                first = tile * QUERIES + keys - queries
                begin = max(low, first + len(rows) - window) if window else low
                end = min(high, first + 1)
                whole = [
                    t for t in range(out.shape[3])
                    if begin <= t * KEYS and t * KEYS + KEYS <= end
                ]  # fmt: skip
                parts = [rows[:, t * KEYS : t * KEYS + KEYS].amax(1) for t in range(out.shape[3])]
                highest = torch.full((len(rows),), -torch.inf, dtype=torch.float64)
                if call["sinks"] is not None:
                    highest[:] = call["sinks"][h].item()
                for t in set(range(out.shape[3])) - set(whole):
                    highest = highest.maximum(parts[t])
                for t in whole:
                    far = bool((parts[t] < highest - limit).all())
                    out[b, h, tile, t] = limit > 0 and far and t != whole[0]
                    highest = highest.maximum(parts[t])
    return out


def definition(call: dict[str, Any]) -> tuple[Tensor, Tensor, float]:
    """Output, log-sum-exp, and the part of the key tiles before the queries that is left out."""
    scores = masked(call)
    out = left_out(call, scores).to(scores.device)
    by_key = out.repeat_interleave(QUERIES, 2).repeat_interleave(KEYS, 3)
    scores = scores.masked_fill(by_key[:, :, : scores.shape[2], : scores.shape[3]], -torch.inf)
    if call["sinks"] is not None:
        logit = call["sinks"].double()[None, :, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, logit], -1)
    v = call["v"].double().repeat_interleave(scores.shape[1] // call["v"].shape[1], 1)
    weights = scores.softmax(-1).nan_to_num(0.0)[..., : v.shape[2]]
    return (weights @ v).transpose(1, 2), scores.logsumexp(-1), out.double().mean().item()


CASES: list[dict[str, Any]] = [
    {"queries": 700, "keys": 700},
    {"queries": 513, "keys": 1111, "skip": [50, 0, 300, 20]},
    {"queries": 600, "keys": 600, "padding": 150, "softcap": 5.0},
    {"queries": 520, "keys": 1100, "window": [500, 0], "sink_tokens": [9, 0], "sinks": True},
    {"queries": 400, "keys": 900, "kv": 1, "group": 3, "padding": 201, "window": [400]},
]


@pytest.mark.parametrize("number", range(len(CASES)))
def test_the_op_leaves_out_what_lies_far_below(number: int) -> None:
    call = make(**CASES[number])
    expected, _, part = definition(call)
    assert part > 0.02
    assert (expected - definition(call | {"skip": [0]})[0]).abs().max() > 1e-3
    for out in (attend(call), REFERENCE(*call.values()), attention_with_lse(**call)[0]):
        assert out.is_contiguous()
        torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


def test_the_log_sum_exp_is_of_what_is_computed() -> None:
    call = make(**CASES[0])
    lse = attention_with_lse(**call)[1]
    torch.testing.assert_close(lse.double(), definition(call)[1], rtol=1e-5, atol=1e-5)


def test_holes_in_the_mask_leave_nothing_out() -> None:
    call = make(500, 500, batch=1)
    call["mask"] = torch.ones(1, 500, dtype=torch.int64, device=DEVICE)
    call["mask"][0, 450] = 0
    for spelling in (torch.ops.fxopt.attention, REFERENCE):
        torch.testing.assert_close(spelling(*call.values()), attend(call, skip=[0]))


@settings(max_examples=12, deadline=None)
@given(
    queries=st.integers(1, 600), past=st.integers(0, 300), near=st.integers(1, 200),
    more=st.integers(0, 200), window=st.sampled_from([0, 150]),
)  # fmt: skip
def test_limits(queries: int, past: int, near: int, more: int, window: int) -> None:
    """None is dense attention, to the last bit of what the spelling makes; a larger one leaves out
    less; calls of at most 256 tokens see all."""
    call = make(queries, past + queries, kv=1, group=1, batch=1, window=[window], skip=[near])
    dense = attend(call, skip=[0])
    for spelling in (torch.ops.fxopt.attention, REFERENCE):
        out = spelling(*(call | {"skip": [NEVER]}).values())
        torch.testing.assert_close(out, dense, rtol=1e-4, atol=1e-5)
    scores = masked(call)
    few = left_out(call | {"skip": [near + more]}, scores)
    assert (few <= left_out(call, scores)).all()
    if queries <= 256:
        torch.testing.assert_close(attend(call), dense)


def test_the_diagonal_and_the_first_tile_are_computed_whatever_they_hold() -> None:
    """The least limit leaves all others out where the diagonal has the largest scores."""
    call = make(600, 600, kv=1, group=1, batch=1, skip=[1])
    call["q"][...], call["k"][...] = 0.0, 0.0
    call["q"][..., 0], call["k"][..., 0] = 4.0, torch.arange(600.0)
    places = torch.arange(600)
    near = (places[:, None] >= places) & (
        (places // KEYS == 0) | (places // KEYS >= places[:, None] // QUERIES * 2)
    )
    scores = (call["q"] @ call["k"].mT * call["scale"]).masked_fill(~near, -torch.inf)
    expected = (scores.softmax(-1) @ call["v"]).transpose(1, 2)
    torch.testing.assert_close(attend(call), expected)
    torch.testing.assert_close(REFERENCE(*call.values()), expected)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"skip": [1, 2, 3]}, "skip has 3 entries; give 1 or 4, the query heads"),
        ({"skip": [-1]}, "is in hundredths of a nat, 0 or more"),
        ({"causal": False}, "skip needs causal attention"),
        ({"bias": torch.zeros(1, 1, 1, 300)}, "skip does not look at a bias"),
        ({"top": [0, 9]}, "and top or delta exclude each other in one head"),
        ({"window": [9], "delta": [9]}, "and top or delta exclude each other in one head"),
    ],
)
def test_misfits_are_named(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attend(make(300, 300) | wrong)


def test_gradients_are_those_of_what_is_computed() -> None:
    call = make(420, 420, batch=1, dim=8, dtype=torch.float64)
    out = left_out(call, masked(call)).to(DEVICE)
    hidden = out.repeat_interleave(QUERIES, 2).repeat_interleave(KEYS, 3)[:, :, :420, :420]
    hidden = hidden | ~torch.ones(420, 420, device=DEVICE).tril().bool()
    leaves = [call[name].clone().requires_grad_() for name in "qkv"]

    def explicit(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (x.repeat_interleave(2, 1) for x in (k, v))
        scores = (q @ k.mT * call["scale"]).masked_fill(hidden, -torch.inf)
        return (scores.softmax(-1) @ v).transpose(1, 2)

    weights = torch.randn(1, 420, 4, 8, dtype=torch.float64, device=DEVICE)
    expected = torch.autograd.grad((explicit(*leaves) * weights).sum(), leaves)
    named = call | dict(zip("qkv", leaves, strict=True))
    found = torch.autograd.grad((attend(named) * weights).sum(), leaves)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-11)


def test_opcheck() -> None:
    call = make(300, 300, batch=1, kv=1, dim=8)
    torch.library.opcheck(torch.ops.fxopt.attention.default, tuple(call.values()))


def test_prompts_leave_out_and_decoded_tokens_do_not() -> None:
    """Through an exact and a packed cache, against one pass over the whole sequence."""
    prompt, total, skip = 400, 520, [60, 0, 30, 200]
    call = make(total, total, dtype=torch.float64, padding=70, skip=skip)
    fixed = (None, None, call["scale"], True, [0], 0.0, [0])
    expected, dense = attend({**call, **cut(call, prompt)}), attend(call, skip=[0])
    for layout in ("exact", "k8v8g32r32s4"):
        whole = decoded_attention(
            call["q"], call["k"], call["v"], call["mask"], *fixed, layout, prompt, skip=skip
        )
        torch.testing.assert_close(whole[:, :prompt], expected)
        if layout == "exact":
            torch.testing.assert_close(whole[:, prompt:], dense[:, prompt:])
        state = allocate(parse(layout), 2, 2, 16, 16, total, torch.float64, DEVICE)
        for first, last in ((0, prompt), *((i, i + 1) for i in range(prompt, prompt + 3))):
            new = [call[name][:, :, first:last] for name in "qkv"]
            start = torch.tensor(first, device=DEVICE)
            seen = call["mask"][:, :last]
            out = cached_attention(*new, state, start, seen, *fixed, layout, skip=skip)
            torch.testing.assert_close(out, whole[:, first:last], rtol=1e-6, atol=1e-7)


def cut(call: dict[str, Any], prompt: int) -> dict[str, Any]:
    parts = {name: call[name][:, :, :prompt] for name in "qkv"}
    return parts | {"mask": call["mask"][:, :prompt]}


@pytest.mark.slow
@pytest.mark.parametrize("number", [2, 3])
def test_onnx_leaves_out_the_same_tiles(number: int, tmp_path: Path) -> None:
    """One file for prompts and single tokens: by sinks in plain operators, else as one operator."""
    options = {k: v for k, v in CASES[number].items() if k not in ("padding", "softcap")}
    call = {n: x.cpu() if isinstance(x, Tensor) else x for n, x in make(**options).items()}
    call["mask"] = torch.ones(2, call["k"].shape[2], dtype=torch.int64)
    file = AttentionFile(call)
    assert file.domains <= {""}
    for queries, keys, padding in ((600, 600, 140), (1, 601, 140), (300, 651, 2), (5, 9, 2)):
        new = make(queries, keys, padding=padding)
        call |= {name: new[name].cpu() for name in INPUTS}
        out = file.run(call)
        torch.testing.assert_close(out, attend(call), rtol=1e-4, atol=1e-5)
    _runs_long(file.model, call, tmp_path)


RUN = r"""
import re, resource, sys
from pathlib import Path
import numpy, onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1] + "/model.onnx")
given = numpy.load(sys.argv[1] + "/inputs.npz")
inputs = {i.name: given[n] for i, n in zip(session.get_inputs(), ("q", "k", "v", "mask"))}
numpy.save(sys.argv[1] + "/out.npy", session.run(None, inputs)[0])
if Path("/proc").exists():  # where a process that was forked counts its parent's peak as its own
    kib = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]
    print(int(kib) * 1024)
else:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def _runs_long(model: bytes, call: dict[str, Any], folder: Path) -> None:
    """4,096 tokens in four heads, whose scores take 268 MB, in a process of less than 2 GB."""
    new = make(4096, 4096, batch=1, padding=100)
    call |= {name: new[name].cpu().contiguous() for name in INPUTS}
    (folder / "model.onnx").write_bytes(model)
    np.savez(folder / "inputs.npz", **{name: call[name].numpy() for name in INPUTS})
    done = subprocess.run([sys.executable, "-c", RUN, folder], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 2e9
    out = torch.from_numpy(np.load(folder / "out.npy"))
    torch.testing.assert_close(out, attend(call), rtol=1e-4, atol=1e-5)


@needs_triton
@pytest.mark.parametrize("number", [1, 3, pytest.param(4, marks=pytest.mark.slow)])
def test_the_kernel(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What CUDA runs, interpreted where there is none; heads that leave nothing out apart."""
    monkeypatch.setattr(op, "_has_kernel", lambda q: True)
    monkeypatch.setattr(op, "_shared_bytes", lambda _: 163 * 1024)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    call = make(**({"batch": 1} | CASES[number]))
    torch.testing.assert_close(
        attention_cuda(**call).double(), definition(call)[0], rtol=1e-5, atol=1e-5
    )


@needs_triton
def test_values_of_tiles_that_are_left_out_are_never_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op, "_has_kernel", lambda q: True)
    monkeypatch.setattr(op, "_shared_bytes", lambda _: 163 * 1024)
    call = make(400, 400, kv=1, group=1, batch=1, skip=[1])
    call["q"][...], call["k"][...] = 0.0, 0.0
    call["q"][..., 0], call["k"][..., 0] = 4.0, torch.arange(400.0)
    expected = attend(call)
    call["v"][:, :, 64:128] = torch.nan
    out = attention_cuda(**call)
    torch.testing.assert_close(out[:, 256:], expected[:, 256:], rtol=1e-3, atol=1e-4)


@needs_triton
@pytest.mark.parametrize(
    ("dtype", "dim", "kib", "way"),
    [
        (torch.bfloat16, 256, 227, "skipping"), (torch.bfloat16, 256, 163, "skipping"),
        (torch.bfloat16, 256, 99, "reference"), (torch.bfloat16, 128, 99, "skipping"),
        (torch.bfloat16, 80, 64, "reference"), (torch.float32, 256, 227, "reference"),
        (torch.float32, 128, 163, "skipping"), (torch.float32, 128, 99, "reference"),
        (torch.float32, 64, 99, "skipping"),
    ],
)  # fmt: skip
def test_devices_without_room_for_its_tiles_take_the_reference(
    dtype: torch.dtype, dim: int, kib: int, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(op, "_has_kernel", lambda q: True)
    monkeypatch.setattr(op, "_shared_bytes", lambda _: kib * 1024)
    call = bind(**make(300, 300, dim=dim, dtype=dtype))
    assert op._shares(call) == [([0, 1], way)]  # pyright: ignore[reportPrivateUsage]


@needs_triton
def test_room_is_what_the_device_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a program may ask for, where devices tell it apart from what it gets unasked."""
    ask = op._shared_bytes.__wrapped__  # pyright: ignore[reportPrivateUsage]
    told = {"shared_memory_per_block": 49152, "shared_memory_per_block_optin": 101376}
    for names, expected in ((list(told), 101376), (list(told)[:1], 49152)):
        device = SimpleNamespace(**{name: told[name] for name in names})
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _, d=device: d)
        assert ask(torch.device("cuda", 0)) == expected


COMPILE = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from fxopt.kernels.attention.triton import (
    _attention_forward as kernel, skip_bytes, skip_tiles, tiles_for,
)

FLAGS = ("HAS_MASK", "HAS_BIAS", "HAS_SINKS", "HAS_WINDOW", "HAS_SOFTCAP", "SKIPS")
TYPES = dict(lse_ptr="*fp32", limit_ptr="*fp32", scale="fp32", softcap="fp32") | dict.fromkeys(
    ("rank_ptr", "window_ptr", "span_ptr",
     "partial_count_ptr", "partial_ptr", "full_count_ptr", "full_ptr"), "*i32")

def build(dtype, dim, flags, hopper, capability=90):
    sizes = tiles_for(dim, dim, 4096, 4 if dtype == "fp32" else 2, hopper)
    sizes |= skip_tiles(sizes) if "SKIPS" in flags else {}
    options = {name: sizes.pop(name) for name in ("num_warps", "num_stages")}
    constants = dict(CAUSAL=True, DIM=dim, VALUE_DIM=dim, UPCAST=False, q_d=1, k_d=1, v_d=1,
                     EVEN=False, LIST_M=0, LIST_N=0,
                     **{name: name in flags for name in FLAGS}, **sizes)
    signature = {
        name: "constexpr" if name in constants
        else TYPES.get(name, "*" + dtype if name.endswith("_ptr") else "i32")
        for name in kernel.arg_names
    }
    if sizes["TMA"]:
        rows = f"tensordesc<{dtype}[1, 1, {sizes['BLOCK_N']}, {dim}]>"
        signature |= {"k_ptr": rows, "v_ptr": rows}
    # Rows that begin at 16 bytes, as calls have them: others do not pass by in stages.
    aligned = [i for i, name in enumerate(kernel.arg_names) if capability < 90 and (
        name.endswith("_ptr") or name[:2] in ("q_", "k_", "v_") and name not in constants
    )]
    attributes = {(i,): [["tt.divisibility", 16]] for i in aligned}
    source = ASTSource(kernel, signature, constants, attributes)
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    expected = skip_bytes(dim, dim, 4 if dtype == "fp32" else 2)
    products = built.asm["ptx"].count("wgmma.mma_async")
    print(dtype, dim, capability, expected, built.metadata.shared, products)

build("bf16", 64, ("SKIPS",), True)
build("bf16", 128, ("SKIPS",), True)
build("bf16", 256, ("SKIPS", "HAS_WINDOW", "HAS_MASK"), True)
build("bf16", 128, ("SKIPS", "HAS_SINKS", "HAS_SOFTCAP"), False)
build("fp32", 128, ("SKIPS",), False)
build("bf16", 256, ("SKIPS",), False, 86)
build("fp32", 64, ("SKIPS",), False, 86)
"""


@pytest.mark.slow
@needs_triton
def test_compiles_ahead_of_time_for_hopper() -> None:
    built = compiled(COMPILE)
    assert len(built) == 7
    assert all(int(shared) <= 227 * 1024 for *_, shared, _ in built)
    for dtype, _, capability, expected, shared, products in built:
        assert (int(products) > 0) == (dtype == "bf16" and capability == "90")
        assert capability == "90" or 0 <= int(expected) - int(shared) <= 512


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("options", [{}, {"padding": 300}, {"window": [1000], "sinks": True}])
def test_long_inputs_on_the_device(dim: int, options: dict[str, Any]) -> None:
    call = make(2000, 2300, dim=dim, dtype=torch.bfloat16, **options)
    expected, _, part = definition(call)
    assert part > 0.05
    out = attend(call)
    plain = attend(call, skip=[0]).double() - definition(call | {"skip": [0]})[0]
    assert (out.double() - expected).norm() < 4 * plain.norm() + 1e-3 * expected.norm()
