"""What cannot be captured is one message: what, where, why, what to do next."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from fxopt.capture import capture
from fxopt.ir.errors import CaptureError

SMALL: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 1, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


def from_package(name: str, base: type) -> type:
    return type("Changed", (base,), {"__module__": f"{name}.nn"})


@pytest.mark.parametrize(
    ("package", "way_out"),
    [
        ("bitsandbytes", "without quantization_config"),
        ("peft", "merge_and_unload"),
        ("awq", "unquantized checkpoint"),
        ("gptqmodel", "unquantized checkpoint"),
    ],
)
def test_modules_that_a_library_changed(package: str, way_out: str) -> None:
    model = Net()
    model.fc = from_package(package, nn.Linear)(4, 4)
    with pytest.raises(CaptureError, match=rf"Changed at 'fc' was changed by .*{way_out}"):
        capture(model, torch.randn(2, 4))


def test_tensor_subclasses() -> None:
    model = Net()
    kind = from_package("torchao", Tensor)
    model.fc.weight = nn.Parameter(model.fc.weight.detach().as_subclass(kind))
    with pytest.raises(CaptureError, match="changed by torchao"):
        capture(model, torch.randn(2, 4))
    kind = from_package("sharding", Tensor)
    model.fc.weight = nn.Parameter(torch.randn(4, 4).as_subclass(kind))
    with pytest.raises(CaptureError, match=r"fc.weight is a Changed, not a plain tensor"):
        capture(model, torch.randn(2, 4))


def test_models_loaded_quantized() -> None:
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL, num_attention_heads=2))
    config = types.SimpleNamespace(quant_method="fp8")
    model.hf_quantizer = types.SimpleNamespace(quantization_config=config)
    with pytest.raises(CaptureError, match=r"loaded quantized \(fp8\)"):
        capture(model)


def test_models_spread_over_devices() -> None:
    model: Any = Net()
    model.hf_device_map = {"fc": 0, "": "cpu"}
    model.fc._hf_hook = object()
    with pytest.raises(CaptureError, match=r"moved between devices by accelerate.*device_map"):
        capture(model, torch.randn(2, 4))


def test_one_device_under_accelerate_is_fine() -> None:
    model: Any = Net()
    model.hf_device_map = {"": "cpu"}
    model._hf_hook = object()
    assert capture(model, torch.randn(2, 4)).sites


def test_meta_weights() -> None:
    model = Net().to("meta")
    with pytest.raises(CaptureError, match=r"fc.weight is on the meta device.*from_pretrained"):
        capture(model, torch.randn(2, 4))


def test_input_on_another_device() -> None:
    with pytest.raises(CaptureError, match=r"example input 'x' is on meta, .* on cpu"):
        capture(Net(), torch.randn(2, 4, device="meta"))


def test_no_inputs() -> None:
    with pytest.raises(CaptureError, match="Net needs example_inputs"):
        capture(Net())


def test_wrong_arguments() -> None:
    with pytest.raises(CaptureError, match=r"do not fit Net.forward\(.*unexpected keyword"):
        capture(Net(), {"y": torch.randn(2, 4)})


class Prefixed(nn.Module):
    """Takes a batch of one alone, which tracing makes two."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.prefix = nn.Parameter(torch.randn(1, 2, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(torch.cat([self.prefix, x], 1))


def test_inputs_that_the_model_takes_are_not_blamed() -> None:
    with pytest.raises(CaptureError) as caught:
        capture(Prefixed(), torch.randn(1, 5, 4))
    assert "itself fails" not in str(caught.value)


def test_inputs_that_the_model_itself_does_not_take(capfd: pytest.CaptureFixture[str]) -> None:
    model = nn.Sequential(nn.Linear(4, 4), Net())
    with pytest.raises(CaptureError) as caught:
        capture(model, torch.randn(2, 5))
    said = str(caught.value)
    assert "Sequential itself fails on the example inputs ([2, 5] float32): RuntimeError" in said
    assert "It fails in 0 (Linear). Pass example_inputs that the model takes." in said
    assert "torch.where" not in said
    assert capfd.readouterr().err == ""  # nor does torch print a traceback of its own


def test_tensors_in_keyword_arguments() -> None:
    class Loose(nn.Module):
        def forward(self, x: Tensor, **kwargs: Tensor) -> Tensor:
            return x + kwargs["y"]

    with pytest.raises(CaptureError, match=r"no argument 'y'\. A tensor that goes to its \*\*kw"):
        capture(Loose(), {"x": torch.randn(2), "y": torch.randn(2)})


def test_a_mistyped_argument_of_a_forward_that_takes_any() -> None:
    class Model(nn.Module):
        def forward(self, input_ids: Tensor, **kwargs: Tensor) -> Tensor:
            return input_ids

    with pytest.raises(CaptureError, match=r"no argument 'inputs'\. Did you mean 'input_ids'\?"):
        capture(Model(), {"inputs": torch.ones(1, 3)})


def test_data_dependent_control_flow() -> None:
    class Choice(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(CaptureError, match=r"Choice cannot be captured.*torch.where") as caught:
        capture(Choice(), torch.randn(2, 3))
    assert len(str(caught.value)) < 800


def test_autocast_regions() -> None:
    class Region(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return x @ x.transpose(0, 1)

    with pytest.raises(CaptureError, match=r"enabled torch.autocast region.*bfloat16"):
        capture(Region(), torch.randn(2, 3))


def test_mamba_says_which_length_is_fixed() -> None:
    model = hf.MambaForCausalLM(hf.MambaConfig(**SMALL, state_size=4)).eval()
    captured = capture(model, {"input_ids": torch.randint(97, (1, 7))})
    assert captured.static_dims == ("input_ids dim 1 = 7", "attention_mask dim 1 = 7")
    assert not captured.causal_lm
    assert "no argument position_ids" in str(captured.reason)
    ids = torch.randint(97, (3, 7))
    torch.testing.assert_close(captured.run(input_ids=ids).logits, model(input_ids=ids).logits)
    with pytest.raises(CaptureError, match="model fixed these sizes"):
        captured.run(input_ids=torch.randint(97, (3, 8)))


def test_attention_outside_the_interface_is_still_found() -> None:
    config = hf.FalconConfig(**SMALL, num_attention_heads=2)
    model = hf.FalconForCausalLM(config).eval()
    captured = capture(model)
    assert "does not go through transformers' attention interface" in str(captured.reason)
    infos = [s.info for s in captured.sites if s.family == "attention"]
    assert [(i.causal, i.has_mask, i.num_kv_heads) for i in infos] == [(True, True, 1)]
    ids, mask = torch.randint(97, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    mask[0, :3] = 0
    got = captured.run(input_ids=ids, attention_mask=mask).logits
    want = model(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(got[mask.bool()], want[mask.bool()])


def test_attention_weights_are_kept_when_asked_for() -> None:
    config = hf.BertConfig(**SMALL, num_attention_heads=2, intermediate_size=64)
    model = hf.BertModel(config, add_pooling_layer=False).eval()
    model.set_attn_implementation("eager")
    inputs = {"input_ids": torch.randint(97, (2, 5)), "output_attentions": True}
    captured = capture(model, inputs)
    assert captured.attentions == ()
    torch.testing.assert_close(captured.run(**inputs).attentions, model(**inputs).attentions)


def test_no_foreign_library_is_imported() -> None:
    assert not {"bitsandbytes", "peft", "torchao"} & set(sys.modules)
