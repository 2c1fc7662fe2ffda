"""Linear head and cross-entropy without stored logits: `fxopt::cut_cross_entropy`."""

from .op import cut_cross_entropy, cut_cross_entropy_sum, linear_cross_entropy
from .reference import cut_cross_entropy as REFERENCE
from .reference import workspace

__all__ = [
    "REFERENCE",
    "cut_cross_entropy",
    "cut_cross_entropy_sum",
    "linear_cross_entropy",
    "workspace",
]
