"""Linear kernels fit into the shared memory of the device that they are launched on."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from fxopt.kernels._triton import common
from fxopt.kernels.quantized_experts import triton as experts
from fxopt.kernels.quantized_linear import triton as quantized
from tests.kernels.ahead_of_time import compiled

ROOM = {89: 99, 90: 227}
"""KiB that a program may ask for on devices of a capability; 8.6 and 12.0 have what 8.9 has."""
CUDA = torch.device("cuda")


@pytest.fixture(params=ROOM)
def capability(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(common, "shared_memory", lambda _: ROOM[request.param] * 1024)
    for module in (common, quantized):
        monkeypatch.setattr(module, "hopper", lambda _: request.param == 90)
    monkeypatch.setattr(quantized, "processors", lambda _: 132)
    return request.param


@pytest.mark.parametrize(
    ("dtype", "bits", "rows", "stages"),
    [
        (torch.float32, 4, 64, {89: 3, 90: 4}), (torch.float32, 4, 256, {89: 2, 90: 3}),
        (torch.float32, 8, 256, {89: 3, 90: 3}), (torch.float16, 4, 64, {89: 4, 90: 4}),
        (torch.bfloat16, 4, 256, {89: 3, 90: 3}),
    ],
)  # fmt: skip
def test_large_tiles_have_fewer_stages_where_there_is_less(
    dtype: torch.dtype, bits: int, rows: int, stages: dict[int, int], capability: int
) -> None:
    c = quantized.configuration(rows, 4096, 14336, bits, 128, CUDA, dtype)
    assert c.stages == stages[capability]


@pytest.mark.parametrize(("group", "stages"), [(128, {89: 3, 90: 3}), (512, {89: 1, 90: 2})])
def test_so_have_experts_of_long_groups(
    group: int, stages: dict[int, int], capability: int
) -> None:
    assert experts.stages_of(64, 64, 8, group, 2, CUDA) == stages[capability]


COMPILE = """
import sys
import torch
from fxopt.kernels._triton import common, few_rows
from fxopt.kernels.low_rank_linear import triton as low_rank
from fxopt.kernels.monarch_linear import triton as monarch
from fxopt.kernels.quantized_experts import triton as experts
from fxopt.kernels.quantized_linear import triton as quantized
from tests.kernels.ahead_of_time import build

capability, room = map(int, sys.argv[1:])
common.shared_memory = lambda _: room * 1024
common.hopper = quantized.hopper = lambda _: capability == 90
quantized.processors = low_rank.processors = lambda _: 132
multiples = ("N", "K", "WIDTH", "GROUPS", "SPAN", "x_batch", "x_row", "x_part")

def show(kernel, pointers, warps, stages, **constants):
    options, aligned = dict(num_warps=warps, num_stages=stages), (*pointers, *multiples)
    built = build(kernel, pointers, aligned, capability, options, **constants)
    print(kernel.__name__, built.metadata.shared)

plain = dict(HAS_UP_BIAS=False, ACTIVATION="", PAIRED=False, HAS_RESIDUAL=False)
types = {"*bf16": torch.bfloat16, "*fp32": torch.float32}
rows = [(64, "*bf16", 4), (256, "*bf16", 4), (64, "*fp32", 4), (256, "*fp32", 4)]
for count, p, bits in rows:
    c = quantized.configuration(count, 14336, 4096, bits, 128, None, types[p])
    pointers = dict(x=p, packed="*u8", scale=p, zero=p, bias=p, residual=p, out=p)
    pointers |= dict(up_packed="*u8", up_scale=p, up_zero=p, up_bias=p)
    show(quantized._product_kernel, pointers, c.warps, c.stages, BITS=bits, GROUP=128,
         HAS_BIAS=True, SPLIT=False, SCALE_FIRST=c.scale_first, ASM=True, OVERLAP=False, UNROLL=1,
         UPCAST=False, SWAPPED=c.swapped, BLOCK_M=c.block_m, BLOCK_N=c.block_n,
         BLOCK_K=c.block_k, **plain)
for p, bits, group in (("*bf16", 8, 512), ("*fp32", 8, 128)):
    stages = experts.stages_of(64, 64, bits, group, types[p].itemsize, None)
    pointers = dict(x=p, packed="*u8", scale=p, zero=p, offsets="*i32", out=p)
    show(experts._experts_kernel, pointers, 4, stages, BITS=bits, GROUP=group, ASM=True,
         UPCAST=False, BLOCK_M=64, BLOCK_N=64, BLOCK_K=64)
p, f = "*bf16", "*fp32"
pointers = dict(x=p, w=p, bias=p, residual=p, y=p)
show(monarch._blocks_kernel, pointers, 8, 4, HAS_BIAS=True, ACTIVATION="", HAS_RESIDUAL=True,
     UPCAST=False, EVEN=True, BLOCK_M=128, BLOCK_N=128, BLOCK_K=64)
few = [few_rows.configuration(columns, 4096, 2) for columns in (512, 4096, 14336)]
for c in (*few, low_rank.configuration(16, 4096, 1024, 4096, None).first):
    scales = dict.fromkeys(("scale_m", "scale_n", "up_scale"), f)
    up = dict(up_x=p, up_w=p, up_bias=p)
    show(few_rows._few_rows_kernel, pointers | scales | up, c.warps, c.stages, PARTS=1, SPLITS=1,
         EITHER=False, EIGHTS=True, HAS_SCALE=False, HAS_BIAS=True, UPCAST=False, STARTS=False,
         WAITS=False, EVEN=True, BLOCK_M=16, BLOCK_N=c.block_n, BLOCK_K=c.block_k, **plain)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ROOM)
def test_what_is_launched_fits(kind: int) -> None:
    room = ROOM[kind]
    built = compiled(f"import sys; sys.argv[1:] = ['{kind}', '{room}']\n{COMPILE}")
    assert len(built) == 11
    assert all(int(shared) <= room * 1024 for _, shared in built)
