"""Folders: round trip, a process without the original class, folders that were tampered with."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import textwrap
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from torch import nn

from fxopt.capture import capture
from fxopt.emit.editor import GraphEditor
from fxopt.emit.module import emit
from fxopt.emit.save import load, save
from fxopt.ir.errors import FxoptError

ROOT = Path(__file__).parents[2]


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(17, 8)
        self.mix = nn.Linear(8, 8)
        self.head = nn.Linear(8, 17, bias=False)
        self.head.weight = self.table.weight
        self.register_buffer("scale", torch.tensor(0.5), persistent=False)
        self.mix.bias.requires_grad_(False)

    def forward(self, ids):
        return {"scores": self.head(self.mix(self.table(ids)) * self.scale), "ids": ids}


@pytest.fixture
def tied():
    model, ids = Tied().eval(), torch.randint(0, 17, (3, 5))
    captured = capture(model, ids)
    return model, ids, emit(captured, GraphEditor(captured), model)


@pytest.mark.parametrize("name", ["llama", "bert", "vit"])
def test_hugging_face_round_trip(case, tmp_path, name):
    found = case(name)
    opt = found.emit()
    opt.save(tmp_path / "out")
    again = load(tmp_path / "out")
    with torch.no_grad():
        want, got = opt(**found.example), again(**found.example)
    assert type(want) is type(got)
    assert all(torch.equal(want[key], got[key]) for key in want)
    assert again.source == opt.source
    assert list(again.state_dict()) == list(found.model.state_dict())
    if name == "llama":
        ids = found.example["input_ids"]
        options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 5}
        assert torch.equal(opt.generate(ids, **options), again.generate(ids, **options))
        assert type(again.config) is type(opt.config)


def test_ties_buffers_and_frozen_parameters_survive(tied, tmp_path):
    model, ids, opt = tied
    save(opt, tmp_path / "out")
    again = load(tmp_path / "out")
    assert again.head.weight is again.table.weight
    assert "scale" not in again.state_dict()
    frozen = [name for name, p in again.named_parameters() if not p.requires_grad]
    assert frozen == ["mix.bias"]
    want, got = model(ids), again(ids)
    assert torch.equal(want["scores"], got["scores"])


def test_a_process_without_the_class_loads_and_runs_nothing_of_the_folder(case, tmp_path):
    found = case("llama")
    opt = found.emit()
    opt.save(tmp_path / "out")
    (tmp_path / "out" / "model.py").write_text("raise SystemExit('executed')")
    ids = found.example["input_ids"]
    torch.save((ids, opt(input_ids=ids).logits), tmp_path / "expected.pt")
    script = f"""
        import sys, torch, logging
        logging.basicConfig()
        import fxopt.emit.save
        opt = fxopt.emit.save.load({str(tmp_path / "out")!r})
        ids, logits = torch.load({str(tmp_path / "expected.pt")!r})
        assert torch.equal(opt(input_ids=ids).logits, logits)
        assert "transformers.models.llama.modeling_llama" not in sys.modules
        assert "fxopt.capture" not in sys.modules
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "was not run" in done.stderr


def test_an_unknown_output_class_becomes_named_values(tied, tmp_path):
    _, ids, opt = tied
    save(opt, tmp_path / "out")
    graph = tmp_path / "out" / "graph.json"
    data = json.loads(graph.read_text())
    data["output"] |= {"kind": "class", "type": "nowhere.models.Result"}
    graph.write_text(json.dumps(data))
    result = load(tmp_path / "out")(ids)
    assert torch.equal(result.scores, result["scores"])
    assert torch.equal(result[0], result.scores)


@pytest.mark.parametrize(
    "edit",
    [
        lambda data: data["nodes"][3].update(op="call_function", target="os.system"),
        lambda data: data["nodes"][-2].update(target="builtins.eval"),
        lambda data: data["nodes"][-2].update(target="operator.__class__"),
        lambda data: data["nodes"][0].update(target="ids):\n  raise SystemExit\n#"),
        lambda data: data["modules"][""].update(cls="X(print)"),
        lambda data: data.pop("nodes"),
        lambda data: data["nodes"].pop(0),
    ],
    ids=["call", "builtin", "dunder", "placeholder", "class", "missing", "dangling"],
)
def test_an_edited_graph_is_refused(tied, tmp_path, edit):
    save(tied[2], tmp_path / "out")
    graph = tmp_path / "out" / "graph.json"
    data = json.loads(graph.read_text())
    edit(data)
    graph.write_text(json.dumps(data))
    with pytest.raises(FxoptError, match=r"graph\.json"):
        load(tmp_path / "out")


PAYLOAD = '" + exit(7) + \'""" ); exit(7) #'


@pytest.mark.parametrize("place", ["argument", "size", "keyword", "attribute", "module", "base"])
def test_strings_of_a_graph_never_become_code(tied, tmp_path, place):
    save(tied[2], tmp_path / "out")
    graph = tmp_path / "out" / "graph.json"
    data = json.loads(graph.read_text())
    node = next(n for n in data["nodes"] if n["target"].startswith("aten.mul"))
    if place == "argument":
        node["args"][1] = PAYLOAD
    elif place == "size":
        node |= {"target": "aten.sym_size.int", "args": [node["args"][0], PAYLOAD]}
    elif place == "keyword":
        node["kwargs"] = {PAYLOAD: 1}
    elif place == "attribute":
        node |= {"target": "builtins.getattr", "args": [{"node": "ids"}, PAYLOAD]}
    elif place == "base":
        data["modules"][""]["base"] = PAYLOAD
    else:
        data["modules"][PAYLOAD] = data["modules"].pop("mix")
        data["modules"][""]["children"]["mix"] = PAYLOAD
    graph.write_text(json.dumps(data))
    # Running the payload would be a SystemExit, which nothing here catches.
    with suppress(FxoptError, TypeError, RuntimeError, KeyError):
        load(tmp_path / "out")(tied[1])


def test_truncated_files_are_one_error(tied, tmp_path):
    save(tied[2], tmp_path / "out")
    tensors = tmp_path / "out" / "fxopt.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-40])
    with pytest.raises(FxoptError, match=r"fxopt\.safetensors.*save again"):
        load(tmp_path / "out")
    graph = tmp_path / "out" / "graph.json"
    graph.write_text(graph.read_text()[:100])
    with pytest.raises(FxoptError, match=r"graph\.json"):
        load(tmp_path / "out")


def test_wrong_paths(tied, tmp_path):
    opt = tied[2]
    (tmp_path / "file").write_text("")
    with pytest.raises(FxoptError, match="is a file"):
        save(opt, tmp_path / "file")
    with pytest.raises(FxoptError, match="is a file"):
        load(tmp_path / "file")
    with pytest.raises(FxoptError, match="does not exist"):
        load(tmp_path / "nothing")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("years")
    with pytest.raises(FxoptError, match="something else"):
        save(opt, tmp_path / "other")
    assert (tmp_path / "other" / "thesis.tex").exists()


def test_a_failed_save_leaves_the_old_folder(tied, tmp_path):
    opt = tied[2]
    save(opt, tmp_path / "out")

    class Broken:
        def save(self, path):
            raise RuntimeError("disk full")

    opt.plan = Broken()
    with pytest.raises(RuntimeError, match="disk full"):
        save(opt, tmp_path / "out")
    assert os.listdir(tmp_path) == ["out"]
    opt.plan = None
    load(tmp_path / "out")
    save(opt, tmp_path / "out")
    assert os.listdir(tmp_path) == ["out"]


def test_an_unchanged_folder_is_silent(tied, tmp_path, caplog):
    save(tied[2], tmp_path / "out")
    with caplog.at_level(logging.WARNING, "fxopt"):
        load(tmp_path / "out")
    assert not caplog.records


def test_a_folder_of_transformers_is_told_from_one_of_save(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FxoptError, match="pass the model to fxopt"):
        load(tmp_path)
