"""A model's folder, a text, a module of the user's, and a way to run a command."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fxopt.cli import run

TEXT = "".join(f"def f{i}(x):\n    return x + {i}\n" for i in range(200))

Invoke = Callable[..., tuple[int, str, str]]

MODULE = """
import torch

def model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 8))

def inputs():
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(4, 16, generator=generator) for _ in range(3))

def pair():
    return model(), torch.ones(5, 16)

def triple():
    return model(), 1, 2

def sized(width):
    return torch.nn.Linear(width, width)

def failing():
    raise LookupError("no weights on the disk")

def nothing():
    return []

def broken_inputs():
    yield torch.ones(1, 16)
    raise LookupError("the second file is gone")

class Ready:
    model = model()

number = 3
ready = model()
"""


@pytest.fixture
def fxopt(capsys: pytest.CaptureFixture[str]) -> Invoke:
    """Run one command; its exit code, standard output and standard error."""

    def invoke(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = run([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return code, captured.out, captured.err

    return invoke


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level Llama of two small layers, without a tokenizer."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    path = tmp_path_factory.mktemp("model")
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module of the user's, importable from the working folder only."""
    name = f"users_{tmp_path.name}".replace("-", "_")
    (tmp_path / f"{name}.py").write_text(MODULE, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    return name
