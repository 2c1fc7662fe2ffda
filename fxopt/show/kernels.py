"""The kernels that calls of a graph run, as text of the installed fxopt; nothing is imported."""

from __future__ import annotations

import re
from functools import cache
from importlib.resources import files

from fxopt.ir.evidence import Block

from .network import LINE

FILE = "triton.py"
OPTIONS = {"block_topk": "top=", "hip": "hip=", "decode_topk": "+t"}
"""Folders that only calls with this argument launch."""


def kernels_at(block: Block) -> dict[str, list[str]]:
    """The folders below `kernels/` of what stands at each rewritten site of a block."""
    found: dict[str, list[str]] = {}
    for call in filter(None, map(LINE.fullmatch, block.lines)):
        if call["mark"] != "+" or call["word"] != "at":
            continue
        folders = _folders(_op(call["op"], call["args"]))
        folders = [name for name in folders if OPTIONS.get(name, "") in call["args"]]
        folders = [name for name in folders if not name.endswith("_backward")]  # gradients alone
        if folders:
            module = call["module"] or ""
            found[module] = list(dict.fromkeys([*found.get(module, []), *folders]))
    return found


@cache
def text_of(folder: str) -> str:
    """The text of a folder's Triton kernels."""
    return (files("fxopt") / "kernels" / folder / FILE).read_text(encoding="utf-8")


def _op(name: str, arguments: str) -> str:
    """The registered op: `attend` calls one that reads a cache where it is given one."""
    if name == "attend":
        return "cached_attention" if re.search(r"\bstate=%", arguments) else "attention"
    return name.removeprefix("fxopt.")


@cache
def _folders(op: str) -> tuple[str, ...]:
    """Where an op is registered, and whose kernels that folder launches, if they have any."""
    for folder in (files("fxopt") / "kernels").iterdir():
        if not folder.is_dir() or not (folder / "__init__.py").is_file():
            continue
        texts = [f.read_text("utf-8") for f in folder.iterdir() if f.name.endswith(".py")]
        if not any(re.search(rf'register\(\s*"{re.escape(op)}"', text) for text in texts):
            continue
        launched = (re.findall(r"fxopt\.kernels\.(\w+)\.triton", text) for text in texts)
        names = dict.fromkeys([folder.name, *(name for found in launched for name in found)])
        kernels = files("fxopt") / "kernels"
        return tuple(name for name in names if (kernels / name / FILE).is_file())
    return ()
