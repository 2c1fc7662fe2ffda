"""Architecture families in onnxruntime at sizes other than those they were captured at."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxopt.emit.ort import Session
from tests.emit.onnx_cases import everywhere

hf = pytest.importorskip("transformers")
pytest.importorskip("onnxruntime")

VOCAB, SPECIAL = 97, {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SHAPES = ((1, 5), (2, 9), (3, 17))
Inputs = Callable[[int, int], dict[str, Tensor]]


def llama() -> nn.Module:
    config = hf.LlamaConfig(
        vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, **SPECIAL,
    )  # fmt: skip
    return hf.LlamaForCausalLM(config)


def gpt2() -> nn.Module:
    sizes = {"n_positions": 64, "n_embd": 64, "n_layer": 2, "n_head": 4}
    return hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=VOCAB, **sizes, **SPECIAL))


def bert() -> nn.Module:
    config = hf.BertConfig(
        vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=64,
    )  # fmt: skip
    return hf.BertForMaskedLM(config)


def vit() -> nn.Module:
    config = hf.ViTConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        image_size=16, patch_size=4,
    )  # fmt: skip
    return hf.ViTForImageClassification(config)


def t5() -> nn.Module:
    config = hf.T5Config(
        vocab_size=VOCAB, d_model=64, d_kv=16, d_ff=96, num_layers=1, num_heads=4,
        decoder_start_token_id=0, **{**SPECIAL, "bos_token_id": None},
    )  # fmt: skip
    return hf.T5ForConditionalGeneration(config)


def padded(batch: int, length: int) -> dict[str, Tensor]:
    """Tokens of which the first row is padded on the left, and the last one on the right."""
    mask = torch.ones(batch, length, dtype=torch.int64)
    if batch > 1:
        mask[0, :3] = 0
        mask[-1, -2:] = 0
    return {"input_ids": torch.randint(3, VOCAB, (batch, length)), "attention_mask": mask}


def positioned(batch: int, length: int) -> dict[str, Tensor]:
    given = padded(batch, length)
    positions = (given["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    return {**given, "position_ids": positions}


def images(batch: int, length: int) -> dict[str, Tensor]:
    del length
    return {"pixel_values": torch.randn(batch, 3, 16, 16)}


def translated(batch: int, length: int) -> dict[str, Tensor]:
    target = torch.randint(3, VOCAB, (batch, length // 2))
    mask = {"decoder_attention_mask": torch.ones_like(target)}
    return {**padded(batch, length), "decoder_input_ids": target, **mask}


FAMILIES: list[tuple[Callable[[], nn.Module], Inputs]] = [
    (llama, positioned), (gpt2, positioned), (bert, padded), (vit, images), (t5, translated),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("make", "inputs"), FAMILIES, ids=[make.__name__ for make, _ in FAMILIES])
def test_a_family_runs_at_three_shapes(make: Any, inputs: Inputs, tmp_path: Path) -> None:
    torch.manual_seed(0)
    example = inputs(2, 12)
    example.pop("position_ids", None)
    opt, _ = everywhere("linear.quantized", make().eval(), example, label="int4")
    report = opt.export_onnx(tmp_path / "model.onnx")
    assert report.difference < 1e-4
    session = Session(report.path)
    for shape in SHAPES:
        given = inputs(*shape)
        with torch.no_grad():
            wanted = opt(**given).logits
        torch.testing.assert_close(session.run(given)["logits"], wanted, atol=1e-4, rtol=0)


@pytest.mark.slow
def test_gpt2_generates_in_ten_steps(tmp_path: Path) -> None:
    """Positions are looked up in a table here, and the cache is exact."""
    torch.manual_seed(0)
    opt, _ = everywhere("attention.exact", gpt2().eval(), {"input_ids": padded(1, 12)["input_ids"]})
    session = Session(opt.export_onnx(tmp_path / "model.onnx", kind="generate").path)
    cache = {n: torch.zeros(2, 4, 0, 16) for n in session.inputs if n.startswith("past.")}
    sequence = positioned(2, 30)
    # a row that ends early is the business of whoever samples
    sequence["attention_mask"][-1] = 1
    sequence["position_ids"][-1] = torch.arange(30)
    with torch.no_grad():
        wanted = opt(**sequence).logits
    seen = 0
    for length in (20, *[1] * 10):
        now = slice(seen, seen + length)
        step = {
            "input_ids": sequence["input_ids"][:, now],
            "position_ids": sequence["position_ids"][:, now],
            "attention_mask": sequence["attention_mask"][:, : now.stop],
        }
        found = session.run({**step, **cache})
        cache = {name: found[name.replace("past.", "present.")] for name in cache}
        torch.testing.assert_close(found["logits"], wanted[:, now], atol=1e-4, rtol=0)
        seen += length
    assert seen == 30
