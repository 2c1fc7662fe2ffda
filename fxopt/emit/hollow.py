"""A rewritten module without what its sites compute: what a call takes beside them.

Linear layers and attention are stood in for by outputs of the right shape, so that a call runs all
of the module's own code, Python and glue, and nothing of its sites.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .module import OptimizedModule
from .source import Source
from .tree import Entry, leaf_class

Stand = Callable[[tuple[int, ...], Tensor], Tensor]
"""(shape, a tensor of the dtype and device) -> the output that stands for a site's."""


def zeros_made_once() -> Stand:
    """For timing: nothing is computed and nothing allocated."""
    known: dict[tuple[Any, ...], Tensor] = {}

    def stand(shape: tuple[int, ...], like: Tensor) -> Tensor:
        key = (shape, like.dtype, like.device)
        found = known.get(key)
        if found is None:
            found = known[key] = like.new_zeros(shape)
        return found

    return stand


def hollow(
    module: OptimizedModule,
    stand: Stand,
    *,
    linear: Callable[[Tensor], Any] = lambda weight: None,
    attention: Callable[[], Any] = lambda: None,
) -> OptimizedModule:
    """`module` with `stand` in the place of its linear layers and attention, over the same
    tensors; its caches are not written.

    `linear` is called before each linear layer with its weight, `attention` before each attention,
    and what they return lives until the output is there.
    """

    def linear_stand(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        held = linear(weight)
        output = stand((*x.shape[:-1], weight.shape[0]), x)
        del held
        return output

    def attend_stand(
        q: Tensor, k: Tensor | None, v: Tensor | None, *_: Any, **given: Any
    ) -> Tensor:
        held = attention()
        width = (given["state"][-1] if v is None else v).shape[-1]
        output = stand((q.shape[0], q.shape[2], q.shape[1], width), q)
        del held
        return output

    functional = ModuleType("functional")
    vars(functional).update(vars(F), linear=linear_stand)
    return _over(module, {"F": functional, "attend": attend_stand})


def _over(module: OptimizedModule, names: dict[str, Any]) -> OptimizedModule:
    """A module of the same code and tensors whose code reads `names` in the place of its own."""
    source: Source = module._source  # pyright: ignore[reportPrivateUsage]
    space: dict[str, Any] = {"__name__": f"{__name__}.code"}
    exec(compile(source.text, "<hollow>", "exec"), space)
    space.update(names)

    def pick(name: str, entry: Entry) -> type[nn.Module]:
        known = source.classes.get(name)
        return leaf_class(entry) if known is None else space[known]

    made = object.__new__(type(module))
    nn.Module.__init__(made)
    own = {n: v for n, v in vars(module).items() if n not in vars(made) and n != "_steps"}
    vars(made).update(own)
    tree = module.program.tree
    tree.with_tensors(tree.collect(module)).fill(made, pick)
    made._run = pick("", tree.modules[""]).forward  # pyright: ignore[reportPrivateUsage]
    return made.eval()


def fresh(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """For peaks: the output is allocated as the site would."""
    return torch.empty(shape, dtype=like.dtype, device=like.device)
