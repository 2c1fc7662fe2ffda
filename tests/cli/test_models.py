"""Models from folders and factories, and each way in which these can be wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fxopt.cli.models import load_model
from fxopt.ir.errors import FxoptError


def mistake(source: object) -> str:
    with pytest.raises(FxoptError) as caught:
        load_model(str(source))
    return str(caught.value)


def test_models_of_every_kind(folder: Path, project: str) -> None:
    loaded = load_model(str(folder))
    assert type(loaded.module).__name__ == "LlamaForCausalLM"
    assert loaded.example is None
    for name in ("model", "ready", "Ready.model", "pair"):
        module = load_model(f"{project}:{name}").module
        assert isinstance(module, torch.nn.Sequential)
        assert not module.training


def test_a_factory_may_give_example_inputs(project: str) -> None:
    example = load_model(f"{project}:pair", torch.device("cpu")).example
    assert torch.equal(example, torch.ones(5, 16))


def test_a_folder_is_loaded_as_stored_or_in_the_dtype_asked_for(folder: Path, project: str) -> None:
    for dtype in (torch.float64, torch.bfloat16):
        parameters = load_model(str(folder), dtype=dtype).module.parameters()
        assert {p.dtype for p in parameters} == {dtype}
    with pytest.raises(FxoptError, match=r"--dtype: .* makes its model in a dtype of its own"):
        load_model(f"{project}:model", dtype=torch.float64)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("number", "gives int, not a torch.nn.Module"),
        ("nothing", "gives list, not a torch.nn.Module"),
        ("triple", "gives a tuple of 3"),
        ("sized", "(width) cannot be called without arguments (missing a required argument"),
        ("failing", "failing() raised LookupError: no weights on the disk"),
        ("modle", "Did you mean 'model'"),
        ("Ready.modle", "Ready has no 'modle'. Did you mean 'model'?"),
        ("", "is not of the form package.module:name"),
    ],
)
def test_factories_that_are_wrong(project: str, name: str, says: str) -> None:
    assert says in mistake(f"{project}:{name}")


def test_modules_that_cannot_be_imported(
    project: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    mistakes = {
        "needs_more": ("import no_such_package", "it needs 'no_such_package'"),
        "fails": ("1 / 0", "importing fails raised ZeroDivisionError"),
        "unfinished": ("def f(:", "importing unfinished raised SyntaxError"),
    }
    for module, (code, says) in mistakes.items():
        (tmp_path / f"{module}.py").write_text(code, encoding="utf-8")
        assert says in mistake(f"{module}:f")
    assert "there is no module 'absent'" in mistake("absent.module:f")
    # a module is no package
    assert f"there is no module '{project}.inner'" in mistake(f"{project}.inner:f")


def test_folders_that_are_wrong(folder: Path, tmp_path: Path) -> None:
    assert "no config.json" in mistake(tmp_path)
    config = tmp_path / "config.json"
    config.write_text('{"architectures": ["FrobModel"]}', encoding="utf-8")
    assert "is a FrobModel" in mistake(tmp_path)
    config.write_text("{", encoding="utf-8")
    assert "cannot be loaded" in mistake(tmp_path)
    shutil.copy(folder / "config.json", config)
    assert "cannot be loaded" in mistake(tmp_path)  # no weights
    (tmp_path / "model.safetensors").write_bytes(b"truncated")
    assert "cannot be loaded" in mistake(tmp_path)
    assert "is a file" in mistake(config)
    (tmp_path / "graph.json").write_text("{}", encoding="utf-8")
    assert "was written by fxopt" in mistake(tmp_path)
    assert "there is no folder 'absent'" in mistake("absent")


def test_weights_that_lack_some_are_an_error_and_not_random(folder: Path, tmp_path: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    lost = "model.layers.1.mlp.up_proj.weight"
    del tensors[lost]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(folder / "config.json", tmp_path)
    assert f"its weights lack {lost}, which would be random" in mistake(tmp_path)


def test_tied_weights_are_not_missing(folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    tensors = load_file(folder / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    text = json.dumps({**config, "tie_word_embeddings": True})
    (tmp_path / "config.json").write_text(text, encoding="utf-8")
    model = load_model(str(tmp_path)).module
    assert torch.equal(model.lm_head.weight, tensors["model.embed_tokens.weight"])
