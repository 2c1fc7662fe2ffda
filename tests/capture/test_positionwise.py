"""A cache is offered only where tokens meet in attention alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fxopt.capture import capture
from fxopt.capture.positionwise import why_not_positionwise


def llama() -> Any:
    return hf.LlamaForCausalLM(
        hf.LlamaConfig(
            vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=2,
        )
    ).eval()  # fmt: skip


class TokenShift(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x + 0.5 * nn.functional.pad(x, (0, 0, 1, 0))[:, :-1])


class OwnPositions(TokenShift):
    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x + torch.arange(x.shape[1], device=x.device)[:, None])


class BatchMean(TokenShift):
    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x + x.mean(0, keepdim=True))


class MadeWeight(TokenShift):
    def forward(self, x: Tensor) -> Tensor:
        shares = x.mean((0, 1)).expand(x.shape[2], x.shape[2])
        return self.inner(x + nn.functional.linear(x, shares))


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    ("wrap", "reason"),
    [
        (MadeWeight, "tokens meet outside attention"),
        (TokenShift, "position 4 of sequence 0 changes the result at position 5 of sequence 0"),
        (OwnPositions, "does not take all positions from position_ids"),
        (BatchMean, "at position 4 of sequence 1"),
    ],
)
def test_reasons(wrap: Any, reason: str, device: str) -> None:
    model = llama().to(device)
    model.model.layers[1].mlp = wrap(model.model.layers[1].mlp)
    captured = capture(model, weights=device != "meta")
    assert not captured.causal_lm
    assert reason in str(captured.reason)
    assert not any(s.family == "kv_cache" for s in captured.sites)
    if device == "meta":
        return
    ids = torch.randint(97, (3, 8))
    torch.testing.assert_close(captured.run(input_ids=ids).logits, model(input_ids=ids).logits)


def test_key_shift_is_noticed() -> None:
    """Mixing tokens in the keys alone is seen too."""
    model = llama()
    attention = model.model.layers[0].self_attn
    attention.k_proj = TokenShift(attention.k_proj)
    assert "tokens meet outside attention" in str(capture(model).reason)


class Reordered(TokenShift):
    """Rounds otherwise where there are other rows, as a matrix product in half precision may."""

    def forward(self, x: Tensor) -> Tensor:
        rows = torch.arange(x.shape[1], device=x.device, dtype=torch.float32)[:, None]
        noise = torch.sin(12.9898 * rows * x.shape[1] + torch.arange(x.shape[2], device=x.device))
        return self.inner(x * (1 + 0.05 * noise).to(x.dtype))


def test_sums_in_another_order_are_no_reason_in_half_precision() -> None:
    model = llama().to(torch.bfloat16)
    model.model.layers[1].mlp = Reordered(model.model.layers[1].mlp)
    assert capture(model).causal_lm
    model.model.layers[1].mlp = OwnPositions(model.model.layers[1].mlp.inner)
    assert "position_ids" in str(capture(model).reason)


class RoundsByRows(TorchDispatchMode):
    """Products of matrices err otherwise for other numbers of rows."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        y = func(*args, **(kwargs or {}))
        if func is not torch.ops.aten.mm.default:
            return y
        return y * (1 + 0.5 * torch.sin(torch.arange(y.shape[1]) * y.shape[0])).to(y.dtype)


def test_how_products_are_rounded_is_no_reason() -> None:
    """On GPUs other kernels serve other numbers of rows, and deep models amplify the difference."""
    model = llama().to(torch.bfloat16)
    captured = capture(model, generate=False)
    x = torch.ones(4, 4)
    with RoundsByRows():
        assert not torch.equal(nn.functional.linear(x, x), nn.functional.linear(x[:2], x))
        assert why_not_positionwise(captured.graph, 97) is None


def test_attention_that_looks_ahead_has_no_cache() -> None:
    model = llama()
    model.config.is_causal = False
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    captured = capture(model)
    assert captured.reason == "the attention at model.layers.0.self_attn is not causal"


def test_only_when_generation_is_asked_for() -> None:
    captured = capture(llama(), generate=False)
    assert not captured.causal_lm
    assert captured.reason is None


def test_inputs_that_decoding_cannot_pass_on() -> None:
    model = llama()
    embeds = {"inputs_embeds": torch.randn(2, 5, 32)}
    captured = capture(model, embeds)
    assert "example_inputs give inputs_embeds" in str(captured.reason)
    torch.testing.assert_close(captured.run(**embeds).logits, model(**embeds).logits)


def test_hidden_states_among_the_outputs() -> None:
    model = llama()
    model.config.output_hidden_states = True
    captured = capture(model)
    assert "more than logits" in str(captured.reason)
    assert len(captured.run(input_ids=torch.ones(2, 4, dtype=torch.long)).hidden_states) == 3
