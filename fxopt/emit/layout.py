"""Line breaks of generated source."""

from __future__ import annotations

INDENT = "    "
WIDTH = 100


def assign(names: str, text: str) -> list[str]:
    """The lines of `names = text` in a method body."""
    return wrap(f"{INDENT * 2}{names} = {text}")


def wrap(line: str) -> list[str]:
    """`line`, broken at the commas of its outermost bracket where it is too wide."""
    if len(line) <= WIDTH:
        return [line]
    opening, closing = _outermost(line)
    if opening is None or closing is None:
        return [line]
    margin = line[: len(line) - len(line.lstrip())]
    lines, current = [line[: opening + 1]], margin + INDENT
    inner = line[opening + 1 : closing]
    if len(margin + INDENT + inner) <= WIDTH:
        return [*lines, f"{margin}{INDENT}{inner}", margin + line[closing:]]
    for part in _split(inner):
        if len(current) + len(part) + 2 > WIDTH and current.strip():
            lines.append(current.rstrip())
            current = margin + INDENT
        current += f"{part}, "
    lines.append(current.rstrip())
    return [*lines, margin + line[closing:]]


def _outermost(line: str) -> tuple[int | None, int | None]:
    """The bracket pair that encloses most of the line."""
    best: tuple[int | None, int | None] = (None, None)
    widest, stack = 0, list[int]()
    quoted = False
    for index, sign in enumerate(line):
        quoted ^= sign == '"'
        if quoted:
            continue
        if sign in "([":
            stack.append(index)
        elif sign in ")]" and stack:
            start = stack.pop()
            commas = len(_split(line[start + 1 : index])) > 1
            if index - start > widest and (commas or line[start] == "("):
                best, widest = (start, index), index - start
    return best


def _split(text: str) -> list[str]:
    """The parts of `text` between commas outside brackets and quotes."""
    parts, depth, start, quoted = list[str](), 0, 0, False
    for index, sign in enumerate(text):
        quoted ^= sign == '"'
        if quoted:
            continue
        depth += (sign in "([") - (sign in ")]")
        if sign == "," and not depth:
            parts.append(text[start:index].strip())
            start = index + 1
    parts.append(text[start:].strip())
    return [part for part in parts if part]
