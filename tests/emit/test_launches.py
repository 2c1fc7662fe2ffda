"""What an eager call costs on a GPU: kernels launched and waits for the device, as counted here.

Where fxopt's own ops are called, what CUDA would run is run instead, on CPU tensors.
"""

from __future__ import annotations

import copy
import functools
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

from fxopt.capture import capture
from fxopt.emit.editor import GraphEditor
from fxopt.emit.module import OptimizedModule, emit
from fxopt.kernels.attention.op import attention_cuda
from fxopt.kernels.kv_attention import op as kv_op
from tests.crossed import crossed

# Ops that make a view, or nothing on a device.
NO_LAUNCH = {
    "view", "_unsafe_view", "t", "transpose", "permute", "unsqueeze", "squeeze", "expand", "slice",
    "select", "split", "unbind", "narrow", "reshape", "alias", "detach", "lift_fresh",
    "_assert_tensor_metadata", "_assert_scalar", "empty", "empty_like", "new_empty",
}  # fmt: skip
ON_CUDA = {
    "attention": attention_cuda,
    "cached_attention": kv_op._cached_cuda,  # pyright: ignore[reportPrivateUsage]
}
DTYPES = [torch.bfloat16, torch.float32]
# Reading a number from a tensor.
WAIT = "_local_scalar_dense"


class Launches(TorchDispatchMode):
    """Counts ops by name, those inside of fxopt's ops as well."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func._schema.name.partition("::")[2]
        if func.namespace == "fxopt":
            with self:
                return ON_CUDA[name](*args, **(kwargs or {}))
        self.seen[name] += 1
        return func(*args, **(kwargs or {}))


def launches(call: Callable[[], Any]) -> tuple[int, int]:
    """(kernels, waits for the device) of a call."""
    with torch.no_grad(), Launches() as mode:
        call()
    kernels = sum(count for name, count in mode.seen.items() if name not in {*NO_LAUNCH, WAIT})
    return kernels, mode.seen[WAIT]


def deep(name: str, dtype: torch.dtype) -> tuple[nn.Module, dict[str, Any]]:
    import transformers as hf

    torch.manual_seed(0)
    ids = torch.randint(3, 61, (2, 11))
    sizes: dict[str, Any] = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
        "num_attention_heads": 4,
    }  # fmt: skip
    text = {"vocab_size": 61, "max_position_embeddings": 128}
    match name:
        case "llama":
            model: nn.Module = hf.LlamaForCausalLM(
                hf.LlamaConfig(num_key_value_heads=2, **sizes, **text)
            )
        case "gpt2":
            model = hf.GPT2LMHeadModel(
                hf.GPT2Config(vocab_size=61, n_positions=128, n_embd=32, n_layer=4, n_head=4)
            )
        case "bert":
            model = hf.BertModel(hf.BertConfig(**sizes, **text))
            return model.eval().to(dtype), {
                "input_ids": ids,
                "attention_mask": torch.ones_like(ids),
            }
        case _:
            config = hf.ViTConfig(image_size=16, patch_size=4, **sizes)
            model = hf.ViTForImageClassification(config)
            return model.eval().to(dtype), {"pixel_values": torch.randn(2, 3, 16, 16, dtype=dtype)}
    return model.eval().to(dtype), {"input_ids": ids}


@functools.cache
def emitted(name: str, dtype: torch.dtype) -> tuple[nn.Module, OptimizedModule, dict[str, Any]]:
    model, example = deep(name, dtype)
    captured = capture(model, example)
    return model, emit(captured, GraphEditor(captured), model), example


@pytest.mark.parametrize(
    ("name", "masked", "dtype"), crossed(["llama", "gpt2"], [True, False], DTYPES)
)
def test_generation_launches_no_more_than_the_original(
    name: str, masked: bool, dtype: torch.dtype
) -> None:
    model, opt, example = emitted(name, dtype)
    caches = DynamicCache(config=model.config), opt.make_cache(2, 64)  # type: ignore[operator]
    ids = example["input_ids"]
    for step, new in enumerate((ids, ids[:, :1], ids[:, :1])):
        mask = torch.ones(2, 11 + step, dtype=torch.long) if masked else None
        inputs = {"input_ids": new, "attention_mask": mask, "logits_to_keep": 1}
        (before, _), (after, waits) = (
            launches(partial(call, **inputs, past_key_values=cache))
            for call, cache in zip((model, opt), caches, strict=True)
        )
        assert after <= before
        assert waits == int(masked)


@pytest.mark.parametrize(("name", "dtype"), crossed(["llama", "gpt2", "bert", "vit"], DTYPES))
def test_a_forward_launches_no_more_than_the_original(name: str, dtype: torch.dtype) -> None:
    model, opt, example = emitted(name, dtype)
    options = {"use_cache": False} if name in ("llama", "gpt2") else {}
    (before, _), (after, waits) = (
        launches(partial(call, **example, **options)) for call in (model, opt)
    )
    assert after <= before
    assert waits == int("attention_mask" in example)


@pytest.mark.gpu
@pytest.mark.parametrize("masked", [False, True])
def test_decoding_never_waits_for_the_device(masked: bool) -> None:
    _, opt, example = emitted("llama", torch.bfloat16)
    opt = copy.deepcopy(opt).to("cuda")
    ids = example["input_ids"].to("cuda")
    mask = torch.ones(2, 13, dtype=torch.long, device="cuda")
    mask[0, :4] = 0
    cache = opt.make_cache(2, 64)  # type: ignore[operator]
    with torch.no_grad():
        for step in range(3):
            new = ids if step == 0 else ids[:, :1]
            seen = mask[:, : 11 + step] if masked else None
            # The first step compiles, which may wait.
            torch.cuda.set_sync_debug_mode("error" if step == 2 else "default")
            try:
                opt(new, attention_mask=seen, past_key_values=cache, logits_to_keep=1)
            finally:
                torch.cuda.set_sync_debug_mode("default")


def test_generate_asks_about_its_mask_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """No step sees a mask that hides nothing; one that hides something reaches every call."""
    _, opt, example = emitted("llama", torch.float32)
    ids = example["input_ids"]
    seen: list[Tensor | None] = []
    run = opt.run_flat

    def recorded(inputs: dict[str, Any]) -> Any:
        seen.append(inputs["attention_mask"])
        return run(inputs)

    monkeypatch.setattr(opt, "run_flat", recorded)
    mask = torch.ones_like(ids)
    opt.generate(ids, attention_mask=mask, max_new_tokens=3, do_sample=False)
    assert seen[1:] == [None, None]
    seen.clear()
    mask[0, :4] = 0
    opt.generate(ids, attention_mask=mask, max_new_tokens=3, do_sample=False)
    assert [None if seen_ is None else seen_.shape[1] for seen_ in seen] == [11, 12, 13]


@pytest.mark.parametrize(
    ("name", "dtype"), crossed(["llama", "gemma3", "qwen3", "t5"], [*DTYPES, torch.float16])
)
def test_fused_norms_keep_every_bit(name: str, dtype: torch.dtype) -> None:
    import transformers as hf

    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    }  # fmt: skip
    ids = torch.randint(3, 61, (2, 11))
    example = {"input_ids": ids}
    match name:
        case "llama":
            model: Any = hf.LlamaForCausalLM(hf.LlamaConfig(**sizes))
        case "gemma3":
            model = hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**sizes))
        case "qwen3":
            model = hf.Qwen3ForCausalLM(hf.Qwen3Config(**sizes))
        case _:
            model = hf.T5EncoderModel(
                hf.T5Config(vocab_size=61, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
            )
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    model = model.eval().to(dtype)
    captured = capture(model, example)
    opt = emit(captured, GraphEditor(captured), model)
    assert "rms_norm(" in opt.source
    assert "rsqrt" not in opt.source
    with torch.no_grad():
        assert torch.equal(opt(**example)[0], model(**example)[0])


class Norm(nn.Module):
    """One norm, spelled in a way that `rms_norm` would not follow to the bit, or not at all."""

    def __init__(self, spelling: str) -> None:
        super().__init__()
        self.spelling = spelling
        self.weight = nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        square, dim = x.pow(2), -1
        match self.spelling:
            case "another dimension":
                dim = 1
            case "cubes":
                square = x.pow(3).abs()
            case "two readers":
                return self.weight * x * (root := torch.rsqrt(square.mean(-1, True) + 1e-6)) + root
            case "another factor":
                return self.weight * torch.rsqrt(square.mean(-1, True) + 1e-6)
            case _:
                x, square = x.double(), x.float().pow(2)
        return self.weight * (x * torch.rsqrt(square.mean(dim, True) + 1e-6))


@pytest.mark.parametrize(
    "spelling", ["another dimension", "cubes", "two readers", "another factor", "another precision"]
)
def test_what_is_no_norm_stays(spelling: str) -> None:
    torch.manual_seed(0)
    model, x = Norm(spelling).eval(), torch.randn(3, 8, 8)
    captured = capture(model, {"x": x})
    opt = emit(captured, GraphEditor(captured), model)
    assert "rms_norm" not in opt.source
    assert torch.equal(opt(x), model(x))


@pytest.mark.parametrize(
    ("name", "dtype"), crossed(["llama", "qwen3", "gemma3", "phi3", "neox"], DTYPES)
)
def test_rotary_embeddings_are_one_call_and_keep_every_bit(name: str, dtype: torch.dtype) -> None:
    from tests.emit.test_packed_generation import captured

    model, found = captured(name, dtype)
    opt = emit(found, GraphEditor(found), model)
    if name in ("phi3", "neox"):  # what is turned is joined to channels that are not
        assert opt.source.count("rotate(") == 2
    else:
        assert opt.source.count("q, k = rotate_both(") >= 1
        assert "rotate(" not in opt.source
    ids = torch.randint(1, 96, (2, 13))
    with torch.no_grad():
        expected = found.graph(**bound(found, ids))[0]
        assert torch.equal(opt(ids).logits, expected)


def bound(found: Any, ids: Tensor) -> dict[str, Any]:
    """Arguments of a captured graph for whole sequences without padding."""
    places = torch.arange(ids.shape[1]).expand(ids.shape)
    kept = torch.arange(ids.shape[1])
    given = {"input_ids": ids, "position_ids": places, "logits_to_keep": kept}
    given["past"] = [None] * len(found.attentions)
    return {
        n: given.get(n) for n in (p.target for p in found.graph.graph.find_nodes(op="placeholder"))
    }


class Crossed(nn.Module):
    """Turned queries and keys of lengths of their own; with `writes`, what both are read from is
    changed between them."""

    def __init__(self, writes: bool) -> None:
        super().__init__()
        self.writes = writes
        self.project = nn.Linear(16, 48)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        # [3, B, heads, N, 8], of which q, k and v are views
        parts = self.project(x).unflatten(2, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        q = self.turned(parts[0] if self.writes else parts[0, :, :, :3], cos, sin)
        if self.writes:
            parts.mul_(2.0)
        k = self.turned(parts[1], cos, sin)
        return F.scaled_dot_product_attention(q, k, parts[2])

    def turned(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return x * cos + torch.cat([-x[..., 4:], x[..., :4]], -1) * sin


@pytest.mark.parametrize("writes", [False, True])
def test_queries_and_keys_are_turned_at_once_only_where_that_is_the_same(writes: bool) -> None:
    model = Crossed(writes).eval()
    inputs = {
        "x": torch.randn(2, 5, 16), "cos": torch.randn(1, 1, 1, 8), "sin": torch.randn(1, 1, 1, 8)
    }  # fmt: skip
    found = capture(model, inputs)
    opt = emit(found, GraphEditor(found), model)
    assert ("rotate_both(" in opt.source) is not writes
    torch.testing.assert_close(opt(**inputs), model(**inputs))


class Turned(nn.Module):
    """A rotation, and what is none: pairs of another kind, or factors of another dtype."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.scale = nn.Parameter(torch.randn(8), requires_grad=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x * self.scale
        low, high = x[..., :4], x[..., 4:]
        match self.kind:
            case "swapped":
                turned = torch.cat([low, -high], -1)
            case "other sign":
                turned = torch.cat([-low, high], -1)
            case "interleaved":
                turned = torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
            case _:
                turned = torch.cat([-high, low], -1)
        if self.kind == "wide":
            cos, sin = cos.double(), sin.double()
        if self.kind == "reversed":
            return sin * turned + cos * x
        return x * cos + turned * sin


@pytest.mark.parametrize(
    ("kind", "joined"),
    [
        ("plain", True), ("reversed", True), ("swapped", False), ("other sign", False),
        ("interleaved", False), ("wide", False),
    ],
)  # fmt: skip
def test_only_a_rotation_is_taken_for_one(kind: str, joined: bool) -> None:
    model = Turned(kind)
    inputs = {
        "x": torch.randn(2, 3, 5, 8), "cos": torch.randn(2, 1, 5, 8), "sin": torch.randn(2, 1, 5, 8)
    }  # fmt: skip
    found = capture(model, inputs)
    opt = emit(found, GraphEditor(found), model)
    assert ("rotate(" in opt.source) is joined
    torch.testing.assert_close(opt(**inputs), model(**inputs), rtol=0, atol=0)
