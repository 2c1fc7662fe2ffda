"""Plain modules and awkward input: ties, shared modules, buffers, odd calls."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxopt.capture import capture
from fxopt.ir.errors import CaptureError
from fxopt.ir.site import LinearInfo, TemporaryInfo, rows_of
from fxopt.ir.workload import Scenario


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(16, 64), nn.ReLU(inplace=True), nn.Linear(64, 8)).eval()


def convnet() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16), nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Dropout(0.5), nn.Linear(16, 5),
    ).eval()  # fmt: skip


@pytest.mark.parametrize("batch", [0, 1, 2, 7])
def test_mlp(assert_same: Any, batch: int) -> None:
    model = mlp()
    captured = capture(model, torch.randn(1, 16))
    assert captured.inputs == ("input",)
    assert captured.static_dims == ("input dim 1 = 16",)
    assert_same(captured, model, {"input": torch.randn(batch, 16)})


def test_mlp_sites() -> None:
    sites = capture(mlp(), torch.randn(2, 16)).sites
    assert [(s.family, s.key) for s in sites] == [
        ("linear", "0"),
        ("linear", "2"),
        ("activation", "2"),
        ("linear", "0+2"),
    ]
    assert sites[2].info.out_bytes == 8 * 4


class Pooled(nn.Module):
    """Two linears: of each token, and of each sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.each, self.whole = nn.Linear(16, 24), nn.Linear(24, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.whole(self.each(x).mean(1))


def test_rows_of_a_matrix_are_items_of_the_batch() -> None:
    def rows(sites: Any) -> dict[str, int]:
        call = Scenario("forward", 5, 16, 0)
        infos = {s.key: s.info for s in sites if isinstance(s.info, LinearInfo)}
        return {key: rows_of(info, call) for key, info in infos.items()}

    assert rows(capture(mlp(), torch.randn(2, 16)).sites) == {"0": 5, "2": 5}
    assert rows(capture(Pooled(), torch.randn(2, 7, 16)).sites) == {"each": 80, "whole": 5}


def test_rows_of_all_tokens_together_are_no_items() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.each = nn.Linear(16, 24)

        def forward(self, x: Tensor) -> Tensor:
            return self.each(x.flatten(0, 1))

    site, *_ = capture(Flat(), torch.randn(2, 7, 16)).sites
    assert rows_of(site.info, Scenario("forward", 5, 7, 0)) == 35


class Windows(nn.Module):
    """An image's places in windows of four, which a linear and an MLP see as items."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.mlp = nn.Linear(16, 16), mlp()

    def forward(self, x: Tensor) -> Tensor:
        windows = x.flatten(2).transpose(1, 2).reshape(-1, 4, 16)
        return self.mlp(self.linear(windows))


@pytest.mark.parametrize("batch", [2, 6])
def test_rows_that_are_no_items_are_counted_by_item(batch: int) -> None:
    sites = capture(Windows(), torch.randn(2, 16, 8, 6)).sites
    infos = [s.info for s in sites if isinstance(s.info, LinearInfo | TemporaryInfo)]
    assert {rows_of(i, Scenario("forward", batch, 16, 0)) for i in infos} == {batch * 48}


def test_rows_of_a_batch_that_the_model_fixes() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.each = nn.Linear(16, 24)

        def forward(self, x: Tensor) -> Tensor:
            return self.each(x.reshape(4, 16))

    captured = capture(Fixed(), torch.randn(4, 16))
    assert "x dim 0 = 4" in captured.static_dims
    site, *_ = captured.sites
    assert rows_of(site.info, Scenario("forward", 4, 16, 0)) == 4


@pytest.mark.parametrize(("batch", "size"), [(1, 8), (3, 17), (2, 32)])
def test_convnet(assert_same: Any, batch: int, size: int) -> None:
    model = convnet()
    captured = capture(model, torch.randn(1, 3, 12, 12))
    assert [s.key for s in captured.sites] == ["10"]
    assert_same(captured, model, {"input": torch.randn(batch, 3, size, size)})


def test_non_contiguous_input(assert_same: Any) -> None:
    model = mlp()
    captured = capture(model, torch.randn(16, 4).t())
    assert_same(captured, model, {"input": torch.randn(16, 9).t()})


class Twice(nn.Module):
    """One block called twice, under two names, and a tied head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 16)
        self.block = nn.Sequential(nn.Linear(16, 16), nn.Tanh())
        self.alias = self.block
        self.head = nn.Linear(16, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.alias(self.block(self.block(self.embed(ids)))))


def test_shared_and_tied_modules(assert_same: Any) -> None:
    model = Twice().eval()
    captured = capture(model, torch.randint(11, (2, 5)))
    *layers, head = (s for s in captured.sites if s.family == "linear")
    linears = {s.key: s for s in layers}
    assert set(linears) == {"block.0", "block@1.0", "alias.0"}
    assert linears["alias.0"].info.weight == "alias.0.weight"
    assert all(site.blocked and "tied weight" in site.blocked for site in linears.values())
    assert (head.key, head.blocked, head.info.kind) == ("head", None, "tied")
    assert [m.info.weight for m in head.info.members] == ["embed.weight", "head.weight"]
    assert [m.key for m in head.info.members] == ["embed", "head"]
    assert_same(captured, model, {"ids": torch.randint(11, (3, 4))})


class Spellings(nn.Module):
    """Linear layers that are not nn.Linear."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(16, 24))
        self.b = nn.Parameter(torch.randn(8, 24))
        self.bias = nn.Parameter(torch.randn(24))
        self.register_buffer("c", torch.randn(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        flat = torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.a).view(*x.shape[:-1], 24)
        return F.linear(flat @ self.b.T, self.c) @ (self.c + 1)


def test_spellings_of_linear(assert_same: Any) -> None:
    model = Spellings().eval()
    captured = capture(model, torch.randn(2, 5, 16))
    a, b, c = (s for s in captured.sites if isinstance(s.info, LinearInfo))
    assert (a.info.weight, a.info.bias, a.info.transposed) == ("a", "bias", True)
    assert (a.info.in_features, a.info.out_features) == (16, 24)
    assert (b.info.weight, b.info.bias, b.info.transposed) == ("b", None, False)
    assert (b.info.in_features, b.info.out_features) == (24, 8)
    assert (a.blocked, b.blocked) == (None, None)
    assert (a.key, b.key, c.key) == ("#0", "#1", "#2")
    assert c.blocked == "the weight is a buffer or a constant, not a parameter"
    targets = [str(n.target) for n in captured.graph.graph.nodes]
    assert not any("addmm" in t or "view" in t for t in targets)
    assert_same(captured, model, {"x": torch.randn(3, 2, 16)})


class Overwriting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = self.fc(x)
        before = y * 2
        y.add_(1)
        torch.relu_(y)
        z = x + 1
        view = z.view(-1)
        z.mul_(3)
        return before, y - 1, view


def test_overwritten_temporaries() -> None:
    model = Overwriting()
    captured = capture(model, torch.randn(2, 4))
    targets = {str(n.target) for n in captured.graph.graph.nodes}
    assert {"aten.add.Tensor", "aten.relu.default", "aten.mul_.Tensor"} <= targets
    assert not {"aten.add_.Tensor", "aten.relu_.default"} & targets
    x = torch.randn(3, 4)
    for got, want in zip(captured.run(x), model(x), strict=True):
        torch.testing.assert_close(got, want)


class Counter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.fc(x) * self.calls


def test_buffers_that_forward_updates() -> None:
    model = Counter()
    captured = capture(model, torch.randn(2, 4))
    assert model.calls == 0
    x = torch.randn(3, 4)
    torch.testing.assert_close(captured.run(x), model.fc(x))
    torch.testing.assert_close(captured.run(x), 2 * model.fc(x))
    assert model.calls == 2


class Point(NamedTuple):
    x: Tensor
    y: Tensor


class Outputs(nn.Module):
    def forward(self, x: Tensor, *, scale: float = 1.0, kind: str = "dict") -> Any:
        made = {
            "dict": {"a": x * scale, "b": (x + 1, None, 3)},
            "list": [x, {"c": x * scale}],
            "named": Point(x, x * scale),
        }
        return made[kind]


@pytest.mark.parametrize("kind", ["dict", "list", "named"])
def test_output_objects(kind: str) -> None:
    captured = capture(Outputs(), {"x": torch.randn(2, 3), "scale": 2.0, "kind": kind})
    assert captured.constants == {"scale": 2.0, "kind": kind}
    x = torch.randn(4, 3)
    got, want = captured.run(x), Outputs()(x, scale=2.0, kind=kind)
    assert type(got) is type(want)
    torch.testing.assert_close(captured.output.leaves_of(got), captured.output.leaves_of(want))
    again = type(captured.output).from_json(captured.output.to_json())
    assert again == captured.output
    if kind == "dict":
        assert captured.output.leaf_names() == ["a", "b.0"]
        assert got["b"][1:] == (None, 3)


class Sum(nn.Module):
    def forward(self, *parts: Tensor) -> Tensor:
        return torch.stack(parts).sum(0)


def test_variadic_arguments() -> None:
    captured = capture(Sum(), (torch.randn(2, 3), torch.randn(2, 3)))
    assert captured.inputs == ("parts_0", "parts_1")
    x, y = torch.randn(5, 3), torch.randn(5, 3)
    torch.testing.assert_close(captured.run(x, y), x + y)


class Nested(nn.Module):
    def forward(self, x: dict[str, Tensor], pair: tuple[Tensor, list[Tensor]]) -> Tensor:
        return x["a"] @ pair[0] + pair[1][0] * x["b"]


def test_containers_of_tensors() -> None:
    def inputs(batch: int) -> dict[str, Any]:
        x = {"a": torch.randn(batch, 3), "b": torch.randn(batch, 1)}
        return {"x": x, "pair": (torch.randn(3, 4), [torch.randn(batch, 4)])}

    captured = capture(Nested(), inputs(2))
    assert captured.inputs == ("x_a", "x_b", "pair_0", "pair_1_0")
    given = inputs(5)
    torch.testing.assert_close(captured.run(**given), Nested()(**given))


class Constant(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            y = x * torch.tensor([1.0, 2.0, 3.0], device=x.device)
        return y + torch.arange(x.shape[0], device=x.device)[:, None]


def test_constants_regions_and_devices() -> None:
    captured = capture(Constant(), torch.randn(2, 3))
    x = torch.randn(5, 3)
    torch.testing.assert_close(captured.run(x), Constant()(x))
    arange = next(n for n in captured.graph.graph.nodes if "arange" in str(n.target))
    device = arange.kwargs["device"]
    assert (device.target, device.args[1]) == (getattr, "device")


def test_gradients_flow() -> None:
    model = mlp()
    captured = capture(model, torch.randn(2, 16))
    captured.run(torch.randn(3, 16)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_inside_no_grad(mode: Any) -> None:
    model = mlp()
    with mode():
        captured = capture(model, torch.randn(2, 16))
    x = torch.randn(3, 16)
    torch.testing.assert_close(captured.run(x), model(x))


def test_bfloat16(assert_same: Any) -> None:
    model = mlp().bfloat16()
    captured = capture(model, torch.randn(2, 16, dtype=torch.bfloat16))
    assert captured.sites[0].info.dtype == torch.bfloat16
    x = torch.randn(3, 16, dtype=torch.bfloat16)
    torch.testing.assert_close(captured.run(x), model(x))


def test_missing_and_unknown_arguments() -> None:
    captured = capture(mlp(), torch.randn(2, 16))
    with pytest.raises(CaptureError, match="lacks input"):
        captured.run()
    with pytest.raises(CaptureError, match=r"input has shape \(2, 15\).*\(any, 16\)"):
        captured.run(torch.randn(2, 15))
