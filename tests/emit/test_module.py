"""Calling an emitted module: signatures, outputs, awkward models and awkward inputs."""

from __future__ import annotations

import copy
import inspect
from collections import namedtuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fxopt.capture import capture
from fxopt.emit.editor import GraphEditor
from fxopt.emit.module import OptimizedModule, emit
from fxopt.ir.errors import FxoptError

Result = namedtuple("Result", "total parts")


def optimised(model, example):
    captured = capture(model.eval(), example)
    return emit(captured, GraphEditor(captured), model)


class Dictionary(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, *, x, scale=None, flag=False, name="plain"):
        y = self.linear(x) if scale is None else self.linear(x) * scale
        return {"y": y, "parts": (y.sum(), [y.mean(), None]), "kept": 3}


class Plain(nn.Module):
    def forward(self, x, y):
        return F.gelu(x) + y.T, x.flip(0)


class Named(nn.Module):
    def forward(self, x):
        return Result(x.sum(), x * 2)


class Counter(nn.Module):
    """A buffer that the forward updates, and one that is not saved."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("offset", torch.ones(3), persistent=False)
        self.linear = nn.Linear(3, 3)

    def forward(self, x):
        self.calls.add_(1)
        return self.linear(x) + self.offset + self.calls


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.low = nn.Linear(6, 6).bfloat16()
        self.high = nn.Linear(6, 2)

    def forward(self, x):
        return self.high(self.low(x.bfloat16()).float())


class Convolutions(nn.Module):
    def __init__(self):
        super().__init__()
        self.stack = nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2)
        )
        self.head = nn.Linear(4, 2)

    def forward(self, images):
        return self.head(self.stack(images).mean((2, 3)))


def test_keyword_only_forward_with_nested_outputs():
    model, x = Dictionary(), torch.randn(5, 4)
    opt = optimised(model, {"x": x})
    want, got = model(x=x), opt(x=x)
    assert torch.equal(want["y"], got["y"])
    assert isinstance(got["parts"], tuple)
    assert got["parts"][1][1] is None
    assert got["kept"] == 3
    with pytest.raises(TypeError, match="0 positional"):
        opt(x)


def test_arguments_that_were_not_captured_are_named():
    opt = optimised(Dictionary(), {"x": torch.randn(5, 4)})
    x = torch.randn(2, 4)
    opt(x=x, scale=None, flag=False, name="plain")
    with pytest.raises(FxoptError, match=r"'scale'.*example_inputs"):
        opt(x=x, scale=torch.tensor(2.0))
    with pytest.raises(FxoptError, match="'flag'"):
        opt(x=x, flag=True)
    with pytest.raises(TypeError, match="unexpected keyword argument 'other'"):
        opt(x=x, other=1)
    with pytest.raises(TypeError, match="missing argument 'x'"):
        opt()


def test_constants_of_the_example_may_be_repeated():
    opt = optimised(Dictionary(), {"x": torch.randn(5, 4), "name": "odd"})
    opt(x=torch.randn(2, 4), name="odd")
    with pytest.raises(FxoptError, match="'name'"):
        opt(x=torch.randn(2, 4), name="even")


def test_a_model_without_parameters_and_positional_calls():
    model, inputs = Plain(), (torch.randn(3, 5), torch.randn(5, 3))
    opt = optimised(model, inputs)
    x, y = torch.randn(4, 7), torch.randn(7, 4)
    for call in (opt(x, y), opt(x, y=y), opt(y=y, x=x)):
        assert all(torch.equal(a, b) for a, b in zip(call, model(x, y), strict=True))
    with pytest.raises(TypeError, match="multiple values for argument 'x'"):
        opt(x, y, x=x)
    with pytest.raises(TypeError, match="takes 2 positional"):
        opt(x, y, x)
    assert list(inspect.signature(opt).parameters) == ["x", "y"]


def test_named_tuples_come_back():
    model, x = Named(), torch.randn(3, 2)
    got = optimised(model, x)(x)
    assert type(got) is Result
    assert torch.equal(got.parts, x * 2)


def test_buffers_are_updated_and_shared_with_the_original():
    model, x = Counter(), torch.randn(2, 3)
    opt, twin = optimised(model, x), copy.deepcopy(model)
    calls = int(model.calls)
    twin.calls.fill_(calls)
    for _ in range(3):
        with torch.no_grad():
            assert torch.equal(opt(x), twin(x))
    assert int(opt.calls) == calls + 3
    assert opt.calls is model.calls
    assert list(opt.state_dict()) == ["calls", "linear.weight", "linear.bias"]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_gradient_modes(mode):
    model, images = Convolutions(), torch.randn(2, 3, 8, 8)
    opt = optimised(model, images)
    with mode():
        assert torch.equal(opt(images), model(images))


def test_strided_and_empty_batches():
    model = Convolutions()
    opt = optimised(model, torch.randn(2, 3, 8, 8))
    strided = torch.randn(3, 8, 8, 5).permute(3, 0, 1, 2)[::2]
    assert torch.equal(opt(strided), model(strided))
    assert opt(torch.randn(0, 3, 8, 8)).shape == (0, 2)


def test_mixed_dtypes_and_gradients():
    model, x = Mixed(), torch.randn(3, 6)
    opt = optimised(model, x)
    assert torch.equal(opt(x), model(x))
    opt(x).sum().backward()
    assert model.low.weight.grad is not None
    assert opt.low.weight is model.low.weight


def test_dtype_changes_are_refused_and_device_changes_are_not():
    class Rows:
        notes: list[str] = []  # noqa: RUF012

    model = Convolutions()
    opt = copy.deepcopy(optimised(model, torch.randn(2, 3, 8, 8)))
    for change in (opt.half, opt.bfloat16, opt.double, lambda: opt.to(torch.float16)):
        with pytest.raises(FxoptError, match=r"computes in torch\.float32.*optimise that"):
            change()
    assert opt.float() is opt
    assert opt.to("cpu", torch.float32) is opt
    assert next(opt.parameters()).dtype == torch.float32
    opt.report = Rows()
    opt.to("meta")
    assert opt.device.type == "meta"
    assert opt.report.notes == ["moved from cpu to meta: not measured there"]


def test_a_bf16_model_stays_bf16(case):
    found = case("bert")
    model = copy.deepcopy(found.model).bfloat16()
    captured = capture(model, found.example)
    opt = emit(captured, GraphEditor(captured), model)
    assert opt.dtype == torch.bfloat16
    with torch.no_grad():
        got, want = opt(**found.example), model(**found.example)
        exact = copy.deepcopy(model).double()(**found.example).last_hidden_state
    error = (want.last_hidden_state.double() - exact).abs().max()
    assert (got.last_hidden_state.double() - exact).abs().max() <= 2 * error


def test_hugging_face_options(case):
    found = case("bert")
    opt = found.emit()
    assert isinstance(opt(**found.example, return_dict=False), tuple)
    assert type(opt(**found.example)) is type(found.model(**found.example))
    with pytest.raises(FxoptError, match="'output_hidden_states'"):
        opt(**found.example, output_hidden_states=True)
    with pytest.raises(TypeError, match="missing argument 'input_ids'"):
        opt(attention_mask=found.example["attention_mask"])


def test_what_cannot_generate_says_why(case):
    with pytest.raises(FxoptError, match=r"ViTForImageClassification: .* no generate: "):
        case("vit").emit().generate(torch.zeros(1, 3, dtype=torch.int64))


def test_training_mode_is_told(case, caplog):
    opt = case("vit").emit()
    with caplog.at_level("INFO", "fxopt"):
        assert opt.train() is opt
    assert "evaluation mode" in caplog.text
    assert opt.training


def test_is_a_module_with_its_own_attributes(case):
    opt = case("vit").emit()
    assert isinstance(opt, OptimizedModule)
    assert opt.config is case("vit").model.config
    assert opt.plan is None
    assert "(q_proj): Linear(weight=[32, 32] float32" in repr(opt)
