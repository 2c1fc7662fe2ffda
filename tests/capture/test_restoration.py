"""Capture leaves no trace: model, config, registries and random state are as before."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from fxopt.capture import capture
from fxopt.capture.interface import configs_of
from fxopt.ir.errors import CaptureError


def llama(**changes: Any) -> Any:
    config = hf.LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2, **changes,
    )  # fmt: skip
    return hf.LlamaForCausalLM(config)


def snapshot(model: Any) -> dict[str, Any]:
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    return {
        "configs": [copy.deepcopy(config.__dict__) for config in configs_of(model)],
        "attention": dict(AttentionInterface._global_mapping),
        "masks": dict(AttentionMaskInterface._global_mapping),
        "training": [module.training for module in model.modules()],
        "hooks": [dict(getattr(m, name)) for m in model.modules() for name in hooks],
        "forward": [m.__dict__.get("forward") for m in model.modules()],
        "parameters": {n: (id(p), p.requires_grad) for n, p in model.named_parameters()},
        "buffers": {n: id(b) for n, b in model.named_buffers()},
        "values": {n: t.clone() for n, t in model.state_dict().items()},
        "rng": torch.get_rng_state(),
        "dtype": torch.get_default_dtype(),
        "grad": torch.is_grad_enabled(),
    }


def assert_untouched(before: dict[str, Any], model: Any) -> None:
    after = snapshot(model)
    assert torch.equal(before.pop("rng"), after.pop("rng"))
    values = after.pop("values")
    for name, value in before.pop("values").items():
        assert torch.equal(value, values[name])
    assert before == after


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_everything_is_as_before(training: bool, implementation: str) -> None:
    model = llama(attn_implementation=implementation).train(training)
    model.model.layers[0].mlp.eval()
    before = snapshot(model)
    capture(model)
    assert_untouched(before, model)


def test_encoder_decoder_with_copied_configs() -> None:
    config = hf.T5Config(d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4, vocab_size=97)
    model = hf.T5ForConditionalGeneration(config)
    assert len(configs_of(model)) > 1
    before = snapshot(model)
    capture(model)
    assert_untouched(before, model)


class Broken(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return x
        return torch.randn_like(x)


def test_also_when_export_fails() -> None:
    model = llama()
    model.model.layers[0].mlp.act_fn = Broken()
    before = snapshot(model)
    with pytest.raises(CaptureError, match="LlamaForCausalLM cannot be captured"):
        capture(model)
    assert_untouched(before, model)


def test_a_registration_of_the_users_own_survives() -> None:
    def own(*_: Any, **__: Any) -> None: ...

    AttentionInterface.register("fxopt", own)
    try:
        capture(llama())
        assert AttentionInterface._global_mapping["fxopt"] is own
    finally:
        del AttentionInterface._global_mapping["fxopt"]


def test_two_threads_capture_at_once() -> None:
    models = [llama() for _ in range(2)]
    found: list[int] = []
    threads = [
        threading.Thread(target=lambda m=m: found.append(len(capture(m).sites))) for m in models
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 2
    assert len(set(found)) == 1
    assert "fxopt" not in AttentionInterface._global_mapping
