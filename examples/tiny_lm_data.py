"""Text for the tiny byte-level language model: held-out windows, retrieval documents, scores.

Everything but `stdlib_corpus` needs only `tiny_lm/heldout.txt` beside this file. With the variable
TINY_LM set, the model and its held-out text are those of another folder that `train_tiny_lm.py`
wrote: `TINY_LM=larger_lm python benchmarks/kv_quality.py`.
"""

from __future__ import annotations

import functools
import hashlib
import os
import random
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F

CONTEXT = 4096
HELDOUT_BYTES = 75 * CONTEXT  # 300 KiB
MODEL_DIR = Path(os.environ.get("TINY_LM", Path(__file__).parent / "tiny_lm"))

# Tables of code points and generated help text say nothing about how code is written.
NOT_SOURCE = ("site-packages/", "encodings/", "pydoc_data/", "html/entities.py")


# --- the standard library, split by file ------------------------------------------------------


def stdlib_files(root: Path) -> dict[str, bytes]:
    """Every source file below `root` by its relative name, in sorted order."""
    names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py"))
    return {n: (root / n).read_bytes() for n in names if not n.startswith(NOT_SOURCE)}


def _may_be_held_out(name: str, text: bytes) -> bool:
    is_test = any(part.startswith(("test", "idle_test")) for part in name.split("/"))
    return not is_test and 4_000 <= len(text) <= 48_000 and text.isascii()


def stdlib_corpus(root: Path | None = None, more: Sequence[Path] = ()) -> tuple[bytes, bytes]:
    """Returns (training text, held-out text); each file is headed by its name.

    The split orders files by a hash of their name, so it does not depend on their contents, and
    a file is in one part alone: what the last held-out file has beyond the limit is dropped. The
    source files below the folders of `more` are training text.
    """
    files = stdlib_files(root or Path(sysconfig.get_paths()["stdlib"]))
    candidates = (name for name, text in files.items() if _may_be_held_out(name, text))
    heldout = b""
    for name in sorted(candidates, key=lambda n: hashlib.sha256(n.encode()).digest()):
        heldout += _headed(name, files.pop(name))
        if len(heldout) >= HELDOUT_BYTES:
            break
    for folder in more:
        files |= {f"{folder.name}/{name}": text for name, text in stdlib_files(folder).items()}
    training = b"".join(_headed(name, text) for name, text in files.items())
    return training, heldout[:HELDOUT_BYTES]


def _headed(name: str, text: bytes) -> bytes:
    return f"# Lib/{name}\n".encode() + text


# --- held-out text ----------------------------------------------------------------------------


@functools.cache
def heldout_text() -> bytes:
    return (MODEL_DIR / "heldout.txt").read_bytes()


def heldout_windows(length: int = CONTEXT, text: bytes | None = None) -> torch.Tensor:
    """All whole windows of the held-out text, int64 [windows, length]."""
    ids = _to_ids(text or heldout_text())
    return ids[: len(ids) // length * length].view(-1, length)


def _to_ids(text: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).long()


# --- retrieval documents ----------------------------------------------------------------------


def retrieval_document(
    rng: random.Random, length: int = CONTEXT, pairs: int = 4, filler: bytes | None = None
) -> tuple[torch.Tensor, slice]:
    """Code with `k3f9a = '81c02b'` lines, each answered later by `assert k3f9a == '81c02b'`.

    Returns int64 ids [length] and the slice of the answer in the assertion that ends the document:
    six bytes that nothing but its assignment, anywhere before, tells. `ids[: answer.start]` is the
    prompt. The filler is a random window of `filler`, the held-out text by default.
    """
    assigns, asserts = _pairs(rng, pairs)
    statement_bytes = sum(map(len, assigns + asserts))
    window = _random_window(rng, filler or heldout_text(), length - statement_bytes)

    statements = [(rng.randrange(len(window)), assigns[0]), (len(window), asserts[0])]
    for assign, check in zip(assigns[1:], asserts[1:], strict=True):
        # Distances uniform up to the whole document, rather than the short ones of two free draws.
        distance = rng.randrange(len(window))
        start = rng.randrange(len(window) - distance)
        statements += [(start, assign), (start + distance, check)]
    text = _insert_lines(window, statements)
    return _to_ids(text), slice(length - 8, length - 2)


def _pairs(rng: random.Random, count: int) -> tuple[list[bytes], list[bytes]]:
    """Assignments of random values to random names, and the assertions that repeat them."""
    keys = [f"k{key:04x}" for key in rng.sample(range(16**4), count)]
    values = [f"{rng.getrandbits(24):06x}" for _ in keys]
    named = list(zip(keys, values, strict=True))
    assigns = [f"{key} = '{value}'\n".encode() for key, value in named]
    return assigns, [f"assert {key} == '{value}'\n".encode() for key, value in named]


def _random_window(rng: random.Random, text: bytes, length: int) -> bytes:
    """Ends in a newline, so that a line may follow it."""
    start = rng.randrange(len(text) - length)
    return text[start : start + length - 1] + b"\n"


def _insert_lines(text: bytes, statements: list[tuple[int, bytes]]) -> bytes:
    """Puts each statement before the line of `text` that its position falls in."""
    pieces, done = [], 0
    for position, statement in sorted(statements, key=lambda item: item[0]):
        line_start = text.rfind(b"\n", 0, position) + 1
        pieces += [text[done:line_start], statement]
        done = line_start
    return b"".join(pieces) + text[done:]


def retrieval_documents(
    count: int, length: int = CONTEXT, seed: int = 0, filler: bytes | None = None
) -> tuple[torch.Tensor, slice]:
    """A batch of documents, int64 [count, length], and the answer's slice, one for all."""
    rng = random.Random(seed)
    documents = [retrieval_document(rng, length, filler=filler) for _ in range(count)]
    return torch.stack([ids for ids, _ in documents]), documents[0][1]


def retrieval_turns(
    count: int, turns: int = 4, length: int = CONTEXT, seed: int = 0
) -> tuple[torch.Tensor, list[slice]]:
    """Documents that end with `turns` assertions, each a question of its own: int64
    [count, length], and the slices of their answers.

    The assigned names are anywhere before the first question, and asked for in random order.
    """
    rng, documents, line = random.Random(seed), [], 0
    for _ in range(count):
        assigns, asserts = _pairs(rng, turns)
        line = len(asserts[0])
        window = _random_window(rng, heldout_text(), length - turns * (line + len(assigns[0])))
        text = _insert_lines(window, [(rng.randrange(len(window)), assign) for assign in assigns])
        documents.append(_to_ids(text + b"".join(asserts)))
    ends = [length - line * turn for turn in reversed(range(turns))]
    return torch.stack(documents), [slice(end - 8, end - 2) for end in ends]


# --- scores -----------------------------------------------------------------------------------


def _logits(model, ids: torch.Tensor, rows: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(logits, ids) of a few rows at a time."""
    device = next(model.parameters()).device
    for part in ids.split(rows):
        part = part.to(device)
        yield model(input_ids=part, use_cache=False).logits, part


@torch.no_grad()
def nats_per_byte(model, windows: torch.Tensor, rows: int = 8) -> float:
    """Mean cross-entropy of every byte but each window's first."""
    total = 0.0
    for logits, ids in _logits(model, windows, rows):
        total += F.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="sum"
        ).item()
    return total / (windows.shape[0] * (windows.shape[1] - 1))


@torch.no_grad()
def retrieval_rate(model, documents: torch.Tensor, answer: slice, rows: int = 8) -> float:
    """Share of documents whose answer is the argmax at each of its bytes: greedy decoding's."""
    before = slice(answer.start - 1, answer.stop - 1)
    exact = 0
    for logits, ids in _logits(model, documents, rows):
        exact += (logits[:, before].argmax(-1) == ids[:, answer]).all(-1).sum().item()
    return exact / documents.shape[0]
