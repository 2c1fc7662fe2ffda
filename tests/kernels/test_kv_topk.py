"""Kept tiles through a cache: prompts leave tiles out, decoded tokens see all that is stored."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fxopt.kernels.attention import attention_reference
from fxopt.kernels.kv_attention import (
    allocate,
    cached_attention,
    cached_attention_functional,
    decoded_attention,
    empty_past,
    parse,
)

PROMPT, TOTAL = 1300, 1750
TOP = [300, 0]
LAYOUTS = ["", "k4v4g32r8s4", "kf8v4g32r8s4", "0:k8v4g32r8s4|1:exact"]


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    sizes = ((4, 16), (2, 16), (2, 8))
    q, k, v = (torch.randn(2, heads, TOTAL, dim, dtype=torch.float64) for heads, dim in sizes)
    return 2 * q, k, v


def padding() -> Tensor:
    mask = torch.ones(2, TOTAL, dtype=torch.int64)
    mask[1, :130] = 0
    return mask


def attention(*x: Tensor, mask: Tensor, top: list[int]) -> Tensor:
    return attention_reference(*x, mask, None, None, 0.25, True, [0], 0.0, [0], top)


def run(layout: str, chunks: list[int], x: tuple[Tensor, ...], mask: Tensor) -> list[Tensor]:
    state = allocate(parse(layout), 2, 2, 16, 8, TOTAL, torch.float64)
    past = empty_past(parse(layout), 2, 2, 16, 8, torch.float64)
    start, outputs = torch.zeros((), dtype=torch.int64), list[Tensor]()
    for count in chunks:
        done = int(start)
        new = [t[:, :, done : done + count] for t in x]
        options = (None, None, 0.25, True, [0], 0.0, [0], layout)
        seen = mask[:, : done + count]
        out = cached_attention(*new, state, start, seen, *options, top=TOP)
        functional, past = cached_attention_functional(*new, past, seen, *options, top=TOP)
        torch.testing.assert_close(functional, out, rtol=1e-10, atol=1e-12)
        outputs.append(out)
        start += count
    return outputs


def test_an_exact_cache_gives_what_its_keys_give() -> None:
    x, mask = inputs(), padding()
    prompt, one, more, rest = run("", [PROMPT, 1, 300, TOTAL - PROMPT - 301], x, mask)
    known = [[t[:, :, :end] for t in x] for end in (PROMPT, PROMPT + 1, PROMPT + 301)]
    expected = attention(*known[0], mask=mask[:, :PROMPT], top=TOP)
    torch.testing.assert_close(prompt, expected, rtol=1e-10, atol=1e-12)
    dense = attention(*known[0], mask=mask[:, :PROMPT], top=[0])
    assert (prompt - dense)[:, :, :2].abs().max() > 0.01
    torch.testing.assert_close(prompt[:, :, 2:], dense[:, :, 2:], rtol=1e-10, atol=1e-12)
    whole = attention(*x, mask=mask, top=[0])
    torch.testing.assert_close(one, whole[:, PROMPT : PROMPT + 1], rtol=1e-10, atol=1e-12)
    # Three hundred tokens at once are a prompt again, after a past.
    q = x[0][:, :, PROMPT + 1 : PROMPT + 301]
    expected = attention(q, *known[2][1:], mask=mask[:, : PROMPT + 301], top=TOP)
    torch.testing.assert_close(more, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(rest, whole[:, PROMPT + 301 :], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_pass_gives_what_decoding_gives(layout: str) -> None:
    x, mask = [t[:, :, : PROMPT + 40] for t in inputs()], padding()[:, : PROMPT + 40]
    decoded = torch.cat(run(layout, [PROMPT, *[1] * 40], tuple(x), mask), 1)
    options = (mask, None, None, 0.25, True, [0], 0.0, [0], layout, PROMPT)
    out = decoded_attention(*x, *options, TOP)
    torch.testing.assert_close(out, decoded, rtol=1e-10, atol=1e-12)
