"""Calibration inputs from files and from Python."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fxopt.cli.calibration import SEQUENCES, load_calibration
from fxopt.cli.models import load_model
from fxopt.ir.errors import FxoptError


def test_calibration_text_is_spread_over_the_file(folder: Path, text_file: Path) -> None:
    model, text = load_model(str(folder)).module, text_file.read_text(encoding="utf-8")
    rows = load_calibration(str(text_file), str(folder), model, 100)
    assert [tuple(row["input_ids"].shape) for row in rows] == [(1, 100)] * SEQUENCES
    starts = [text.index(bytes(row["input_ids"][0].tolist()).decode()) for row in rows]
    assert starts == [i * (len(text) // SEQUENCES) for i in range(SEQUENCES)]
    # never longer than the model's context
    assert load_calibration(str(text_file), str(folder), model, 999)[0]["input_ids"].shape[1] == 128


@pytest.mark.parametrize(("text", "rows", "length"), [("abcdefghi", 3, 3), ("ab", 1, 2)])
def test_short_calibration_text(
    folder: Path, tmp_path: Path, text: str, rows: int, length: int
) -> None:
    path = tmp_path / "short.txt"
    path.write_text(text, encoding="utf-8")
    found = load_calibration(str(path), str(folder), load_model(str(folder)).module, 64)
    assert [row["input_ids"].shape[1] for row in found] == [length] * rows


def test_calibration_json_lines(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    lines = ['{"text": "abc"}', "", '"de"', '{"input_ids": [1, 2], "attention_mask": [1, 1]}']
    path.write_text("\n".join(lines), encoding="utf-8")
    rows = load_calibration(str(path), str(folder), load_model(str(folder)).module, 2)
    assert [row["input_ids"].tolist() for row in rows] == [[[97, 98]], [[100, 101]], [[1, 2]]]
    assert rows[2]["attention_mask"].dtype == torch.int64


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("a.jsonl", '{"text": "a"}\n{"text"', "line 2"),
        ("a.jsonl", "3", "line 1: it is neither"),
        ("a.jsonl", '{"input_ids": "abc"}', "line 1"),
        ("a.jsonl", '{"input_ids": []}', "line 1: it holds an empty input"),
        (
            "a.jsonl",
            '{"text": "a"}\n{"input_ids": [1, 256]}',
            "line 2: input_ids must lie",
        ),
        ("a.jsonl", '{"input_ids": [1, -1]}', "line 1: input_ids must lie"),
        ("a.jsonl", "", "holds no tokens"),
        ("a.txt", "", "holds no tokens"),
        ("a.txt", None, "no file"),
        ("a.txt", b"\xff\xfe", "not UTF-8"),
    ],
)
def test_calibration_mistakes(
    folder: Path, tmp_path: Path, name: str, text: str | bytes | None, says: str
) -> None:
    path = tmp_path / name
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(FxoptError, match=says):
        load_calibration(str(path), str(folder), load_model(str(folder)).module, 8)


def test_a_line_of_json_ends_where_its_line_ends(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "a\u2028b"}\n', encoding="utf-8")
    rows = load_calibration(str(path), str(folder), load_model(str(folder)).module, 9)
    assert bytes(rows[0]["input_ids"][0].tolist()).decode() == "a\u2028b"


def test_calibration_from_python(project: str) -> None:
    model = load_model(f"{project}:model").module
    assert len(load_calibration(f"{project}:inputs", f"{project}:model", model, 8)) == 3
    for name, says in {
        "number": "gives int, not an iterable of inputs",
        "nothing": "yields nothing",
        "failing": "raised LookupError: no weights",
        "broken_inputs": "raised LookupError: the second file is gone",
    }.items():
        with pytest.raises(FxoptError, match=f"calibration: .*{says}"):
            load_calibration(f"{project}:{name}", f"{project}:model", model, 8)


def test_text_needs_a_tokenizer_or_bytes(project: str, text_file: Path) -> None:
    model = load_model(f"{project}:model").module
    with pytest.raises(FxoptError, match="holds no tokenizer"):
        load_calibration(str(text_file), f"{project}:model", model, 8)


def test_given_tokens_need_no_tokenizer(project: str, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"x": [[0.5, 1.5]]}', encoding="utf-8")
    model = load_model(f"{project}:model").module
    (row,) = load_calibration(str(path), f"{project}:model", model, 8)
    assert row["x"].tolist() == [[[0.5, 1.5]]]


def test_a_broken_tokenizer_is_one_error(folder: Path, text_file: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{", encoding="utf-8")
    model = load_model(str(folder)).module
    with pytest.raises(FxoptError, match=r"tokenizer of .* cannot be loaded"):
        load_calibration(str(text_file), str(tmp_path), model, 8)


def test_the_tokenizer_of_the_folder_is_used(folder: Path, tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 7, "b": 9, "?": 0}, "?"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path)
    path = tmp_path / "text.txt"
    path.write_text("a b a a b c", encoding="utf-8")
    rows = load_calibration(str(path), str(tmp_path), load_model(str(folder)).module, 2)
    assert [row["input_ids"].tolist() for row in rows] == [[[7, 9]], [[7, 7]], [[9, 0]]]
