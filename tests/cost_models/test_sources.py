"""What an op is priced by: its kernels' source, and what that imports."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fxopt.cost_models import sources
from fxopt.cost_models.sources import digest


@pytest.fixture
def kernels(tmp_path: Path) -> Iterator[Path]:
    texts = {
        "one/op.py": 'register(\n    "first", "() -> ()")\nfrom fxopt.kernels.two.triton import x',
        "two/triton.py": "from fxopt.kernels import _shared\n",
        "_shared/__init__.py": "a = 1",
        "three/op.py": 'register("third", "() -> ()")',
    }
    for name, text in texts.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    digest.cache_clear()
    yield tmp_path
    digest.cache_clear()


@pytest.mark.parametrize(
    ("file", "changes"),
    [("one/op.py", True), ("two/triton.py", True), ("_shared/__init__.py", True),
     ("three/op.py", False)],
)  # fmt: skip
def test_it_changes_with_what_computes_it(kernels: Path, file: str, changes: bool) -> None:
    before = digest("fxopt::first", kernels)
    with (kernels / file).open("a") as out:
        out.write("\n# changed\n")
    assert digest("fxopt::first", kernels) == before, "it is read once a process"
    digest.cache_clear()
    assert (digest("fxopt::first", kernels) != before) is changes


def test_other_ops_are_torch_s(kernels: Path) -> None:
    assert digest("aten::linear", kernels) == torch.__version__
    assert digest("fxopt::unknown", kernels) == torch.__version__


def test_every_op_that_is_priced_has_its_folder() -> None:
    folder = sources.kernels_folder()
    for op in ("attention", "cached_attention", "filled_attention", "quantized_linear",
               "fp8_linear", "low_rank_linear", "monarch_linear", "pack_activation",
               "unpack_activation", "cut_cross_entropy", "chunked"):  # fmt: skip
        assert len(digest(f"fxopt::{op}")) == 16, op
        assert digest(f"fxopt.{op}.default") == digest(f"fxopt::{op}")
    reached = sources._reached(folder, "kv_attention")
    assert {"kv_exact", "kv_int8", "kv_append", "_triton", "attention"} <= reached
