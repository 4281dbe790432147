"""Behind the page of ``adapt.py page``: its functions, its refusals, and what its parts may show."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import socket
from pathlib import Path

import pytest
from few_shot_data import save_random_adapter

from metasft.adapt.chat import Voices
from metasft.adapt.command import main
from metasft.adapt.page import FIGURES, Workshop, build, examples_of, serve
from metasft.adapt.settings import AdaptConfig

ROWS = [{"prompt": f"Say {n}", "response": f"= {n}"} for n in range(4)]
JSONL = "\n".join(map(json.dumps, ROWS))
TABLE = [[row["prompt"], row["response"]] for row in ROWS]
EMPTY = [["", ""], [None, None]]

needs_gradio = pytest.mark.skipif(importlib.util.find_spec("gradio") is None, reason="gradio is not installed")


@pytest.fixture(scope="module")
def start(tmp_path_factory, tiny_model):
    """A PEFT folder of a random adapter: sgd 0.5, 5 steps of 4 examples."""
    exported = save_random_adapter(tmp_path_factory.mktemp("start"), tiny_model)
    return shutil.copytree(exported.parent / "adapter_step_7", exported.parent / "start")


def workshop(start: Path, output: Path, **settings) -> Workshop:
    settings = {"device": "cpu", **settings}
    return Workshop(AdaptConfig(model_path=str(start), examples=Path("examples"), output=output, **settings))


# ---- examples -------------------------------------------------------------------------------------------------------


def test_examples_are_the_same_from_every_place(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text(JSONL)
    tasks = [
        examples_of(JSONL, EMPTY, None),
        examples_of(" \n", [*TABLE, *EMPTY], None),
        examples_of("", [], str(path)),
    ]
    assert len({task.sha256 for task in tasks}) == 1
    assert [task.name for task in tasks] == ["examples", "examples", "mine"]


@pytest.mark.parametrize(
    ("pasted", "table", "why"),
    [
        ("", EMPTY, "give examples in one place: paste JSONL, fill in the table, or upload a file; empty the others"),
        (JSONL, TABLE, "give examples in one place"),
        ('{"prompt": "a"', EMPTY, "line 1 is no JSON"),
        ("[" * 100_000, EMPTY, "line 1 is no JSON"),
        ('{"prompt": "a"}', EMPTY, "the data of examples row 1 have the columns prompt, which are of no known layout"),
        ("", [["a", ""]], "examples row 1 has no question or no response"),
        ("", [["a", "b", "c"]], "the table has 3 columns: keep two, prompt and response"),
    ],
)
def test_unusable_examples_are_named(pasted, table, why):
    with pytest.raises(ValueError, match=f"^{why}"):
        examples_of(pasted, table, None)


def test_an_uploaded_file_is_named_without_its_folder(tmp_path):
    (tmp_path / "mine.csv").write_text("prompt,response\na,")
    with pytest.raises(ValueError, match=r"^mine.csv row 1 has no question or no response"):
        examples_of("", EMPTY, str(tmp_path / "mine.csv"))


# ---- adapting and asking --------------------------------------------------------------------------------------------


def test_an_adapter_is_adapted_and_asked_beside_its_start(start, tmp_path):
    work, steps = workshop(start, tmp_path / "out"), []
    made = work.adapt(examples_of(JSONL, EMPTY, None), True, steps.append)
    assert made.folder == tmp_path / "out" / "adapter_1"
    assert [loss for (loss,) in steps] == made.losses and len(made.losses) == work.steps == 5
    assert re.match(r"adapted to 4 examples: sgd 0.5, 5 steps\n.*adapting", made.summary)
    assert [row[0] for row in made.figures] == ["before", "after", "fresh LoRA, as many steps"]
    assert all(len(row) == len(FIGURES) and re.fullmatch(r"\d+%", row[-1]) for row in made.figures)
    voices = Voices([str(start), str(made.folder)], device="cpu")
    answers = list(work.ask("Say 9", made.folder))
    assert answers == [voices.answer(1, "Say 9").text, voices.answer(2, "Say 9").text]
    assert answers[0] != answers[1]


def test_a_model_is_asked_as_it_stands_and_adapters_are_kept(tiny_model, tmp_path):
    work = workshop(tiny_model, tmp_path / "out", adaptation_lr=0.05)
    first = work.adapt(examples_of(JSONL, EMPTY, None), False)
    assert first.figures == [] and "\n" not in first.summary
    second = work.adapt(examples_of(JSONL.splitlines()[0], EMPTY, None), True)
    assert "one example leaves nothing to hold out" in second.summary and second.figures == []
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["adapter_1", "adapter_2"]
    voices = Voices([str(first.folder), str(second.folder)], device="cpu")
    for voice, made in ((1, first), (2, second)):
        expected = [voices.answer(number, "Say 9").text for number in (0, voice)]
        assert list(work.ask("Say 9", made.folder)) == expected
    with pytest.raises(ValueError, match="the prompt is empty: type one"):
        list(work.ask(" ", first.folder))


# ---- the page -------------------------------------------------------------------------------------------------------


def test_without_gradio_one_line_says_what_to_install(tiny_model, tmp_path, monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "gradio" else find(name, *more)
    )
    assert main(["page", "--start", str(tiny_model), "--output", str(tmp_path / "out")]) == 2
    said = 'error: gradio is not installed, which the page needs: pip install "metasft[page]"\n'
    assert capsys.readouterr().err == said


@needs_gradio
@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"--port": "0"}, "--port is 0: give a number from 1 to 65535"),
        ({"--start": "nowhere/at/all"}, "--start is nowhere/at/all, which does not exist"),
        ({"--base-model": "models"}, "--base-model is models, but --start .* is no adapter: leave it out"),
        ({"--output": __file__}, "--output is .*, which is a file: give a folder"),
    ],
)
def test_a_refusal_is_one_line(changes, why, tiny_model, tmp_path, capsys):
    flags = {"--start": str(tiny_model), "--output": str(tmp_path / "out"), **changes}
    assert main(["page", *(word for flag in flags.items() for word in flag)]) == 2
    err = capsys.readouterr().err
    assert re.fullmatch(f"error: {why}.*\n", err), err
    assert not (tmp_path / "out").exists()


@needs_gradio
def test_a_port_that_is_taken_is_named(tiny_model, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"^--port {port} is taken, or not allowed: give another one$"):
            serve(workshop(tiny_model, tmp_path), port)


@needs_gradio
def test_nothing_on_the_page_renders_text_and_no_event_is_open_to_other_clients(tiny_model, tmp_path):
    page = build(workshop(tiny_model, tmp_path), tmp_path)
    assert page.analytics_enabled is False
    parts = [block.get_config() | {"kind": block.get_block_name()} for block in page.blocks.values()]
    kinds = {part["kind"] for part in parts}
    assert kinds.isdisjoint({"markdown", "html", "chatbot", "highlightedtext", "code", "json"})
    assert {part["datatype"] for part in parts if part["kind"] == "dataframe"} == {"str"}
    assert {event.api_visibility for event in page.fns.values()} == {"private"}
