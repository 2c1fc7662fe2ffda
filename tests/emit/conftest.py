"""Tiny random models, captured once for all tests of this folder."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from fxopt.capture import Captured, capture
from fxopt.emit.editor import GraphEditor
from fxopt.emit.module import OptimizedModule, emit
from fxopt.emit.registry import register_ops

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 61,
    "max_position_embeddings": 128,
}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


class Case(NamedTuple):
    model: nn.Module
    example: dict[str, Any]
    captured: Captured

    def emit(self, editor: GraphEditor | None = None) -> OptimizedModule:
        return emit(self.captured, editor or GraphEditor(self.captured), self.model)


def tiny(name: str) -> tuple[nn.Module, dict[str, Any]]:
    import transformers as hf

    torch.manual_seed(0)
    ids = torch.randint(3, 61, (2, 11))
    grouped = {"num_key_value_heads": 2, **SPECIAL, **SIZES}
    no_text = {k: v for k, v in SIZES.items() if k not in ("vocab_size", "max_position_embeddings")}
    match name:
        case "llama":
            model: nn.Module = hf.LlamaForCausalLM(hf.LlamaConfig(**grouped))
        case "gpt2":
            config = hf.GPT2Config(
                vocab_size=61, n_positions=128, n_embd=32, n_layer=3, n_head=4, **SPECIAL
            )
            model = hf.GPT2LMHeadModel(config)
        case "gemma3":
            layers = ["sliding_attention", "sliding_attention", "full_attention"]
            config = hf.Gemma3TextConfig(
                head_dim=8, sliding_window=7, layer_types=layers, **grouped
            )
            model = hf.Gemma3ForCausalLM(config)
        case "bert":
            model = hf.BertModel(hf.BertConfig(**SIZES))
            mask = torch.ones_like(ids)
            mask[0, 7:] = 0
            return model.eval(), {"input_ids": ids, "attention_mask": mask}
        case _:
            config = hf.ViTConfig(image_size=16, patch_size=4, **no_text)
            model = hf.ViTForImageClassification(config)
            return model.eval(), {"pixel_values": torch.randn(2, 3, 16, 16)}
    return model.eval(), {"input_ids": ids}


@cache
def _case(name: str) -> Case:
    model, example = tiny(name)
    return Case(model, example, capture(model, example))


@pytest.fixture(scope="session")
def case() -> Callable[[str], Case]:
    """`case("llama")`: the model, example inputs and the capture; do not change them."""
    return _case


LAYOUTS = ("0:k8v8g32r0s0|1:kf8vf8g32r0s0", "", "1:k4v8g32r5s2|0:exact")


def rewrite(found: Case) -> GraphEditor:
    """A llama with low-rank and int4 linears in layer 1 and packed caches in layers 0 and 2."""
    editor = GraphEditor(found.captured)
    sites = {(site.family, site.key): site for site in found.captured.sites}
    register_ops()
    ops = torch.ops.fxopt
    with editor.applying("linear.low_rank"):
        site = sites["linear", "model.layers.1.mlp.gate_proj"]
        weight = found.model.get_parameter(site.info.weight).detach()
        factors = torch.linalg.svd(weight.float(), full_matrices=False)
        u, s, v = (factor.to(weight.dtype) for factor in factors)
        down = editor.tensor(site, "down", v[:8].contiguous())
        up = editor.tensor(site, "up", (u[:, :8] * s[:8]).contiguous())
        x = editor.node(site).args[0]
        editor.replace(
            site, editor.call(site, ops.low_rank_linear.default, (x, down, up, None), {})
        )
    with editor.applying("linear.quantized"):
        from fxopt.kernels.quantized_linear import quantize

        site = sites["linear", "model.layers.1.self_attn.o_proj"]
        weight = found.model.get_parameter(site.info.weight).detach()
        names = ("packed", "scale", "zero")
        values = zip(names, quantize(weight, 4, 32), strict=True)
        held = [editor.tensor(site, name, value) for name, value in values]
        x = editor.node(site).args[0]
        arguments = (x, *held, None, 4, 32)
        editor.replace(site, editor.call(site, ops.quantized_linear.default, arguments, {}))
    with editor.applying("activation.chunked"):
        site = sites["activation", "model.layers.2.mlp"]
        gate, up, down = (
            editor.node(sites["linear", f"{site.op}.{name}"])
            for name in ("gate_proj", "up_proj", "down_proj")
        )
        program = (
            "a = aten.linear(x, t0); b = aten.silu(a); c = aten.linear(x, t1); "
            "d = aten.mul.Tensor(b, c); e = aten.linear(d, t2)"
        )
        arguments = (gate.args[0], [node.args[1] for node in (gate, up, down)], program, 4)
        editor.replace(site, editor.call(site, ops.chunked.default, arguments, {}))
    with editor.applying("kv_cache.blocks"):
        for layer, layout in enumerate(LAYOUTS):
            if layout:
                editor.update(sites["kv_cache", f"model.layers.{layer}.self_attn/kv=0"],
                              layout=layout)  # fmt: skip
    editor.finish()
    return editor


@pytest.fixture(scope="session")
def rewritten(case: Callable[[str], Case]) -> Callable[[], OptimizedModule]:
    """Makes a rewritten tiny llama: linears in layer 1, packed caches by `LAYOUTS`."""
    found = case("llama")
    editor = rewrite(found)
    return lambda: found.emit(editor)
