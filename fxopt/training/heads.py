"""Linear heads whose logits only a cross-entropy wants, found while a step is traced.

A mode that sees every call of PyTorch's functions follows the output of each linear through casts,
views, slices of rows and softcaps to `cross_entropy` or `nll_loss`. There the loss can be computed
from what the head was given; the head's own product is then read by nothing and leaves the graph.
Matching here, in the terms in which models are written, needs no pattern for what autograd and
decompositions make of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from ..ir.site import LossHeadInfo, Site
from .logits import MATMUL, RESHAPES, VIEWS, WRITES, Head, Logits, follow, operands_of

Loss = Callable[..., Tensor]
"""`linear_cross_entropy(hidden, weight, labels, bias, *, ignore_index, ..., chunk,
filter_eps)`."""
NEAR = 1e-6
"""A factor that is this near to 1 is 1."""


class HeadCut(NamedTuple):
    """Rows at a time of a loss without logits, and the seconds that it adds to a step.

    With `filter_eps` the backward leaves out the classes whose gradient is smaller. Probabilities
    below it have squares that add up to less than it, where the label's gradient is about 1: all
    gradients are expected to be off by `error`, its root.
    """

    chunk: int
    seconds: float = 0.0
    filter_eps: float = 0.0

    @property
    def error(self) -> float:
        return self.filter_eps**0.5


Cut = Mapping[str, HeadCut]
"""Heads whose losses are computed without logits, by key."""


class Heads(TorchFunctionMode):
    """Finds heads in what runs under it; losses of those that `cut` names are computed by `loss`,
    as it says."""

    def __init__(self, cut: Cut, loss: Loss, module: Callable[[], str]) -> None:
        super().__init__()
        self._cut, self._loss, self._module = cut, loss, module
        self._known: dict[int, tuple[Tensor, Logits]] = {}
        self._keys: dict[Head, str] = {}
        self._seen: Counter[str] = Counter()
        self._alone: list[Site] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in ("linear", "addmm", *MATMUL):
            return self._after_linear(name, func, args, kwargs)
        found = [self._known[id(a)][1] for a in pytree.tree_leaves(args) if id(a) in self._known]
        if name in ("cross_entropy", "nll_loss"):
            return self._after_loss(func, args, kwargs)
        result = func(*args, **kwargs)
        if found or id(kwargs.get("out")) in self._known:
            self._follow(name, args, kwargs, result)
        return result

    def _after_linear(self, name: str, func: Any, args: Any, kwargs: Any) -> Any:
        result = func(*args, **kwargs)
        operands = operands_of(name, *args, **kwargs)
        if operands is not None and isinstance(result, Tensor):
            self._know(result, Logits(Head(self._module(), *operands, result.dtype)))
        return result

    def _know(self, value: Tensor, logits: Logits) -> None:
        self._known[id(value)] = (value, logits)  # alive, so that no other gets its id

    def _follow(self, name: str, args: Any, kwargs: Any, result: Any) -> None:
        """Note what `name` made of logits."""
        out = kwargs.get("out")
        first = self._known.get(id(args[0] if out is None else out))
        if first is None:
            return
        value, logits = first
        inplace = name.endswith("_") and not name.endswith("__")
        if inplace or name in WRITES or kwargs.get("inplace") or out is not None:
            reason = f"{name} changes the logits in place before the loss reads them"
            logits.head.blocked = logits.head.blocked or reason
            return
        if not isinstance(result, Tensor):
            made = pytree.tree_leaves(result) if name in VIEWS else []
        else:
            made = [result]
        for tensor in (t for t in made if isinstance(t, Tensor) and t is not value):
            after = None if logits.lost else follow(name, logits, value, args, kwargs, tensor)
            if after is not None:
                self._know(tensor, after)
            elif logits.lost is None or name in VIEWS | RESHAPES:
                reason = logits.lost or f"the logits go through `{name}` before the loss"
                self._know(tensor, replace(logits, lost=reason))

    def _after_loss(self, func: Any, args: Any, kwargs: Any) -> Any:
        """The loss, by the head's op where that is wanted and possible."""
        said = _loss_arguments(func.__name__, *args, **kwargs)
        known = self._known.get(id(said["input"]))
        if known is None:
            self._alone.append(_unknown(self._module()))
            return func(*args, **kwargs)
        value, logits = known
        head = logits.head
        key = self._key(head)
        reason = _refused(func.__name__, logits, value, said)
        if reason is not None:
            head.blocked = head.blocked or reason
        if head.blocked is not None:
            return func(*args, **kwargs)
        target: Tensor = said["target"]
        head.losses.append(head.info(target.numel(), said["reduction"] == "none"))
        if key not in self._cut:
            return func(*args, **kwargs)
        head.cut = True
        return self._computed(logits, said, self._cut[key])

    def _computed(self, logits: Logits, said: dict[str, Any], cut: HeadCut) -> Tensor:
        head, target = logits.head, said["target"]
        hidden, weight, bias = head.operands()
        scale = logits.scale
        for step in logits.rows:
            hidden = step(hidden)
        if abs(scale - 1) > NEAR:
            hidden, bias = hidden * scale, None if bias is None else bias * scale
        kind = hidden.device.type
        narrow = logits.dtype in (torch.bfloat16, torch.float16)
        # as autocast has losses
        dtype = torch.float32 if narrow and torch.is_autocast_enabled(kind) else logits.dtype
        with torch.autocast(kind, enabled=False):
            loss = self._loss(
                hidden.reshape(-1, hidden.shape[-1]),
                weight,
                target.reshape(-1),
                bias,
                ignore_index=said["ignore_index"],
                label_smoothing=said["label_smoothing"],
                softcap=logits.cap,
                reduction=said["reduction"],
                chunk=cut.chunk,
                filter_eps=cut.filter_eps,
            )
        return loss.to(dtype).reshape(target.shape if said["reduction"] == "none" else ())

    def without_logits(self, output: Any, named: bool) -> Any:
        """`output` with None for the logits of heads that were cut.

        `named` says that gradients start from its `loss` alone.
        """

        def one(leaf: Any) -> Any:
            known = self._known.get(id(leaf))
            if known is None:
                return leaf
            head = known[1].head
            head.returned = True
            if head.losses and not named:
                head.blocked = (
                    "the logits are returned beside a loss that has no name, and a gradient may "
                    "come from either; return a mapping or an object with a scalar `loss`"
                )
            return None if head.cut and head.blocked is None else leaf

        return pytree.tree_map(one, output)

    @property
    def sites(self) -> list[Site]:
        """Heads with a loss, and those whose logits are returned without one."""
        for _, logits in self._known.values():
            sizes = logits.head.info(0, False)
            if logits.head.returned and sizes.classes > sizes.features:
                self._key(logits.head)
        keyed = [_site(key, head) for head, key in self._keys.items()]
        alone = {site.key: site for site in self._alone}
        return [*keyed, *alone.values()]

    def _key(self, head: Head) -> str:
        if head not in self._keys:
            base = f"{head.module}.logits".lstrip(".")
            count = self._seen[base]
            self._seen[base] += 1
            self._keys[head] = f"{base}#{count}" if count else base
        return self._keys[head]


def _site(key: str, head: Head) -> Site:
    rows = sum(info.rows for info in head.losses) or head.x.numel() // head.x.shape[-1]
    again = any(info.again for info in head.losses)
    info = replace(head.info(rows, again), returned=head.returned)
    blocked = head.blocked
    if not head.losses and blocked is None:
        blocked = (
            "the loss is computed outside of the model, which has to hand the logits out; compute "
            "it inside (Hugging Face: pass labels=)"
        )
    return Site("activation", key, key, info, op=key, blocked=blocked)


def _unknown(module: str) -> Site:
    key = f"{module}.cross_entropy".lstrip(".")
    info = LossHeadInfo(0, 0, 0, torch.float32)
    reason = "the loss reads something else than a linear's output that was cast, viewed or capped"
    return Site("activation", key, key, info, op=key, blocked=reason)


def _loss_arguments(name: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
    names = ["input", "target", "weight", "size_average", "ignore_index", "reduce", "reduction"]
    names += ["label_smoothing"] if name == "cross_entropy" else []
    given: dict[str, Any] = {
        "weight": None, "size_average": None, "ignore_index": -100, "reduce": None,
        "reduction": "mean", "label_smoothing": 0.0,
    }  # fmt: skip
    return given | dict(zip(names, args, strict=False)) | kwargs


def _refused(name: str, logits: Logits, value: Tensor, said: dict[str, Any]) -> str | None:
    """Why a loss cannot be computed from the head's input."""
    if logits.lost is not None:
        return logits.lost
    if (name == "nll_loss") != logits.log:
        return f"{name} reads {'log-probabilities' if logits.log else 'logits'}"
    if logits.tanh:
        return "the logits go through `tanh` before the loss"
    if said["weight"] is not None:
        return "the loss weighs classes; only equal weights are served"
    if said["size_average"] is not None or said["reduce"] is not None:
        return "the loss is given size_average= or reduce=, which PyTorch has retired"
    if said["target"].is_floating_point():
        return "the targets are probabilities; only class indices are served"
    if value.dim() > 2 and not logits.second:
        return f"the classes of logits {list(value.shape)} are axis 1, which is not the head's"
    return None
