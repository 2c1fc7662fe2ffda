"""Model in, canonical graph and sites out."""

from .captured import Captured, Dimension
from .export import capture
from .output import OutputSpec
from .refuse import weightless
from .sites import find_sites

__all__ = ["Captured", "Dimension", "OutputSpec", "capture", "find_sites", "weightless"]
