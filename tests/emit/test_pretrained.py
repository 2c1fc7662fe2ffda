"""Folders that transformers loads: `save_pretrained` and `from_pretrained`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from fxopt.capture import capture
from fxopt.emit.cache import Cache
from fxopt.emit.editor import GraphEditor
from fxopt.emit.generation import OptimizedForCausalLM
from fxopt.emit.module import OptimizedModule, emit
from fxopt.hf import FxoptConfig
from fxopt.ir.budget import Budget
from fxopt.ir.errors import FxoptError
from fxopt.ir.plan import Plan
from fxopt.ir.workload import Generate

ROOT = Path(__file__).parents[2]


def python(code: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=cwd, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment}, check=False,
    )  # fmt: skip


@pytest.fixture
def folder(rewritten, tmp_path):
    """A rewritten llama with a plan, saved in tmp_path / "out"."""
    opt = rewritten()
    opt.plan = Plan(
        budget=Budget(kl=0.02), workload=Generate(2, 8, 4), hardware={}, decisions=[],
        fingerprint_structure="a", fingerprint_weights="b",
    )  # fmt: skip
    opt.save_pretrained(tmp_path / "out")
    return opt, tmp_path / "out"


def test_from_pretrained_returns_the_optimised_module(folder, case):
    opt, path = folder
    again = hf.AutoModelForCausalLM.from_pretrained(path)
    ids = case("llama").example["input_ids"]
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 5, "num_beams": 2}
    assert type(again) is OptimizedForCausalLM
    assert not again.training
    assert set(vars(again)) == set(vars(opt))
    with torch.no_grad():
        result = again(ids, use_cache=True)
        assert torch.equal(result.logits, opt(ids).logits)
    assert isinstance(result.past_key_values, Cache)
    assert result.past_key_values.layouts == opt.make_cache(1, 1).layouts
    assert torch.equal(again.generate(ids, **options), opt.generate(ids, **options))
    assert again.plan == opt.plan
    assert type(again.config) is type(opt.config)
    assert not hasattr(again.config, "quantization_config")


def test_it_can_be_saved_and_loaded_again(folder, tmp_path):
    opt, path = folder
    again = hf.LlamaForCausalLM.from_pretrained(path, pad_token_id=7)
    assert again.config.pad_token_id == 7
    again.save_pretrained(tmp_path / "second")
    third = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "second")
    assert third.config.pad_token_id == 7
    assert third.source == opt.source
    assert all(torch.equal(a, b) for a, b in zip(opt.parameters(), third.parameters(), strict=True))


def test_the_generation_config_of_the_call_wins(folder):
    wanted = hf.GenerationConfig(max_new_tokens=3, do_sample=True)
    again = hf.AutoModelForCausalLM.from_pretrained(folder[1], generation_config=wanted)
    assert (again.generation_config.max_new_tokens, again.generation_config.do_sample) == (3, True)


def test_shards_ties_and_bfloat16(tmp_path):
    torch.manual_seed(1)
    config = hf.GPT2Config(vocab_size=61, n_positions=64, n_embd=32, n_layer=2, n_head=4)
    model = hf.GPT2LMHeadModel(config).to(torch.bfloat16).eval()
    ids = torch.randint(3, 61, (2, 9))
    captured = capture(model, {"input_ids": ids})
    opt = emit(captured, GraphEditor(captured), model)
    opt.save_pretrained(tmp_path / "out", max_shard_size="20KB")
    shards = sorted((tmp_path / "out").glob("fxopt-*-of-*.safetensors"))
    assert len(shards) > 2
    held = [load_file(shard) for shard in shards]
    assert all(len(part) == 1 or sum(t.nbytes for t in part.values()) <= 20_000 for part in held)
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert again.lm_head.weight is again.transformer.wte.weight
    assert again.dtype == again.config.dtype == torch.bfloat16
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)


@pytest.mark.parametrize(
    ("name", "auto"), [("bert", "AutoModel"), ("vit", "AutoModelForImageClassification")]
)
def test_models_that_do_not_generate(case, tmp_path, name, auto):
    found = case(name)
    opt = found.emit()
    opt.save_pretrained(tmp_path / "out")
    again = getattr(hf, auto).from_pretrained(tmp_path / "out")
    assert type(again) is OptimizedModule
    with torch.no_grad():
        want, got = opt(**found.example), again(**found.example)
    assert type(want) is type(got)
    assert all(torch.equal(want[key], got[key]) for key in want)


@pytest.mark.parametrize("change", ["missing", "unexpected", "shape", "dtype"])
def test_tensors_of_another_module_are_refused(folder, change):
    path = folder[1] / "fxopt.safetensors"
    tensors = load_file(path)
    key = "model.layers.1.mlp.gate_proj.down"
    value = tensors.pop(key)
    changed = {
        "unexpected": {key: value, "model.extra": value.clone()},
        "shape": {key: value[:-1].clone()},
        "dtype": {key: value.half()},
        "missing": {},
    }
    save_file(tensors | changed[change], path)
    name = "model.extra" if change == "unexpected" else key
    with pytest.raises(FxoptError, match=name.replace(".", r"\.")):
        hf.AutoModelForCausalLM.from_pretrained(folder[1])


@pytest.mark.parametrize("content", ["{}", '{"weight_map": {"a": "../x.safetensors"}}', "["])
def test_an_index_that_leads_elsewhere_is_refused(folder, content):
    from fxopt.emit.save import load

    (folder[1] / "fxopt.safetensors.index.json").write_text(content)
    with pytest.raises(FxoptError, match=r"index\.json: not an index"):
        load(folder[1])


def test_what_the_folder_cannot_give_is_one_error(folder):
    path = folder[1]
    with pytest.raises(FxoptError, match=r"torch\.float32, which is part of its code"):
        hf.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float16)
    with pytest.raises(FxoptError, match="holds a LlamaForCausalLM and a LlamaModel was asked for"):
        hf.AutoModel.from_pretrained(path)


def test_devices(folder, case):
    pytest.importorskip("accelerate")
    for device_map in ("cpu", "auto", {"": "cpu"}):
        again = hf.AutoModelForCausalLM.from_pretrained(folder[1], device_map=device_map)
        expected = torch.accelerator.current_accelerator() if device_map == "auto" else None
        assert again.device.type == (expected or torch.device("cpu")).type
    with pytest.raises(FxoptError, match=r"one device, got cpu, disk"):
        hf.AutoModelForCausalLM.from_pretrained(
            folder[1], device_map={"model": "cpu", "lm_head": "disk"}, offload_folder="unused"
        )


def test_an_unoptimised_model_cannot_be_quantized_by_fxopt(case, tmp_path):
    case("llama").model.save_pretrained(tmp_path)
    with pytest.raises(FxoptError, match=r"call fxopt\.optimize"):
        hf.AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=FxoptConfig())


def test_options_of_save_pretrained(case, tmp_path):
    opt = case("llama").emit()
    with pytest.raises(FxoptError, match=r"push_to_hub.*upload_folder"):
        opt.save_pretrained(tmp_path / "out", push_to_hub=True)
    with pytest.raises(FxoptError, match="max_shard_size: 'big' is no size"):
        opt.save_pretrained(tmp_path / "out", max_shard_size="big")
    opt.save_pretrained(tmp_path / "out", is_main_process=False)
    assert not (tmp_path / "out").exists()
    opt.config = None
    with pytest.raises(FxoptError, match=r"no Hugging Face config.*opt\.save"):
        opt.save_pretrained(tmp_path / "out")


def test_tokenizer_files_come_along_and_stay(case, tmp_path):
    original, target = tmp_path / "original", tmp_path / "out"
    original.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.py", "weights.bin"):
        (original / name).write_text("of the original")
    target.mkdir()
    (target / "tokenizer.json").write_text("own")
    (target / "README.md").write_text("own")
    opt = case("llama").emit()
    opt.config = hf.LlamaConfig.from_dict(opt.config.to_dict())
    opt.config.name_or_path = str(original)
    for _ in range(2):
        opt.save_pretrained(target)
        assert (target / "tokenizer.json").read_text() == "own"
        assert (target / "README.md").read_text() == "own"
        assert (target / "tokenizer_config.json").read_text() == "of the original"
        assert not (target / "tokenizer.py").exists()
        assert not (target / "weights.bin").exists()


def test_code_that_a_config_names_is_left_behind(case, tmp_path):
    opt = case("llama").emit()
    opt.config = hf.LlamaConfig.from_dict(opt.config.to_dict())
    opt.config.auto_map = {"AutoModelForCausalLM": "modeling.Evil"}
    opt.save_pretrained(tmp_path / "out")
    (tmp_path / "out" / "modeling.py").write_text("raise SystemExit('executed')")
    (tmp_path / "out" / "model.py").write_text("raise SystemExit('executed')")
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(again) is OptimizedForCausalLM


@pytest.mark.parametrize(
    "first", ["transformers", pytest.param("fxopt.hf", marks=pytest.mark.slow)]
)
def test_one_import_in_either_order(folder, first, tmp_path):
    second = {"fxopt.hf": "transformers", "transformers": "fxopt.hf"}[first]
    code = f"""
        import {first}, {second}
        model = transformers.AutoModelForCausalLM.from_pretrained({str(folder[1])!r})
        print(type(model).__name__, model.plan.budget.kl)
    """
    done = python(code, tmp_path)
    assert done.stdout == "OptimizedForCausalLM 0.02\n", done.stderr


def test_without_fxopt_nothing_is_loaded_half(folder, tmp_path):
    code = f"""
        import transformers
        transformers.AutoModelForCausalLM.from_pretrained({str(folder[1])!r})
    """
    done = python(code, tmp_path)
    assert done.returncode == 1
    assert "Unknown quantization type, got fxopt" in done.stderr
    assert "OSError: Error no file named model.safetensors" in done.stderr


# What a hub answers to `from_pretrained`, and a call of it.
HUB = """
    import http.server, json, os, pathlib, sys, threading
    folder = pathlib.Path({folder!r})

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            name = self.path.rpartition("/")[2]
            file = folder / name
            found = "/resolve/" in self.path and file.is_file()
            body = file.read_bytes() if found else b""
            files = [{{"type": "file", "path": f.name, "size": f.stat().st_size, "oid": f.name}}
                     for f in folder.iterdir()]
            if "/api/models/me/tiny/tree/" in self.path:
                body = json.dumps(files).encode()
            elif "/api/models/me/tiny/revision/" in self.path:
                body = json.dumps({{"id": "me/tiny", "sha": "c" * 40}}).encode()
            self.send_response(200 if body else 404)
            if not body:
                self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", str(len(body)))
            self.send_header("ETag", '"' + name + '"')
            self.send_header("X-Repo-Commit", "c" * 40)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    os.environ["HF_ENDPOINT"] = f"http://127.0.0.1:{{server.server_port}}"
    import fxopt.hf, transformers
    model = transformers.AutoModelForCausalLM.from_pretrained("me/tiny", cache_dir={cache!r})
    print(type(model).__name__, model.plan.budget.kl)
    os._exit(0 if not sys.stdout.flush() else 1)
"""


@pytest.mark.slow
@pytest.mark.parametrize("sharded", [False, True])
def test_a_repository_of_a_hub(folder, tmp_path, sharded):
    opt, path = folder
    opt.save_pretrained(path, max_shard_size="20KB" if sharded else "1GB")
    code = HUB.format(folder=str(path), cache=str(tmp_path / "cache"))
    done = python(code, tmp_path, HF_HUB_OFFLINE="0", NO_PROXY="127.0.0.1")
    assert done.stdout == "OptimizedForCausalLM 0.02\n", done.stderr


def test_the_config_names_the_method(folder):
    config = json.loads((folder[1] / "config.json").read_text())
    assert config["quantization_config"] == {
        "quant_method": "fxopt", "weights": "fxopt.safetensors"
    }  # fmt: skip
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["dtype"] == "float32"
