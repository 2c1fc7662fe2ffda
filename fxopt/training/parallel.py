"""What several processes may do with a planned step, and errors for what they may not.

The step is one graph over whole tensors, so wrappers go around it: `DistributedDataParallel(opt)`,
`fully_shard(opt)`. Both gather what they need before its forward and take the gradients that its
backward hands out; nothing in it knows of other processes.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..ir.errors import FxoptError


def check_whole(tensors: Mapping[str, Tensor]) -> None:
    """FxoptError naming the first of `tensors` of which each process holds a part."""
    # not loaded: there are none; loading it takes a second
    module: Any = sys.modules.get("torch.distributed.tensor")
    kind = getattr(module, "DTensor", None)
    name = next((n for n, t in tensors.items() if kind and isinstance(t, kind)), None)
    if name is not None:
        raise FxoptError(
            f"{name} is a DTensor, and a planned step is one graph over whole tensors: optimise "
            "first, then call fully_shard on the module that came of it, not on parts of that. "
            "Where parts are to be gathered one at a time, optimise each of them, set it in its "
            "place and shard it there"
        )
