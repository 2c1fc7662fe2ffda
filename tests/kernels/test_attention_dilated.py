"""Dilated windows of sequences, against attention in float64 under a mask by their definition."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fxopt.ir.ops import attend
from fxopt.kernels._triton import AVAILABLE
from fxopt.kernels.attention import attention_reference, attention_traceable, attention_with_lse, op
from fxopt.kernels.attention.dilated import fold, unfold
from fxopt.kernels.attention.op import attention, attention_backward
from fxopt.kernels.attention.op import attention_with_lse as op_with_lse

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def visible(length: int, window: int, dilation: int) -> Tensor:
    """[N, N]; a window that no token is outside of hides nothing, whatever its dilation."""
    seen = torch.ones(length, length, dtype=torch.bool)
    if 0 < window < length:
        for i in range(length):
            for j in range(length):
                seen[i, j] = abs(i - j) % dilation == 0 and abs(i - j) // dilation < window
    return seen


def naive(
    inputs: Sequence[Tensor], window: Sequence[int], dilation: Sequence[int],
    mask: Tensor | None = None, sinks: Tensor | None = None, softcap: float = 0.0,
) -> Tensor:  # fmt: skip
    """In float64; [B, N, H, Dv]."""
    q, k, v = (x.double() for x in inputs)
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    scores = q @ k.mT * 0.25
    if softcap:
        scores = softcap * (scores / softcap).tanh()
    seen = torch.stack([visible(q.shape[2], *each) for each in zip(window, dilation, strict=True)])
    scores = scores.masked_fill(~seen.repeat_interleave(group, 0), -torch.inf)
    if mask is not None:
        scores = scores.masked_fill(mask[:, None, None] == 0, -torch.inf)
    if sinks is not None:
        logit = sinks.double()[:, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, logit], -1)
    weights = scores.softmax(-1).nan_to_num(0.0)[..., : q.shape[2]]
    return (weights @ v).transpose(1, 2)


def random(length: int, dtype: Any = torch.float64, heads: int = 4, kv: int = 2) -> Any:
    return tuple(torch.randn(2, n, length, 16).to(dtype) for n in (heads, kv, kv))


def call(
    window: Sequence[int], dilation: Sequence[int], mask: Tensor | None = None,
    sinks: Tensor | None = None, softcap: float = 0.0,
) -> tuple[Any, ...]:  # fmt: skip
    """What follows q, k, v in a call of the op."""
    options = (0.25, False, list(window), softcap, [0], [0], [0], [], [0], list(dilation))
    return (mask, None, sinks, *options)


def padding(length: int) -> Tensor:
    """The first sequence is padded on the right, the second on the left and has a hole."""
    mask = torch.ones(2, length, dtype=torch.int64)
    mask[0, length - 7 :] = 0
    mask[1, :5] = 0
    mask[1, length // 2] = 0
    return mask


@given(length=st.integers(1, 40), each=st.integers(1, 7), lead=st.integers(1, 3))
def test_folding_puts_tokens_of_equal_rest_together_and_back(
    length: int, each: int, lead: int
) -> None:
    x = torch.arange(2 * lead * length).view(2, lead, length, 1) + 1
    folded = fold(x, 2, each)
    for rest in range(each):
        mine = x[:, :, rest::each]
        assert torch.equal(folded[rest::each, :, : mine.shape[2]], mine)
        assert not folded[rest::each, :, mine.shape[2] :].any()
    back = unfold(folded, 2, each, length)
    assert torch.equal(back, x)
    assert back.is_contiguous()


@pytest.mark.parametrize("length", [64, 63, 101])
@pytest.mark.parametrize("kind", ["plain", "padded", "sinks and softcap"])
def test_the_reference_is_attention_under_the_mask(length: int, kind: str) -> None:
    options: dict[str, Any] = {
        "plain": {},
        "padded": {"mask": padding(length)},
        "sinks and softcap": {
            "mask": padding(length),
            "sinks": torch.randn(4, dtype=torch.float64),
            "softcap": 4.0,
        },
    }[kind]
    inputs, window, dilation = random(length), (9, 30), (3, 2)
    expected = naive(inputs, window, dilation, **options)
    arguments = call(window, dilation, **options)
    for form in (attention_reference, attention_traceable):
        torch.testing.assert_close(form(*inputs, *arguments), expected)
    out, lse = attention_with_lse(*inputs, *arguments)
    torch.testing.assert_close(out, expected)
    # of ones, the sum of the weights: what is not the sink's, by the log-sum-exp
    if kind == "sinks and softcap":
        ones = naive((*inputs[:2], torch.ones_like(inputs[2])), window, dilation, **options)
        rest = 1 - (options["sinks"][:, None] - lse).exp()
        torch.testing.assert_close(rest.transpose(1, 2), ones[..., 0])


def test_heads_choose_apart() -> None:
    """One dilated, one under a plain window, one dense."""
    q, k, v = random(61, heads=6, kv=3)
    out = attend(q, k, v, scale=0.25, window=(8, 20, 0), dilation=(4, 1, 1))
    torch.testing.assert_close(out, naive((q, k, v), (8, 20, 0), (4, 1, 1)))
    dense = attend(q, k, v, scale=0.25)
    assert (out - dense)[:, :, :4].abs().amax((0, 1, 3)).min() > 1e-3


def test_short_calls_see_all_keys() -> None:
    inputs = random(20)
    for window in (20, 33):
        options = call((window, 0), (2, 1))
        dense = attend(*inputs, scale=0.25)
        torch.testing.assert_close(attention_reference(*inputs, *options), dense)
        torch.testing.assert_close(attention_traceable(*inputs, *options), dense)
    some = attention_reference(*inputs, *call((19, 0), (2, 1)))
    torch.testing.assert_close(some, naive(inputs, (19, 0), (2, 1)))
    assert (some - dense)[:, :, :2].abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_dtypes_round_as_dense_attention_does(dtype: torch.dtype) -> None:
    inputs = random(63, dtype)
    out = attention_reference(*inputs, *call((8, 0), (3, 1)))
    assert out.dtype == dtype
    error = (out.double() - naive(inputs, (8, 0), (3, 1))).abs().amax(dim=(0, 1, 3))
    assert error[:2].max() < 4 * error[2:].max()


@pytest.mark.parametrize("masked", [False, True])
def test_gradients_are_those_of_attention_under_the_mask(masked: bool) -> None:
    inputs = [x.requires_grad_() for x in random(50)]
    mask = padding(50) if masked else None
    weight = torch.randn(2, 50, 4, 16, dtype=torch.float64)
    out = naive(inputs, (6, 9), (3, 2), mask)
    expected = torch.autograd.grad((out * weight).sum(), inputs)
    out = attention(*inputs, *call((6, 9), (3, 2), mask))
    found = torch.autograd.grad((out * weight).sum(), inputs)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs)


def through_the_op(
    length: int, dtype: torch.dtype, device: str, masked: bool,
    window: Sequence[int] = (8, 9, 10, 0), dilation: Sequence[int] = (2, 3, 1, 1),
) -> None:  # fmt: skip
    """Output and gradients of heads under two dilations, a plain window and none, within the
    reference's rounding."""
    mask = padding(length).to(device) if masked else None
    heads = len(window)
    inputs = [x.to(device).requires_grad_() for x in random(length, dtype, heads, heads)]
    options = call(window, dilation, mask)
    out = attention(*inputs, *options)
    gradient = torch.randn_like(out)
    found = [out, *torch.autograd.grad(out, inputs, gradient)]
    wide = [x.detach().double().requires_grad_() for x in inputs]
    exact = attention_reference(*wide, *options)
    expected = naive(
        [x.cpu() for x in wide], window, dilation, None if mask is None else mask.cpu()
    )
    torch.testing.assert_close(exact.cpu(), expected)
    right = [exact, *torch.autograd.grad(exact, wide, gradient.double())]
    plain = attention_reference(*inputs, *options)
    same = [plain, *torch.autograd.grad(plain, inputs, gradient)]
    for mine, theirs, best in zip(found, same, right, strict=True):
        error, own = ((x.double() - best).abs().max() for x in (mine, theirs))
        assert error < 8 * own + 1e-6


@pytest.mark.skipif(not AVAILABLE, reason="needs triton")
@pytest.mark.parametrize(
    ("length", "masked"), [(67, True), pytest.param(66, False, marks=pytest.mark.slow)]
)
def test_the_kernels_of_windows_serve_it(
    length: int, masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(op, "_has_kernel", lambda q: q.dtype != torch.float64)
    through_the_op(length, torch.float32, DEVICE, masked, window=(8, 9), dilation=(2, 1))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("masked", [False, True])
def test_on_a_gpu(dtype: torch.dtype, masked: bool) -> None:
    for length in (63, 500):
        through_the_op(length, dtype, "cuda", masked)


def test_the_ops_are_sound() -> None:
    inputs, options = random(45, torch.float32), call((7, 0), (2, 1))
    torch.library.opcheck(attention, (*inputs, *options))
    out, lse = op_with_lse(*inputs, *options)
    torch.library.opcheck(attention_backward, (torch.randn_like(out), out, lse, *inputs, *options))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"causal": True}, "dilation of a window takes no causal attention"),
        ({"bias": torch.zeros(1, 1, 30, 30)}, "takes no causal attention, no bias"),
        ({"sink_tokens": (2,)}, "and sink_tokens exclude each other"),
        ({"dilation": (0,)}, "dilation of a window needs one number, 1 or more"),
        ({"dilation": (2, 2, 2)}, "dilation has 3 entries"),
        ({"grid": (0, 5, 6), "dilation": (1, 2, 1, 1)}, "dilation of a window needs one number"),
    ],
)
def test_wrong_calls_are_refused(change: dict[str, Any], reason: str) -> None:
    options: dict[str, Any] = {"scale": 0.25, "window": (8,), "dilation": (2,)}
    with pytest.raises(ValueError, match=reason):
        attend(*random(30, torch.float32), **options | change)


def test_queries_of_another_length_are_refused() -> None:
    q, k, v = random(30, torch.float32)
    with pytest.raises(ValueError, match="as many queries as keys"):
        attend(q[:, :, 5:], k, v, scale=0.25, window=(8,), dilation=(2,))


def test_a_cache_has_no_dilation() -> None:
    with pytest.raises(ValueError, match="dilation has no meaning"):
        attend(
            *random(30, torch.float32), state=[], start=0, scale=0.25, window=(8,), dilation=(2,)
        )
