"""Linear head and cross-entropy without logits, against float64 and PyTorch's own chain."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fxopt.decide.verify import peak_live_bytes
from fxopt.kernels.cut_cross_entropy import (
    cut_cross_entropy,
    cut_cross_entropy_sum,
    linear_cross_entropy,
    reference,
    workspace,
)
from tests.kernels.ahead_of_time import compiled

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
OPTIONS = [
    {},
    {"label_smoothing": 0.1},
    {"softcap": 3.0},
    {"z_loss": 0.01},
    {"label_smoothing": 0.2, "softcap": 2.0, "z_loss": 0.02, "ignore_index": 7},
]
SLACK = 4.0
"""Sums of chunks round a 16-bit gradient once a chunk; one more factor of two is for few rows."""


def draw(rows: int = 63, features: int = 20, classes: int = 101, **kind: Any) -> list[Tensor]:
    """hidden, weight, bias and labels, some of which are ignored."""
    hidden = torch.randn(rows, features, **kind)
    weight, bias = torch.randn(classes, features, **kind), torch.randn(classes, **kind)
    labels = torch.randint(classes, (rows,), device=hidden.device)
    labels[::5], labels[1::9] = -100, 7
    return [hidden, weight, bias, labels]


def plain(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    softcap: float = 0.0,
    z_loss: float = 0.0,
    reduction: str = "mean",
    chunk: int = 0,
) -> Tensor:
    """What PyTorch computes, logits and all."""
    labels = labels.where(labels != -100, ignore_index)
    x = F.linear(hidden, weight, bias).to(torch.promote_types(hidden.dtype, torch.float32))
    x = softcap * torch.tanh(x / softcap) if softcap else x
    options: dict[str, Any] = {"ignore_index": ignore_index, "label_smoothing": label_smoothing}
    loss = F.cross_entropy(x, labels, reduction=reduction, **options)
    z = (z_loss * torch.logsumexp(x, -1).square()).where(labels != ignore_index, 0.0)
    if reduction == "none":
        return loss + z
    return loss + z.sum() / ((labels != ignore_index).sum() if reduction == "mean" else 1)


def gradients(function: Any, operands: list[Tensor], scale: Tensor, **options: Any) -> list[Tensor]:
    """The loss, and the gradients of hidden, weight and bias from `scale` times it."""
    hidden, weight, bias = (t.detach().clone().requires_grad_() for t in operands[:3])
    labels = operands[3].where(operands[3] != -100, options.get("ignore_index", -100))
    loss = function(hidden, weight, labels, bias, **options)
    (loss * scale).sum().backward()
    return [loss.detach(), *(t.grad for t in (hidden, weight, bias))]  # pyright: ignore


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("chunk", [10, 500])
def test_float64_to_the_last_digits(options: dict[str, Any], reduction: str, chunk: int) -> None:
    operands = draw(dtype=torch.float64)
    scale = torch.randn(63, dtype=torch.float64) if reduction == "none" else torch.tensor(0.7)
    expected = gradients(plain, operands, scale, reduction=reduction, **options)
    options = {"reduction": reduction, "chunk": chunk, **options}
    for mine, theirs in zip(
        gradients(linear_cross_entropy, operands, scale, **options), expected, strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


@DTYPES
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("chunk", [3, 16])
def test_as_near_to_float64_as_eager(
    dtype: torch.dtype, options: dict[str, Any], reduction: str, chunk: int
) -> None:
    operands = draw(dtype=torch.float32, device=DEVICE)
    operands[:3] = [t.to(dtype) for t in operands[:3]]
    scale = torch.rand(63, device=DEVICE) if reduction == "none" else torch.tensor(1.0)
    options = {"reduction": reduction, **options}
    exact = gradients(plain, [t.double() for t in operands[:3]] + operands[3:], scale, **options)
    eager = gradients(plain, operands, scale, **options)
    found = gradients(linear_cross_entropy, operands, scale, chunk=chunk, **options)
    for mine, theirs, truth in zip(found, eager, exact, strict=True):
        assert mine.dtype == theirs.dtype
        own = (theirs.double() - truth).norm() + torch.finfo(dtype).eps * truth.norm()
        assert (mine.double() - truth).norm() <= SLACK * own


def test_gradcheck_with_the_log_sum_exp() -> None:
    hidden, weight, bias, labels = draw(7, 4, 9, dtype=torch.float64)
    leaves = [t.requires_grad_() for t in (hidden, weight, bias)]

    def per_token(*operands: Tensor) -> Any:
        return cut_cross_entropy(*operands, labels, -100, 0.1, 2.0, 0.01, 0.0, 3)

    assert torch.autograd.gradcheck(per_token, leaves)
    lse = per_token(*leaves)[1]
    x = 2 * torch.tanh(F.linear(hidden, weight, bias) / 2)
    torch.testing.assert_close(lse, torch.logsumexp(x, -1))


def test_a_mean_over_ignored_labels_is_nan_and_its_gradient_nothing() -> None:
    hidden, weight, bias, labels = draw()
    operands = [hidden, weight, bias, labels.fill_(-100)]
    for smoothing in (0.0, 0.1):
        mine = gradients(
            linear_cross_entropy, operands, torch.tensor(1.0), label_smoothing=smoothing
        )
        theirs = gradients(plain, operands, torch.tensor(1.0), label_smoothing=smoothing)
        assert mine[0].isnan()
        assert theirs[0].isnan()
        for a, b in zip(mine[1:], theirs[1:], strict=True):
            assert torch.equal(a, torch.zeros_like(a))
            assert torch.equal(b, a)


def test_a_label_that_is_no_class_is_an_error_on_a_cpu() -> None:
    hidden, weight, bias, labels = draw()
    labels[3] = 101
    with pytest.raises((IndexError, RuntimeError)):
        linear_cross_entropy(hidden, weight, labels, bias)


def test_no_rows_at_all() -> None:
    hidden, weight, bias, labels = draw()
    none = [hidden[:0], weight, bias, labels[:0]]
    loss, *found = gradients(linear_cross_entropy, none, torch.tensor(1.0), reduction="sum")
    assert loss == 0
    assert all(torch.equal(g, torch.zeros_like(g)) for g in found)


def test_a_turned_weight_keeps_its_strides() -> None:
    """So that autograd takes the gradient of [D, V] as it is."""
    hidden, weight, bias, labels = draw()
    turned = weight.t().contiguous().requires_grad_()
    linear_cross_entropy(hidden, turned.t(), labels, bias).backward()
    assert turned.grad is not None
    _, _, expected, _ = gradients(
        linear_cross_entropy, [hidden, weight, bias, labels], torch.ones(())
    )
    torch.testing.assert_close(turned.grad, expected.t())
    made = cut_cross_entropy_sum(
        hidden,
        turned.detach().t(),
        bias,
        labels,
        False,
        -100,
        0.0,
        0.0,
        0.0,
        0.0,
        [True, True, True],
        10,
    )
    assert made[3].stride() == turned.t().stride()


def test_tied_weights_add_up() -> None:
    weight = torch.randn(50, 8, dtype=torch.float64, requires_grad=True)
    ids = torch.randint(50, (33,))
    found: list[Tensor] = []
    for loss in (linear_cross_entropy, plain):
        hidden = F.embedding(ids, weight).tanh()
        loss(hidden, weight, ids.roll(1), None, chunk=10).backward()
        assert weight.grad is not None
        found.append(weight.grad)
        weight.grad = None
    torch.testing.assert_close(*found)


def test_frozen_operands_cost_no_product() -> None:
    hidden, weight, bias, labels = draw()
    options = (labels, False, -100, 0.0, 0.0, 0.0, 0.0)
    _, _, for_hidden, *others = cut_cross_entropy_sum(
        hidden, weight, bias, *options, [True, False, False], 10
    )
    assert for_hidden.shape == hidden.shape
    assert all(g.numel() == 0 for g in others)
    hidden.requires_grad_()
    linear_cross_entropy(hidden, weight, labels, bias, reduction="sum").backward()
    torch.testing.assert_close(hidden.grad, for_hidden)
    with torch.no_grad():
        torch.testing.assert_close(
            linear_cross_entropy(hidden, weight, labels, bias), plain(hidden, weight, labels, bias)
        )


def test_a_kept_graph_runs_again_and_a_second_derivative_is_refused() -> None:
    hidden, weight, bias, labels = draw()
    weight.requires_grad_()
    loss = linear_cross_entropy(hidden, weight, labels, bias)
    (first,) = torch.autograd.grad(2 * loss, weight, retain_graph=True)
    kept = first.clone()
    (second,) = torch.autograd.grad(loss, weight)
    assert torch.equal(first, kept)
    torch.testing.assert_close(first, 2 * second)
    loss = linear_cross_entropy(hidden, weight, labels, bias)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        torch.autograd.grad(loss, weight, create_graph=True)


def test_half_precision_is_scaled_before_it_is_rounded() -> None:
    """A gradient below float16's least number survives behind a loss scale."""
    operands = draw(1000, 8, 5000)
    operands[:3] = [0.1 * t.half() for t in operands[:3]]
    exact = gradients(plain, [t.double() for t in operands[:3]] + operands[3:], torch.tensor(1.0))
    found = gradients(linear_cross_entropy, operands, torch.tensor(2.0**14), chunk=250)
    for mine, truth in zip(found[1:], exact[1:], strict=True):
        off = mine.double() / 2.0**14 - truth
        assert off.norm() <= 0.01 * truth.norm()


def test_autocast_casts_as_a_linear_layer_does() -> None:
    operands = draw()
    with torch.autocast("cpu", torch.bfloat16):
        mine = gradients(linear_cross_entropy, operands, torch.tensor(1.0))
        theirs = gradients(plain, operands, torch.tensor(1.0))
    for a, b in zip(mine, theirs, strict=True):
        assert a.dtype == b.dtype
        assert (a - b).norm() <= 0.02 * b.norm()


@DTYPES
@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("chunk", [8, 64])
@pytest.mark.parametrize("needs", [[True, True, True], [True, False, False], [False] * 3])
def test_workspace_is_what_is_alive(
    dtype: torch.dtype, softcap: float, chunk: int, needs: list[bool]
) -> None:
    hidden, weight, bias, labels = draw(256, 64, 2048, dtype=dtype)

    def call() -> Any:
        return cut_cross_entropy_sum(
            hidden, weight, bias, labels, True, -100, 0.0, softcap, 0.0, 0.0, needs, chunk
        )

    results = sum(t.nbytes for t in call())
    counted = results + workspace(hidden, weight, softcap, needs, chunk)
    assert peak_live_bytes(call, torch.device("cpu")) == pytest.approx(counted, rel=0.06)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_no_logits_between_forward_and_backward(reduction: str) -> None:
    hidden, weight, _, labels = draw(512, 16, 4000)
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]

    def step(loss: Any) -> Any:
        return lambda: loss(hidden, weight, labels, None, reduction=reduction, chunk=32).sum()

    def trained(loss: Any) -> int:
        def call() -> None:
            step(loss)().backward()
            for leaf in leaves:
                leaf.grad = None

        return peak_live_bytes(call, torch.device("cpu"))

    gradient = sum(t.nbytes for t in leaves)
    assert trained(linear_cross_entropy) < gradient + 1.2 * 32 * 4000 * 4
    assert trained(plain) > 2 * 512 * 4000 * 4


def test_the_backward_makes_no_second_gradient_of_the_weight() -> None:
    """Nor zeros of its size for results that have no gradient."""
    hidden, weight, _, labels = draw(64, 512, 4000)
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]

    def call() -> None:
        torch.autograd.grad(linear_cross_entropy(hidden, weight, labels, chunk=8), leaves)

    assert peak_live_bytes(call, torch.device("cpu")) < 1.2 * sum(t.nbytes for t in leaves)


def test_registration_and_compilation() -> None:
    hidden, weight, bias, labels = draw(17, 8, 33)
    leaves = [t.requires_grad_() for t in (hidden, weight, bias)]
    options = (-100, 0.1, 2.0, 0.01, 0.0)
    torch.library.opcheck(cut_cross_entropy, (*leaves, labels, *options, 5))
    arguments = (hidden, weight, None, labels, True, *options, [True, True, False], 5)
    torch.library.opcheck(cut_cross_entropy_sum, arguments)

    def loss(h: Tensor) -> Tensor:
        return linear_cross_entropy(h, weight, labels, bias) * 2

    compiled = torch.compile(loss, fullgraph=True)
    (mine,) = torch.autograd.grad(compiled(hidden), hidden)
    (eager,) = torch.autograd.grad(loss(hidden), hidden)
    torch.testing.assert_close(mine, eager)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(63, 19)}, r"hidden \[63, 19\]"),
        ({"labels": torch.zeros(62, dtype=torch.int64)}, r"labels \[62\]"),
        ({"labels": torch.zeros(63)}, "must be torch.int64, got torch.float32"),
        ({"bias": torch.zeros(100)}, r"bias \[100\] does not fit 101"),
        ({"bias": torch.zeros(101).double()}, "must have one dtype"),
        ({"chunk": 0}, "chunk must be positive"),
        ({"reduction": "median"}, "reduction must be"),
    ],
)
def test_arguments_that_do_not_fit(change: dict[str, Any], message: str) -> None:
    names = ("hidden", "weight", "bias", "labels")
    arguments: dict[str, Any] = {**dict(zip(names, draw(), strict=True)), **change}
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**arguments)


def test_flops_are_those_of_the_products() -> None:
    hidden, weight, bias, labels = draw()
    hidden.requires_grad_()
    weight.requires_grad_()
    with FlopCounterMode(display=False) as counter:
        linear_cross_entropy(hidden, weight, labels, bias).backward()
    assert counter.get_total_flops() == 3 * 2 * 63 * 20 * 101
    with FlopCounterMode(display=False) as counter:
        linear_cross_entropy(hidden, weight, labels, bias, reduction="none").sum().backward()
    assert counter.get_total_flops() == 4 * 2 * 63 * 20 * 101


@DTYPES
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("classes", [5, 4100])
def test_kernel_of_rows(dtype: torch.dtype, options: dict[str, Any], classes: int) -> None:
    """Forward with gradient, and gradient from a stored log-sum-exp; classes beyond one block."""
    pytest.importorskip("triton")
    from fxopt.kernels.cut_cross_entropy import triton

    chosen = reference.Options(**options)
    logits = (3 * torch.randn(6, classes, device=DEVICE)).to(dtype)
    labels = torch.randint(classes, (6,), device=DEVICE)
    labels[2], labels[4] = chosen.ignore_index, min(7, classes - 1)
    given = torch.randn(2, 6, device=DEVICE)
    found: list[list[Tensor]] = []

    def copy(kind: torch.dtype) -> Tensor:
        """Rows that lie apart, as in an aligned buffer."""
        return F.pad(logits.to(kind), (0, 3))[:, :classes]

    for kernel, kind in ((triton.rows, dtype), (reference.rows, torch.float64)):
        wide = torch.float64 if kind == torch.float64 else torch.float32
        x, loss, lse = (
            copy(kind),
            *torch.full((2, 6), float("nan"), dtype=wide, device=DEVICE),
        )
        kernel(reference.Rows(x, labels, lse, loss, None), chosen, True)
        upstream = reference.Upstream(*given.to(wide))
        y = copy(kind)
        kernel(reference.Rows(y, labels, lse, None, upstream), chosen, True)
        z = copy(kind)
        again = torch.full_like(lse, float("nan"))
        kernel(reference.Rows(z, labels, again, loss.clone(), None), chosen, False)
        found.append([t.double() for t in (x, loss, lse, y, again)])
    eps = torch.finfo(dtype).eps
    for mine, truth in zip(*found, strict=True):
        largest = truth.abs().amax()
        torch.testing.assert_close(mine, truth, rtol=2 * eps, atol=(1e-6 * largest).item())


def test_kernel_turns_a_label_that_is_no_class_into_nan() -> None:
    pytest.importorskip("triton")
    from fxopt.kernels.cut_cross_entropy import triton

    loss, lse = torch.zeros(2, 3, device=DEVICE)
    labels = torch.tensor([1, 50, -3], device=DEVICE)
    logits = torch.randn(3, 50, device=DEVICE)
    triton.rows(reference.Rows(logits, labels, lse, loss, None), reference.Options(), False)
    assert loss.isnan().tolist() == [False, True, True]


@DTYPES
@pytest.mark.parametrize("scale", [1.0, 0.7])
def test_kernel_that_scales(
    dtype: torch.dtype, scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In place, whatever the strides, several blocks a program, and rounded once."""
    pytest.importorskip("triton")
    from fxopt.kernels.cut_cross_entropy import triton

    monkeypatch.setattr(triton, "PROGRAMS", 2)
    given = torch.randn(131, 97, device=DEVICE).to(dtype)
    for x in (given.clone(), given.t().contiguous().t(), given[:0].clone()):
        truth = x.double() * torch.tensor(scale).double()
        assert triton.scale_(x, torch.tensor(scale, device=DEVICE)) is x
        torch.testing.assert_close(x.double(), truth, rtol=torch.finfo(dtype).eps, atol=0.0)


COMPILE = """
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from fxopt.kernels.cut_cross_entropy.triton import _rows_kernel, _scale_kernel

def build(dtype, **constants):
    signature = dict(logits=f"*{dtype}", labels="*i64", V="i32", stride="i32", ignore_index="i32")
    signature |= dict.fromkeys(["lse", "loss", "grad_loss", "grad_lse"], "*fp32")
    signature |= dict.fromkeys(["smoothing", "softcap", "z_loss"], "fp32")
    constants |= dict(BLOCK=4096)
    signature |= dict.fromkeys(constants, "constexpr")
    finish(_rows_kernel, signature, constants)

def finish(kernel, signature, constants):
    values = {(kernel.arg_names.index(n),): v for n, v in constants.items()}
    source = ASTSource(kernel, {n: signature[n] for n in kernel.arg_names}, values)
    options = {"num_warps": 4}
    print(len(compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["cubin"]))

flags = dict(SMOOTHING=False, SOFTCAP=False)
build("bf16", FORWARD=True, GRADIENT=True, UPSTREAM=False, **flags)
build("bf16", FORWARD=True, GRADIENT=False, UPSTREAM=False, **flags)
build("fp32", FORWARD=False, GRADIENT=True, UPSTREAM=True, SMOOTHING=True, SOFTCAP=True)
signature = dict(x="*bf16", scale="*fp32", count="i32", step="i32", BLOCK="constexpr")
finish(_scale_kernel, signature, dict(BLOCK=4096))
"""


def test_kernel_compiles_ahead_of_time_for_hopper() -> None:
    pytest.importorskip("triton")
    sizes = [int(size) for (size,) in compiled(COMPILE)]
    assert len(sizes) == 4
    assert all(size > 0 for size in sizes)


@pytest.mark.gpu
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("rows", [1, 130, 2100])
def test_op_on_the_device(reduction: str, rows: int) -> None:
    """2100 rows are 17 chunks: the gradient of the weight is summed in float32."""
    operands = draw(rows, 1024, 5000, device="cuda")
    operands[:3] = [t.bfloat16() for t in (operands[0], operands[1] / 32, operands[2])]
    scale = torch.rand((), device="cuda")
    options = {"reduction": reduction}
    exact = gradients(plain, [t.double() for t in operands[:3]] + operands[3:], scale, **options)
    eager = gradients(plain, operands, scale, **options)
    found = gradients(linear_cross_entropy, operands, scale, chunk=128, **options)
    for mine, theirs, truth in zip(found, eager, exact, strict=True):
        # the mean over no label at all, where the only one is ignored
        assert torch.equal(mine.isnan(), truth.isnan())
        if truth.isnan().any():
            continue
        own = (theirs.double() - truth).norm() + 2.0**-8 * truth.norm()
        assert (mine.double() - truth).norm() <= SLACK * own
