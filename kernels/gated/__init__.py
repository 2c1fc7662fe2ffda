"""activation(gate) * up of gated feed-forward layers: `fxopt::gated`."""

from .op import follow, gated
from .reference import ACTIVATIONS
from .reference import gated as REFERENCE

__all__ = ["ACTIVATIONS", "REFERENCE", "follow", "gated"]
