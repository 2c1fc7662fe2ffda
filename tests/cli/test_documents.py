"""Every command that a document or `--help` shows runs, on a smaller model of the same name."""

from __future__ import annotations

import inspect
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fxopt.cli import app, run

ROOT = Path(__file__).parents[2]
DOCUMENTS = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
SMALL = {
    "optimize": ["--length", "64"],
    "plan": ["--length", "64"],
    "apply": ["--length", "64"],
    "verify": ["--length", "64"],
    "bench": ["--seconds", "0.1"],
}
CHEAP = ["--rewrites", "linear.quantized", "--rewrites", "kv_cache.blocks"]


def shown_in(document: Path) -> list[str]:
    """The lines `$ fxopt ...` of a document's console blocks, continued lines joined."""
    blocks = re.findall(r"```console\n(.*?)```", document.read_text("utf-8"), re.DOTALL)
    text = "".join(blocks).replace("\\\n", " ")
    return re.findall(r"^\$ (fxopt .*?)(?:  +#.*)?$", text, re.MULTILINE)


def shown_by_help() -> Iterator[str]:
    """The paragraphs of commands' descriptions that are commands."""
    for command in app.registered_commands:
        description = inspect.getdoc(command.callback) or ""
        examples = [p for p in description.split("\n\n") if p.startswith("fxopt ")]
        assert examples, f"{command.callback} shows no example"
        yield from (" ".join(example.split()) for example in examples)


CASES = {path.relative_to(ROOT).as_posix(): shown_in(path) for path in DOCUMENTS}
CASES = {name: lines for name, lines in CASES.items() if lines} | {"--help": [*shown_by_help()]}


def test_the_readme_shows_commands() -> None:
    assert {line.split()[1] for line in CASES["README.md"]} >= {"plan", "apply", "report", "doctor"}


@pytest.fixture
def smaller(tmp_path: Path) -> Path:
    """A folder with examples/tiny_lm: four narrow layers with random weights, the real text."""
    transformers = pytest.importorskip("transformers")
    shipped, folder = ROOT / "examples" / "tiny_lm", tmp_path / "examples" / "tiny_lm"
    config = transformers.AutoConfig.from_pretrained(shipped)
    config.update(
        {
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 4,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
        }
    )
    torch.manual_seed(0)  # `captured_once` takes it for the same model in each test
    transformers.LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    shutil.copy(shipped / "heldout.txt", folder)
    return tmp_path


@pytest.mark.slow
@pytest.mark.usefixtures("captured_once")
@pytest.mark.parametrize("document", CASES)
def test_every_command_shown_runs(
    document: str, smaller: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(smaller)
    for line in CASES[document]:
        arguments = shlex.split(line)[1:]
        if arguments[0] == "bench" or "--calibration" in arguments:
            arguments += SMALL.get(arguments[0], [])
        if arguments[0] in ("optimize", "plan") and "--rewrites" not in arguments:
            arguments += CHEAP
        # plans that differ are no failure of `diff`
        assert run(arguments) in ((0, 2) if arguments[0] == "diff" else (0,)), line
