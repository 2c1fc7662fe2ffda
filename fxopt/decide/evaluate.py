"""Running a canonical graph for its quality: the cache is read as decoding would read it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from ..ir.ops import attend, attend_as_decoded

PROMPT_ONLY = ("top", "delta", "hip", "mass", "skip")
"""Options of attention that decoded tokens know nothing of."""


class _AsDecoded(fx.Interpreter):
    """Attention ops with a cache layout see, from `prompt` on, what decoding reads of it: the image
    of packed keys, the tiles that are kept. Those that hide keys of prompts alone hide none there.
    """

    def __init__(self, graph: fx.GraphModule, prompt: int) -> None:
        super().__init__(graph, garbage_collect_values=True)
        self.prompt = prompt

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        differs = kwargs.get("layout") or any(any(kwargs.get(name, ())) for name in PROMPT_ONLY)
        if target is attend and differs and self.prompt > 0:
            return attend_as_decoded(*args, prompt=self.prompt, **kwargs)
        return super().call_function(target, args, kwargs)


def run_as_decoded(graph: fx.GraphModule, arguments: list[Any], prompt: int) -> tuple[Tensor, ...]:
    """The outputs of `graph`, its tokens from `prompt` on decoded one by one."""
    with torch.no_grad():
        return _AsDecoded(graph, prompt).run(*arguments)
