"""Which kernels serve a head class on a GPU: what they read, and that nothing waits for it."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

from fxopt.kernels.attention.reference import attention_reference
from fxopt.kernels.kv_append import triton as appending
from fxopt.kernels.kv_attention import allocate, op, parse
from fxopt.kernels.kv_attention import triton as decoding
from fxopt.kernels.kv_attention.device import attend_and_append
from fxopt.kernels.kv_attention.mutating import cached_attention_mutating

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KV, GROUP = 2, 3


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, device=DEVICE)


@pytest.mark.parametrize("kind", [torch.bool, torch.int64, torch.float32])
@pytest.mark.parametrize("layout", ["", "k4v4g32r3s2"])
def test_masks_of_any_dtype(layout: str, kind: torch.dtype) -> None:
    x = (draw(2, KV * GROUP, 90, 8), draw(2, KV, 90, 8), draw(2, KV, 90, 8))
    mask = (torch.rand(2, 90, device=DEVICE) > 0.3).to(kind)
    # Columns that are no neighbours in memory.
    spread = torch.stack([mask, mask], -1)[..., 0]
    outputs: list[list[Tensor]] = []
    for chosen, seen in ((None, mask.bool()), (attend_and_append, spread)):
        kernels = None if chosen is None else partial(chosen, attention_reference)
        state = allocate(parse(layout), 2, KV, 8, 8, 90, torch.float32, DEVICE)
        start = torch.zeros((), dtype=torch.int64, device=DEVICE)
        found: list[Tensor] = []
        for count in (85, 1, 4):
            done = int(start)
            new = [t[:, :, done : done + count] for t in x]
            found.append(
                cached_attention_mutating(
                    *new, state, start, seen[:, : done + count], None, None,
                    0.3, True, [0], 0.0, [0], layout, kernels=kernels,
                )
            )  # fmt: skip
            start += count
        outputs.append(found)
    for one, other in zip(*outputs, strict=True):
        torch.testing.assert_close(one, other, rtol=3e-6, atol=3e-6)


class Waits(TorchDispatchMode):
    """Counts what has to wait for a device."""

    count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func._schema.name.removeprefix("aten::")
        self.count += name in {"_local_scalar_dense", "nonzero", "is_nonzero", "item"}
        return func(*args, **(kwargs or {}))


@pytest.mark.skipif(DEVICE != "cpu", reason="the interpreter stands in for a device")
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("layout", ["", "k4v4g32r3s2", "0:k8v2g32r5s1|1:exact"])
def test_what_waits_for_the_device(
    layout: str, known: bool, masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing of a decoding step does, and of a prefill nothing whose length is known."""
    launched: list[str] = []
    for module, name in (
        (decoding, "_decode_kernel"), (decoding, "_join_kernel"),
        (appending, "_plan_kernel"), (appending, "_pack_kernel"), (appending, "_keep_kernel"),
        (appending, "_finish_kernel"),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, Launched(name, launched))
    state = allocate(parse(layout), 2, KV, 8, 8, 90, torch.float32)
    start = torch.zeros((), dtype=torch.int64)
    for count, length in ((70, 0), (1, 70)):
        launched.clear()
        q, k, v = draw(2, KV * GROUP, count, 8), draw(2, KV, count, 8), draw(2, KV, count, 8)
        mask = torch.ones(2, length + count) if masked else None
        with Waits() as waits:
            attend_and_append_all(q, k, v, state, start, mask, layout, length if known else None)
        if count == 1 or known:
            assert waits.count == 0
        assert len(launched) <= (2 if count == 1 else 3) * len(parse(layout).classes)
        start += count


class Launched:
    """Stands in for a kernel: that of a device would not compute anything here either."""

    def __init__(self, name: str, launched: list[str]) -> None:
        self.name, self.launched = name, launched

    def __getitem__(self, grid: object) -> Any:
        return lambda *_, **__: self.launched.append(self.name)


def attend_and_append_all(
    q: Tensor, k: Tensor, v: Tensor, state: list[Tensor], start: Tensor, mask: Tensor | None,
    layout: str, length: int | None,
) -> Tensor:  # fmt: skip
    def attention(q: Tensor, *_: Any, **__: Any) -> Tensor:
        return q.transpose(1, 2).contiguous()

    return cached_attention_mutating(
        q, k, v, state, start, mask, None, None, 0.3, True, [0], 0.0, [0], layout,
        attention, partial(attend_and_append, attention), length,
    )  # fmt: skip


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0)])
def test_a_gpu_that_does_not_convert_e4m3_reads_it_by_plain_pytorch(
    capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    op._reads.cache_clear()
    for layout, served in (
        ("k8v8g32r0s0", True), ("kf8v4g32r0s0", capability >= (8, 9)),
        ("0:k4vf8g32r0s0|1:exact", capability >= (8, 9)),
    ):  # fmt: skip
        there = torch.device("cuda", 0)
        assert op.decodes_on_device(4, (64, 64), torch.bfloat16, layout, there) == served
    op._reads.cache_clear()
