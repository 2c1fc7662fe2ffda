"""Sites of `linear` that are no plain layers, on a GPU in bf16: experts, embeddings, convolutions.

    python benchmarks/linear_sites.py            # 1 to 2 minutes

Each time is that of one call in a CUDA graph of several, which take turns with other experts and
other rows. Ratios are to what the model computes without a rewrite, timed in the same run:
`F.grouped_mm`, `F.embedding`, `F.conv2d`. Every kernel is compared with its reference first.
Prints a line for each size.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fxopt.ir.patches import from_rows, to_rows
from fxopt.kernels.fp8_linear import fp8_linear, row_scale
from fxopt.kernels.fp8_linear import quantize as quantize_fp8
from fxopt.kernels.quantized_embedding import REFERENCE, quantized_embedding
from fxopt.kernels.quantized_experts import quantized_experts
from fxopt.kernels.quantized_experts import reference as experts_reference
from fxopt.kernels.quantized_linear import dequantize, quantize, quantized_linear

GROUP = 128
CALLS = 12
TOKENS = (1, 16, 256, 4096)

Call = Callable[[Tensor], Tensor]


def random(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def milliseconds(call: Call, inputs: Sequence[Tensor]) -> float:
    call(inputs[0])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for index in range(CALLS):
            call(inputs[index % len(inputs)])
    times: list[float] = []
    for _ in range(12):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times[2:]) / CALLS


def compare(name: str, inputs: Sequence[Tensor], dense: Call, forms: dict[str, Call]) -> None:
    base = milliseconds(dense, inputs)
    times = {form: milliseconds(call, inputs) for form, call in forms.items()}
    ratios = "  ".join(f"{form} {base / time:.2f}x" for form, time in times.items())
    print(f"{name:58}{1e3 * base:9.1f} us  {ratios}", flush=True)


def check(out: Tensor, exact: Tensor, what: str) -> None:
    off = ((out.double() - exact.double()).norm() / exact.double().norm()).item()
    if not off < 0.02:
        raise AssertionError(f"{what}: {off:.3g} off its reference")


def experts(name: str, count: int, chosen: int, k: int, n: int) -> None:
    weight, codes = random(count, n, k), dict[int, list[Tensor]]()
    for bits in (8, 4):
        each = [quantize(one, bits, GROUP) for one in weight]
        codes[bits] = [torch.stack(tensors) for tensors in zip(*each, strict=True)]
    for tokens in TOKENS:
        hit = torch.randint(count, (CALLS, tokens * chosen), device="cuda")
        ends = [torch.bincount(one, minlength=count).cumsum(0).int() for one in hit]
        _experts(f"{name}, {tokens} tokens", random(tokens * chosen, k), ends, weight, codes)


def _experts(
    name: str, x: Tensor, ends: list[Tensor], weight: Tensor, codes: dict[int, list[Tensor]]
) -> None:
    def form(bits: int) -> Call:
        return lambda offsets: quantized_experts(x, *codes[bits], offsets, bits, GROUP)

    for bits in codes:
        exact = experts_reference.quantized_experts(x, *codes[bits], ends[0], bits, GROUP)
        check(form(bits)(ends[0]), exact, f"{name} int{bits}")
    forms = {f"int{bits}": form(bits) for bits in codes}
    compare(name, ends, lambda offsets: F.grouped_mm(x, weight.mT, offs=offsets), forms)


def embeddings() -> None:
    table = random(128256, 4096)
    codes = {bits: quantize(table, bits, GROUP) for bits in (8, 4)}

    def form(bits: int) -> Call:
        packed, scale, zero = codes[bits]
        return lambda ids: quantized_embedding(packed, ids, scale, zero, bits, GROUP)

    for tokens in TOKENS:
        ids = list(torch.randint(len(table), (CALLS, tokens), device="cuda"))
        for bits, (packed, scale, zero) in codes.items():
            exact = REFERENCE(packed, ids[0], scale, zero, bits, GROUP)
            check(form(bits)(ids[0]), exact, f"rows of int{bits}")
        forms = {f"int{bits}": form(bits) for bits in codes}
        name = f"embedding 128256 x 4096, {tokens} tokens"
        compare(name, ids, lambda ids: F.embedding(ids, table), forms)


def convolution(name: str, shape: tuple[int, ...], out: int, patch: int) -> None:
    both, k = (patch, patch), shape[1] * patch * patch
    rank = max(16, k * out // (k + out) // 2 // 16 * 16)
    weight = random(out, shape[1], *both)
    down, up = random(rank, shape[1], *both), random(out, rank, 1, 1)
    scale = row_scale(weight.flatten(1))
    rounded, scales = quantize_fp8(weight.flatten(1), scale), scale[:, 0].contiguous()
    group = next(g for g in (128, 64, k) if k % g == 0)
    codes = quantize(weight.flatten(1), 8, group)
    restored = dequantize(*codes, 8, group).view_as(weight)
    forms: dict[str, Call] = {
        "low rank, half": lambda x: F.conv2d(F.conv2d(x, down, stride=both), up),
        "fp8": lambda x: from_rows(fp8_linear(to_rows(x, both), rounded, scales, None), both),
        "int8": lambda x: from_rows(
            quantized_linear(to_rows(x, both), *codes, None, 8, group), both
        ),
    }
    for layout in (torch.contiguous_format, torch.channels_last):
        x = random(*shape).to(memory_format=layout)
        check(forms["int8"](x), F.conv2d(x, restored, stride=both), f"{name} int8")
        word = "last" if layout == torch.channels_last else "first"
        dense: Call = lambda x: F.conv2d(x, weight, stride=both)  # noqa: E731
        compare(f"{name}, channels {word}", [x], dense, forms)


@torch.inference_mode()
def main() -> None:
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, bf16, groups of {GROUP}")
    experts("Mixtral-8x7B gate+up", 8, 2, 4096, 28672)
    experts("Qwen3-30B-A3B gate+up", 128, 8, 2048, 1536)
    embeddings()
    convolution("1x1, 1024 -> 256, 32 x 14 x 14", (32, 1024, 14, 14), 256, 1)
    convolution("1x1, 256 -> 1024, 32 x 56 x 56", (32, 256, 56, 56), 1024, 1)
    convolution("patch 14, 3 -> 1024, 32 x 224 x 224", (32, 3, 224, 224), 1024, 14)


if __name__ == "__main__":
    main()
