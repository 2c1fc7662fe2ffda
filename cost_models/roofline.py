"""The prior: a call takes as long as its arithmetic or its traffic, whichever is longer."""

from __future__ import annotations

from dataclasses import dataclass

from fxopt.ir.cost import Cost, OpCall

from .hardware import Device


@dataclass(frozen=True)
class Roofline:
    """Williams et al., Roofline (2009), with a fixed cost for each launch.

    `dtype` is the one that the matrix units see.
    """

    device: Device
    dtype: str = "float32"

    def __call__(self, call: OpCall) -> Cost:
        arithmetic = call.flops / self.device.rate(self.dtype)
        traffic = (call.bytes_read + call.bytes_written) / self.device.bandwidth
        link = call.host_bytes / (self.device.host_link or self.device.bandwidth)
        return Cost(
            seconds=max(arithmetic, traffic, link) + call.launches * self.device.launch_seconds,
            weight_bytes=call.weight_bytes,
            state_bytes=call.state_bytes,
            temporary_bytes=call.temporary_bytes,
        )
