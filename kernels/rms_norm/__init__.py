"""RMSNorm with its weight, and of a sum: `fxopt::rms_norm`, `fxopt::add_rms_norm`."""

from .op import add_rms_norm, rms_norm
from .reference import rms_norm as REFERENCE

__all__ = ["REFERENCE", "add_rms_norm", "rms_norm"]
