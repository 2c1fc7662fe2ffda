"""The prior: a call takes as long as its arithmetic or its traffic, whichever is longer."""

from __future__ import annotations

from dataclasses import dataclass

from fxopt.ir.cost import Cost, OpCall

from .hardware import FEW_ROWS, Device


@dataclass(frozen=True)
class Roofline:
    """Williams et al., Roofline (2009), with a fixed cost for each launch.

    `dtype` is the one that the matrix units see. A product of few rows is computed at the rate
    that such products reach. On a GPU launches are counted as in a CUDA graph, and `host` are
    those of eager calls, which overlap with what the device computes.
    """

    device: Device
    dtype: str = "float32"

    def __call__(self, call: OpCall) -> Cost:
        device, launches = self.device, call.launches / call.share
        traffic = (call.bytes_read + call.bytes_written) / device.bandwidth
        link = call.host_bytes / (device.host_link or device.bandwidth)
        launch = device.graph_seconds or device.launch_seconds
        return Cost(
            seconds=max(self._arithmetic(call), traffic, link) + launches * launch,
            weight_bytes=call.weight_bytes,
            state_bytes=call.state_bytes,
            temporary_bytes=call.temporary_bytes,
            host=launches * device.launch_seconds if device.graph_seconds else 0.0,
        )

    def _arithmetic(self, call: OpCall) -> float:
        few = self.device.few_rows_rate.get(self.dtype)
        # so many flops a byte are `FEW_ROWS` rows of 16-bit weights
        if few and 0 < call.flops <= FEW_ROWS * call.weight_bytes:
            return call.flops / few
        return call.flops / self.device.rate(self.dtype)
