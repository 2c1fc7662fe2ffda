"""What float noise may decide in a packed cache and in fp8 inputs, and what it may not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fxopt.emit.aligned import Aligned
from fxopt.emit.packed import Rounded, compare_cache
from fxopt.emit.program import State
from fxopt.ir.errors import ExportError
from fxopt.kernels import fp8_linear
from fxopt.kernels.fp8_linear.reference import LARGEST
from fxopt.kernels.kv_attention import cached_attention_functional, empty_past, parse
from fxopt.kernels.kv_attention.layout import functional_names

LAYOUT, FLOAT8, KV, DIM, LENGTH = "k4v4g32r0s4", "kf8vf8g32r0s4", 2, 8, 70
NAMES = {layout: functional_names(parse(layout), KV)[0] for layout in (LAYOUT, FLOAT8)}
PACKED = [
    (layout, name)
    for layout, names in NAMES.items()
    for name in names
    if not name.startswith(("sink", "recent"))
]
New = tuple[Tensor, Tensor]


def state(layout: str) -> State:
    return State(KV, KV, DIM, DIM, layout, torch.float32)


def present(keys: Tensor, values: Tensor, layout: str = LAYOUT) -> list[Tensor]:
    past = empty_past(parse(layout), 1, KV, DIM, DIM, torch.float32)
    mask = torch.ones(1, keys.shape[2], dtype=torch.int64)
    arguments = (mask, None, None, 1.0, True, [0], 0.0, [0], layout)
    return cached_attention_functional(keys, keys, values, past, *arguments)[1]


def compare(wanted: list[Tensor], found: list[Tensor], new: New, layout: str = LAYOUT) -> Rounded:
    past = empty_past(parse(layout), 1, KV, DIM, DIM, torch.float32)
    rounded = Rounded()
    mask = torch.ones(1, LENGTH, dtype=torch.int64)
    compare_cache("present.0", state(layout), [past, wanted, found], new, mask, 1e-4, rounded)
    return rounded


def drawn(layout: str, halfway: float) -> New:
    """Keys and values of which a key of channel 0, whose keys run from -2 to 2, is stored as
    `halfway` before it is rounded."""
    generator = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(1, KV, LENGTH, DIM, generator=generator) for _ in range(2))
    keys[:, :, 4:36, 0] = torch.linspace(-2, 2, 32)
    stored = dict(zip(NAMES[layout], present(keys, values, layout), strict=True))
    between = halfway * stored["key_scale"].float() + stored["key_zero"].float()
    keys[0, 0, 9, 0] = between[0, 0, 0, 0, 0]
    return keys, values


@pytest.fixture
def new() -> New:
    return drawn(LAYOUT, 5.5)


@pytest.mark.parametrize(("layout", "halfway"), [(LAYOUT, 5.5), (FLOAT8, -272.0)])
def test_a_key_on_a_boundary_may_go_either_way(layout: str, halfway: float) -> None:
    """Between two of 16 integers, or of e4m3 numbers."""
    keys, values = new = drawn(layout, halfway)
    wanted = present(keys, values, layout)
    up, down = keys.clone(), keys.clone()
    up[0, 0, 9, 0] += 1e-5
    down[0, 0, 9, 0] -= 1e-5
    counts = [compare(wanted, present(k, values, layout), new, layout) for k in (up, down)]
    assert sorted(count.flipped for count in counts) == [0, 1]
    assert counts[0].total == 2 * KV * 2 * 32 * DIM


@pytest.mark.parametrize(("layout", "name"), PACKED)
def test_what_no_noise_explains_is_refused(layout: str, name: str) -> None:
    new = drawn(layout, 5.5)
    wanted = present(*new, layout)
    found = [tensor.clone() for tensor in wanted]
    changed = found[NAMES[layout].index(name)][0, 0, 0]
    changed.copy_(changed + 1 if changed.dtype == torch.uint8 else changed.float() * 0.75)
    with pytest.raises(ExportError, match=r"present\.0\.(key|value): onnxruntime packs other"):
        compare(wanted, found, new, layout)


def test_blocks_of_the_past_have_to_stay(new: New) -> None:
    past = present(*new)
    mask = torch.ones(1, LENGTH + 1, dtype=torch.int64)
    token = torch.randn(1, KV, 1, DIM)
    arguments = (mask, None, None, 1.0, True, [0], 0.0, [0], LAYOUT)
    wanted = cached_attention_functional(token, token, token, past, *arguments)[1]
    found = [tensor.clone() for tensor in wanted]
    tensors = [past, wanted, found]
    compare_cache("present.0", state(LAYOUT), tensors, (token, token), mask, 1e-4, Rounded())
    found[NAMES[LAYOUT].index("value")][0, 1, 0, 3] ^= 1
    with pytest.raises(ExportError, match="changed blocks that were packed before"):
        compare_cache("present.0", state(LAYOUT), tensors, (token, token), mask, 1e-4, Rounded())


def layer(x: Tensor, choices: list[Tensor]) -> tuple[Tensor, Rounded]:
    weight = torch.eye(4).mul(LARGEST).to(torch.float8_e4m3fn)
    rounded = Rounded()
    with Aligned(choices, 1e-4, rounded):
        out = fp8_linear.fp8_linear(x, weight, torch.full((4,), 1 / LARGEST), None)
    return out, rounded


def test_an_input_on_a_boundary_is_rounded_as_the_other_side_did() -> None:
    # Between 256 and 288, the neighbours in e4m3.
    x = torch.tensor([[LARGEST, 272.0, 3.0, 0.0]])
    own, _ = layer(x, [])
    for choice in (256.0, 288.0):
        out, rounded = layer(x, [torch.tensor([[LARGEST, choice, 3.0, 0.0]])])
        assert out[0, 1] == choice
        assert rounded.flipped == int(choice != own[0, 1])
    # 320 is no rounding of anything that near.
    out, rounded = layer(x, [torch.tensor([[LARGEST, 320.0, 3.0, 0.0]])])
    assert torch.equal(out, own)
    assert rounded.total == 0
