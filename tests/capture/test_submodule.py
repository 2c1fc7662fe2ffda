"""`at=` captures one submodule on the inputs that it sees in a run of the whole."""

from __future__ import annotations

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from fxopt.capture import capture
from fxopt.capture.submodule import scratch, twin
from fxopt.ir.errors import CaptureError
from fxopt.ir.site import LinearInfo


class Whole(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(8)
        self.body = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))
        self.spare = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self.norm(x))


def test_plain_submodule() -> None:
    model = Whole()
    statistics = model.norm.running_mean.clone()
    captured = capture(model, torch.randn(4, 8), at="body")
    assert {"0", "2"} <= {s.key for s in captured.sites if s.family == "linear"}
    assert torch.equal(model.norm.running_mean, statistics)
    assert model.training
    x = torch.randn(3, 8)
    torch.testing.assert_close(captured.run(x), model.body(x))
    assert not model.body._forward_pre_hooks


def test_language_model_inside_another() -> None:
    config = hf.LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2,
    )  # fmt: skip
    model = hf.LlamaForCausalLM(config).eval()
    captured = capture(model, {"input_ids": torch.randint(97, (2, 5))}, at="model")
    assert [s.op for s in captured.sites if s.family == "attention"] == ["layers.0.self_attn"] * 2
    ids = torch.randint(97, (3, 8))
    got = captured.run(input_ids=ids).last_hidden_state
    torch.testing.assert_close(got, model.model(input_ids=ids).last_hidden_state)


def test_unknown_and_uncalled_submodules() -> None:
    with pytest.raises(CaptureError, match=r"no submodule 'bodi'. Did you mean body"):
        capture(Whole(), torch.randn(4, 8), at="bodi")
    with pytest.raises(CaptureError, match="'spare' is not called when Whole runs"):
        capture(Whole(), torch.randn(4, 8), at="spare")


class Gate(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.big, self.gate, self.twice = nn.Linear(8, 64), Gate(), nn.Linear(64, 64)
        self.layers = nn.ModuleList([nn.Linear(64, 8)])

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[0](self.gate(self.twice(self.twice(self.big(x)))))


class Gated(nn.Module):
    """The gate fails; around it stand modules called once, twice, and never."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.block, self.spare = nn.Linear(8, 8), Block(), nn.Linear(99, 99)
        self.steps = 0
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        self.steps += 1
        return self.block(self.body(x))


def test_a_failed_capture_names_the_place_and_parts_to_take() -> None:
    with pytest.raises(CaptureError) as caught:
        capture(Gated(), torch.randn(4, 8))
    message = str(caught.value)
    assert "It fails in block.gate (Gate)." in message
    assert "try at='block.big' or at='block.layers.0' or at='body'." in message
    with pytest.raises(CaptureError, match=r"in block.gate \(Gate\).* try at='block.big' or at="):
        capture(Gated(), torch.randn(4, 8), at="block")


def test_recording_leaves_no_trace_on_the_model() -> None:
    model = Gated()
    capture(model, torch.randn(4, 8), at="block.big")
    assert model.steps == 0
    assert model.seen == 0
    assert model.training


def test_a_weight_that_the_rest_reads_is_blocked() -> None:
    model = Whole()
    model.spare.weight = model.body[0].weight
    sites = capture(model, torch.randn(4, 8), at="body").sites
    blocked = {s.key: s.blocked for s in sites if isinstance(s.info, LinearInfo)}
    assert blocked["0"] == "tied weight: also read as spare.weight, which stays as it is"
    assert blocked["2"] is None
    assert set(blocked) == {"0", "2"}


class Bound(nn.Module):
    """Holds its child also in a list, by a bound method and under a second name."""

    def __init__(self) -> None:
        super().__init__()
        self.child = self.alias = nn.Linear(8, 8)
        self.held, self.call = {"child": [self.child]}, self.child.forward

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.held["child"][0](x))


def test_a_twin_shares_tensors_and_nothing_else() -> None:
    model = Bound().train()
    copied = twin(model)
    assert isinstance(copied, Bound)
    assert copied.child is copied.alias is copied.held["child"][0] is copied.call.__self__
    assert copied.child is not model.child
    assert copied.child.weight is model.child.weight
    copied.eval().register_forward_hook(lambda *_: None)
    copied.held["child"].clear()
    assert model.child.training
    assert not model._forward_hooks
    assert model.held["child"] == [model.child]
    other = nn.Identity()
    replaced = twin(model, {id(model.child): other})
    assert replaced.child is replaced.alias is replaced.held["child"][0] is other


def test_a_scratch_has_buffers_of_its_own_and_no_gradients() -> None:
    model = Whole()
    copied = scratch(model)
    assert not copied.training
    assert copied.norm.running_mean is not model.norm.running_mean
    assert copied.body[0].weight.data_ptr() == model.body[0].weight.data_ptr()
    assert not any(p.requires_grad for p in copied.parameters())
    assert all(p.requires_grad for p in model.parameters())
