"""Own data through a mapping file, and a chat template for models without one."""

import json
import re
from pathlib import Path

import pandas as pd
import pytest
import yaml

import prepare_math_science_data as prepare_data
from metasft import tasks
from metasft.sources import chat_template

SIZES = {"samples_per_task": 20, "test_samples": 6, "shot_pool": 5}


def rows(topics=("heat", "light", "sound"), count=40, start=0) -> list[dict]:
    return [
        {
            "q": f"In {topic}, how many metres are {i} steps of {i + 2}?",
            "result": f"{i * (i + 2)}",
            "work": f"Multiply {i} by {i + 2}.",
            "topic": topic,
            "grade": 1 + i % 3,
        }
        for topic in topics
        for i in range(start, start + count)
    ]


def mapping(**changes) -> dict:
    values = {
        "title": "steps",
        "licence": "ours",
        "files": ["data.jsonl"],
        "fields": {"prompt": "q", "answer": "result", "response": "work", "task": "topic", "level": "grade"},
        "scorer": "number",
        "instruction": "Give metres.",
        "unit": "m",
        "train": ["heat", "light"],
        "unseen": ["sound"],
        "sizes": SIZES,
    }
    return {key: value for key, value in {**values, **changes}.items() if value is not None}


@pytest.fixture
def run_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def run(values: dict, *flags: str) -> int:
        (tmp_path / "steps.yaml").write_text(yaml.safe_dump(values))
        return prepare_data.main(["--source", "local", "--mapping", "steps.yaml", "--output-dir", "x", *flags])

    return run


def write(path: Path, content: list[dict]) -> None:
    frame = pd.DataFrame(content)
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in content))
    elif path.suffix == ".csv":
        frame.to_csv(path, index=False)
    else:
        frame.to_parquet(path)


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_own_files(run_here, tmp_path, suffix):
    write(tmp_path / f"data{suffix}", rows())
    assert run_here(mapping(files=[f"data{suffix}"])) == 0
    support = pd.read_parquet(tmp_path / "x/meta_train/heat_support.parquet")
    assert len(support) == 3 and set(support["task"]) == {"heat"}
    row = support.iloc[0]
    assert row["prompt"].startswith("In heat, how many metres") and row["prompt"].endswith(
        'Give metres. End with "Answer: <answer>".'
    )
    assert row["response"] == f"{row['response'].splitlines()[0]}\nAnswer: {row['answer']}"
    assert tasks.score(f"Answer: {row['answer']} m", row).correct
    assert not tasks.score(f"Answer: {row['answer']} km", row).correct
    assert len(pd.read_parquet(tmp_path / "x/meta_test/sound_test.parquet")) == 6
    manifest = json.loads((tmp_path / "x/manifest.json").read_text())
    assert manifest["sources"]["steps"]["licence"] == "ours"
    assert list(manifest["settings"]["own_files"]) == ["steps.yaml", f"data{suffix}"]
    assert manifest["tasks"]["heat"]["counts"]["read"] == 40
    assert str(tmp_path) not in json.dumps(manifest["sources"])


@pytest.mark.parametrize("name", ["data[1].jsonl", "data*?.csv", "[a-z].parquet"])
def test_a_file_name_is_no_pattern(run_here, tmp_path, name):
    write(tmp_path / name, rows())
    write(tmp_path / f"data1{Path(name).suffix}", rows(topics=("other",)))  # what it would mean as one
    assert run_here(mapping(files=[name])) == 0


def test_own_data_are_nobody_elses_business(run_here, tmp_path, monkeypatch):
    """The library that reads the files counts their uses on a server unless it is told not to."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_UPDATE_DOWNLOAD_COUNTS", True)
    asked = []
    monkeypatch.setattr(datasets.load, "get_session", lambda: asked.append("request"))
    write(tmp_path / "data.jsonl", rows())
    assert run_here(mapping()) == 0
    assert not asked


def test_changed_data_are_noticed(run_here, tmp_path, capsys):
    write(tmp_path / "data.jsonl", rows())
    assert run_here(mapping(), "--skip-existing") == 0
    assert run_here(mapping(), "--skip-existing") == 0
    assert "nothing to do" in capsys.readouterr().out
    write(tmp_path / "data.jsonl", rows(count=41))
    assert run_here(mapping(), "--skip-existing") == 0
    assert "other flags" in capsys.readouterr().out
    assert run_here(mapping(instruction="Give whole metres."), "--skip-existing") == 0
    assert "other flags" in capsys.readouterr().out
    assert "whole metres" in pd.read_parquet(tmp_path / "x/meta_train/heat_query.parquet").iloc[0]["prompt"]


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
@pytest.mark.parametrize("form", ["{:03}", "2024-01-{:02}"])
def test_own_answers_are_taken_as_written(run_here, tmp_path, suffix, form):
    """A code keeps its zeros, a gap in the column makes no 12.0 of 12, and a date gets no time of day."""
    content = [{"q": f"Code of {i}?", "result": form.format(i) if i else ""} for i in range(31)]
    write(tmp_path / f"data{suffix}", content)
    values = mapping(files=[f"data{suffix}"], scorer="text", unit=None, fields={"prompt": "q", "answer": "result"},
                     train=["codes"], unseen=None)  # fmt: skip
    assert run_here(values) == 0
    frames = [pd.read_parquet(path) for path in (tmp_path / "x/meta_train").glob("codes_*.parquet")]
    answers = {answer for frame in frames for answer in frame["answer"]}
    assert len(answers) == 20 and answers <= {form.format(i) for i in range(1, 31)}
    counts = json.loads((tmp_path / "x/manifest.json").read_text())["tasks"]["codes"]["counts"]
    assert (counts["read"], counts["unusable"]) == (31, 1)


@pytest.mark.parametrize("scorer", ["number", "choice"])
def test_rows_of_one_group_are_never_on_both_sides(run_here, tmp_path, scorer):
    content = [
        {"q": f"In wording {i}, how much is {i // 4}?", "result": f"{i // 4}", "pair": f"g{i // 4}",
         "options": [f"{i // 4}", "nothing"]}
        for i in range(120)
    ]  # fmt: skip
    write(tmp_path / "data.jsonl", content)
    fields = {"prompt": "q", "answer": "result", "group": "pair"}
    if scorer == "choice":
        fields["choices"] = "options"
    sizes = {"samples_per_task": 20, "test_samples": 6, "shot_pool": 5}
    values = mapping(scorer=scorer, unit=None, fields=fields, train=["one"], unseen=None, sizes=sizes)
    assert run_here(values) == 0
    groups = {True: set(), False: set()}
    for path in (tmp_path / "x").rglob("*.parquet"):
        numbers = {int(re.search(r"wording (\d+)", p)[1]) // 4 for p in pd.read_parquet(path)["prompt"]}
        groups["_test" in path.name] |= numbers
    assert groups[True] and groups[False] and not groups[True] & groups[False]


def test_own_data_mix_with_embedded_tasks(run_here, tmp_path):
    """One suite of both: the rows of each are scored as if they stood alone, and every item read is accounted for."""
    write(tmp_path / "data.jsonl", rows())
    train = {"heat": {"sources": {"steps": ["heat"]}}, "gcd": {"sources": {"reasoning_gym": ["number_theory"]}}}
    unseen = {"sound": {"sources": {"steps": ["sound"]}}, "logic": {"sources": {"reasoning_gym": ["theorem_proving"]}}}
    assert run_here(mapping(train=train, unseen=unseen)) == 0
    manifest = json.loads((tmp_path / "x/manifest.json").read_text())
    assert manifest["sources"]["reasoning_gym"]["revision"] == tasks.package_version()
    assert {name: task["role"] for name, task in manifest["tasks"].items()} == {
        "heat": "train", "gcd": "train", "sound": "unseen", "logic": "unseen"
    }  # fmt: skip
    for task, entry in manifest["tasks"].items():
        frames = [pd.read_parquet(path) for path in (tmp_path / "x").rglob(f"{task}_*.parquet")]
        taken = sum(map(len, frames))
        left = {why: count for why, count in entry["counts"].items() if why != "read"}
        assert entry["counts"]["read"] == taken + sum(left.values()) + sum(entry["contamination"].values())
        for row in (row for frame in frames for _, row in frame.iterrows()):
            verdict = tasks.score(row["response"], row)
            assert verdict.correct and verdict.formatted
            assert not tasks.score("Answer: something else", row).correct


def test_own_test_files(run_here, tmp_path):
    write(tmp_path / "a.jsonl", rows(count=20))
    write(tmp_path / "b.jsonl", [{**row, "q": row["q"] + " Exactly?"} for row in rows(count=30, start=100)])
    assert run_here(mapping(files={"train": ["a.jsonl"], "test": ["b.jsonl"]})) == 0
    test = pd.read_parquet(tmp_path / "x/meta_train/heat_test.parquet")
    assert test["prompt"].str.contains("Exactly").all()
    assert not pd.read_parquet(tmp_path / "x/meta_train/heat_query.parquet")["prompt"].str.contains("Exactly").any()


def test_own_choices(run_here, tmp_path):
    content = [
        {
            "q": f"Which comes after {i}?",
            "options": json.dumps([str(i - 1), str(i + 1), "neither"]),
            "result": str(i + 1),
        }
        for i in range(40)
    ]
    write(tmp_path / "data.csv", content)
    values = mapping(
        files=["data.csv"], scorer="choice", unit=None, instruction=None, train=["after"], unseen=None,
        fields={"prompt": "q", "answer": "result", "choices": "options"},
    )  # fmt: skip
    assert run_here(values) == 0
    row = pd.read_parquet(tmp_path / "x/meta_train/after_query.parquet").iloc[0]
    assert row["answer"] == "B" and "\nB. " in row["prompt"]


@pytest.mark.parametrize(
    ("scorer", "answer", "ending"),
    [("boxed", r"\frac{1}{2}", r"\boxed{\frac{1}{2}}"), ("gsm8k", "12", "#### 12"), ("text", "yes", "Answer: yes")],
)
def test_responses_end_in_the_form_of_the_scorer(run_here, tmp_path, scorer, answer, ending):
    content = [{"q": f"Question {i} about {i * i}?", "result": answer, "work": "Because."} for i in range(40)]
    write(tmp_path / "data.jsonl", content)
    fields = {"prompt": "q", "answer": "result", "response": "work"}
    assert run_here(mapping(scorer=scorer, unit=None, fields=fields, train=["one"], unseen=None)) == 0
    row = pd.read_parquet(tmp_path / "x/meta_train/one_query.parquet").iloc[0]
    assert row["response"] == f"Because.\n{ending}"
    assert tasks.score(row["response"], row) == tasks.Score(True, True, answer)


WRONG = {
    "unknown entry": ({"file": []}, "'file', which means nothing"),
    "no files": ({"files": None}, "files in steps.yaml is None"),
    "missing file": ({"files": ["other.jsonl"]}, "other.jsonl, which is no file"),
    "no answer field": ({"fields": {"prompt": "q"}}, "lacks answer"),
    "unknown field": ({"fields": {"prompt": "q", "answer": "result", "hint": "x"}}, "'hint', which means nothing"),
    "no task field": ({"fields": {"prompt": "q", "answer": "result"}}, "names 3 tasks but no field for them"),
    "unknown scorer": ({"scorer": "judge"}, "scorer in steps.yaml is 'judge'"),
    "choices without scorer": ({"scorer": "choice"}, "choice and choices go together"),
    "tasks as a text": ({"train": "heat"}, "give a list of task names, or a mapping as in suites"),
    "task without sources": ({"train": {"heat": 1}}, "task heat of train in steps.yaml has no sources"),
    "unknown source": ({"train": {"heat": {"sources": {"stairs": ["heat"]}}}}, "source 'stairs', which is not known"),
    "level without number": (
        {"fields": {"prompt": "q", "answer": "result", "task": "topic", "level": "work"}},
        "fields in steps.yaml maps level to work, which holds 'Multiply 0 by 2.': give numbers, 1 the easiest",
    ),
    "tolerance": ({"relative_tolerance": "small"}, "relative_tolerance in steps.yaml is 'small': give a share"),
    "unit of a text": ({"scorer": "text"}, "gives unit with scorer text: these belong to scorer number"),
    "revision of own data": ({}, "--revision names steps.yaml, which is not fetched here: choose from none"),
    "missing column": (
        {"fields": {"prompt": "question", "answer": "result", "task": "topic"}},
        "column 'question' (any) is missing (further columns: q, work, grade): correct the fields in steps.yaml",
    ),
    "empty task": (
        {"train": ["cold"]},
        "task 'cold' of suite steps has 0 test items, 12 are needed (none read, 0 kept out for resembling test items): "
        "no row of steps belongs to it, correct the names in the suite",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_mappings(case, run_here, tmp_path, capsys):
    write(tmp_path / "data.jsonl", rows())
    changes, message = WRONG[case]
    flags = ["--revision", "steps.yaml=x"] if case == "revision of own data" else []
    assert run_here(mapping(**changes), *flags) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.strip().splitlines()) == 1


# ---- models without a chat template ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bare_model(tmp_path_factory) -> Path:
    """The tiny model as a base model: its tokenizer has no chat template."""
    from tiny_model import build_tiny_model
    from transformers import AutoTokenizer

    folder = build_tiny_model(tmp_path_factory.mktemp("bare"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    assert AutoTokenizer.from_pretrained(folder).chat_template is None
    return folder


def test_a_plain_chat_template_trains_and_evaluates(bare_model, tmp_path):
    import torch
    from omegaconf import OmegaConf
    from transformers import AutoTokenizer

    from metasft.few_shot.open import load_transformers
    from metasft.task_data import TokenizedSet

    before = {path.name: path.read_bytes() for path in bare_model.iterdir()}
    assert chat_template.main(["--model", str(bare_model), "--output", str(tmp_path / "chat")]) == 0
    assert {path.name: path.read_bytes() for path in bare_model.iterdir()} == before
    tokenizer, model = load_transformers(str(tmp_path / "chat"), torch.float32)
    assert model.num_parameters() > 0

    messages = [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "Answer: 2"}]
    pd.DataFrame({"messages": [messages]}).to_parquet(tmp_path / "one.parquet")
    config = OmegaConf.create(
        {"max_length": 128, "truncation": "error", "messages_key": "messages", "pad_mode": "no_padding"}
    )
    example = TokenizedSet(tmp_path / "one.parquet", 1, AutoTokenizer.from_pretrained(tmp_path / "chat"), config)[0]
    whole = tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
    prompt = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, return_dict=True)["input_ids"]
    assert example["input_ids"].tolist() == whole
    assert whole[: len(prompt)] == prompt  # what generation starts from is what training conditions on
    learned = [t for t, m in zip(example["input_ids"].tolist(), example["loss_mask"].tolist(), strict=True) if m]
    assert tokenizer.decode(learned) == f"Answer: 2{tokenizer.eos_token}\n"


def test_models_that_need_no_template(bare_model, tiny_model, tmp_path, capsys):
    assert chat_template.main(["--model", str(tiny_model), "--output", str(tmp_path / "out")]) == 2
    assert re.search(r"which has a chat template already", capsys.readouterr().err)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").write_text("mine")
    assert chat_template.main(["--model", str(bare_model), "--output", str(tmp_path / "full")]) == 2
    assert "is not empty" in capsys.readouterr().err
