"""Linear layer with a Monarch weight: `fxopt::monarch_linear`."""

from .op import monarch_linear
from .reference import dense
from .reference import monarch_linear as REFERENCE

__all__ = ["REFERENCE", "dense", "monarch_linear"]
