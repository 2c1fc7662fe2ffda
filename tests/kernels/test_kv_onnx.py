"""The growing form through torch.onnx and onnxruntime: one file for prefill and decode."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fxopt.kernels.kv_attention import cached_attention_functional, empty_past, parse
from tests.kernels.growing_example import example_lengths, example_past

onnxruntime = pytest.importorskip("onnxruntime")
LAYOUT = "0:k4v2g32r8s4|1:exact"
KV, GROUP, DIM = 2, 2, 8
BFLOAT16 = 16


class Step(torch.nn.Module):
    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, past: list[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        return cached_attention_functional(
            q, k, v, past, mask, None, None, DIM**-0.5, True, [0], 0.0, [0], LAYOUT
        )


def new_tokens(batch: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(batch, KV * GROUP, count, DIM), *torch.randn(2, batch, KV, count, DIM)


@pytest.fixture(scope="module")
def exported() -> Any:
    past, queries = example_lengths([parse(LAYOUT)])
    state = example_past(parse(LAYOUT), 2, KV, DIM, DIM, past, torch.float32)
    arguments = (*new_tokens(2, queries), torch.ones(2, past + queries, dtype=torch.long), state)
    grows = {0: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC}
    mask = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    program = torch.export.export(
        Step(), arguments, dynamic_shapes=(grows, grows, grows, mask, [grows] * len(state))
    )
    model = torch.onnx.export(program, dynamo=True, opset_version=23, verbose=False)
    assert model is not None
    return model.model_proto


def feed(tensor: Tensor) -> Any:
    tensor = tensor.contiguous()
    if tensor.dtype == torch.bfloat16:
        bits = tensor.view(torch.int16).numpy().view(np.uint16)
        return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, BFLOAT16)
    return onnxruntime.OrtValue.ortvalue_from_numpy(tensor.numpy())


def fetch(value: Any) -> Tensor:
    if value.element_type() == BFLOAT16:
        return torch.from_dlpack(value._ortvalue.to_dlpack())
    return torch.from_numpy(value.numpy())


@pytest.mark.slow
def test_onnxruntime_stores_the_same_bytes(exported: Any) -> None:
    import onnx

    onnx.checker.check_model(exported)
    session = onnxruntime.InferenceSession(exported.SerializeToString())
    names = [entry.name for entry in session.get_inputs()]
    outputs = [entry.name for entry in session.get_outputs()]
    for batch, chunks in ((3, [1, 1, 60, 1, 1]), (1, [50, *[1] * 30, 70, 1])):
        ours = empty_past(parse(LAYOUT), batch, KV, DIM, DIM, torch.float32)
        theirs = [tensor.clone() for tensor in ours]
        length = 0
        for count in chunks:
            new = new_tokens(batch, count)
            length += count
            mask = torch.ones(batch, length, dtype=torch.long)
            mask[0, :9] = 0
            out, ours = Step()(*new, mask, ours)
            feeds = dict(zip(names, map(feed, (*new, mask, *theirs)), strict=True))
            found, *theirs = map(fetch, session.run_with_ort_values(outputs, feeds))
            torch.testing.assert_close(found, out, rtol=1e-5, atol=1e-5)
            for one, other in zip(ours, theirs, strict=True):
                assert one.shape == other.shape
                assert torch.equal(one, other)


def test_example_sizes_are_general() -> None:
    layouts = [parse(text) for text in (LAYOUT, "", "k8v8g128r64s1", "k2v2g64r0s0")]
    past, queries = example_lengths(layouts)
    for layout in layouts:
        state = example_past(layout, 2, KV, DIM, DIM, past, torch.float32)
        assert all(tensor.shape[2] >= 2 for tensor in state)
        for _, fmt in layout.resolve(KV):
            if fmt is not None:
                assert fmt.packed(past + queries) - fmt.packed(past) >= 2 * fmt.group
