"""A state that is filled once: what it holds, how large it is, and what is read from it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fxopt.kernels.attention.reference import attention_reference
from fxopt.kernels.kv_attention.filled import fill, filled_attention, filled_bytes
from fxopt.kernels.kv_attention.layout import parse
from fxopt.kernels.kv_attention.op import decoded_attention
from tests.oracle import fake_quantize
from tests.oracle import parse as formats

FLOAT8 = "kf8vf8g32r5s3"
LAYOUTS = ("", "k4v2g32r0s0", "k8v16g32r5s3", FLOAT8, "1:k4v4g32r0s0|0,2:exact", "k2v2g64r0s0")

# The first multiplies copies of the arguments, which e4m3 cannot be.
CHECKS = (
    "test_schema",
    "test_autograd_registration",
    "test_faketensor",
    "test_aot_dispatch_dynamic",
)


def tensors(length: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    q = torch.randn(2, 6, 4, 16, dtype=dtype)
    return q, torch.randn(2, 3, length, 16, dtype=dtype), torch.randn(2, 3, length, 8, dtype=dtype)


def images(k: Tensor, v: Tensor, layout: str, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values through integers as the layout says, by loops over heads and blocks."""
    k, v = k.clone(), v.clone()
    for head, fmt in enumerate(formats(layout, 3) if layout else []):
        if fmt is None:
            continue
        key_bits, value_bits, group, residual, sink = fmt
        for low in range(sink, k.shape[2] - residual - group + 1, group):
            span = slice(low, low + group)
            seen = valid[:, span, None]
            if key_bits != 16:
                k[:, head, span] = fake_quantize(k[:, head, span], seen, key_bits, 1)
            if value_bits != 16:
                v[:, head, span] = fake_quantize(v[:, head, span], seen, value_bits, 2)
    return k, v


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("length", [1, 7, 70, 96])
@pytest.mark.parametrize("padded", [False, True])
def test_reads_the_image_of_what_was_packed(layout: str, length: int, padded: bool) -> None:
    q, k, v = tensors(length)
    mask = torch.ones(2, length, dtype=torch.long)
    if padded:
        mask[1, length // 2 + 1 :] = 0
    given = mask if padded else None
    keys, values = images(k, v, layout, mask.bool())
    want = attention_reference(
        q.double(), keys.double(), values.double(), given, None, None, 0.3, False, [0], 0.0, [0]
    )
    got = filled_attention(q, fill(k, v, given, layout), given, None, None, 0.3, 0.0, layout)
    torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=1e-5)
    once = decoded_attention(q, k, v, given, None, None, 0.3, False, [0], 0.0, [0], layout, 1)
    assert torch.equal(once, got)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("length", [1, 40, 97])
def test_bytes_are_those_of_the_tensors(layout: str, length: int) -> None:
    _, k, v = tensors(length, torch.bfloat16)
    state = fill(k, v, None, layout)
    assert filled_bytes(parse(layout), 2, 3, 16, 8, length, 2) == sum(t.nbytes for t in state)
    assert all(t.untyped_storage().nbytes() == t.nbytes for t in state)


def test_the_op_is_registered_with_its_shape() -> None:
    q, k, v = tensors(40)
    for layout in LAYOUTS:
        state = fill(k, v, None, layout)
        arguments = (q, state, None, None, None, 0.3, 0.0, layout)
        op = torch.ops.fxopt.filled_attention.default
        torch.library.opcheck(op, arguments, test_utils=CHECKS[layout == FLOAT8 :])
        assert op(*arguments).shape == (2, 4, 6, 8)
