"""What follows integer products as part of their call: where it is joined, where not, to which
bits, and that saved folders, ONNX files, gradients and `torch.compile` know of it."""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxopt.capture import capture
from fxopt.emit import module as emission
from fxopt.emit.editor import GraphEditor
from fxopt.emit.lowering import inlined
from fxopt.emit.module import OptimizedModule, emit
from fxopt.emit.save import load
from fxopt.kernels.quantized_linear import quantize
from tests.crossed import crossed, first
from tests.emit.onnx_cases import everywhere, mlp

pytest.importorskip("transformers")


def llama() -> tuple[nn.Module, dict[str, Any]]:
    import transformers as hf

    torch.manual_seed(0)
    config = hf.LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    return hf.LlamaForCausalLM(config).eval(), {"input_ids": torch.randint(3, 97, (1, 40))}


def gpt2() -> tuple[nn.Module, dict[str, Any]]:
    import transformers as hf

    torch.manual_seed(0)
    config = hf.GPT2Config(
        vocab_size=97, n_positions=64, n_embd=64, n_layer=3, n_head=4, bos_token_id=1,
        eos_token_id=2, activation_function="gelu_pytorch_tanh",
    )  # fmt: skip
    return hf.GPT2LMHeadModel(config).eval(), {"input_ids": torch.randint(3, 97, (1, 40))}


def bert() -> tuple[nn.Module, dict[str, Any]]:
    import transformers as hf

    torch.manual_seed(0)
    config = hf.BertConfig(
        vocab_size=97, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4,
    )  # fmt: skip
    return hf.BertModel(config).eval(), {"input_ids": torch.randint(3, 97, (2, 11))}


MODELS = {"llama": llama, "gpt2": gpt2, "bert": bert}


def both(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> tuple[OptimizedModule, OptimizedModule, dict[str, Any]]:
    """A model in int4, and the same without anything joined to its products."""
    model, example = MODELS[name]()
    model.to(dtype)
    joined, _ = everywhere("linear.quantized", model, example, "int4")
    with monkeypatch.context() as patch:
        patch.setattr(emission, "fuse_epilogues", lambda graph: None)
        apart, _ = everywhere("linear.quantized", model, example, "int4")
    return joined, apart, example


def following(opt: OptimizedModule) -> Counter[str]:
    """How many products have which names of what follows them."""
    return Counter(name for node in opt.program.graph.nodes for name in product_kwargs(node))


def product_kwargs(node: Any) -> dict[str, Any]:
    kinds = ("quantized", "monarch", "low_rank", "fp8")
    ops = {f"fxopt.{kind}_linear.default" for kind in kinds}
    return node.kwargs if str(node.target) in ops else {}


EXPECTED: dict[str, tuple[dict[str, int], str]] = {
    # The sum that the norm within a layer reads is part of the norm; that of down_proj is not.
    "llama": (
        {"activation": 2, "up_packed": 2, "up_scale": 2, "up_zero": 2, "residual": 2},
        '="silu"',
    ),
    "gpt2": ({"activation": 3, "residual": 6}, '="gelu_tanh"'),
    "bert": ({"activation": 2, "residual": 4}, '="gelu"'),
}


@pytest.mark.parametrize(
    ("name", "dtype"), crossed(MODELS, [torch.bfloat16, torch.float32]), ids=str
)
def test_layers_call_one_kernel(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    joined, apart, example = both(name, dtype, monkeypatch)
    counts, activation = EXPECTED[name]
    found = following(joined)
    assert not following(apart)
    assert found == counts
    assert activation in joined.source
    assert "gated(" not in joined.source
    assert "F.gelu(" not in joined.source
    # Layers are still of one class.
    assert joined.source.count("class ") == apart.source.count("class ") - (name == "bert")
    with torch.no_grad():
        assert torch.equal(joined(**example)[0], apart(**example)[0])


def test_generation_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    joined, apart, example = both("llama", torch.float32, monkeypatch)
    options: dict[str, Any] = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    assert torch.equal(joined.generate(**example, **options), apart.generate(**example, **options))


def test_gradients_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    joined, apart, example = both("llama", torch.float32, monkeypatch)
    for opt in (joined, apart):
        opt.train()(**example).logits.square().mean().backward()
    wanted = {n: p.grad for n, p in apart.named_parameters() if p.grad is not None}
    assert wanted
    for name, parameter in joined.named_parameters():
        if name in wanted:
            torch.testing.assert_close(parameter.grad, wanted[name])


@pytest.mark.parametrize(
    "chosen",
    first(
        [
            ("linear.quantized", "fp8"),
            ("linear.quantized", "int4"),
            ("linear.monarch",),
            ("linear.low_rank",),
        ]
    ),
)
def test_autocast_computes_the_same(
    chosen: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers then take and add tensors of two dtypes."""
    (rewrite, *label), (model, example) = chosen, gpt2()
    opt, _ = everywhere(rewrite, model, example, *label)
    assert following(opt)["residual"] == 6
    with monkeypatch.context() as patch:
        patch.setattr(emission, "fuse_epilogues", lambda graph: None)
        apart, _ = everywhere(rewrite, model, example, *label)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert torch.equal(opt(**example).logits, apart(**example).logits)
    with torch.autocast("cpu", torch.bfloat16):
        loss = opt.train()(**example).logits.float().square().mean()
    loss.backward()


def test_a_saved_folder_and_a_copy_compute_the_same(tmp_path: Path) -> None:
    model, example = MODELS["gpt2"]()
    opt, _ = everywhere("linear.quantized", model, example, "int4")
    opt.save(tmp_path / "out")
    for again in (load(tmp_path / "out"), copy.deepcopy(opt)):
        assert again.source == opt.source
        with torch.no_grad():
            assert torch.equal(again(**example).logits, opt(**example).logits)


def test_compiled_modules_compute_the_same() -> None:
    model, example = mlp()
    opt, _ = everywhere("linear.quantized", model, example, "int4")
    assert following(opt)["up_bias"] == 2
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(opt)(**example), opt(**example))


def test_a_low_rank_part_is_added_by_the_product_beside_it() -> None:
    model, example = mlp()
    opt, chosen = everywhere("linear.quantized_low_rank", model, example)
    assert following(opt) == {"residual": len(chosen)}
    apart = inlined(opt.program.graph)
    assert len(apart.nodes) == len(opt.program.graph.nodes) + len(chosen)


OTHERS = {
    "monarch": ("linear.monarch",),
    "low_rank": ("linear.low_rank",),
    "fp8": ("linear.quantized", "fp8"),
}
SECOND = {
    "monarch": {},
    "low_rank": {"second_down": 2, "second_up": 2},
    "fp8": {"up_weight": 2, "up_scale": 2},
}


@pytest.mark.parametrize(("kind", "name"), crossed(OTHERS, ["llama", "gpt2"]))
def test_other_layers_call_one_kernel(
    kind: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two weights at once where the op takes them."""
    (rewrite, *label), (model, example) = OTHERS[kind], MODELS[name]()
    opt, _ = everywhere(rewrite, model, example, *label)
    activations = {"gpt2": 3, "llama": 2 if SECOND[kind] else 0}[name]
    second = SECOND[kind] if name == "llama" else {}
    added = {"residual": {"gpt2": 6, "llama": 2}[name]}
    assert following(opt) == Counter(activation=activations, **second, **added)
    with monkeypatch.context() as patch:
        patch.setattr(emission, "fuse_epilogues", lambda graph: None)
        apart, _ = everywhere(rewrite, model, example, *label)
    opt.save(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(opt(**example).logits, apart(**example).logits)
        assert torch.equal(load(tmp_path / "out")(**example).logits, opt(**example).logits)
    lowered = (inlined(each.program.graph) for each in (opt, apart))
    assert len({tuple(sorted(str(node.target) for node in g.nodes)) for g in lowered}) == 1


@pytest.mark.slow
def test_onnx_files_have_calls_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    joined, apart, _ = both("llama", torch.float32, monkeypatch)
    report = joined.export_onnx(tmp_path / "model.onnx", kind="generate", target="ort")
    assert report.difference < 1e-4
    nodes = onnx.load(report.path).graph.node
    properties = [{p.key: p.value for p in node.metadata_props} for node in nodes]
    sites = {found["ai.fxopt.site"] for found in properties if "ai.fxopt.site" in found}
    assert {"model.layers.1.mlp.gate_proj", "model.layers.1.mlp.up_proj"} <= sites
    assert Counter(node.op_type for node in nodes)["MatMulNBits"] == 11
    lowered = (inlined(opt.program.graph) for opt in (joined, apart))
    assert len({tuple(sorted(str(node.target) for node in g.nodes)) for g in lowered}) == 1


class Layers(nn.Module):
    """Integer products and something that may be joined to them, or not quite."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        for name, bits in (("a", 4), ("b", 8 if kind == "other bits" else 4)):
            tensors = quantize(torch.randn(64, 64), bits, 32)
            for part, tensor in zip(("packed", "scale", "zero"), tensors, strict=True):
                self.register_buffer(f"{name}_{part}", tensor)
        self.count: Tensor
        self.register_buffer("count", torch.zeros(5, 64))

    def product(self, name: str, x: Tensor, bits: int = 4) -> Tensor:
        weight = (getattr(self, f"{name}_{part}") for part in ("packed", "scale", "zero"))
        return torch.ops.fxopt.quantized_linear.default(x, *weight, None, bits, 32)

    def forward(self, x: Tensor) -> Tensor:
        x = x * 2
        y = self.product("a", x)
        match self.kind:
            case "sum":
                return x + y
            case "sum, the other way":
                return y + x
            case "relu and sum":
                return F.relu(y) + x
            case "gate":
                return F.silu(y) * self.product("b", x)
            case "gate and sum":
                return F.gelu(y) * self.product("b", x) + x
            case "scaled sum":
                return torch.add(x, y, alpha=2)
            case "sum with itself":
                return y + y
            case "broadcast sum":
                return y + x[:1]
            case "wide sum":
                return y + x.double()
            case "number":
                return y + 1
            case "sum with what comes later":
                return y + torch.tanh(x)
            case "sum after a write":
                self.count.add_(1)
                return self.count + y
            case "read twice":
                return F.silu(y) + y
            case "another activation":
                return F.elu(y)
            case "other bits":
                return F.silu(y) * self.product("b", x, 8)
            case "other input":
                return F.silu(y) * self.product("b", x + 1)
            case _:
                up = self.product("b", x)
                return F.silu(y) * up + up


@pytest.mark.parametrize(
    ("kind", "joined"),
    [
        ("sum", ["residual"]),
        ("sum, the other way", ["residual"]),
        ("relu and sum", ["activation", "residual"]),
        ("gate", ["activation", "up_packed", "up_scale", "up_zero"]),
        ("gate and sum", ["activation", "up_packed", "up_scale", "up_zero", "residual"]),
        ("scaled sum", []),
        ("sum with itself", []),
        ("broadcast sum", []),
        ("wide sum", []),
        ("number", []),
        ("sum with what comes later", []),
        ("sum after a write", []),
        ("read twice", []),
        ("another activation", []),
        ("other bits", []),
        ("other input", []),
        ("up read twice", []),
    ],
)
def test_only_what_nothing_else_reads_is_joined(kind: str, joined: list[str]) -> None:
    torch.manual_seed(0)
    model, x = Layers(kind).eval(), torch.randn(5, 64)
    found = capture(model, {"x": x})
    wanted = copy.deepcopy(model)(x)
    opt = emit(found, GraphEditor(found), model)
    products = [node for node in opt.program.graph.nodes if product_kwargs(node)]
    assert [list(node.kwargs) for node in products] == ([joined] if joined else [])
    assert torch.equal(opt(x), wanted)
    if joined:
        apart = inlined(opt.program.graph)
        assert not any(product_kwargs(node) for node in apart.nodes)
