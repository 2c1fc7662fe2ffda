"""The derivative of an activation function in a few bits a value: `fxopt::derivative_codes` for the
forward, `fxopt::times_derivative` for the backward."""

from .op import derivative_codes, times_derivative
from .reference import code_bytes
from .reference import derivative_codes as REFERENCE

__all__ = ["REFERENCE", "code_bytes", "derivative_codes", "times_derivative"]
