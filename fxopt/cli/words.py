"""Messages in the words of the command line: arguments of Python as options."""

from __future__ import annotations

import re
from collections.abc import Callable
from re import Match

NAMES = (
    "latency|memory|weights|kv_cache|activations|kl|loss_increase|relative_error|minimize|"
    "keep|rewrites|at|refit"
)
VALUE = r"\"[^\"]*\"|'[^']*'|\w+(?:\.\w+)*|"


def as_options(message: str) -> str:
    """The message with the arguments, rows and functions that it names as a shell has them."""
    for pattern, replacement in RULES:
        message = re.sub(pattern, replacement, message)
    return message


def _option(found: Match[str]) -> str:
    name, value = found["name"].replace("_", "-"), (found["value"] or "").strip("\"'")
    return f"--{name}" if value in ("", "True") else f"--{name} {value}"


RULES: tuple[tuple[str, str | Callable[[Match[str]], str]], ...] = (
    (r"workload=fxopt\.Generate\([^)]*\)", "--prompt and --new-tokens"),
    (r"workload=fxopt\.Forward\([^)]*\)", "--new-tokens 0"),
    (r"latency=\{\"(\w+)\": \"(\w+(?:\.\w+)?)\"\}", r"--latency \1=\2"),
    (r"\bfxopt\.(optimize|plan|apply|verify)\b", r"fxopt \1"),
    (r"\bBudget\((.*?)\)", lambda found: found[1].replace(", ", " ")),
    (rf"\b(?:Budget\.|(?=\w+=))(?P<name>{NAMES})\b(?:=(?P<value>{VALUE}))?", _option),
    ("the nearest plan is in .best, its rows in .rows", "the rows of the nearest plan follow"),
)
