"""Linear head and cross-entropy, a chunk of tokens at a time: no more logits ever exist.

For token t with logits x = softcap(hidden[t] @ weight.T + bias), x = c * tanh(x / c) if c > 0:

    lse[t]  = log sum_v exp x_v
    loss[t] = lse - (1 - s) x_label - s mean_v x_v + z lse^2           (0 where label is ignored)

with s the label smoothing and z the weight of the z-loss. A chunk's logits turn into their own
gradient in place, and two products take it to the gradients of hidden and weight: "Cut Your
Losses in Large-Vocabulary Language Models", https://arxiv.org/abs/2411.09009, with chunks of
tokens where the paper has tiles.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

FEW = 16
"""Up to so many chunks 16-bit gradients of the weight are summed in 16 bits: every chunk rounds
the sum once. Beyond, the sum is kept in float32, for 4 bytes an element of the weight more."""

ALIGNED = 64


class Options(NamedTuple):
    """What the loss of a token is."""

    ignore_index: int = -100
    label_smoothing: float = 0.0
    softcap: float = 0.0
    z_loss: float = 0.0


class Upstream(NamedTuple):
    """Gradients that reach the loss and the log-sum-exp of each token."""

    loss: Tensor
    lse: Tensor


class Rows(NamedTuple):
    """One chunk: logits [n, V], overwritten, each row contiguous; labels [n], and where lse [n]
    and loss [n] are kept.

    `upstream` None: ones for the loss, zeros for the log-sum-exp.
    """

    logits: Tensor
    labels: Tensor
    lse: Tensor
    loss: Tensor | None
    upstream: Upstream | None


RowsKernel = Callable[[Rows, Options, bool], None]
"""Writes lse and loss where loss is given, else reads lse; then, if asked to, turns the logits
into their gradient."""


def narrow(dtype: torch.dtype) -> bool:
    """Whether sums are kept in a wider dtype than this."""
    return dtype in (torch.bfloat16, torch.float16)


def rows(chunk: Rows, options: Options, gradient: bool) -> None:
    """The `RowsKernel` in plain PyTorch."""
    logits, labels, lse, loss, upstream = chunk
    x = logits.float() if narrow(logits.dtype) else logits
    cap = options.softcap
    if cap:
        x.div_(cap).tanh_().mul_(cap)
    slope = (x / cap).square_().neg_().add_(1) if cap and gradient else None
    valid = labels != options.ignore_index
    target = labels.where(valid, 0)[:, None]
    if loss is not None:
        smoothing = options.label_smoothing
        wanted = (1 - smoothing) * x.gather(1, target)[:, 0]
        if smoothing:
            wanted += smoothing * x.mean(1)
        most = x.amax(1)
        x.sub_(most[:, None]).exp_()
        total = x.sum(1)
        torch.add(most, total.log(), out=lse)
        loss.copy_((lse - wanted + options.z_loss * lse.square()).where(valid, 0.0))
        if gradient:
            x.div_(total[:, None])
    else:
        x.sub_(lse[:, None]).exp_()
    if not gradient:
        return
    _gradient(x, target, valid, lse, upstream, options)
    if slope is not None:
        x.mul_(slope)
    if x is not logits:
        logits.copy_(x)


def _gradient(
    x: Tensor,
    target: Tensor,
    valid: Tensor,
    lse: Tensor,
    upstream: Upstream | None,
    options: Options,
) -> None:
    """Probabilities x [n, V] become a x - b ((1 - s) onehot + s / V)."""
    given = torch.ones_like(lse) if upstream is None else upstream.loss
    b = given.where(valid, 0.0)
    a = b * (1 + 2 * options.z_loss * lse)
    if upstream is not None:
        a = a + upstream.lse
    x.mul_(a[:, None])
    if options.label_smoothing:
        x.sub_((b * (options.label_smoothing / x.shape[1]))[:, None])
    x.scatter_add_(1, target, -(1 - options.label_smoothing) * b[:, None])


def cut_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    ignore_index: int,
    label_smoothing: float,
    softcap: float,
    z_loss: float,
    filter_eps: float,
    chunk: int,
    kernel: RowsKernel = rows,
) -> tuple[Tensor, Tensor]:
    """Loss [N] and log-sum-exp [N] of hidden [N, D], weight [V, D], bias [V], labels [N].

    Both in float32, or float64 if hidden is; logits are made in hidden's dtype, `chunk` rows at a
    time. `filter_eps` is of the backward: classes whose gradient in a chunk is nowhere as much,
    times the largest that reaches a loss there, take no part in its products (`filtered.py`).
    """
    check(hidden, weight, bias, labels, chunk)
    options = Options(ignore_index, label_smoothing, softcap, z_loss)
    loss, lse = _per_token(hidden), _per_token(hidden)
    for part, logits in _logits(hidden, weight, bias, chunk):
        kernel(Rows(logits, labels[part], lse[part], loss[part], None), options, False)
    return loss, lse


def cut_cross_entropy_sum(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    mean: bool,
    ignore_index: int,
    label_smoothing: float,
    softcap: float,
    z_loss: float,
    filter_eps: float,
    needs: Sequence[bool],
    chunk: int,
    kernel: RowsKernel = rows,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Sum of the losses or their mean, how many labels count, and the gradients of it.

    Logits are made once. `needs` says which gradients of hidden, weight and bias are wanted; the
    others are empty. Over no label the mean is nan and its gradients are 0. Other arguments as for
    `cut_cross_entropy`.
    """
    check(hidden, weight, bias, labels, chunk)
    options = Options(ignore_index, label_smoothing, softcap, z_loss)
    loss, lse = _per_token(hidden), _per_token(hidden)
    count = (labels != ignore_index).sum().to(loss.dtype)
    upstream = _mean(count, lse) if mean else None
    sums = _sums(hidden, weight, needs, chunk, filter_eps)
    for part, logits in _logits(hidden, weight, bias, chunk):
        reach = None if upstream is None else Upstream(*(t[part] for t in upstream))
        kernel(Rows(logits, labels[part], lse[part], loss[part], reach), options, any(needs))
        sums.add(part, logits, _least(reach, filter_eps))
    total = loss.sum() / count if mean else loss.sum()
    return total, count, *sums.gradients()


def _mean(count: Tensor, lse: Tensor) -> Upstream:
    """What reaches each token from the mean over `count` of them."""
    share = torch.where(count > 0, 1 / count, 0.0)
    return Upstream(share.expand(len(lse)), lse.new_zeros(()).expand(len(lse)))


def cut_cross_entropy_backward(
    grad_loss: Tensor,
    grad_lse: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    lse: Tensor,
    ignore_index: int,
    label_smoothing: float,
    softcap: float,
    z_loss: float,
    filter_eps: float,
    needs: Sequence[bool],
    chunk: int,
    kernel: RowsKernel = rows,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias from those of loss and lse [N]; logits made again."""
    options = Options(ignore_index, label_smoothing, softcap, z_loss)
    sums = _sums(hidden, weight, needs, chunk, filter_eps)
    for part, logits in _logits(hidden, weight, bias, chunk):
        upstream = Upstream(grad_loss[part], grad_lse[part])
        kernel(Rows(logits, labels[part], lse[part], None, upstream), options, True)
        sums.add(part, logits, _least(upstream, filter_eps))
    return sums.gradients()


def _sums(
    hidden: Tensor, weight: Tensor, needs: Sequence[bool], chunk: int, filter_eps: float
) -> Sums:
    if not filter_eps:
        return Sums(hidden, weight, needs, chunk)
    from .filtered import FilteredSums

    return FilteredSums(hidden, weight, needs, chunk)


def _least(upstream: Upstream | None, filter_eps: float) -> Tensor | float:
    """What a gradient of a chunk's logits must be for its class to count."""
    if upstream is None or not filter_eps:
        return filter_eps
    return filter_eps * upstream.loss.abs().amax()


class Sums:
    """Gradients of hidden, weight and bias, added up chunk by chunk; empty where not needed."""

    def __init__(self, hidden: Tensor, weight: Tensor, needs: Sequence[bool], chunk: int) -> None:
        self.needs = needs
        self._operands = hidden, weight
        self._begun = False
        """Whether the weight's gradient holds anything yet."""
        wide = torch.float32 if narrow(hidden.dtype) else hidden.dtype
        many = wide_sum(len(hidden), chunk, hidden.dtype)
        # The weight's gradient has the weight's strides, as autograd wants to keep it.
        self.hidden = hidden.new_empty(hidden.shape if needs[0] else 0)
        self.weight = torch.empty_like(
            weight if needs[1] else weight.new_empty(0), dtype=wide if many else weight.dtype
        )
        self.bias = hidden.new_zeros(len(weight) if needs[2] else 0, dtype=wide)
        if len(hidden) == 0:
            self.weight.zero_()

    def add(self, part: slice, gradient: Tensor, least: Tensor | float = 0.0) -> None:
        """Take in the gradient [n, V] of the logits of the rows in `part`; `least` is of those that
        leave out smaller ones."""
        del least
        hidden, weight = self._operands
        if self.needs[0]:
            torch.mm(gradient, weight, out=self.hidden[part])
        if self.needs[1]:
            add_product(self.weight, gradient.t(), hidden[part], int(self._begun))
            self._begun = True
        if self.needs[2]:
            self.bias += gradient.sum(0, dtype=self.bias.dtype)

    def gradients(self) -> tuple[Tensor, Tensor, Tensor]:
        dtype = self._operands[0].dtype
        self.weight, self.bias = self.weight.to(dtype), self.bias.to(dtype)
        return self.hidden, self.weight, self.bias


def add_product(total: Tensor, a: Tensor, b: Tensor, beta: int) -> None:
    """total = beta total + a @ b, summed in the dtype of `total`; beta 0 does not read it."""
    if total.dtype == a.dtype:
        total.addmm_(a, b, beta=beta)
    elif total.is_cuda:
        torch.ops.aten.addmm.dtype_out(total, a, b, total.dtype, beta=beta, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype), beta=beta)


def _logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, chunk: int
) -> Iterator[tuple[slice, Tensor]]:
    """The rows of each chunk, and their logits in a buffer that the next chunk overwrites."""
    count = len(hidden)
    size = len(weight)
    buffer = hidden.new_empty((min(chunk, count), row_stride(size, hidden)))
    for start in range(0, count, chunk):
        part = slice(start, min(start + chunk, count))
        logits = buffer[: part.stop - start, :size]
        if bias is None:
            torch.mm(hidden[part], weight.t(), out=logits)
        else:
            torch.addmm(bias, hidden[part], weight.t(), out=logits)
        yield part, logits


def row_stride(size: int, hidden: Tensor) -> int:
    """Elements from one row of logits to the next: on CUDA rows begin where wide loads may."""
    return -(-size // ALIGNED) * ALIGNED if hidden.is_cuda else size


def _per_token(hidden: Tensor) -> Tensor:
    dtype = torch.float32 if narrow(hidden.dtype) else hidden.dtype
    return hidden.new_empty(len(hidden), dtype=dtype)


def wide_sum(count: int, chunk: int, dtype: torch.dtype) -> bool:
    """Whether the gradient of the weight is summed in float32 beside its own dtype."""
    return narrow(dtype) and count > FEW * chunk


def workspace(
    hidden: Tensor,
    weight: Tensor,
    softcap: float,
    needs: Sequence[bool],
    chunk: int,
    filter_eps: float = 0.0,
) -> int:
    """Bytes that an op takes beside its results; tensors of N elements are not counted.

    On CUDA the kernel works on a chunk's logits in place; here, in plain PyTorch, 16-bit logits
    are copied to float32.
    """
    logits = min(chunk, len(hidden)) * row_stride(len(weight), hidden)
    buffer = found = logits * hidden.element_size()
    many = needs[1] and wide_sum(len(hidden), chunk, hidden.dtype)
    wide = 4 if narrow(hidden.dtype) else hidden.element_size()
    found += len(weight) * wide * needs[2]
    beside = 0
    if not hidden.is_cuda:
        copies = narrow(hidden.dtype) + bool(softcap and any(needs))
        beside = logits * wide * max(copies, int(many))
    if filter_eps:
        from .filtered import filtered_bytes

        beside = max(beside, filtered_bytes(hidden, weight, needs, chunk))
    found += beside
    if not many:
        return found
    # the result is made from the wide sum when the chunks are done
    return 4 * weight.numel() + max(found - weight.nbytes, buffer)


def check(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, chunk: int) -> None:
    """Raises ValueError when the arguments do not fit each other."""
    fit = hidden.dim() == weight.dim() == 2 and hidden.shape[1] == weight.shape[1]
    if not fit or labels.shape != hidden.shape[:1]:
        raise ValueError(
            f"cut_cross_entropy: hidden {list(hidden.shape)}, weight {list(weight.shape)} and "
            f"labels {list(labels.shape)} do not fit as [N, D], [V, D], [N]"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"cut_cross_entropy: bias {list(bias.shape)} does not fit {len(weight)} classes"
        )
    if labels.dtype != torch.int64:
        raise ValueError(f"cut_cross_entropy: labels must be torch.int64, got {labels.dtype}")
    dtypes = {t.dtype for t in (hidden, weight, bias) if t is not None}
    if len(dtypes) > 1:
        raise ValueError(
            f"cut_cross_entropy: hidden, weight and bias must have one dtype, got "
            f"{', '.join(sorted(map(str, dtypes)))}"
        )
    if chunk < 1:
        raise ValueError(f"cut_cross_entropy: chunk must be positive, got {chunk}")
