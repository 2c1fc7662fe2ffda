"""What a norm was given, from what it returned: `fxopt::norm_input`."""

from .op import norm_input
from .reference import norm_input as REFERENCE
from .reference import workspace

__all__ = ["REFERENCE", "norm_input", "workspace"]
