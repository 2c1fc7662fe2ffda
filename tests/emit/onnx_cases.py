"""Small models with one rewrite at every site that takes it, for tests of ONNX files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxopt
from fxopt.compiler import Compiler
from fxopt.decide.propose import Proposal
from fxopt.emit.module import OptimizedModule
from fxopt.request import resolve

WIDTH = 128
# The smallest sizes at which each rewrite has something to offer are of long sequences.
GENERATE = fxopt.Generate(batch=1, prompt=4000, new_tokens=90)


class Mlp(nn.Module):
    """Two gated blocks: layers of each shape, alone and in groups."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = (nn.Linear(WIDTH, 2 * WIDTH) for _ in range(2))
        self.down = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


def mlp() -> tuple[nn.Module, dict[str, Any]]:
    torch.manual_seed(0)
    return Mlp().eval(), {"x": torch.randn(2, 40, WIDTH)}


def llama(layers: int = 1, tied: bool = False) -> tuple[nn.Module, dict[str, Any]]:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=160, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=4096,
        initializer_range=0.1, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        tie_word_embeddings=tied,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval(), {"input_ids": torch.randint(3, 97, (1, 40))}


def vision() -> tuple[nn.Module, dict[str, Any]]:
    """A class token before a grid that is large enough for windows in two dimensions."""
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(0)
    config = ViTConfig(
        image_size=37 * 4, patch_size=4, num_channels=3, hidden_size=32, intermediate_size=64,
        num_hidden_layers=1, num_attention_heads=2, initializer_range=0.2,
    )  # fmt: skip
    model = ViTModel(config, add_pooling_layer=False).eval()
    return model, {"pixel_values": torch.randn(1, 3, 37 * 4, 37 * 4)}


def mixture(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, dict[str, Any]]:
    """Two layers of seven experts, of which three are chosen for a token."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=97, hidden_size=64, intermediate_size=96, moe_intermediate_size=128,
        num_experts=7, num_experts_per_tok=3, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=64, initializer_range=0.2,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = Qwen3MoeForCausalLM(config).to(dtype).eval()
    return model, {"input_ids": torch.randint(3, 97, (1, 40))}


def everywhere(
    name: str,
    model: nn.Module,
    example: Mapping[str, Any],
    label: str = "",
    workload: fxopt.Workload | None = None,
) -> tuple[OptimizedModule, list[Proposal]]:
    """`model` with the rewrite `name` at each site that takes it: by turns with each of its
    candidates, or the one labelled `label`, or those whose labels contain it. Nothing is priced or
    searched."""
    request = resolve(
        model, fxopt.Budget(weights="99%"), dict(example), workload=workload,
        calibration=[example] * 3, keep=(), rewrites=[name], at=None, seed=0, time_limit=None,
    )  # fmt: skip
    compiler, turns, chosen = Compiler(request), Counter[str](), list[Proposal]()
    for found in compiler.proposals.by_site.values():
        offered = [proposal for proposal in found if label == proposal.candidate.label] or [
            proposal for proposal in found if label in proposal.candidate.label
        ]
        if offered:
            chosen.append(offered[turns[name] % len(offered)])
            turns[name] += 1
    assert chosen, f"no site takes {name}"
    opt = compiler.emit(compiler.realise(chosen))
    assert isinstance(opt, OptimizedModule)
    return opt, chosen
