"""Real architectures through optimize, save, load and ONNX; random weights prove shapes only."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxopt

transformers = pytest.importorskip("transformers")


def llama() -> tuple[nn.Module, list[dict[str, Tensor]], fxopt.Budget, Any]:
    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=128, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=64, max_position_embeddings=256,
    )  # fmt: skip
    data = [{"input_ids": torch.randint(256, (1, 200))} for _ in range(4)]
    workload = fxopt.Generate(batch=1, prompt=160, new_tokens=40)
    budget = fxopt.Budget(kl=0.1, kv_cache="160%", weights="60%")
    return transformers.LlamaForCausalLM(config), data, budget, workload


def gpt2() -> tuple[nn.Module, list[dict[str, Tensor]], fxopt.Budget, Any]:
    config = transformers.GPT2Config(
        vocab_size=256, n_embd=128, n_layer=2, n_head=2, n_positions=256
    )
    data = [{"input_ids": torch.randint(256, (1, 90))} for _ in range(4)]
    workload = fxopt.Generate(batch=2, prompt=64, new_tokens=26)
    return transformers.GPT2LMHeadModel(config), data, fxopt.Budget(weights="75%"), workload


def bert() -> tuple[nn.Module, list[dict[str, Tensor]], fxopt.Budget, Any]:
    config = transformers.BertConfig(
        vocab_size=256, hidden_size=128, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=256, max_position_embeddings=64,
    )  # fmt: skip
    mask = torch.ones(1, 31, dtype=torch.long)
    mask[:, 25:] = 0
    data = [{"input_ids": torch.randint(256, (1, 31)), "attention_mask": mask} for _ in range(4)]
    budget = fxopt.Budget(relative_error=0.1, weights="60%")
    return transformers.BertModel(config), data, budget, fxopt.Forward(batch=1, length=31)


def vit() -> tuple[nn.Module, list[dict[str, Tensor]], fxopt.Budget, Any]:
    config = transformers.ViTConfig(
        hidden_size=128, num_hidden_layers=2, num_attention_heads=2, intermediate_size=256,
        image_size=32, patch_size=8,
    )  # fmt: skip
    data = [{"pixel_values": torch.randn(1, 3, 32, 32)} for _ in range(4)]
    budget = fxopt.Budget(kl=0.05, weights="60%")
    return transformers.ViTForImageClassification(config), data, budget, fxopt.Forward()


@pytest.mark.parametrize("build", [llama, gpt2, bert, vit], ids=lambda f: f.__name__)
def test_optimise_save_load_export(build: Callable[[], Any], tmp_path: Path) -> None:
    torch.manual_seed(7)
    model, data, budget, workload = build()
    model.eval()
    opt = fxopt.optimize(model, budget, data[0], calibration=data, workload=workload)
    assert opt.plan.rewritten
    assert all(row.excess <= 0 for row in opt.report.rows)
    with torch.no_grad():
        expected, found = model(**data[0]), opt(**data[0])
    assert type(found) is type(expected)
    assert [o.shape for o in found.to_tuple() if isinstance(o, Tensor)] == [
        o.shape for o in expected.to_tuple() if isinstance(o, Tensor)
    ]
    opt.save(tmp_path / "saved")
    loaded = fxopt.load(tmp_path / "saved")
    with torch.no_grad():
        assert torch.equal(loaded(**data[0])[0], found[0])
    report = opt.export_onnx(tmp_path / "model.onnx")
    assert report.difference < 1e-4
    assert (tmp_path / "model.onnx").stat().st_size > 0


def test_example_inputs_come_from_the_config() -> None:
    torch.manual_seed(1)
    model, *_ = bert()
    opt = fxopt.optimize(model.eval(), fxopt.Budget(weights="60%"))
    assert opt(input_ids=torch.randint(256, (3, 17))).last_hidden_state.shape == (3, 17, 128)
