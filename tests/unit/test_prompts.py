"""Prompts at test time are those of training: what renders them is recorded in exports and used again."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from chat_templates import CHAT_TEMPLATE, CLOCK, DATED, QWEN3, THINKING, set_clock
from few_shot_data import ADAPTATION, base_config, load, random_adapter, sum_rows, without_lora_flags
from omegaconf import OmegaConf
from script_runner import ROOT
from tiny_model import build_tiny_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from metasft.checkpoint.exports import load_adapter_folder, load_meta_lora, save_hf_model, save_meta_lora
from metasft.config.prompts import DEFAULT_DATE, Prompts, check_arguments
from metasft.data.task_sets import TokenizedSet
from metasft.evaluation.evaluate import evaluate
from metasft.evaluation.few_shot_model import CellJob
from metasft.experiments.composition import compose

NO_THINKING = {"enable_thinking": False}
CONFIGS = {
    "meta_lora": "config_meta_lora_example",
    "fomaml": "config_fomaml_math_science",
    "reptile": "config_reptile_math_science",
}


@pytest.fixture(scope="module")
def bare_model(tmp_path_factory) -> Path:
    """The tiny model as a base model: its tokenizer has no chat template."""
    folder = build_tiny_model(tmp_path_factory.mktemp("bare"))
    (folder / "chat_template.jinja").unlink()
    assert AutoTokenizer.from_pretrained(folder).chat_template is None
    return folder


@pytest.fixture
def config(tiny_model, data_dir, tmp_path):
    return base_config(tiny_model, data_dir, tmp_path / "out", n_shots=(0, 2))


def tokenizer_with(model, template):
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = template
    return tokenizer


def training_set(path, model, template, method="meta_lora", samples=6, **arguments):
    """The examples of a file as the trainer of ``method`` reads them."""
    overrides = tuple(f"+data.apply_chat_template_kwargs.{key}={json.dumps(v)}" for key, v in arguments.items())
    data = compose(ROOT / "data/math_science_meta", CONFIGS[method], overrides, method)["data"]
    return TokenizedSet(path, samples, tokenizer_with(model, template), OmegaConf.create(data))


def prompt_of_training(example):
    """What stands before the first token that is learned."""
    return example["input_ids"][: int(example["loss_mask"].argmax())].tolist()


def export(method, folder, model, template, arguments):
    """Write what the trainer of ``method`` writes; returns the paths it may be evaluated by."""
    adaptation = {**ADAPTATION, "chat_template_kwargs": arguments}
    if method == "meta_lora":
        adapted = random_adapter(model)
        tensors = {name.replace(".default.", "."): t for name, t in adapted.state_dict().items() if "lora_" in name}
        kwargs = {"base_model": str(model), "adaptation": adaptation, "tensors": tensors, "chat_template": template}
        return [save_meta_lora(folder, 7, adapted, **kwargs), folder / "adapter_step_7"]
    weights = AutoModelForCausalLM.from_pretrained(model).state_dict()
    settings = AutoConfig.from_pretrained(model)
    return [save_hf_model(folder / "step_7", weights, settings, tokenizer_with(model, template), adaptation)]


def evaluated(config, path, method):
    return load(without_lora_flags(config, model_path=str(path), model_type=method))


# ---- arguments and the date -----------------------------------------------------------------------------------------


def test_the_arguments_are_those_that_the_template_reads():
    def arguments(template, **given):
        tokenizer = SimpleNamespace(chat_template=template)
        return Prompts.of(tokenizer, {"apply_chat_template_kwargs": given}).arguments

    assert arguments(CHAT_TEMPLATE, date_string="1 Jan 2030") == {}
    assert arguments(THINKING, enable_thinking=False) == NO_THINKING
    assert arguments(DATED) == arguments(CLOCK) == {"date_string": DEFAULT_DATE} == {"date_string": "26 Jul 2024"}
    assert arguments(CLOCK, date_string="1 Jan 2030") == {"date_string": "1 Jan 2030"}
    check_arguments(CHAT_TEMPLATE, {"date_string": "1 Jan 2030"}, "--x")
    with pytest.raises(ValueError, match=r"--x names enable_thinkin, which the chat template does not read"):
        check_arguments(THINKING, {"enable_thinkin": False}, "--x")


def test_the_default_of_verl_for_thinking_counts_as_an_argument(tiny_model):
    data = {"apply_chat_template_kwargs": {}, "enable_thinking_default": False}
    assert Prompts.of(tokenizer_with(tiny_model, THINKING), data).arguments == NO_THINKING
    assert Prompts.of(tokenizer_with(tiny_model, CHAT_TEMPLATE), data).arguments == {}


@pytest.mark.parametrize("template", [DATED, CLOCK])
def test_today_and_tomorrow_give_the_same_tokens(template, config, tiny_model, data_dir, tmp_path, monkeypatch):
    path = data_dir / "meta_test/calculus_test.parquet"
    model = shutil.copytree(tiny_model, tmp_path / "model")
    (model / "chat_template.jinja").write_text(template)
    seen = []
    for year in (2031, 2032):
        set_clock(monkeypatch, year)
        tokenizer = tokenizer_with(tiny_model, template)
        turn = [{"role": "user", "content": "x"}]
        assert str(year) in tokenizer.apply_chat_template(turn, tokenize=False)  # what is to be kept out
        trained = training_set(path, tiny_model, template)
        tested, _ = load(dataclasses.replace(config, model_path=str(model)))
        items = tested._tests["calculus"]
        assert [item.prompt for item in items] == [prompt_of_training(trained[i]) for i in range(6)]
        seen.append([trained[i]["input_ids"].tolist() for i in range(6)] + [item.prompt for item in items])
    assert seen[0] == seen[1]
    text = tokenizer.decode(seen[0][0])
    assert ("26 Jul 2024" if template is DATED else "2024-07-26") in text and "203" not in text


def test_a_date_of_ones_own(tiny_model, data_dir):
    path = data_dir / "meta_test/calculus_test.parquet"
    decode = AutoTokenizer.from_pretrained(tiny_model).decode
    assert "Today Date: 3 Feb 2025<" in decode(
        training_set(path, tiny_model, DATED, date_string="3 Feb 2025")[0]["input_ids"]
    )
    assert "Today: 2025-02-03<" in decode(
        training_set(path, tiny_model, CLOCK, date_string="3 Feb 2025")[0]["input_ids"]
    )
    with pytest.raises(ValueError, match=r"date_string='soon' is no date such as 26 Jul 2024"):
        training_set(path, tiny_model, CLOCK, date_string="soon")


# ---- what a template must do ----------------------------------------------------------------------------------------


def test_a_template_whose_answers_open_otherwise_when_asked_for(tiny_model, data_dir):
    """Qwen3's own template: veRL would keep the first tokens of every answer out of the loss, in silence."""
    path = data_dir / "meta_test/calculus_test.parquet"
    with pytest.raises(ValueError, match=r"renders the turns of .* otherwise one by one.*model\.custom_chat_template"):
        training_set(path, tiny_model, QWEN3, **NO_THINKING).check_template()
    ignoring = {"pad_mode": "no_padding", "max_length": 4096, "ignore_input_ids_mismatch": True}

    def examples(**given):
        settings = {**ignoring, "apply_chat_template_kwargs": given}
        return TokenizedSet(path, 6, tokenizer_with(tiny_model, QWEN3), settings)

    with pytest.raises(
        ValueError, match=r"the prompt of .* row 0 .* otherwise than its turns.*--chat-template.*custom_chat"
    ):
        examples(**NO_THINKING).check_template()
    thinking = examples()
    thinking.check_template()
    assert thinking.prompt_ids(0) == prompt_of_training(thinking[0])


@pytest.mark.parametrize("page", ["experiments.md", "experiments.zh-CN.md"])
def test_the_documented_template_answers_without_thinking(page, tiny_model, data_dir):
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    template = re.search(r"```jinja\n\s*(.*?)\n\s*```", text, re.DOTALL)[1]
    examples = training_set(data_dir / "meta_test/calculus_test.parquet", tiny_model, template)
    examples.check_template()
    prompt = examples.prompt_ids(0)
    assert prompt == prompt_of_training(examples[0])
    assert AutoTokenizer.from_pretrained(tiny_model).decode(prompt).endswith("assistant\n<think>\n\n</think>\n\n")


def test_rows_may_say_whether_to_think(tiny_model, tmp_path):
    rows = [{**row, "enable_thinking": i % 2 == 0} for i, row in enumerate(sum_rows("calculus", range(4)))]
    pd.DataFrame(rows).to_parquet(tmp_path / "a.parquet")
    examples = training_set(tmp_path / "a.parquet", tiny_model, THINKING, samples=4)
    examples.check_template()
    decode = AutoTokenizer.from_pretrained(tiny_model).decode
    for index in range(4):
        prompt = examples.prompt_ids(index)
        assert examples[index]["input_ids"][: len(prompt)].tolist() == prompt
        assert decode(prompt).endswith("assistant\n" if index % 2 == 0 else "assistant\n<think></think>")
    # veRL's dataset would keep the length of an empty thought out of the loss of row 0, which has none.
    with pytest.raises(ValueError, match=r"the prompt of .* row 0 .* otherwise than its turns"):
        training_set(tmp_path / "a.parquet", tiny_model, THINKING, samples=4, **NO_THINKING).check_template()


# ---- exports --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", CONFIGS)
def test_evaluation_renders_as_training_did(method, config, tiny_model, data_dir, tmp_path):
    """Template and arguments come out of every kind of export; in adaptation, tests, and shots in the prompt."""
    paths = export(method, tmp_path, tiny_model, THINKING, NO_THINKING)
    train = {
        name: training_set(
            data_dir / f"meta_test/calculus_{name}.parquet", tiny_model, THINKING, method, n, **NO_THINKING
        )
        for name, n in (("support", 12), ("test", 6))
    }
    for path in paths:
        model, _ = evaluated(config, path, method)
        items = model._tests["calculus"]
        assert [item.prompt for item in items] == [prompt_of_training(train["test"][i]) for i in range(6)]
        assert [item.ids for item in items] == [train["test"][i]["input_ids"].tolist() for i in range(6)]
        assert model._shots["calculus"]
        for index, shot in model._shots["calculus"].items():
            assert all(torch.equal(shot[key], train["support"][index][key]) for key in ("input_ids", "loss_mask"))
        decode = model.tokenizer.decode
        assert decode(items[0].prompt).endswith("<|im_start|>assistant\n<think></think>")
    in_prompt, _ = evaluated(dataclasses.replace(config, shots_in_prompt=True), path, method)
    text = decode(in_prompt._items(CellJob("calculus", [0, 1], 0))[0].prompt)
    assert text.count("<|im_start|>assistant\n<think></think>") == 3


def test_flags_take_the_place_of_what_is_recorded(config, tiny_model, tmp_path):
    path, _ = export("meta_lora", tmp_path, tiny_model, THINKING, NO_THINKING)
    model, _ = evaluated(dataclasses.replace(config, chat_template_kwargs="{}"), path, "meta_lora")
    assert "think" not in model.tokenizer.decode(model._tests["calculus"][0].prompt)
    (tmp_path / "mine.jinja").write_text(CHAT_TEMPLATE)
    for template in (str(tmp_path / "mine.jinja"), CHAT_TEMPLATE):
        model, _ = evaluated(dataclasses.replace(config, chat_template=template), path, "meta_lora")
        assert "Be brief." in model.tokenizer.decode(model._tests["calculus"][0].prompt)


def test_exports_without_a_record_stay_readable(config, tiny_model, adapter):
    content = torch.load(adapter, weights_only=True)
    assert "chat_template" not in content
    for read, path in ((load_meta_lora, adapter), (load_adapter_folder, adapter.parent / "adapter_step_7")):
        assert read(path).chat_template is None
        model, _ = evaluated(config, path, "meta_lora")
        assert "Be brief." in model.tokenizer.decode(model._tests["calculus"][0].prompt)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"chat_template": 7}, "chat_template=7"),
        ({"adaptation": {"chat_template_kwargs": [1]}}, "chat_template_kwargs"),
        ({"adaptation": {"chat_template_kwargs": {"tokenize": False}}}, "chat_template_kwargs"),
    ],
)
def test_a_record_that_no_trainer_writes(change, words, tiny_model, tmp_path):
    path, _ = export("meta_lora", tmp_path, tiny_model, THINKING, NO_THINKING)
    torch.save({**torch.load(path, weights_only=True), **change}, path)
    with pytest.raises(ValueError, match=words):
        load_meta_lora(path)


# ---- base models, and what an evaluation writes down ----------------------------------------------------------------


def test_a_base_model_without_a_template_takes_one(config, bare_model, tmp_path):
    changed = dataclasses.replace(config, model_path=str(bare_model), n_shots=(0, 2), n_runs=1)
    with pytest.raises(ValueError, match=r"has no chat template, which prompts need: .*--chat-template"):
        evaluate(changed)
    (tmp_path / "dated.jinja").write_text(DATED)
    changed = dataclasses.replace(
        changed, chat_template=str(tmp_path / "dated.jinja"), chat_template_kwargs=json.dumps(NO_THINKING)
    )
    results, _ = evaluate(changed)
    assert set(results) == {"calculus", "logic"}
    settings = json.loads((changed.output_dir / "base_settings.json").read_text())
    assert settings["chat_template_kwargs"] == {**NO_THINKING, "date_string": "26 Jul 2024"}
    assert len(settings["chat_template_sha256"]) == 64
    # The same folder is not continued with other prompts.
    with pytest.raises(ValueError, match=r"made with other settings .*chat_template"):
        evaluate(dataclasses.replace(changed, chat_template=THINKING))
    with pytest.raises(ValueError, match=r"made with other settings .*chat_template_kwargs"):
        evaluate(dataclasses.replace(changed, chat_template_kwargs=None))


def test_answers_end_where_the_template_ends_a_turn(config, bare_model):
    """A base model's own end token is another one, and it would go on talking after the answer."""
    template = THINKING.replace("<|im_end|>", "<|endoftext|>")
    model, _ = load(dataclasses.replace(config, model_path=str(bare_model), chat_template=template))
    ends = model.tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    assert set(model.runner.stop) == set(model.model.generation_config.eos_token_id) == set(ends)
    model, _ = load(
        dataclasses.replace(
            config, model_path=str(bare_model), chat_template="{% for m in messages %}{{ m.content }};{% endfor %}"
        )
    )
    assert set(model.runner.stop) == {ends[1]}  # a character may also be a part of an answer


@pytest.mark.parametrize(
    ("flag", "value", "words"),
    [
        ("chat_template", "nowhere.jinja", "--chat-template is nowhere.jinja, which does not exist"),
        ("chat_template", "{% for", "the chat template of .* cannot be rendered"),
        ("chat_template_kwargs", "enable_thinking", "--chat-template-kwargs is 'enable_thinking': give a JSON object"),
        ("chat_template_kwargs", "[1]", "give a JSON object"),
        ("chat_template_kwargs", '{"tokenize": true}', "--chat-template-kwargs .* none of the names .*tokenize"),
        (
            "chat_template_kwargs",
            '{"enable_thinking": true}',
            "names enable_thinking, which the chat template does not",
        ),
    ],
)
def test_flags_that_cannot_be(flag, value, words, config):
    with pytest.raises(ValueError, match=words):
        evaluate(dataclasses.replace(config, **{flag: value}))
