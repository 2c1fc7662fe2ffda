"""Small models of each kind, with a batch to train on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

Example = tuple[nn.Module, dict[str, Any]]


class Residual(nn.Module):
    """Dropout, tied weights, views, changes in place, a tensor read twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 16)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 48), nn.GELU(), nn.Dropout(0.3))
            for _ in range(2)
        )
        self.mix = nn.Linear(16, 16)
        self.head = nn.Linear(16, 40, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            y = block(x)
            a, b, c = y[..., :16], y[..., 16:32], y[..., 32:].clone()
            y = a * torch.sigmoid(b)
            y[..., :4] *= 2
            x = x + self.mix(y) + c.relu_()
        return self.head(torch.nn.functional.dropout(x.transpose(0, 1), 0.1).contiguous())


class Convolutional(nn.Module):
    """Batch norm in training mode and a skip connection."""

    def __init__(self) -> None:
        super().__init__()

        def block(wide: int, out: int) -> nn.Sequential:
            convolution = nn.Conv2d(wide, out, 3, padding=1, bias=False)
            return nn.Sequential(convolution, nn.BatchNorm2d(out), nn.ReLU(inplace=True))

        self.first, self.second, self.third = block(3, 8), block(8, 8), block(8, 16)
        self.pool = nn.MaxPool2d(2)
        self.drop = nn.Dropout2d(0.25)
        self.head = nn.Linear(16, 4)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.first(pixels)
        x = self.pool(self.third(self.drop(x + self.second(x))))
        return self.head(x.mean((2, 3)))


def residual() -> Example:
    return Residual(), {"ids": torch.randint(40, (4, 24))}


def convolutional() -> Example:
    return Convolutional(), {"pixels": torch.randn(4, 3, 16, 16)}


def mlp() -> Example:
    layers = [layer for _ in range(4) for layer in (nn.Linear(32, 32), nn.GELU(), nn.Dropout(0.2))]
    return nn.Sequential(*layers, nn.Linear(32, 4)), {"input": torch.randn(256, 32)}


def llama() -> Example:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=96, max_position_embeddings=64, use_cache=False,
    )  # fmt: skip
    ids = torch.randint(96, (2, 48))
    return transformers.LlamaForCausalLM(config), {"input_ids": ids, "labels": ids}


def gpt2() -> Example:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        n_embd=64, n_layer=2, n_head=4, vocab_size=96, n_positions=64, use_cache=False,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    ids = torch.randint(96, (2, 48))
    return transformers.GPT2LMHeadModel(config), {"input_ids": ids, "labels": ids}


def vit() -> Example:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        image_size=32, patch_size=4, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1,
    )  # fmt: skip
    batch = {"pixel_values": torch.randn(4, 3, 32, 32), "labels": torch.tensor([0, 1, 1, 0])}
    return transformers.ViTForImageClassification(config), batch


EXAMPLES: dict[str, Callable[[], Example]] = {
    "mlp": mlp,
    "residual": residual,
    "convolutional": convolutional,
    "llama": llama,
    "gpt2": gpt2,
    "vit": vit,
}


# Of the transformers one by default: each of their tests takes seconds.
SLOW = ("gpt2", "vit")


@pytest.fixture(
    params=[pytest.param(n, marks=[pytest.mark.slow] if n in SLOW else []) for n in EXAMPLES]
)
def example(request: pytest.FixtureRequest) -> Example:
    """A model in training mode and its batch, as keyword arguments."""
    model, batch = EXAMPLES[request.param]()
    return model.train(), batch


@pytest.fixture
def small() -> Example:
    """The smallest model that has dropout, ties, views and changes in place."""
    model, batch = residual()
    return model.train(), batch


@pytest.fixture
def conv() -> Example:
    model, batch = convolutional()
    return model.train(), batch
