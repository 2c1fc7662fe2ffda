"""One decoding step of other libraries over smaller caches: what `kv_decode.py --peers` times.

Each function makes the cache and returns the call; ImportError where its library is not installed.
Contents prove speed alone. Pages lie in order.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

HEADS, KV, DIM, PAGE = 32, 8, 128, 16
Call = Callable[[], object]


def _query(batch: int) -> Tensor:
    return torch.randn(batch, HEADS, DIM, device="cuda", dtype=torch.bfloat16)


def flashinfer(dtype: torch.dtype, batch: int, length: int) -> Call:
    """Paged decoding on tensor cores over keys and values in `dtype`."""
    import flashinfer  # pyright: ignore[reportMissingImports]

    pages = math.ceil(length / PAGE)
    workspace = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=True)
    first = torch.arange(batch + 1, dtype=torch.int32, device="cuda") * pages
    every = torch.arange(batch * pages, dtype=torch.int32, device="cuda")
    last = torch.full((batch,), length - (pages - 1) * PAGE, dtype=torch.int32, device="cuda")
    wrapper.plan(
        first, every, last, HEADS, KV, DIM, PAGE, q_data_type=torch.bfloat16, kv_data_type=dtype
    )
    sizes = (batch * pages, 2, PAGE, KV, DIM)
    cache = torch.empty(sizes, dtype=dtype, device="cuda")
    for part in cache.split(4096):
        part.copy_(torch.randn(part.shape, device="cuda", dtype=torch.bfloat16))
    q = _query(batch)
    return lambda: wrapper.run(q, cache)


def turboquant(float8_keys: bool, batch: int, length: int) -> Call:
    """vLLM's kernel over keys of 4-bit centroids with a norm, or of float8, and 4-bit values."""
    from vllm.v1.attention.ops.triton_turboquant_decode import (  # pyright: ignore[reportMissingImports]
        triton_turboquant_decode_attention,
    )

    pages = math.ceil(length / PAGE)
    key_bytes, value_bytes = DIM if float8_keys else DIM // 2 + 2, DIM // 2 + 4
    sizes = (batch * pages, PAGE, KV, key_bytes + value_bytes)
    cache = torch.zeros(sizes, dtype=torch.uint8, device="cuda")
    table = torch.arange(batch * pages, dtype=torch.int32, device="cuda").view(batch, pages)
    lengths = torch.full((batch,), length, dtype=torch.int32, device="cuda")
    rotation = torch.eye(DIM, device="cuda")
    return partial(
        triton_turboquant_decode_attention, _query(batch), cache, table, lengths, rotation,
        torch.linspace(-2, 2, 16, device="cuda"), DIM**-0.5, 4, key_bytes, 4, key_fp8=float8_keys,
    )  # fmt: skip


def transformers(backend: str, batch: int, length: int) -> Call:
    """A layer of `QuantizedCache` in 4 bits, which dequantises all of it, and attention over that.
    Only steps in which nothing is quantised again are run."""
    from transformers.cache_utils import HQQQuantizedLayer, QuantoQuantizedLayer

    kinds: dict[str, Any] = {"quanto": QuantoQuantizedLayer, "hqq": HQQQuantizedLayer}
    axis = {"quanto": 0, "hqq": 1}[backend]
    layer = kinds[backend](nbits=4, axis_key=axis, axis_value=axis, residual_length=1 << 20)
    k, v = torch.randn(2, batch, KV, length, DIM, device="cuda", dtype=torch.bfloat16)
    layer.update(k, v)
    q = _query(batch)[:, :, None]
    new = k[:, :, :1].clone(), v[:, :, :1].clone()

    def step() -> Tensor:
        keys, values = layer.update(*new)
        return F.scaled_dot_product_attention(q, keys, values, enable_gqa=True)

    return step


PEERS: dict[str, Callable[[int, int], Call]] = {
    "FlashInfer bf16": partial(flashinfer, torch.bfloat16),
    "FlashInfer fp8": partial(flashinfer, torch.float8_e4m3fn),
    "vLLM TurboQuant 4-4": partial(turboquant, False),
    "vLLM TurboQuant fp8-4": partial(turboquant, True),
    "QuantizedCache quanto 4-4": partial(transformers, "quanto"),
    "QuantizedCache hqq 4-4": partial(transformers, "hqq"),
}


def run(
    batch: int, length: int, timed: Callable[[Call], float], report: Callable[..., None],
    missing: set[str],
) -> None:  # fmt: skip
    """Report the time of each peer; one that does not run is named, with its reason, once."""
    for name, make in itertools.filterfalse(lambda item: item[0] in missing, PEERS.items()):
        try:
            report(peer=name, B=batch, T=length, us=round(timed(make(batch, length)), 1))
        except Exception as error:  # whatever another library raises is its answer
            why = (str(error).splitlines() or [""])[0][:160]
            report(peer=name, B=batch, T=length, refused=type(error).__name__, why=why)
            if isinstance(error, ImportError):
                missing.add(name)
        torch.cuda.empty_cache()
