"""The suite of single reasoning-gym families: its sides, the prepared data, the verdicts, and the page on it."""

import hashlib
import json
import random
from collections import Counter

import pytest
from script_runner import ROOT

from metasft.data import command as prepare_data
from metasft.data.families import FAMILIES, OWN_FAMILIES
from metasft.data.reasoning import table
from metasft.data.reasoning.groups import GROUPS, KINDS, LEFT_OUT
from metasft.data.scoring import score
from metasft.data.sources.catalog import SOURCES
from metasft.data.sources.duplicates import normalised_question
from metasft.data.sources.suite import ROLES, read_suite

SUITE = read_suite("reasoning", SOURCES)
MODEL = ROOT / "models" / "SmolLM2-135M-Instruct"
SLOW = {"simple_equations", "polynomial_equations", "polynomial_multiplication", "simple_integration",
        "intermediate_integration", "advanced_geometry", "word_ladder", "sokoban"}  # fmt: skip
"""Seconds each; their items are made and scored by the same code as the embedded tasks'."""
CONTENT = "942e805a2b3e39d9e8cc136333c1374f7c7f525999f80016c16fb0c2ca183ab0"
"""SHA-256 of the files without those; a family that is changed on purpose changes it."""
CODE = "__import__('pathlib').Path('scored').touch()"
GARBAGE = ("garbage", "nan", "inf", "×", ",", "()", "[]", "[[", "[1]", "[[1]]", "{}", "1/0", "1e999999999", " / ",
           "A=1", "null", "[null]", '["fill A"]', "_ _", "L" * 200, "[" * 290, "1 " * 140, "9**9**9**9", "12:00",
           "- 1", CODE, f"[{CODE}]")  # fmt: skip


@pytest.fixture(scope="module")
def built():
    return table.prepared("--tasks", *(name for name in SUITE.tasks if name not in SLOW))


@pytest.fixture(scope="module")
def examples(built):
    return [example for members in built.files.values() for example in members]


def left_out() -> list[str]:
    return [family for families in LEFT_OUT.values() for family in families]


# ---- sides ----------------------------------------------------------------------------------------------------------


def test_every_family_is_a_task_or_left_out_for_a_reason():
    from reasoning_gym.factory import DATASETS

    assert sorted([*GROUPS, *left_out()]) == sorted(set(DATASETS) - OWN_FAMILIES)
    assert set(GROUPS) <= set(FAMILIES)
    assert sum(len(groups) for groups in KINDS.values()) == len(set(GROUPS.values())), "a group is of one kind"


def test_no_group_is_on_two_sides():
    assert sorted(SUITE.tasks) == sorted(GROUPS)
    assert all(task.sources == {"reasoning_gym": (name,)} for name, task in SUITE.tasks.items())
    counts = {role: Counter(GROUPS[name] for name in SUITE.roles[role]) for role in ROLES}
    assert sum(map(len, counts.values())) == len(set(GROUPS.values()))
    assert max(max(counts[role].values()) for role in ROLES[1:]) == 2
    train, search, valid, unseen = (counts[role].total() for role in ROLES)
    assert SUITE.title.endswith(
        f"{train} tasks to train on, {search} to search on, {valid} to report on, {unseen} unseen"
    )


def test_the_sides_are_those_of_a_seeded_draw():
    """Groups of at most two in random order within their kinds, then every side at its places in turns of 11."""
    order = []
    for kind, groups in KINDS.items():
        small = sorted(group for group, families in groups.items() if len(families) <= 2)
        order += random.Random(f"reasoning/{kind}").sample(small, len(small))
    places = {"t": "train", "s": "search", "v": "valid", "u": "unseen"}
    drawn = {group: places["tuvtutsuvtu"[index % 11]] for index, group in enumerate(order)}
    assert {name: drawn.get(group, "train") for name, group in GROUPS.items()} == {
        name: SUITE.role(name) for name in GROUPS
    }


# ---- data -----------------------------------------------------------------------------------------------------------


def test_files_have_enough_examples_and_share_none(built, examples):
    for path, members in built.files.items():
        part = path.removesuffix(".parquet").rpartition("_")[2]
        trained = members[0].task in SUITE.train
        assert len(members) == {"support": 100, "query": 50, "test": 50 if trained else 64}[part], path
    assert len({normalised_question(example.prompt) for example in examples}) == len(examples)
    assert len({example.example_id for example in examples}) == len(examples)


def test_labels_are_balanced(built):
    for path, members in built.files.items():
        if labels := FAMILIES[members[0].task].labels:
            counts = Counter(example.answer for example in members)
            assert set(counts) == set(labels) and max(counts.values()) - min(counts.values()) <= 1, path


def test_the_same_seed_gives_the_same_data(built):
    """In every process: sets of strings have another order in each."""
    content = {path: [(one.example_id, one.prompt, one.response) for one in members]
               for path, members in built.files.items()}  # fmt: skip
    assert hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest() == CONTENT


@pytest.mark.skipif(not MODEL.exists(), reason="needs the tokenizer: make model")
def test_examples_are_short(examples):
    from tokenizers import Tokenizer  # what transformers' AutoTokenizer wraps, without the seconds of its import

    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    texts = [f"{example.prompt}\n{example.response}" for example in examples]
    lengths = [len(tokens.ids) for tokens in tokenizer.encode_batch(texts, add_special_tokens=False)]
    longest = max(range(len(lengths)), key=lengths.__getitem__)
    assert lengths[longest] <= table.MOST_TOKENS, examples[longest].task


def test_solvers_that_understand_nothing_fail(built):
    best = {name: max(task["trivial"].values()) for name, task in built.tasks.items()}
    assert max(best.values()) <= 0.6, max(best, key=best.__getitem__)


def test_only_right_answers_score(built, tmp_path, monkeypatch):
    """And whatever a model writes gets a verdict; nothing of it is run."""
    monkeypatch.chdir(tmp_path)
    for members in (members for path, members in built.files.items() if path.endswith("_test.parquet")):
        for example in members[:3]:
            assert score(example.response, example).correct
            assert not score(f"{example.response} or something else", example).correct
            wrong = {text for text in GARBAGE if text.strip() != example.answer}
            assert not [text for text in wrong if score(f"Answer: {text}", example).correct], example.prompt
    assert not list(tmp_path.iterdir())


def test_verifiers_that_are_too_lenient_are_corrected(built):
    def verdict(family: str, answer: str, gold: str, **metadata: object) -> bool:
        row = {"data_source": f"reasoning_gym/{family}", "answer": gold}
        return score(f"Answer: {answer}", {**row, "extra_info": {"family": family, "metadata": metadata}}).correct

    assert verdict("time_intervals", "01:07", "01:07", task_type="time")
    assert not verdict("time_intervals", "01:08", "01:07", task_type="time")
    assert verdict("number_sorting", "['2', '7']", "['2.0', '7.0']", direction="ascending")
    assert not verdict("number_sorting", "['2.5', '7']", "['2.0', '7.0']", direction="ascending")
    # Its verifier evaluates the gold answer of the file.
    assert not verdict("number_sorting", "[]", "[print('run')]", direction="ascending")


def test_preparing_the_suite(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ["--suite", "reasoning", "--tasks", "gcd", "acre", "bf", "n_queens", "--output-dir", "data"]
    assert prepare_data.main(flags) == 0
    manifest = json.loads((tmp_path / "data/manifest.json").read_text())
    assert {name: task["role"] for name, task in manifest["tasks"].items()} == {
        name: SUITE.role(name) for name in SUITE.tasks if name in flags
    }
    task = manifest["tasks"]["gcd"]
    assert (task["kind"], task["group"], task["parameters"]) == ("arithmetic", "divisors", [{"max_value": 100}])
    assert set(task["trivial"]) == {"constant", "copy", "part", "pattern"}


# ---- documentation --------------------------------------------------------------------------------------------------


def test_the_page_lists_the_tasks_as_they_are(built):
    page = (ROOT / "docs/reasoning.md").read_text(encoding="utf-8")
    assert page.startswith(table.introduction()) and page.endswith(table.left_out()), "make reasoning"
    for name, task in built.tasks.items():
        (support,) = (members for path, members in built.files.items() if path.endswith(f"/{name}_support.parquet"))
        assert table.task_row(name, task, support[0]) in page, "make reasoning"
    assert page.count("\n| ") == len(GROUPS) + len(KINDS) + len(left_out()) + len(ROLES) + 2, "a line per family"
