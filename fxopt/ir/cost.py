"""Costs: what an op call takes, as additive numbers; None stands for unknown."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True)
class Cost:
    """Additive cost of one op call for one workload scenario on one device.

    `seconds` of one call, `weight_bytes` of its parameters, `state_bytes` of its cache at the
    workload's final length, `temporary_bytes` of workspace alive only inside the call. `host` are
    seconds to issue the call where a device computes it meanwhile; `doubt` is the standard error
    of `seconds`.
    """

    seconds: float = 0.0
    weight_bytes: int = 0
    state_bytes: int = 0
    temporary_bytes: int = 0
    host: float = 0.0
    doubt: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.seconds + other.seconds,
            self.weight_bytes + other.weight_bytes,
            self.state_bytes + other.state_bytes,
            max(self.temporary_bytes, other.temporary_bytes),
            self.host + other.host,
            math.hypot(self.doubt, other.doubt),
        )


@dataclass(frozen=True)
class OpCall:
    """One call of an op at a concrete size: what a cost model prices.

    `run` makes the inputs on a device and returns a closure to time, so that the measured
    cost model knows no op by name. `key` identifies equal calls across sites and processes.
    `share` equal calls are one op (the heads of an attention): `run` computes all of them, all
    other numbers are of one. Calls of one `family` differ in nothing but sizes.
    """

    op: str
    key: str
    flops: float
    bytes_read: float
    bytes_written: float
    weight_bytes: int = 0
    state_bytes: int = 0
    temporary_bytes: int = 0
    launches: int = 1
    host_bytes: float = 0.0
    share: int = 1
    family: str = ""
    run: Callable[[Any], Callable[[], Any]] | None = field(default=None, compare=False, repr=False)


class CostModel(Protocol):
    """A pure function of an op call; `None` when it cannot tell."""

    def __call__(self, call: OpCall) -> Cost | None: ...
