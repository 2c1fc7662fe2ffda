"""`torch.compile(model, backend="fxopt")`: exact rewrites, and graphs left alone with a reason."""

from __future__ import annotations

import logging
import math
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo import list_backends, lookup_backend
from torch._dynamo.exc import BackendCompilerFailed

import fxopt.backend
from fxopt.backend import backend
from fxopt.ir.ops import attend

ROOT = Path(__file__).resolve().parents[1]
aten = torch.ops.aten


class Attention(nn.Module):
    """Attention as people write it, under a mask that is made inside."""

    def __init__(self, dropout: float = 0.1) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, 4, 8).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-2, -1) / math.sqrt(8)
        seen = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()
        weights = self.dropout(scores.masked_fill(~seen, float("-inf")).softmax(-1))
        return self.out((weights @ v).transpose(1, 2).reshape(batch, length, 32))


class Branching(Attention):
    """Control flow on values: export refuses it, Dynamo breaks the graph there."""

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            x = x - x.mean()
        return super().forward(torch.nn.functional.relu(x, inplace=True) + 1)


class Watch:
    """A backend to come after: keeps the graphs and runs them as they are."""

    def __init__(self) -> None:
        self.graphs: list[torch.fx.GraphModule] = []

    def __call__(self, gm, example_inputs):
        self.graphs.append(gm)
        return gm.forward

    def count(self, target: object) -> int:
        return sum(len(g.graph.find_nodes(op="call_function", target=target)) for g in self.graphs)


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(model: nn.Module, **options) -> tuple[nn.Module, Watch]:
    watch = Watch()
    found = torch.compile(model.eval(), backend="fxopt", options={"then": watch}, **options)
    return found, watch


def double(model: nn.Module, *args: Tensor) -> Tensor:
    """What the model returns in float64."""
    try:
        return model.double()(*(a.double() if a.is_floating_point() else a for a in args)).float()
    finally:
        model.float()


@pytest.mark.parametrize("dynamic", [None, True, False])
def test_spelled_out_attention_across_graph_breaks_and_sizes(dynamic):
    model = Branching()
    found, watch = compiled(model, dynamic=dynamic)
    with torch.no_grad():
        for length, sign in ((7, 1), (7, -1), (9, 1), (12, 1), (1, 1)):
            x = sign * torch.rand(2, length, 32)
            torch.testing.assert_close(found(x.clone()), double(model, x.clone()))
    assert watch.count(attend) >= 2
    assert watch.count(aten.softmax.int) == 0
    assert len(watch.graphs) > watch.count(attend)


def test_inductor_is_what_comes_after_by_default():
    model, x = Attention().eval(), torch.randn(2, 9, 32)
    found = torch.compile(model, backend="fxopt", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(found(x), double(model, x))


@pytest.mark.parametrize("spelling", ["eager", "sdpa"])
def test_a_hugging_face_model_without_padding_is_rewritten(spelling):
    hf = pytest.importorskip("transformers")
    config = hf.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=61, attn_implementation=spelling,
    )  # fmt: skip
    model = hf.LlamaForCausalLM(config)
    found, watch = compiled(model)
    with torch.no_grad():
        for length in (5, 8):
            ids = torch.randint(0, 61, (2, length))
            got = found(input_ids=ids, use_cache=False).logits
            want = model.double()(input_ids=ids, use_cache=False).logits.float()
            model.float()
            torch.testing.assert_close(got, want)
    assert watch.count(attend) == 2 * len(watch.graphs)
    assert watch.count(aten.rms_norm.default) == 5 * len(watch.graphs)


def test_padding_is_exact_in_every_row(caplog):
    """Queries on padding see no key; the average that eager attention makes of that stays."""
    hf = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, :4] = 0
    ids = torch.randint(0, 61, (2, 9))
    for spelling in ("eager", "sdpa"):
        config = hf.LlamaConfig(
            **sizes, num_hidden_layers=1, vocab_size=61, attn_implementation=spelling
        )
        model = hf.LlamaForCausalLM(config)
        found, watch = compiled(model)
        with torch.no_grad(), caplog.at_level(logging.INFO, "fxopt"):
            arguments = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
            torch.testing.assert_close(found(**arguments).logits, model(**arguments).logits)
        assert watch.count(attend) == (spelling == "sdpa")
    assert "a padded query may see no key" in caplog.text


class Writing(Attention):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x)


class Weights(nn.Module):
    """Returns what `attend` never makes, beside what it does."""

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        weights = (q @ k.transpose(-2, -1)).softmax(-1)
        return weights @ k, weights


class Transposed(nn.Module):
    """Its result is laid out as the product is, [batch, heads, tokens, features]."""

    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        return (q @ k.transpose(-2, -1)).softmax(-1) @ k


def left_alone(model: nn.Module, *args: Tensor, caplog) -> str:
    found, watch = compiled(model)
    with caplog.at_level(logging.INFO, "fxopt"):
        got = found(*args)
    assert watch.count(attend) == 0
    torch.testing.assert_close(got, model(*args))
    return caplog.text


def test_a_training_step_is_left_alone(caplog):
    model, x = Attention(0.0), torch.randn(2, 5, 32)
    assert "part of a training step" in left_alone(model, x, caplog=caplog)
    found, _ = compiled(model)
    found(x).sum().backward()
    got = model.qkv.weight.grad.clone()
    model.zero_grad()
    model(x).sum().backward()
    torch.testing.assert_close(got, model.qkv.weight.grad)


@torch.no_grad()
def test_dropout_that_is_at_work_is_left_alone():
    model = Attention(0.5).train()
    watch = Watch()
    found = torch.compile(model, backend="fxopt", options={"then": watch})
    x = torch.randn(2, 5, 32)
    torch.manual_seed(3)
    got = found(x)
    torch.manual_seed(3)
    torch.testing.assert_close(got, model(x))
    assert watch.count(attend) == 0


@torch.no_grad()
def test_writes_to_buffers_are_left_alone_and_happen(caplog):
    model, x = Writing(), torch.randn(2, 5, 32)
    assert "overwrites a tensor in place (aten.add_" in left_alone(model, x, caplog=caplog)
    assert model.calls == 2


@torch.no_grad()
def test_autocast_is_left_alone(caplog):
    with torch.autocast("cpu", torch.bfloat16):
        assert "autocast" in left_alone(Attention(), torch.randn(2, 5, 32), caplog=caplog)


@torch.no_grad()
def test_weights_that_are_returned_stay(caplog):
    q, k = torch.randn(2, 4, 5, 8), torch.randn(2, 4, 7, 8)
    assert "nothing to rewrite" in left_alone(Weights(), q, k, caplog=caplog)


@torch.no_grad()
def test_results_keep_their_layout(caplog):
    q, k = torch.randn(2, 4, 5, 8), torch.randn(2, 4, 7, 8)
    found, _ = compiled(Transposed())
    assert found(q, k).stride() == Transposed()(q, k).stride()
    assert "differently in memory" in left_alone(Transposed(), q, k, caplog=caplog)


@torch.no_grad()
def test_a_graph_that_cannot_be_traced_is_left_alone(caplog, monkeypatch):
    def refuse(*args, **kwargs):
        raise RuntimeError("no such call")

    monkeypatch.setattr(fxopt.backend, "make_fx", refuse)
    text = left_alone(Attention(), torch.randn(2, 5, 32), caplog=caplog)
    assert "RuntimeError: no such call" in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kl": 0.02}, r"kl: the backend makes exact rewrites only.*fxopt\.optimize"),
        ({"relative_error": 0.1, "weights": "40%"}, r"relative_error, weights: .*exact"),
        ({"colour": "red"}, "takes no colour"),
    ],
)
def test_rows_of_a_budget_are_an_error(options, message):
    found = torch.compile(Attention().eval(), backend="fxopt", options=options)
    with torch.no_grad(), pytest.raises(BackendCompilerFailed, match=message):
        found(torch.randn(2, 5, 32))


def test_a_mode_is_an_error():
    found = torch.compile(Attention().eval(), backend="fxopt", mode="reduce-overhead")
    with torch.no_grad(), pytest.raises(BackendCompilerFailed, match="takes no mode"):
        found(torch.randn(2, 5, 32))


def test_the_backend_is_known_by_name():
    assert "fxopt" in list_backends(exclude_tags=())
    assert lookup_backend("fxopt") is backend
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (entry,) = project["entry-points"]["torch_dynamo_backends"].items()
    assert EntryPoint(*entry, "torch_dynamo_backends").load() is backend
    assert entry[0] == "fxopt"
