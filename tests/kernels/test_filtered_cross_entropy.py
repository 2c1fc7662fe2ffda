"""Gradients without the classes that get next to nothing, against float64 and all classes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fxopt.decide.verify import peak_live_bytes
from fxopt.kernels.cut_cross_entropy import (
    cut_cross_entropy,
    cut_cross_entropy_sum,
    filtered,
    linear_cross_entropy,
    reference,
    workspace,
)

EPS = 2.0**-12


def peaked(rows: int = 500, features: int = 31, classes: int = 2000, **kind: Any) -> list[Tensor]:
    """hidden, weight and labels as of a trained head: 100 classes are likely, all others share a
    direction that keeps them from it, and some mass."""
    weight = 3 * torch.randn(classes, features) / features**0.5
    weight[100:] *= 0.03
    weight[100:, 0] = -2.0
    hidden, labels = torch.randn(rows, features), torch.randint(100, (rows,))
    hidden[:, 0] = 1.0
    labels[::7] = -100
    return [hidden.to(**kind), weight.to(**kind), labels]


def gradients(operands: list[Tensor], **options: Any) -> list[Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in operands[:2]]
    loss = linear_cross_entropy(leaves[0], leaves[1], operands[2], **options)
    return [loss.detach().sum(), *torch.autograd.grad(loss.sum(), leaves)]


def off(mine: Tensor, truth: Tensor) -> float:
    return ((mine.double() - truth.double()).norm() / truth.double().norm()).item()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("chunk", [20, 133, 500])
def test_gradients_are_near_those_of_all_classes(
    dtype: torch.dtype, reduction: str, chunk: int
) -> None:
    """20 rows are 25 chunks: the sums that stand for small classes are taken in twice."""
    operands = peaked(dtype=dtype)
    options: dict[str, Any] = {"reduction": reduction, "chunk": chunk}
    exact = gradients([t.double() for t in operands[:2]] + operands[2:], **options)
    whole = gradients(operands, **options)
    found = gradients(operands, filter_eps=EPS, **options)
    assert torch.equal(found[0], whole[0])  # the loss is exact
    for mine, theirs, truth in zip(found[1:], whole[1:], exact[1:], strict=True):
        assert mine.dtype == dtype
        own = off(theirs, truth)
        assert off(mine, truth) < 0.004 + 2 * own
        assert off(mine, theirs) > 0


def test_products_are_of_the_kept_classes_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gathered in pieces, each class once a chunk."""
    hidden, weight, labels = peaked(dtype=torch.float64)
    expected = gradients([hidden, weight, labels], filter_eps=EPS, chunk=250)
    taken: list[int] = []

    def product(total: Tensor, a: Tensor, b: Tensor, beta: int) -> None:
        taken.append(len(a) if beta == 0 else 0)
        reference.add_product(total, a, b, beta)

    monkeypatch.setattr(filtered, "add_product", product)
    monkeypatch.setattr(filtered, "PIECE", 33)
    found = gradients([hidden, weight, labels], filter_eps=EPS, chunk=250)
    assert max(taken) == 33
    assert 2 * 100 <= sum(taken) < 2 * 150
    for mine, whole in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, whole)


def test_the_sums_of_small_classes_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is left out pulls every row towards the same mean of the weight: its sums stand for it,
    and without them the gradient of hidden would be off by several times as much."""
    operands = peaked(dtype=torch.float64)
    exact = gradients(operands)[1]
    near = off(gradients(operands, filter_eps=EPS)[1], exact)
    monkeypatch.setattr(filtered, "_rate", lambda rows, columns: torch.zeros(()))
    assert off(gradients(operands, filter_eps=EPS)[1], exact) > 4 * near


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_small_is_relative_to_what_reaches_the_loss(scale: float) -> None:
    hidden, weight, labels = peaked(dtype=torch.float64)
    hidden.requires_grad_()
    found: list[Tensor] = []
    for factor in (1.0, scale):
        loss = linear_cross_entropy(hidden, weight, labels, filter_eps=EPS, reduction="none")
        found += torch.autograd.grad(factor * loss.sum(), hidden)
    torch.testing.assert_close(found[1] / scale, found[0])


def test_where_most_classes_count_all_do() -> None:
    operands = [*(torch.randn(n, 9, dtype=torch.float64) for n in (60, 80)), torch.arange(60)]
    for mine, theirs in zip(
        gradients(operands, filter_eps=EPS, chunk=25), gradients(operands, chunk=25), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-14)


def test_sums_that_cancel_stand_for_nothing() -> None:
    """Label smoothing takes as much from all classes as it gives to the small ones."""
    rows, columns = torch.tensor([1.0, -0.9]), torch.tensor([0.1, 0.0])
    assert filtered._rate(rows, columns) == 0.0  # pyright: ignore[reportPrivateUsage]
    operands = peaked(dtype=torch.float64)
    exact = gradients(operands, label_smoothing=0.1)
    found = gradients(operands, label_smoothing=0.1, filter_eps=EPS)
    for mine, truth in zip(found[1:], exact[1:], strict=True):
        assert off(mine, truth) < 0.05


def test_nothing_undefined_is_left_out() -> None:
    hidden, weight, labels = peaked()
    hidden[3] = float("nan")
    _, for_hidden, for_weight = gradients([hidden, weight, labels], filter_eps=EPS)
    assert for_hidden[3].isnan().all()
    assert for_weight.isnan().any()


@pytest.mark.parametrize("needs", [[True, False, True], [False, True, False]])
def test_what_is_frozen_or_biased(needs: list[bool]) -> None:
    hidden, weight, labels = peaked(dtype=torch.float64)
    bias = torch.randn(len(weight), dtype=torch.float64)
    rest = (labels, True, -100, 0.0, 0.0, 0.0)
    exact = cut_cross_entropy_sum(hidden, weight, bias, *rest, 0.0, needs, 200)
    found = cut_cross_entropy_sum(hidden, weight, bias, *rest, EPS, needs, 200)
    for mine, truth in zip(found, exact, strict=True):
        assert mine.shape == truth.shape
        assert truth.numel() == 0 or off(mine, truth) < 0.004


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("chunk", [32, 512])
def test_workspace_bounds_what_is_alive(dtype: torch.dtype, chunk: int) -> None:
    """Half of the classes is the most that is gathered."""
    hidden, weight, labels = peaked(512, 64, 4096, dtype=dtype)
    weight[100:2000, 0] += 8.0
    labels = torch.arange(512) * 3
    rest = (None, labels, True, -100, 0.0, 0.0, 0.0, EPS, [True, True, False], chunk)

    def call() -> Any:
        return cut_cross_entropy_sum(hidden, weight, *rest)

    results = sum(t.nbytes for t in call())
    counted = results + workspace(hidden, weight, 0.0, [True, True, False], chunk, EPS)
    assert 0.5 * counted < peak_live_bytes(call, torch.device("cpu")) < 1.1 * counted


def test_registration() -> None:
    hidden, weight, labels = peaked(40, 8, 200)
    leaves = [t.requires_grad_() for t in (hidden, weight)]
    options = (-100, 0.0, 0.0, 0.0, EPS)
    torch.library.opcheck(cut_cross_entropy, (*leaves, None, labels, *options, 16))
    arguments = (*leaves, None, labels, True, *options, [True, True, False], 16)
    torch.library.opcheck(cut_cross_entropy_sum, arguments)


@pytest.mark.gpu
def test_op_on_the_device() -> None:
    operands = [t.cuda() for t in peaked(2100, 1000, 5000)]
    operands[:2] = [t.bfloat16() for t in operands[:2]]
    for chunk in (100, 1024):
        exact = gradients([t.double() for t in operands[:2]] + operands[2:], chunk=chunk)
        found = gradients(operands, filter_eps=EPS, chunk=chunk)
        for mine, truth in zip(found, exact, strict=True):
            assert off(mine, truth) < 0.03
