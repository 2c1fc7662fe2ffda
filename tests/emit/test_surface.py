"""The tools around transformers on optimised modules: pipelines, lm_eval's interface, Trainer."""

from __future__ import annotations

import logging

import pytest
import torch
import transformers as hf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from fxopt.capture import capture
from fxopt.emit.editor import GraphEditor
from fxopt.emit.generation import OptimizedForCausalLM
from fxopt.emit.module import emit
from fxopt.ir.errors import FxoptError

TEXT = "the quick brown fox jumps over the lazy dog"
PROMPTS = ["the quick", "brown fox jumps over", "dog"]
GREEDY = {"max_new_tokens": 6, "do_sample": False}


@pytest.fixture(scope="module")
def tokenizer():
    """Byte-level pairs, trained on one line: 61 tokens, as many as the tiny models have."""
    tokens = Tokenizer(models.BPE())
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=61, special_tokens=special, show_progress=False)
    tokens.train_from_iterator([TEXT] * 3, trainer)
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=tokens, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


@pytest.mark.parametrize("batch_size", [1, 3])
def test_text_generation_pipeline(case, tokenizer, batch_size, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    found = case("llama")
    written = []
    for model in (found.model, found.emit()):
        pipe = hf.pipeline("text-generation", model=model, tokenizer=tokenizer)
        written.append(pipe(PROMPTS, batch_size=batch_size, **GREEDY))
    assert written[0] == written[1]
    assert "'input_modalities': ('text',)" in repr(pipe)
    assert "not supported" not in caplog.text


def test_a_pipeline_is_saved_and_loaded(rewritten, tokenizer, tmp_path):
    pipe = hf.pipeline("text-generation", model=rewritten(), tokenizer=tokenizer)
    pipe.save_pretrained(tmp_path / "out")
    again = hf.pipeline("text-generation", model=str(tmp_path / "out"))
    assert type(again.model) is OptimizedForCausalLM
    assert again(PROMPTS, **GREEDY) == pipe(PROMPTS, **GREEDY)


class Harness:
    """What `HFLM(pretrained=model, tokenizer=...)` of lm_eval 0.4 asks of a model."""

    def __init__(self, model, tokenizer):
        self.model, self.tokenizer = model, tokenizer
        self.device, self.config = model.device, model.config
        model.eval()
        model.tie_weights()

    def loglikelihood(self, context, continuation):
        ids = self.tokenizer(context)["input_ids"]
        added = self.tokenizer(continuation)["input_ids"]
        with torch.no_grad():
            logits = self.model(torch.tensor([(ids + added)[:-1]], device=self.device)).logits
        scores = logits[0, len(ids) - 1 :].log_softmax(-1)
        return scores.gather(1, torch.tensor(added)[:, None]).sum().item()

    def generate_until(self, prompts, stop):
        batch = self.tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
        length = batch["input_ids"].shape[1]
        criteria = hf.StoppingCriteriaList([hf.StopStringCriteria(self.tokenizer, [stop])])
        made = self.model.generate(
            **batch, max_length=length + 6, stopping_criteria=criteria, do_sample=False,
            pad_token_id=self.tokenizer.pad_token_id, use_cache=True,
        )  # fmt: skip
        return self.tokenizer.batch_decode(made[:, length:])

    def info(self):
        text = self.config.get_text_config()
        parameters = sum(p.numel() for p in self.model.parameters())
        return (self.model.name_or_path, text.vocab_size, text.max_position_embeddings,
                self.config.model_type, parameters, self.model.dtype)  # fmt: skip


def test_the_interface_of_lm_eval(case, tokenizer):
    found = case("llama")
    want, got = (Harness(model, tokenizer) for model in (found.model, found.emit()))
    assert got.info() == want.info()
    for context, continuation in (("the quick", " brown fox"), ("dog", "jumps")):
        expected = want.loglikelihood(context, continuation)
        assert got.loglikelihood(context, continuation) == pytest.approx(expected, abs=1e-5)
    assert got.generate_until(PROMPTS, "x") == want.generate_until(PROMPTS, "x")


def test_lm_eval_scores_an_optimised_module(rewritten, tokenizer):
    """The real thing, where lm_eval is installed: no extra brings it."""
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    module = rewritten()
    asked = [("the quick", " brown fox"), ("dog", " jumps over")]
    judge = HFLM(pretrained=module, tokenizer=tokenizer, backend="causal", batch_size=1)
    found = judge.loglikelihood([Instance("loglikelihood", {}, a, 0) for a in asked])
    for (context, continuation), (score, greedy) in zip(asked, found, strict=True):
        ids, whole = (tokenizer(t)["input_ids"] for t in (context, context + continuation))
        with torch.no_grad():
            logits = module(torch.tensor([whole[:-1]])).logits[0, len(ids) - 1 :]
        added = torch.tensor(whole[len(ids) :])
        want = logits.log_softmax(-1).gather(1, added[:, None]).sum().item()
        assert score == pytest.approx(want, abs=1e-4)
        assert greedy == torch.equal(logits.argmax(-1), added)


def trainer(model, data, tmp_path, **options):
    arguments = hf.TrainingArguments(
        str(tmp_path), per_device_eval_batch_size=2, report_to=[], use_cpu=True, disable_tqdm=True,
        **options,
    )  # fmt: skip
    return hf.Trainer(model=model, args=arguments, eval_dataset=data)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_trainer_evaluates_and_predicts(case, tmp_path, name, smoothing):
    pytest.importorskip("accelerate")
    found = case(name)
    rows = torch.randint(3, 61, (5, 11))
    labels = rows.masked_fill(rows % 4 == 0, -100)
    data = [{"input_ids": ids, "labels": y} for ids, y in zip(rows, labels, strict=True)]
    losses, logits = [], []
    for model in (found.model, found.emit()):
        made = trainer(model, data, tmp_path, label_smoothing_factor=smoothing)
        losses.append(made.evaluate()["eval_loss"])
        logits.append(torch.from_numpy(made.predict(data).predictions))
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    assert logits[0].shape == (5, 11, 61)
    torch.testing.assert_close(logits[1], logits[0])


def test_trainer_predicts_with_an_encoder(case, tmp_path):
    pytest.importorskip("accelerate")
    found = case("vit")
    data = [{"pixel_values": image} for image in torch.randn(5, 3, 16, 16)]
    made = trainer(found.emit(), data, tmp_path, remove_unused_columns=False)
    got = torch.from_numpy(made.predict(data).predictions)
    with torch.no_grad():
        want = found.model(torch.stack([row["pixel_values"] for row in data])).logits
    torch.testing.assert_close(got, want)


def test_what_a_model_reads(case):
    kinds = {name: case(name).emit().input_modalities for name in ("llama", "vit")}
    assert kinds == {"llama": ("text",), "vit": ("image",)}


def test_a_module_without_generate_says_so_and_why(case):
    found = case("llama")
    captured = capture(found.model, found.example, generate=False)
    opt = emit(captured, GraphEditor(captured), found.model)
    assert [opt.can_generate(), found.emit().can_generate()] == [False, True]
    with pytest.raises(FxoptError, match="has no generate"):
        opt.generate(**found.example)


def test_tools_find_where_the_original_came_from(tmp_path):
    config = hf.GPT2Config(vocab_size=11, n_positions=16, n_embd=8, n_layer=1, n_head=2)
    hf.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    model = hf.GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    captured = capture(model, {"input_ids": torch.randint(0, 11, (2, 5))})
    assert emit(captured, GraphEditor(captured), model).name_or_path == str(tmp_path)
