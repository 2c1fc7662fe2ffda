"""activation(gate) * up in one kernel."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fxopt.kernels._triton.epilogue import activated

BLOCK = 1024


@triton.jit
def _gated_kernel(
    gate, up, out, F, gate_n, up_n,
    ACTIVATION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK features of one row: gate and up [rows, F] with rows `gate_n` and `up_n` apart."""
    i_n = tl.program_id(0).to(tl.int64)
    o_f = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m_f = o_f < F
    b_x = tl.load(gate + i_n * gate_n + o_f, mask=m_f, other=0.0).to(tl.float32)
    b_up = tl.load(up + i_n * up_n + o_f, mask=m_f, other=0.0)
    b_y = activated(b_x, ACTIVATION)
    b_y = b_y.to(b_up.dtype).to(tl.float32) * b_up.to(tl.float32)
    tl.store(out + i_n * F + o_f, b_y.to(b_up.dtype), mask=m_f)


def gated_forward(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """As the reference for half precision, computed in float32 and contiguous."""
    size = gate.shape[-1]
    out = gate.new_empty(gate.shape)
    gate, up = (t.reshape(-1, size) for t in (gate, up))
    gate, up = (t if t.stride(1) == 1 else t.contiguous() for t in (gate, up))
    _gated_kernel[(len(gate), triton.cdiv(size, BLOCK))](
        gate, up, out, size, gate.stride(0), up.stride(0),
        ACTIVATION=activation, BLOCK=BLOCK, enable_fp_fusion=False,
    )  # fmt: skip
    return out
