"""Linear layer of low rank: `fxopt::low_rank_linear`."""

from .op import low_rank_linear
from .reference import low_rank_linear as REFERENCE

__all__ = ["REFERENCE", "low_rank_linear"]
