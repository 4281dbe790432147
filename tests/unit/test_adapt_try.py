"""``adapt.py try``: prompts on standard input, answered by adapters and their base model."""

from __future__ import annotations

import io
import re
import shutil
import subprocess
import sys

import pytest
import torch
from few_shot_data import save_random_adapter
from peft import PeftModel
from script_runner import ROOT, script_environment
from tiny_model import build_tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from metasft.adapt import adapt
from metasft.adapt.chat import HELP, Voices, _Printed
from metasft.adapt.command import main

PROMPT = "Which colour?"
TOKENS = 12


@pytest.fixture(scope="module")
def adapters(tmp_path_factory, tiny_model):
    """Folders ``one`` and ``two.5`` of different adapters, and ``three.pt``, the adapter of ``one`` again."""
    folder = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate(("one", "two.5")):
        exported = save_random_adapter(folder / "exports" / name, tiny_model, seed=seed)
        shutil.copytree(exported.parent / "adapter_step_7", folder / name)
    shutil.copy(folder / "exports" / "one" / "meta_lora_checkpoint_step_7.pt", folder / "three.pt")
    return folder


def expected(model, adapter=None, prompt=PROMPT, tokens=TOKENS):
    """The greedy answer by transformers and peft alone."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    if adapter is not None:
        loaded = PeftModel.from_pretrained(loaded, adapter)
    turns = [{"role": "user", "content": prompt}]
    ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    given = ids["input_ids"].shape[1]
    out = loaded.generate(**ids, max_new_tokens=tokens, do_sample=False)[0, given:]
    return tokenizer.decode(out, skip_special_tokens=True)


def say(capsys, monkeypatch, lines, *arguments, code=0):
    """What ``try`` prints when it is given these lines."""
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    assert main(["try", *map(str, arguments), "--device", "cpu", "--max-new-tokens", str(TOKENS)]) == code
    return capsys.readouterr()


@pytest.fixture
def spoken(monkeypatch):
    """Answers that tell who was asked what, in place of the model's."""

    def answer(self, voice, prompt, streamer=None):
        streamer.on_finalized_text(f"<{self.names[voice]}: {prompt}>", stream_end=True)
        return type("Answer", (), {"truncated": False})

    monkeypatch.setattr(Voices, "answer", answer)


# ---- answers --------------------------------------------------------------------------------------------------------


def test_every_voice_answers_as_with_transformers_and_peft(adapters, tiny_model):
    places = [adapters / "one", adapters / "two.5", adapters / "three.pt"]
    voices = Voices(list(map(str, places)), device="cpu", max_new_tokens=TOKENS)
    assert voices.names == ["base", "one", "two.5", "three"]
    base, one, two = expected(tiny_model), *(expected(tiny_model, place) for place in places[:2])
    assert len({base, one, two}) == 3
    for voice in (1, 0, 2, 3, 0, 1):  # in any order: switching leaves nothing behind
        assert voices.answer(voice, PROMPT).text == (base, one, two, one)[voice]


def test_answers_end_at_the_end_of_a_turn_or_at_the_limit(adapters, tiny_model):
    voices = Voices([str(adapters / "one")], device="cpu", max_new_tokens=3)
    assert voices.answer(1, PROMPT) == (expected(tiny_model, adapters / "one", tokens=3), True)
    voices._ends = set(range(len(voices.tokenizer)))
    assert not voices.answer(1, PROMPT).truncated


def test_a_merged_or_full_model_answers_as_it_stands(adapters, tiny_model, tmp_path, capsys, monkeypatch):
    rows = [{"prompt": f"Say {n}", "response": f"= {n}"} for n in range(3)]
    adapt(adapters / "one", rows, tmp_path / "mine", merge=True, device="cpu", evaluate=False)
    voices = Voices([str(tmp_path / "mine_merged")], device="cpu", max_new_tokens=TOKENS)
    assert voices.names == ["mine_merged"]
    assert voices.answer(0, PROMPT).text == expected(tmp_path / "mine_merged")
    out = say(capsys, monkeypatch, f"/base\n{PROMPT}\n/all\n{PROMPT}\n/list\n", tmp_path / "mine_merged").out
    assert out.count("mine_merged: ") == 2 and out.endswith("* mine_merged\n")


@pytest.mark.parametrize(("systems", "said"), [(("Be brief.",) * 2, "Be brief."), (("Be brief.", "Be kind."), None)])
def test_a_prompt_opens_with_the_system_message_of_all_examples(systems, said, adapters, tmp_path, monkeypatch):
    rows = [
        {
            "messages": [
                {"role": "system", "content": system},
                {"role": "user", "content": f"Say {n}"},
                {"role": "assistant", "content": f"= {n}"},
            ]
        }
        for n, system in enumerate(systems)
    ]
    adapt(adapters / "one", rows, tmp_path / "mine", device="cpu", evaluate=False)
    voices = Voices([str(tmp_path / "mine"), str(adapters / "two.5")], device="cpu", max_new_tokens=TOKENS)
    read = []
    generate = voices._model.generate
    monkeypatch.setattr(voices._model, "generate", lambda **k: read.append(k["input_ids"][0]) or generate(**k))
    for voice, system in ((0, said), (1, said), (2, None)):
        voices.answer(voice, PROMPT)
        turns = [{"role": "system", "content": system}] if system else []
        turns.append({"role": "user", "content": PROMPT})
        text = voices.tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        assert voices.tokenizer.decode(read.pop()) == text


# ---- the prompt -----------------------------------------------------------------------------------------------------


def test_commands_say_who_answers(adapters, spoken, capsys, monkeypatch):
    lines = """a
/use two.5
b

/base
c
/all
d
e
/list
/use three
//f
g\\
h
/quit
never
"""
    out, err = say(capsys, monkeypatch, lines, adapters / "one", adapters / "two.5")
    assert out.splitlines() == [
        "one: <one: a>",
        "two.5: <two.5: b>",
        "base: <base: c>",
        "base: <base: d>",
        "one: <one: d>",
        "two.5: <two.5: d>",
        "base: <base: e>",
        "* base",
        "  one",
        "  two.5",
        "no adapter is called 'three': /list shows the names",
        "base: <base: /f>",
        "base: <base: g",
        "h>",
    ]
    assert err.endswith("Each prompt is answered on its own; /help lists the commands.\n")


def test_the_end_of_the_input_ends_it_and_help_names_every_command(adapters, spoken, capsys, monkeypatch):
    out = say(capsys, monkeypatch, "/help\n/clear\nlast\\", adapters / "one").out
    assert out.startswith(HELP) and out.endswith("one: <one: last>\n")
    assert "there is no command /clear: /help lists them" in out
    for command in re.findall(r"^  (/\w+)", HELP, re.MULTILINE):
        assert "no command" not in say(capsys, monkeypatch, f"{command}\n", adapters / "one").out


def test_one_prompt_that_is_too_long_does_not_end_it(adapters, capsys, monkeypatch):
    out = say(capsys, monkeypatch, f"{'x' * 5000}\n{PROMPT}\n", adapters / "one").out
    first, second = out.split("\n", 1)
    assert re.fullmatch(r"one: the prompt has \d+ tokens, and the model reads \d+: shorten it", first)
    assert second.startswith("one: ") and "tokens" not in second.splitlines()[0]


def test_a_terminal_gets_no_control_characters(capsys):
    _Printed(None).on_finalized_text("a\x1b[2J\x9b31m\r\tb\u4e2d\n", stream_end=True)
    assert capsys.readouterr().out == "a\ufffd[2J\ufffd31m\ufffd\tb\u4e2d\n\n"


def test_adapted_then_asked_as_a_user_does(tiny_model, tmp_path):
    rows = [{"prompt": f"Say {n}", "response": "x"} for n in range(4)]
    settings = {"adaptation_lr": 0.05, "adaptation_steps": 20, "device": "cpu", "evaluate": False}
    adapt(tiny_model, rows, tmp_path / "mine", **settings)
    done = subprocess.run(
        [sys.executable, "adapt.py", "try", str(tmp_path / "mine"), "--max-new-tokens", "5", "--device", "cpu"],
        input="Say 7\n/base\nSay 7\n",
        cwd=ROOT,
        env=script_environment(),
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.startswith("mine: x") and "\nbase: " in done.stdout and "base: x" not in done.stdout


# ---- refusals -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def unusable(tmp_path_factory, adapters, tiny_model):
    """Name in :data:`REFUSED` -> path."""
    folder = tmp_path_factory.mktemp("unusable")
    copy, wide = (
        build_tiny_model(folder / "copy"),
        build_tiny_model(folder / "wide", hidden_size=48),
    )
    for name, base in (("other", copy), ("wider", wide)):
        shutil.copytree(save_random_adapter(folder / "exports" / name, base).parent / "adapter_step_7", folder / name)
    shutil.copytree(adapters / "one", folder / "template")
    (folder / "template" / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}|{% endfor %}")
    (folder / "template" / "SHA256SUMS").unlink()
    return {"one": adapters / "one", "model": tiny_model, "nowhere": folder / "nowhere"} | {
        name: folder / name for name in ("other", "wider", "template")
    }


REFUSED = {
    "another base": (
        ["one", "other"],
        r"other is an adapter of \S+copy, \S+one of \S+: try adapters of one base model",
    ),
    "does not fit": (["one", "wider", "--base-model", "model"], "does not fit .*give --base-model the same arch"),
    "a model beside an adapter": (["one", "model"], "is a model, not an adapter: try it alone"),
    "given twice": (["one", "one"], "is given twice: give every adapter once"),
    "nothing there": (["nowhere"], "ADAPTER is .*nowhere, which does not exist: try takes"),
    "another template": (["one", "template"], "have different chat templates: try them one at a time"),
    "a model has no base": (["model", "--base-model", "model"], "is no adapter: leave it out"),
    "no device": (["one", "--device", "tpu"], "--device='tpu' must be auto, cpu, cuda or cuda:<index>"),
    "no tokens": (["one", "--max-new-tokens", "0"], "--max-new-tokens=0 must be at least 1"),
    "no adapter": ([], "the following arguments are required: ADAPTER"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_refusal_is_one_line(what, unusable, capsys, monkeypatch):
    words, why = REFUSED[what]
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n"))
    try:
        code = main(["try", *(str(unusable.get(word, word)) for word in words)])
    except SystemExit as end:  # of the flags' own reader
        code = end.code
    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1 and re.search(why, err), err
