"""Memory copied to the host and back beside what the device computes: `fxopt::offload`.

A copy has two ends, which stand apart in a graph: `offload` starts one to the host, and `landed`
waits for it; `reload` starts one to the device, and `arrived` waits.
"""

from .op import arrived, landed, offload, reload
from .reference import offload as REFERENCE

__all__ = ["REFERENCE", "arrived", "landed", "offload", "reload"]
