"""The page docs/huggingface.md: its snippets run in the order in which they stand."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
TEXTS = [
    "the quick brown fox jumps over the lazy dog and runs",
    "a lazy dog sleeps under the old brown tree all day long",
    "over the hill the quick fox looks for another lazy dog",
    "the old tree stands where the quick brown river runs on",
]


def snippets() -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / "docs/huggingface.md").read_text(), re.DOTALL)


def write_model(folder: Path) -> None:
    """A small llama with a byte-level tokenizer."""
    import transformers as hf
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokens = Tokenizer(models.BPE())
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<pad>", "<s>", "</s>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokens.train_from_iterator(TEXTS, trainer)
    hf.PreTrainedTokenizerFast(
        tokenizer_object=tokens, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    config = hf.LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=300, max_position_embeddings=128,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    hf.LlamaForCausalLM(config).save_pretrained(folder)


@pytest.mark.slow
def test_the_snippets_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "my-llm")
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS))
    names: dict[str, Any] = {}
    for code in snippets():
        if "Trainer" in code and not find_spec("accelerate"):
            continue
        exec(compile(code, "huggingface.md", "exec"), names)
    ids = names["batches"][0]["input_ids"]
    with torch.no_grad():
        want = names["opt"](ids).logits
        torch.testing.assert_close(names["small"](ids).logits, want)
        torch.testing.assert_close(names["same"].model(ids).logits, want)
        torch.testing.assert_close(names["logits"], names["model"](**names["batches"][0]).logits)
