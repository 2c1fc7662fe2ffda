"""Attention in a user's own modules, in the spellings that people write."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxopt.capture import Captured, capture
from fxopt.ir.ops import attend
from fxopt.ir.site import LinearInfo

HEADS, HEAD_DIM, VOCABULARY, LONGEST = 4, 16, 50, 64
Core = Callable[[nn.Module, Tensor, Tensor, Tensor, Tensor | None], Tensor]


def scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])


def steps(x: Tensor) -> tuple[Tensor, Tensor]:
    places = torch.arange(x.shape[-2], device=x.device)
    return places[:, None], places[None, :]


def tril_buffer(m: Any, q: Tensor, k: Tensor, v: Tensor, _: Any) -> Tensor:
    n = q.shape[2]
    a = scores(q, k).masked_fill(m.tril[:, :, :n, :n] == 0, float("-inf"))
    return m.drop(F.softmax(a, dim=-1)) @ v


def additive_triu(m: Any, q: Tensor, k: Tensor, v: Tensor, _: Any) -> Tensor:
    n = q.shape[2]
    mask = torch.full((n, n), torch.finfo(torch.float32).min).triu(1)
    return (scores(q, k) + mask).softmax(-1, dtype=torch.float32).to(q.dtype) @ v


def windowed(m: Any, q: Tensor, k: Tensor, v: Tensor, _: Any) -> Tensor:
    rows, columns = steps(q)
    seen = (rows >= columns) & (rows - columns < 37)
    return torch.where(seen, scores(q, k), float("-inf")).softmax(-1) @ v


def neighbours(m: Any, q: Tensor, k: Tensor, v: Tensor, _: Any) -> Tensor:
    rows, columns = steps(q)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=(rows - columns).abs() < 5)


def distances(m: Any, q: Tensor, k: Tensor, v: Tensor, _: Any) -> Tensor:
    rows, columns = steps(q)
    slopes = torch.arange(1, HEADS + 1, device=q.device).view(-1, 1, 1) / 10
    return (scores(q, k) - slopes * (rows - columns).abs()).softmax(-1) @ v


def capped(m: Any, q: Tensor, k: Tensor, v: Tensor, _: Any) -> Tensor:
    return (20.0 * torch.tanh(scores(q, k) / 20.0)).softmax(-1) @ v


def padded(m: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    assert mask is not None
    n = q.shape[2]
    a = scores(q, k).masked_fill(m.tril[:, :, :n, :n] == 0, float("-inf"))
    return a.masked_fill(mask[:, None, None, :] == 0, float("-inf")).softmax(-1) @ v


def ignored(m: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """The convention of nn.Transformer: true hides."""
    assert mask is not None
    hidden = (mask == 0)[:, None, None, :]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=~hidden)


def causal_flag(m: Any, q: Tensor, k: Tensor, v: Tensor, _: Any) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3)


def grouped_flag(m: Any, q: Tensor, k: Tensor, v: Tensor, _: Any) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def interleaved(m: Any, q: Tensor, k: Tensor, v: Tensor, _: Any) -> Tensor:
    k, v = (x.repeat_interleave(2, dim=1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v)


def expanded(m: Any, q: Tensor, k: Tensor, v: Tensor, _: Any) -> Tensor:
    def repeat(x: Tensor) -> Tensor:
        b, h, n, d = x.shape
        return x[:, :, None].expand(b, h, 2, n, d).reshape(b, 2 * h, n, d)

    return scores(q, repeat(k)).softmax(-1) @ repeat(v)


def tiled(m: Any, q: Tensor, k: Tensor, v: Tensor, _: Any) -> Tensor:
    """Query head h reads KV head h % 2, which `attend` does not mean by two KV heads."""
    k, v = (x.repeat(1, 2, 1, 1) for x in (k, v))
    return scores(q, k).softmax(-1) @ v


def data_dependent(m: Any, q: Tensor, k: Tensor, v: Tensor, _: Any) -> Tensor:
    seen = (q[..., :1] * k[..., :1].transpose(-2, -1)) > -10
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen)


@dataclass(frozen=True)
class Case:
    core: Core
    kv_heads: int = HEADS
    masked: bool = False
    causal: bool = False
    window: int = 0
    softcap: float = 0.0
    bias: bool = False


CASES = {
    "tril_buffer": Case(tril_buffer, causal=True),
    "additive_triu": Case(additive_triu, causal=True),
    "windowed": Case(windowed, causal=True, window=37),
    "neighbours": Case(neighbours, window=5),
    "distances": Case(distances, bias=True),
    "capped": Case(capped, softcap=20.0),
    "padded": Case(padded, masked=True, causal=True),
    "ignored": Case(ignored, masked=True),
    "causal_flag": Case(causal_flag, causal=True),
    "grouped_flag": Case(grouped_flag, kv_heads=2, causal=True),
    "interleaved": Case(interleaved, kv_heads=2),
    "expanded": Case(expanded, kv_heads=2),
    "tiled": Case(tiled, kv_heads=2),
    "data_dependent": Case(data_dependent, bias=True),
}


class Layer(nn.Module):
    def __init__(self, core: Core, kv_heads: int) -> None:
        super().__init__()
        width = HEADS * HEAD_DIM
        self.core, self.kv_heads = core, kv_heads
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, (HEADS + 2 * kv_heads) * HEAD_DIM)
        self.out = nn.Linear(width, width)
        self.drop = nn.Dropout(0.1)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )
        self.register_buffer("tril", torch.ones(1, 1, LONGEST, LONGEST).tril())

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        batch, length, width = x.shape
        heads = self.qkv(self.norm(x)).view(batch, length, -1, HEAD_DIM).transpose(1, 2)
        q, k, v = heads.split((HEADS, self.kv_heads, self.kv_heads), dim=1)
        y = self.core(self, q, k, v, mask)
        x = x + self.out(y.transpose(1, 2).contiguous().view(batch, length, width))
        return x + self.mlp(x)


class Transformer(nn.Module):
    def __init__(self, case: Case) -> None:
        super().__init__()
        width = HEADS * HEAD_DIM
        self.embed = nn.Embedding(VOCABULARY, width)
        self.layers = nn.ModuleList([Layer(case.core, case.kv_heads) for _ in range(2)])
        self.head = nn.Linear(width, VOCABULARY, bias=False)

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x, mask)
        return self.head(x)


def inputs_of(case: Case, batch: int, length: int) -> dict[str, Tensor]:
    inputs = {"ids": torch.randint(VOCABULARY, (batch, length))}
    if case.masked:
        inputs["mask"] = torch.ones(batch, length)
        inputs["mask"][0, max(1, length - 3) :] = 0
    return inputs


@dataclass(frozen=True)
class Trial:
    case: Case
    model: nn.Module
    captured: Captured


@pytest.fixture(scope="module", params=list(CASES))
def trial(request: pytest.FixtureRequest) -> Trial:
    torch.manual_seed(0)
    case = CASES[request.param]
    model = Transformer(case).eval()
    return Trial(case, model, capture(model, inputs_of(case, 1, 9)))


@pytest.mark.parametrize(("batch", "length"), [(1, 1), (3, 50), (2, 7)])
def test_equals_the_model(trial: Trial, assert_same: Any, batch: int, length: int) -> None:
    assert_same(trial.captured, trial.model, inputs_of(trial.case, batch, length))


def test_attention_is_one_call(trial: Trial) -> None:
    case, captured = trial.case, trial.captured
    nodes = captured.graph.graph.find_nodes(op="call_function", target=attend)
    assert len(nodes) == 2
    targets = {str(n.target) for n in captured.graph.graph.nodes}
    assert not any("softmax" in t or "scaled_dot" in t for t in targets)
    infos = [s.info for s in captured.sites if s.family == "attention"]
    kv_heads = HEADS if case.core is tiled else case.kv_heads
    assert len(infos) == 2 * kv_heads
    for info in infos:
        assert (info.causal, info.window, info.softcap) == (case.causal, case.window, case.softcap)
        assert (info.has_mask, info.has_bias) == (case.masked, case.bias)
    assert [s.op for s in captured.sites if s.family == "attention"][::kv_heads] == [
        "layers.0",
        "layers.1",
    ]


def test_linears_are_counted(trial: Trial) -> None:
    """One product for queries, keys and values, however their heads are repeated afterwards."""
    linears = [s for s in trial.captured.sites if isinstance(s.info, LinearInfo)]
    names = ("qkv", "out", "mlp.0", "mlp.2")
    assert [s.key for s in linears] == [
        *(f"layers.{layer}.{name}" for layer in range(2) for name in names),
        "head",
    ]
    width = HEADS * HEAD_DIM
    first, *_, head = (s.info for s in linears)
    assert first.out_features == width + 2 * trial.case.kv_heads * HEAD_DIM
    assert (head.weight, head.in_features, head.out_features) == ("head.weight", width, VOCABULARY)
    assert not any(s.blocked for s in linears)


def test_no_transposes_are_left_behind(trial: Trial) -> None:
    node = trial.captured.attentions[0]
    assert not any(
        "transpose" in str(u.target) or "contiguous" in str(u.target) for u in node.users
    )


def test_returned_weights_keep_the_attention_as_it_is() -> None:
    model = nn.MultiheadAttention(64, 4, batch_first=True).eval()
    x = torch.randn(2, 9, 64)
    captured = capture(model, {"query": x, "key": x, "value": x})
    assert captured.attentions == ()
    got, want = captured.run(x, x, x), model(x, x, x)
    torch.testing.assert_close(got, want)


def test_torch_encoder_layers(assert_same: Any) -> None:
    layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    captured = capture(model, torch.randn(2, 9, 64))
    assert len(captured.attentions) == 2
    linears = [s.key for s in captured.sites if isinstance(s.info, LinearInfo)]
    # the module itself applies the weights of its out_proj, which is never called
    names = ("self_attn#0", "self_attn#1", "linear1", "linear2")
    assert linears == [f"layers.{layer}.{name}" for layer in range(2) for name in names]
    assert_same(captured, model, {"src": torch.randn(3, 21, 64)})
