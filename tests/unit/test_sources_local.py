"""Own data through a mapping file, and a chat template for models without one."""

import json
import re
from pathlib import Path

import pandas as pd
import pytest
import yaml

from metasft import chat_template
from metasft.data import command as prepare_command
from metasft.data import embedded_tasks as tasks
from metasft.data.answers import Score
from metasft.data.scoring import score

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


def plain(**changes) -> dict:
    """A mapping of one task that leaves texts as they are: no scorer, no names of columns."""
    free = dict.fromkeys(("scorer", "unit", "instruction", "fields", "unseen"))
    return mapping(**{**free, "train": ["one"], **changes})


@pytest.fixture
def run_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def run(values: dict, *flags: str) -> int:
        (tmp_path / "steps.yaml").write_text(yaml.safe_dump(values))
        return prepare_command.main(["--source", "local", "--mapping", "steps.yaml", "--output-dir", "x", *flags])

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
    assert score(f"Answer: {row['answer']} m", row).correct
    assert not score(f"Answer: {row['answer']} km", row).correct
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
    values = plain(files=[f"data{suffix}"], scorer="text", fields={"prompt": "q", "answer": "result"}, train=["codes"])
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
    assert run_here(plain(scorer=scorer, fields=fields)) == 0
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
            verdict = score(row["response"], row)
            assert verdict.correct and verdict.formatted
            assert not score("Answer: something else", row).correct


def test_own_test_files(run_here, tmp_path):
    write(tmp_path / "a.jsonl", rows(count=20))
    write(tmp_path / "b.jsonl", [{**row, "q": row["q"] + " Exactly?"} for row in rows(count=30, start=100)])
    assert run_here(mapping(files={"train": ["a.jsonl"], "test": ["b.jsonl"]})) == 0
    test = pd.read_parquet(tmp_path / "x/meta_train/heat_test.parquet")
    assert test["prompt"].str.contains("Exactly").all()
    assert not pd.read_parquet(tmp_path / "x/meta_train/heat_query.parquet")["prompt"].str.contains("Exactly").any()


def test_own_choices(run_here, tmp_path):
    options = [json.dumps([str(i - 1), str(i + 1), "neither"]) for i in range(40)]
    content = [{"q": f"Which comes after {i}?", "options": options[i], "result": str(i + 1)} for i in range(40)]
    write(tmp_path / "data.csv", content)
    fields = {"prompt": "q", "answer": "result", "choices": "options"}
    assert run_here(plain(files=["data.csv"], scorer="choice", fields=fields)) == 0
    row = pd.read_parquet(tmp_path / "x/meta_train/one_query.parquet").iloc[0]
    assert row["answer"] == "B" and "\nB. " in row["prompt"]


@pytest.mark.parametrize(
    ("scorer", "answer", "ending"),
    [("boxed", r"\frac{1}{2}", r"\boxed{\frac{1}{2}}"), ("gsm8k", "12", "#### 12"), ("text", "yes", "Answer: yes")],
)
def test_responses_end_in_the_form_of_the_scorer(run_here, tmp_path, scorer, answer, ending):
    content = [{"q": f"Question {i} about {i * i}?", "result": answer, "work": "Because."} for i in range(40)]
    write(tmp_path / "data.jsonl", content)
    fields = {"prompt": "q", "answer": "result", "response": "work"}
    assert run_here(plain(scorer=scorer, fields=fields)) == 0
    row = pd.read_parquet(tmp_path / "x/meta_train/one_query.parquet").iloc[0]
    assert row["response"] == f"Because.\n{ending}"
    assert score(row["response"], row) == Score(True, True, answer)


# ---- layouts --------------------------------------------------------------------------------------------------------

WORDS = ["  indented", "two\nlines\n", "Größe: 5 €", "2024-01-01", "None", 'a, b; "c"', "007", "['x']"]
"""Texts that a reader may be tempted to change."""


def turns_of(i: int) -> list[dict]:
    return [{"role": "user", "content": f"{WORDS[i % 8]} {i}"}, {"role": "assistant", "content": f"{WORDS[i % 7]}{i} "}]


def long_turns_of(i: int) -> list[dict]:
    """A system turn, two turns before the last question, and a word after the response."""
    system, first = {"role": "system", "content": f"Be {WORDS[i % 3]}."}, turns_of(100 + i)
    return [system, *first, *turns_of(i)]


def share_gpt(turns: list[dict]) -> list[dict]:
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    return [{"from": names[turn["role"]], "value": turn["content"]} for turn in turns]


def with_input(turns: list[dict], i: int) -> list[dict]:
    question, response = turns
    return [{**question, "content": question["content"] + (f"\n{WORDS[i % 5]}" if i % 2 else "")}, response]


def with_system(turns: list[dict], i: int) -> list[dict]:
    return [{"role": "system", "content": f"Be {i}."}, *turns] if i % 2 else turns


# Name -> (a row's columns, what the prepared file's messages are, the mapping's fields).
LAYOUTS = {
    "messages": (lambda i: {"messages": turns_of(i)}, turns_of, None),
    "long messages": (lambda i: {"messages": long_turns_of(i)}, long_turns_of, None),
    "a word after the response": (
        lambda i: {"messages": [*turns_of(i), {"role": "user", "content": "Thanks!"}]}, turns_of, None
    ),
    "mapped messages": (lambda i: {"chat": long_turns_of(i), "prompt": "x"}, long_turns_of, {"messages": "chat"}),
    "messages mapped as prompt": (lambda i: {"messages": turns_of(i)}, turns_of, {"prompt": "messages"}),
    "turns and a response": (
        lambda i: {"prompt": long_turns_of(i)[:-1], "reply": long_turns_of(i)[-1]["content"]}, long_turns_of,
        {"prompt": "prompt", "response": "reply"},
    ),
    "ShareGPT": (lambda i: {"conversations": share_gpt(long_turns_of(i)), "id": f"{i}"}, long_turns_of, None),
    "ShareGPT with a system column": (
        lambda i: {"conversations": share_gpt(turns_of(i)), "system": f"Be {i}." if i % 2 else ""},
        lambda i: with_system(turns_of(i), i), None,
    ),
    "Alpaca": (
        lambda i: {"instruction": turns_of(i)[0]["content"], "input": WORDS[i % 5] if i % 2 else "",
                   "output": turns_of(i)[1]["content"]},
        lambda i: with_input(turns_of(i), i), None,
    ),
    "Alpaca with a system column": (
        lambda i: {"instruction": turns_of(i)[0]["content"], "input": "", "output": turns_of(i)[1]["content"],
                   "system": f"Be {i}." if i % 2 else ""},
        lambda i: with_system(turns_of(i), i), None,
    ),
    "prompt and response": (
        lambda i: {"prompt": turns_of(i)[0]["content"], "response": turns_of(i)[1]["content"]}, turns_of, None
    ),
    "mapped": (
        lambda i: {"q": turns_of(i)[0]["content"], "a": turns_of(i)[1]["content"], "messages": "unused"}, turns_of,
        {"prompt": "q", "response": "a"},
    ),
    "an answer as the response": (
        lambda i: {"q": turns_of(i)[0]["content"], "a": turns_of(i)[1]["content"]}, turns_of,
        {"prompt": "q", "answer": "a"},
    ),
}  # fmt: skip


def prepared_messages(folder: Path) -> list[list[dict]]:
    frames = [pd.read_parquet(path) for path in folder.rglob("*.parquet")]
    return [[dict(turn) for turn in messages] for frame in frames for messages in frame["messages"]]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_are_recognised_and_kept_word_for_word(layout, suffix, run_here, tmp_path, capsys):
    columns, messages, fields = LAYOUTS[layout]
    content = [columns(i) for i in range(26)]
    if suffix == ".csv":  # lists as JSON text
        content = [{k: v if isinstance(v, str) else json.dumps(v) for k, v in row.items()} for row in content]
    if suffix == ".json":
        (tmp_path / "data.json").write_text(json.dumps(content))
    else:
        write(tmp_path / f"data{suffix}", content)
    assert run_here(plain(files=[f"data{suffix}"], fields=fields)) == 0
    found = prepared_messages(tmp_path / "x")
    expected = [messages(i) for i in range(26)]
    assert len(found) == 20 and all(turns in expected for turns in found)
    assert "no scorer: texts are used word for word; evaluation measures the loss and exact" in capsys.readouterr().out
    row = pd.read_parquet(tmp_path / "x/meta_train/one_test.parquet").iloc[0]
    assert row["response"] == row["answer"] == row["messages"][-1]["content"]
    assert all(turn["content"] in row["prompt"] for turn in row["messages"][:-1])
    assert score(row["response"], row) == Score(True, True, row["response"].strip())
    assert not score(f"Answer: {row['response']}", row).correct


def test_a_single_question_is_the_prompt_and_turns_are_named(run_here, tmp_path):
    write(tmp_path / "data.jsonl", [{"messages": (long_turns_of if i % 2 else turns_of)(i)} for i in range(20)])
    assert run_here(plain()) == 0
    for path in tmp_path.rglob("*.parquet"):
        for _, row in pd.read_parquet(path).iterrows():
            *before, _ = row["messages"]
            named = "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in before)
            assert row["prompt"] == (named if len(before) > 1 else before[0]["content"])


def test_only_a_scorer_changes_texts_and_the_command_says_so(run_here, tmp_path, capsys):
    """The form is asked for in the last question, and added to responses without it: neither twice."""
    content = []
    for i in range(40):
        *before, question, response = long_turns_of(i)
        question["content"] += ' End with "Answer: <answer>".' if i % 4 == 0 else ""
        response["content"] = ("7", "It is 7.", "It is 7.\nAnswer: 7", "Answer: 7")[i % 4]
        content.append({"messages": [*before, question, response], "gold": "7"})
    write(tmp_path / "data.jsonl", content)
    assert run_here(plain(scorer="number", fields={"answer": "gold"})) == 0
    assert (
        "steps: scorer number reads the answer in a form of its own: prompts get the line 'End with \"Answer: "
        "<answer>\".', and responses that do not end so the line 'Answer: <answer>'" in capsys.readouterr().out
    )
    given = {row["messages"][-2]["content"].removesuffix(' End with "Answer: <answer>".'): row for row in content}
    frames = [pd.read_parquet(path) for path in (tmp_path / "x").rglob("*.parquet")]
    for _, row in (pair for frame in frames for pair in frame.iterrows()):
        *before, question, response = row["messages"]
        text, _, instruction = question["content"].rpartition("End with")
        assert instruction == ' "Answer: <answer>".' and "End with" not in text
        assert text[-1] in "\n " and row["prompt"].endswith(question["content"])
        original = given[text[:-1]]["messages"]
        assert [dict(turn) for turn in before] == original[:-2]
        expected = {"7": "Answer: 7", "It is 7.": "It is 7.\nAnswer: 7"}
        assert response["content"] == expected.get(original[-1]["content"], original[-1]["content"])
        assert score("Answer: 7", row).correct and not score("7", row).correct


def test_an_instruction_of_ones_own_needs_no_scorer(run_here, tmp_path, capsys):
    write(tmp_path / "data.jsonl", [{"messages": turns_of(i)} for i in range(20)])
    assert run_here(plain(instruction="Be brief.")) == 0
    assert "texts are used with the instruction of the mapping added to prompts" in capsys.readouterr().out
    expected = [turns_of(i) for i in range(20)]
    for question, _ in expected:
        question["content"] += "\nBe brief."
    assert all(turns in expected for turns in prepared_messages(tmp_path / "x"))


def test_questions_from_one_template_are_not_taken_for_duplicates(run_here, tmp_path):
    """Unless the mapping asks for it."""
    template = "Say whether the sentence that follows praises or blames the film that it is about, in one word. {}"
    letters = [f"{a}{b}" for a in "abcdef" for b in "ghijkl"]
    write(tmp_path / "data.jsonl", [{"prompt": template.format(x), "response": x.upper()} for x in letters])
    assert run_here(plain()) == 0
    assert run_here(plain(near_duplicates=0.8)) == 2


def test_what_is_not_used_is_told(run_here, tmp_path, capsys):
    content = [{"prompt": f"Question {i}?", "response": "x" * (9000 if i < 3 else 2)} for i in range(30)]
    content += [{"prompt": "Question 9?", "response": "again"}, {"prompt": "Question?", "response": " "}]
    write(tmp_path / "data.jsonl", content)
    assert run_here(plain(sizes={**SIZES, "samples_per_task": 27})) == 0
    assert "one: not used: 1 duplicates among" in (out := capsys.readouterr().out)
    assert "3 too long" in out and "1 unusable" in out


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_a_file_per_task(run_here, tmp_path, suffix):
    """71 tasks without a column that names them."""
    names = [f"rule-{number}" for number in range(71)]
    (tmp_path / "tasks").mkdir()
    for name in names:
        content = [{"prompt": f"{name} of {i}?", "response": f"{i}"} for i in range(8)]
        write(tmp_path / "tasks" / f"{name}{suffix}", content)
    sizes = {"samples_per_task": 8, "support_ratio": 0.25, "test_samples": 4, "shot_pool": 4}
    values = plain(files=[f"tasks/{name}{suffix}" for name in names], train=names[:68], unseen=names[68:], sizes=sizes)
    assert run_here(values) == 0
    assert len(list((tmp_path / "x/meta_train").glob("*_support.parquet"))) == 68
    assert len(list((tmp_path / "x/meta_test").glob("*_support.parquet"))) == 3
    for path in (tmp_path / "x").rglob("*.parquet"):
        frame = pd.read_parquet(path)
        assert set(frame["task"]) == {path.stem.rpartition("_")[0]}
        assert frame["prompt"].str.startswith(f"{frame['task'][0]} of ").all()


@pytest.mark.parametrize("turns", [turns_of, long_turns_of])
def test_the_baselines_learn_from_the_last_response_too(turns, run_here, tmp_path, tiny_model):
    """veRL's trainer makes its dataset by the configuration; its own would learn from every turn of the assistant."""
    from hydra import compose, initialize_config_dir
    from transformers import AutoTokenizer
    from verl.trainer.sft_trainer import create_sft_dataset

    write(tmp_path / "data.jsonl", [{"messages": turns(i)} for i in range(20)])
    assert run_here(plain()) == 0
    with initialize_config_dir(str(tmp_path / "x"), version_base=None):
        config = compose("baseline_lora_mixed", overrides=["data.pad_mode=no_padding"])
    assert (config.data.custom_cls.path is None) == (turns is turns_of)  # veRL's own where it is the same
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    data = create_sft_dataset(config.data.train_files, config.data, tokenizer, None)
    rows = pd.read_parquet(config.data.train_files[0])
    for row, example in zip(rows["response"], data, strict=True):
        assert tokenizer.decode(example["input_ids"][example["loss_mask"].bool()]) == f"{row}<|im_end|>\n"


# What the table of bad input (tests/e2e/test_bad_input.py) does not have.
WRONG = {
    "turns with a tool call": ({"fields": {"messages": "call", "answer": "result", "task": "topic"}},
     "the column call in the data of steps.yaml holds {'role': 'assistant', 'content': None, 'tool_calls'"),
    "messages that are text": ({"fields": {"messages": "q", "answer": "result", "task": "topic"}},
     "the column q in the data of steps.yaml holds In heat, how many metres are 0 steps of 2?: give text, or a list"),
    "two responses": ({"fields": {"messages": "chat", "response": "work", "answer": "result", "task": "topic"}},
     "steps.yaml maps response to work, but the turns in chat end with another response: leave one of the two out"),
    "two prompts": ({"fields": {"messages": "chat", "prompt": "q", "answer": "result", "task": "topic"}},
     "fields in steps.yaml has messages and prompt: map one of the two"),
    "a response without a prompt": ({"fields": {"response": "work", "answer": "result", "task": "topic"}},
     "fields in steps.yaml lacks prompt"),
    "unknown entry": ({"file": []}, "'file', which means nothing"),
    "no files": ({"files": None}, "files in steps.yaml is None"),
    "unknown field": ({"fields": {"prompt": "q", "answer": "result", "hint": "x"}}, "'hint', which means nothing"),
    "no task field": ({"fields": {"prompt": "q", "answer": "result"}}, "names 3 tasks but no field for them"),
    "choices without scorer": ({"scorer": "choice"}, "choice and choices go together"),
    "tasks as a text": ({"train": "heat"}, "give a list of task names, or a mapping as in suites"),
    "task without sources": ({"train": {"heat": 1}}, "steps.yaml: train.heat=1 must be a mapping"),
    "unknown source": ({"train": {"heat": {"sources": {"stairs": ["heat"]}}}}, "the source 'stairs' is not known"),
    "level without number": (
        {"fields": {"prompt": "q", "answer": "result", "task": "topic", "level": "work"}},
        "fields in steps.yaml maps level to work, which holds 'Multiply 0 by 2.': give numbers, 1 the easiest",
    ),
    "tolerance": ({"relative_tolerance": "small"}, "relative_tolerance in steps.yaml is 'small': give a share"),
    "unit of a text": ({"scorer": "text"}, "gives unit with scorer text: these belong to scorer number"),
    "revision of own data": ({}, "--revision names steps.yaml, which is not fetched here: choose from none"),
    "missing column": ({"fields": {"prompt": "question", "answer": "result", "task": "topic"}},
     "column 'question' (any) is missing (further columns: q, work, grade, call, chat): correct the "
     "fields in steps.yaml"),
    "empty task": ({"train": ["cold"]},
     "task 'cold' of suite steps has 0 test items, 12 are needed (none read, 0 kept out for resembling test items): "
     "no row of steps belongs to it, correct the names in the suite"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_mappings(case, run_here, tmp_path, capsys):
    odd = {
        "call": [{"role": "assistant", "content": None, "tool_calls": [{"name": "x"}]}],
        "chat": turns_of(0),
    }
    write(tmp_path / "data.jsonl", [{**row, **odd} for row in rows()])
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

    from metasft.adapt.open_model import load_transformers
    from metasft.data.task_sets import TokenizedSet

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
