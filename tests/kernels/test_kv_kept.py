"""Decoding that reads some tiles of a cache, by the definition and in each of its forms."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fxopt.kernels.decode_topk.reference import TILE
from fxopt.kernels.kv_attention import (
    allocate,
    cached_attention,
    cached_attention_functional,
    decoded_attention,
    empty_past,
    mutating,
    parse,
)
from fxopt.kernels.kv_attention.layout import Blocks
from fxopt.kernels.kv_attention.packing import pack_side, unpack_side

H, KV, D, DV, SCALE = 4, 2, 16, 8, 0.25
LAYOUTS = [
    "exact+t256",
    "k8v4g32r8s4+t96",
    "kf8vf8g32r8s4+t96",
    "k4v4g64r70s0+t128",
    "0:k4v2g32r8s4+t64|1:exact+t384",
]


def draw(tokens: int, batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    sizes = ((H, D), (KV, D), (KV, DV))
    q, k, v = (torch.randn(batch, h, tokens, d, dtype=torch.float64) for h, d in sizes)
    return 3 * q, k, v


def padding(tokens: int) -> Tensor:
    """The second row begins with hidden tokens, a whole tile of them and more, and has a few amid
    the others."""
    mask = torch.ones(2, tokens, dtype=torch.int64)
    mask[1, :170] = 0
    mask[1, 300:310] = 0
    return mask


def by_definition(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, top_keys: int, fmt: Blocks | None,
    by: int | None = None,
) -> Tensor:  # fmt: skip
    """The newest of the tokens of one KV head's query heads q [B, group, T, D], as [B, group, Dv],
    over the tiles that the token at position `by` chose; token by token, tile by tile."""
    outputs: list[Tensor] = []
    past = k.shape[1] - 1
    by = past if by is None else by
    size, first = (TILE, 0) if fmt is None else (fmt.group, fmt.sink)
    whole, then = ((p if fmt is None else fmt.packed(p)) // size for p in (past, by))
    for row in range(len(k)):
        keys, values = k[row].clone(), v[row].clone()
        ranked: list[tuple[float, int]] = []
        best = [-torch.inf] * q.shape[1]
        found: dict[int, list[float]] = {}
        for tile in range(whole):
            span = slice(first + tile * size, first + (tile + 1) * size)
            shown = keys[span][mask[row, span].bool()] if mask[row, span].any() else keys[span]
            low, high = shown.amin(0), shown.amax(0)
            if fmt is not None:
                valid = mask[row, span].bool()[None, None, None, :, None]
                for x, side, bits in (
                    (keys, "key", fmt.key_bits), (values, "value", fmt.value_bits),
                ):  # fmt: skip
                    stored = pack_side(x[span][None, None, None], valid, side, bits)
                    x[span] = unpack_side(stored, side, bits, x.dtype)[0, 0, 0]
                    if side == "key":
                        zero, scale = (
                            stored[f"key_{name}"].double().flatten() for name in ("zero", "scale")
                        )
                        least, most = (-448, 448) if bits == "f8" else (0, 2**bits - 1)
                        low, high = zero + least * scale, zero + most * scale
            if tile < then and mask[row, span].any():
                scaled = q[row, :, by] * SCALE
                middle, width = (low + high) / 2, high - low
                found[tile] = (scaled @ middle + scaled**2 @ width**2 / 12).tolist()
                best = [max(b, f) for b, f in zip(best, found[tile], strict=True)]
        for tile, masses in found.items():
            behind = min(b - f for b, f in zip(best, masses, strict=True))
            forced = tile == min(found) or tile >= then - max(1, 64 // size)
            ranked.append((-1.0 if forced else behind, tile))
        kept = {tile for _, tile in sorted(ranked)[: max(1 + max(1, 64 // size), top_keys // size)]}
        seen = mask[row].bool().clone()
        for tile in range(then):
            if tile not in kept:
                seen[first + tile * size : first + (tile + 1) * size] = False
        scores = (q[row, :, past] @ keys.mT * SCALE).masked_fill(~seen, -torch.inf)
        outputs.append(scores.softmax(-1) @ values)
    return torch.stack(outputs)


def calls(
    layout: str, chunks: list[int], x: tuple[Tensor, ...], mask: Tensor | None
) -> Iterator[tuple[Tensor, list[Tensor], tuple[Any, ...]]]:
    """How many tokens are there, the next ones, and the options of a call that brings them."""
    done = 0
    for count in chunks:
        new = [t[:, :, done : done + count] for t in x]
        seen = None if mask is None else mask[:, : done + count]
        yield torch.tensor(done), new, (seen, None, None, SCALE, True, [0], 0.0, [0], layout)
        done += count


def decode(
    layout: str, chunks: list[int], x: tuple[Tensor, ...], mask: Tensor | None
) -> list[Tensor]:
    """Through the cache in place and through the growing one, which agree."""
    total, batch = sum(chunks), len(x[0])
    state = allocate(parse(layout), batch, KV, D, DV, total, torch.float64)
    past = empty_past(parse(layout), batch, KV, D, DV, torch.float64)
    outputs: list[Tensor] = []
    for start, new, options in calls(layout, chunks, x, mask):
        out = cached_attention(*new, state, start, *options)
        functional, past = cached_attention_functional(*new, past, *options)
        torch.testing.assert_close(functional, out, rtol=1e-10, atol=1e-12)
        outputs.append(out)
    return outputs


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_decoded_token_reads_the_tiles_of_the_definition(layout: str, masked: bool) -> None:
    prompt, new = 900, 3
    x, total = draw(prompt + new), prompt + new
    mask = padding(total) if masked else torch.ones(2, total, dtype=torch.int64)
    x[1][:, :, :310] *= torch.where(mask[:, :310] == 0, 9.0, 1.0)[:, None, :, None]
    outputs = decode(layout, [prompt, *[1] * new], x, mask if masked else None)
    parsed = parse(layout)
    formats, chosen = parsed.formats(KV), parsed.top_keys(KV)
    for step, out in enumerate(outputs[1:]):
        end = prompt + step + 1
        for head in range(KV):
            group = slice(2 * head, 2 * head + 2)
            q, k, v = x[0][:, group, :end], x[1][:, head, :end], x[2][:, head, :end]
            expected = by_definition(q, k, v, mask[:, :end], chosen[head], formats[head])
            torch.testing.assert_close(out[:, 0, group], expected, rtol=1e-9, atol=1e-11)


KEPT = ["exact+t128/5", "k8v4g32r8s4+t128/40", "0:k4v2g32r8s4+t128/3|1:exact+t160"]


def decode_in_place(
    layout: str, chunks: list[int], x: tuple[Tensor, ...], mask: Tensor | None
) -> list[Tensor]:
    """Through the cache in place alone: a growing one keeps no choice."""
    state = allocate(parse(layout), len(x[0]), KV, D, DV, sum(chunks), torch.float64)
    given = calls(layout, chunks, x, mask)
    return [cached_attention(*new, state, start, *options) for start, new, options in given]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("layout", KEPT)
def test_a_choice_is_read_until_the_next_one(layout: str, masked: bool) -> None:
    """Every n-th token chooses; those between read its tiles and all that became whole since.
    Several tokens at once see all, choose nothing, and count."""
    chunks = [414, *[1] * 7, 2, *[1] * 34]
    total = sum(chunks)
    x = draw(total)
    mask = padding(total) if masked else torch.ones(2, total, dtype=torch.int64)
    outputs = decode_in_place(layout, chunks, x, mask if masked else None)
    parsed = parse(layout)
    formats, top_keys = parsed.formats(KV), parsed.top_keys(KV)
    by = [0] * KV
    end, others = chunks[0], 0
    for step, (count, out) in enumerate(zip(chunks[1:], outputs[1:], strict=True)):
        end += count
        for head, refresh in enumerate(parsed.refresh(KV)):
            if count > 1:
                continue
            if end - 1 >= by[head] + refresh:
                by[head] = end - 1
            if step not in (0, 1, 4, 5, 6, 8, 10, 33, 41):
                continue
            group = slice(2 * head, 2 * head + 2)
            q, k, v = x[0][:, group, :end], x[1][:, head, :end], x[2][:, head, :end]
            given = q, k, v, mask[:, :end], top_keys[head], formats[head]
            expected = by_definition(*given, by[head])
            torch.testing.assert_close(out[:, 0, group], expected, rtol=1e-9, atol=1e-11)
            if by[head] != end - 1:
                others += not torch.allclose(by_definition(*given), expected, rtol=1e-3)
    assert others > 0  # the choice of its own would have been another


@pytest.mark.parametrize("prompt", [3, 330])
@pytest.mark.parametrize("layout", KEPT)
def test_one_pass_keeps_choices_as_decoding_does(layout: str, prompt: int) -> None:
    """From the first token on that finds a whole tile."""
    new = 45 if prompt > 3 else 240
    x = draw(prompt + new)
    mask = padding(prompt + new) if prompt > 3 else None
    decoded = torch.cat(decode_in_place(layout, [prompt, *[1] * new], x, mask), 1)
    options = (mask, None, None, SCALE, True, [0], 0.0, [0])
    found = decoded_attention(*x, *options, layout, prompt)
    torch.testing.assert_close(found, decoded, rtol=1e-9, atol=1e-11)
    each = re.sub(r"/\d+", "", layout)
    assert (decoded_attention(*x, *options, each, prompt) - decoded).abs().max() > 0.01


def test_a_token_that_comes_again_chooses_again() -> None:
    """What a step that was taken back chose does not count, as in a graph's first run."""
    layout, x = "exact+t96/8", draw(400)
    state = allocate(parse(layout), 2, KV, D, DV, 400, torch.float64)
    options = (None, None, None, SCALE, True, [0], 0.0, [0], layout)

    def step(begin: int, end: int, factor: float = 1.0) -> Tensor:
        q, k, v = (t[:, :, begin:end] for t in x)
        return cached_attention(factor * q, k, v, state, torch.tensor(begin), *options)

    step(0, 390)
    step(390, 391, -1.0)
    found = step(390, 391)
    state = allocate(parse(layout), 2, KV, D, DV, 400, torch.float64)
    step(0, 390)
    assert torch.equal(found, step(390, 391))


@pytest.mark.parametrize("format", ["exact", "k4v4g32r8s4"])
def test_short_pasts_are_not_gathered(format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no tile is left out a choice is noted, and attention is that of the whole cache."""
    monkeypatch.setattr(mutating, "attend_kept", None)
    outputs = [
        decode_in_place(layout, [190, *[1] * 9], x, None)
        for x in [draw(199)]
        for layout in (format, f"{format}+t256/4")
    ]
    for one, other in zip(*outputs, strict=True):
        assert torch.equal(one, other)


def test_a_growing_cache_refuses_kept_choices() -> None:
    layout = "exact+t64/8"
    past = empty_past(parse(layout), 2, KV, D, DV, torch.float64)
    assert len(past) == 2
    options = (None, None, None, SCALE, True, [0], 0.0, [0], layout)
    with pytest.raises(ValueError, match="keeps which tiles are read"):
        cached_attention_functional(*draw(8), past, *options)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_pass_gives_what_decoding_gives(layout: str) -> None:
    prompt, new = 700, 140
    x, mask = draw(prompt + new), padding(prompt + new)
    decoded = torch.cat(decode(layout, [prompt, *[1] * new], x, mask), 1)
    options = (mask, None, None, SCALE, True, [0], 0.0, [0], layout, prompt)
    torch.testing.assert_close(decoded_attention(*x, *options), decoded, rtol=1e-9, atol=1e-11)
    dense = decoded_attention(*x, *options[:-2], "", prompt)
    assert (dense - decoded)[:, prompt:].abs().max() > 0.01


@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_tiles_are_the_whole_cache(layout: str) -> None:
    """A number as large as the past, and several tokens at once."""
    x, mask = draw(400), padding(400)
    whole = re.sub(r"\+t\d+", "", layout)
    every = re.sub(r"\+t\d+", "+t400", layout)
    outputs = [decode(text, [390, *[1] * 10], x, mask) for text in (whole, every)]
    torch.testing.assert_close(*outputs, rtol=1e-9, atol=1e-11)
    outputs = [decode(text, [390, 10], x, mask) for text in (whole, layout)]
    torch.testing.assert_close(*outputs, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("layout", ["exact+t96", "k4v4g32r8s0+t96"])
def test_a_short_row_reads_all_that_it_sees(layout: str) -> None:
    """A row with fewer visible tiles than the others read is dense, whatever its padding holds."""
    x, mask = draw(300), torch.ones(2, 300, dtype=torch.int64)
    mask[1, :258] = 0
    x[1][1, :, :258] = 1e4
    out = decode(layout, [299, 1], x, mask)[-1]
    seen = [t[1:, :, 258:] for t in x]
    expected = decode(layout.split("+t")[0], [41, 1], tuple(seen), None)[-1]
    close = 1e-9 if layout.startswith("exact") else 0.2  # blocks begin elsewhere
    torch.testing.assert_close(out[1:], expected, rtol=close, atol=close)


def test_what_the_choice_does_not_know_is_an_error() -> None:
    x = draw(8)
    bias = torch.zeros(1, 1, 8, 8, dtype=torch.float64)
    for given, window, top, reason in (
        (bias, 0, 0, "does not look at a bias"),
        (None, 4, 0, "and window"),
        (None, 0, 100, "and tiles kept in prompts"),
    ):
        state = allocate(parse("exact+t64"), 2, KV, D, DV, 8, torch.float64)
        options = (None, given, None, SCALE, True, [window], 0.0, [0], "exact+t64")
        options = (*options, None, [top])
        with pytest.raises(ValueError, match=f"reads some tiles {reason}"):
            cached_attention(*x, state, torch.tensor(0), *options)


@pytest.mark.parametrize(
    "layout", ["exact+t64", "0:k4v4g32r8s4+t64|1:exact+t64", "0:k4v4g32r8s4+t64/4|1:exact+t64/8"]
)
def test_op(layout: str) -> None:
    x = draw(170)
    state = allocate(parse(layout), 2, KV, D, DV, 171, torch.float64)
    start = torch.tensor(0)
    options = (None, None, None, SCALE, True, [0], 0.0, [0], layout)
    cached_attention(*x, state, start, *options)
    new = [t[:, :, :1] for t in x]
    op: Any = torch.ops.fxopt.cached_attention.default
    utils = ("test_schema", "test_faketensor")
    torch.library.opcheck(op, (*new, state, start + 170, *options), test_utils=utils)
