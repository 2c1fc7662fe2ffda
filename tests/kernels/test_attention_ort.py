"""`GroupQueryAttention` of onnxruntime against the definition, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fxopt.ir.ops import ATTEND
from fxopt.kernels.attention.ort import OPERATOR, grouped_query_attention, refusal
from tests.kernels.attention_file import AttentionFile

DEFAULTS = {n: p.default for n, p in ATTEND.parameters.items() if p.default is not p.empty}
CASES: list[dict[str, Any]] = [
    {},
    {"window": (9, 9), "softcap": 3.0, "heads": (6, 6), "dim": 8},
    {"sinks": True, "window": (17,), "heads": (8, 1), "dim": 24},
]
LENGTHS = ((3, 31), (1, 1), (2, 150))


def made(
    batch: int, length: int, heads: tuple[int, int] = (4, 2), dim: int = 16, **options: Any
) -> dict[str, Any]:
    """A call of `attend` by name, its first row padded on the left and its last on the right."""
    torch.manual_seed(length)
    q = torch.randn(batch, heads[0], length, dim)
    k, v = torch.randn(2, batch, heads[1], length, dim)
    mask = torch.ones(batch, length, dtype=torch.int64)
    if batch > 1:
        mask[0, : length // 3], mask[-1, -3:] = 0, 0
    if options.pop("sinks", False):
        options["sinks"] = torch.linspace(-2, 2, heads[0])
    return {
        "q": q, "k": k, "v": v, "mask": mask, **{n: d for n, d in DEFAULTS.items() if n != "mask"},
        "scale": 0.3, "causal": True, **options,
    }  # fmt: skip


def defined(call: dict[str, Any]) -> Tensor:
    """[B, N, H, D] by the definition, a row at a time."""
    q, k, v = (call[name].double() for name in "qkv")
    batch, heads, length, dim = q.shape
    group, window = heads // k.shape[1], call["window"][0]
    out = torch.zeros(batch, length, heads, dim, dtype=torch.float64)
    for b in range(batch):
        for i in range(length):
            first = max(0, i - window + 1) if window else 0
            seen = [j for j in range(first, i + 1) if call["mask"][b, j]]
            for h in range(heads if seen else 0):
                scores = k[b, h // group, seen] @ q[b, h, i] * call["scale"]
                if call["softcap"]:
                    scores = call["softcap"] * (scores / call["softcap"]).tanh()
                if call["sinks"] is not None:
                    scores = torch.cat([scores, call["sinks"][h : h + 1].double()])
                weights = scores.softmax(0)[: len(seen)]
                out[b, i, h] = weights @ v[b, h // group, seen]
    return out


@pytest.mark.parametrize("options", CASES)
def test_one_operator_computes_a_prompt(options: dict[str, Any]) -> None:
    """At other sizes than the file was traced with, with padding, and rows that see nothing."""
    file = AttentionFile(made(2, 40, **options), lambda **call: grouped_query_attention(call))
    assert file.domains == {"", OPERATOR.partition("::")[0]}
    for batch, length in LENGTHS:
        call = made(batch, length, **options)
        torch.testing.assert_close(
            file.run(call).double(), defined(call), rtol=1e-5, atol=1e-5, msg=str((batch, length))
        )


REFUSED = {
    "attention is not causal": {"causal": False},
    "a bias is added to the scores": {"bias": torch.zeros(1, 1, 8, 8)},
    "heads see other keys than one sliding window": {"sink_tokens": (4,), "window": (16,)},
    "there are not as many queries as keys": {"q": torch.zeros(1, 4, 3, 16)},
    "value heads have other sizes than key heads": {"v": torch.zeros(1, 2, 8, 24)},
    "heads of 20 channels are no multiple of 8": {n: torch.zeros(1, 2, 8, 20) for n in "qkv"},
}


@pytest.mark.parametrize("reason", REFUSED)
def test_others_are_refused(reason: str) -> None:
    def answer(call: dict[str, Any], dtype: torch.dtype = torch.float32) -> str | None:
        return refusal(call, [call[name].shape for name in "qkv"], dtype)

    call = made(1, 8)
    assert answer(call) is None
    assert answer(call | REFUSED[reason]) == reason
    assert answer(call | {"window": (4, 8)}) == "heads see other keys than one sliding window"
    assert "bfloat16" in (answer(call, torch.bfloat16) or "")
