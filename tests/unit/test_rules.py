"""The hidden rules: what each computes, the sides of the tasks, the prepared data, and the page that lists them."""

import hashlib
import json
import random
from collections import Counter, defaultdict

import pandas as pd
import pytest
from script_runner import ROOT

from metasft.data import command as prepare_data
from metasft.data.rules import table
from metasft.data.rules.rule import KINDS, OPENING, all_items, all_rules
from metasft.data.sources.catalog import SOURCES
from metasft.data.sources.duplicates import normalised_question
from metasft.data.sources.suite import ROLES, read_suite
from metasft.data.trivial import Trivial, trivial_accuracies

RULES = all_rules()
GROUPS = {rule.group: rule.kind for rule in RULES.values()}
SUITE = read_suite("rules", SOURCES)
MODEL = ROOT / "models" / "SmolLM2-135M-Instruct"
LATER_GROUPS: set[str] = set()
"""Groups that were added after the draw of the sides, for training."""
CONTENT = "96d34bc8feb6b7a31019acb99c9eca1dc7e7220734321b8c13abd62c504d80d4"
"""SHA-256 of the suite's files as they shall stay; a rule that is changed on purpose changes it."""


@pytest.fixture(scope="module")
def built():
    return table.prepared()


def parts_of(built) -> dict[str, dict[str, list]]:
    """Task -> part -> its examples."""
    parts = defaultdict(dict)
    for path, members in built.files.items():
        name, _, part = path.removesuffix(".parquet").partition("/")[2].rpartition("_")
        parts[name][part] = members
    return parts


# ---- rules ----------------------------------------------------------------------------------------------------------


def examples() -> dict[str, list[tuple[str, str]]]:
    found = defaultdict(list)
    for line in (ROOT / "tests/support/rule_examples.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            name, _, pair = line.partition(": ")
            text, _, answer = pair.partition(" -> ")
            found[name].append((text, answer))
    return found


def test_rules_compute_what_was_worked_out_by_hand():
    wrong = [
        (name, text, RULES[name].answer(text), answer)
        for name, pairs in examples().items()
        for text, answer in pairs
        if RULES[name].answer(text) != answer
    ]
    assert not wrong


def test_every_rule_was_worked_out_by_hand():
    assert set(examples()) == set(RULES)
    of_group = Counter(RULES[name].group for name, pairs in examples().items() for _ in pairs)
    assert set(of_group) == set(GROUPS) and min(of_group.values()) >= 2
    for name, pairs in examples().items():
        assert len({answer for _, answer in pairs}) >= 2 or not RULES[name].labels, name


def test_there_are_many_rules_of_every_kind():
    assert len(RULES) >= 150 and len(GROUPS) >= 45
    assert set(GROUPS.values()) == set(KINDS)
    assert len({(rule.group, rule.kind) for rule in RULES.values()}) == len(GROUPS), "a group is in one module"
    assert all(rule.description.endswith(".") and "\n" not in rule.description for rule in RULES.values())
    labels = [label for rule in RULES.values() for label in rule.labels]
    assert len(set(labels)) == len(labels), "no word stands for two things"


# ---- sides ----------------------------------------------------------------------------------------------------------


def test_no_group_is_on_two_sides():
    assert sorted(SUITE.tasks) == sorted(RULES)
    assert all(task.sources == {"rules": (name,)} for name, task in SUITE.tasks.items())
    counts = {role: Counter(RULES[name].group for name in SUITE.roles[role]) for role in ROLES}
    assert sum(map(len, counts.values())) == len(GROUPS)
    assert counts["train"].total() >= 80
    assert [counts[role].total() for role in ROLES[1:]] == [8, 16, 32]
    assert max(max(counts[role].values()) for role in ROLES[1:]) == 2
    assert f"{counts['train'].total()} tasks to train on" in SUITE.title


def test_the_sides_are_those_of_a_seeded_draw():
    """Groups in random order within their kinds, then every side at its places in turns of 18."""
    order = []
    for kind in KINDS:
        groups = sorted(group for group, its_kind in GROUPS.items() if its_kind == kind and group not in LATER_GROUPS)
        order += random.Random(f"rules/{kind}").sample(groups, len(groups))
    places = {"t": "train", "s": "search", "v": "valid", "u": "unseen"}
    drawn = {group: places["tuttvtutsttuttvtut"[index % 18]] for index, group in enumerate(order)}
    assert {name: drawn.get(rule.group, "train") for name, rule in RULES.items()} == {
        name: SUITE.role(name) for name in RULES
    }


# ---- data -----------------------------------------------------------------------------------------------------------


def test_files_have_enough_examples_and_share_none(built):
    for name, parts in parts_of(built).items():
        sizes = {part: len(members) for part, members in parts.items()}
        assert sizes["test"] >= 48
        if name in SUITE.train:
            assert sizes["support"] >= 100 and sizes["query"] >= 50
        else:
            assert sizes["support"] >= 50 and "query" not in sizes
    every = [example for members in built.files.values() for example in members]
    assert len({normalised_question(example.prompt) for example in every}) == len(every)
    assert len({example.example_id for example in every}) == len(every)


def test_prompts_say_nothing_but_the_input(built):
    for example in (example for members in built.files.values() for example in members):
        system, user = example.turns
        assert system == {"role": "system", "content": OPENING}
        assert example.response == RULES[example.task].answer(user["content"])


def test_classes_are_balanced(built):
    for name, parts in parts_of(built).items():
        if labels := RULES[name].labels:
            for members in parts.values():
                counts = Counter(example.response for example in members)
                assert set(counts) == set(labels) and max(counts.values()) - min(counts.values()) <= 1, name


def test_the_same_seed_gives_the_same_data(built):
    content = {path: [(one.example_id, one.turns[-1]["content"], one.response) for one in members]
               for path, members in built.files.items()}  # fmt: skip
    assert hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest() == CONTENT
    alone = table.prepared("--tasks", "sort_up", "weekend")
    assert alone.files == {path: members for path, members in built.files.items() if members[0].task in alone.tasks}
    assert all_items(1)["sort_up"] != all_items(2)["sort_up"]


@pytest.mark.skipif(not MODEL.exists(), reason="needs the tokenizer: make model")
def test_examples_are_short(built):
    from tokenizers import Tokenizer  # what transformers' AutoTokenizer wraps, without the seconds of its import

    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    examples = [example for path, members in built.files.items() for example in members]
    texts = [text for example in examples for text in (example.turns[-1]["content"], example.response)]
    lengths = [len(tokens.ids) for tokens in tokenizer.encode_batch(texts, add_special_tokens=False)]
    assert max(map(sum, zip(lengths[::2], lengths[1::2], strict=True))) <= 40


def test_solvers_that_understand_nothing_fail(built):
    best = {name: max(task["trivial"].values()) for name, task in built.tasks.items()}
    assert max(best.values()) <= 0.6, max(best, key=best.__getitem__)
    for name, rule in RULES.items():
        if len(rule.labels) == 2:
            assert built.tasks[name]["trivial"]["constant"] == 0.5


def test_what_trivial_solvers_get_right():
    pool = [("a, 1", "x"), ("b, 2", "x"), ("c d", "d"), ("e f", "f")]
    test = [("g, 3", "x"), ("h i", "i"), ("j k", "d"), ("l, m", "l, m")]
    assert trivial_accuracies(pool, test) == Trivial(constant=0.25, copy=0.25, part=0.25, pattern=0.5)


def test_preparing_the_suite(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = ["--suite", "rules", "--tasks", "sort_up", "count_sevens", "plus_one", "transpose", "--output-dir", "data"]
    assert prepare_data.main(flags) == 0
    manifest = json.loads((tmp_path / "data/manifest.json").read_text())
    assert {name: task["role"] for name, task in manifest["tasks"].items()} == {
        "sort_up": "train", "count_sevens": "search", "plus_one": "valid", "transpose": "unseen"
    }  # fmt: skip
    assert {name: entry["rows"] for name, entry in manifest["files"].items()} == {
        "meta_train/sort_up_support.parquet": 100,
        "meta_train/sort_up_query.parquet": 50,
        "meta_train/sort_up_test.parquet": 50,
        **{
            f"{folder}/{name}_{part}.parquet": rows
            for folder, name in (
                ("meta_valid", "count_sevens"), ("meta_valid", "plus_one"), ("meta_test", "transpose")
            )
            for part, rows in (("support", 100), ("test", 64))
        },
    }  # fmt: skip
    task = manifest["tasks"]["plus_one"]
    assert (task["kind"], task["group"], task["description"]) == ("numbers", "successor", "Each number plus 1.")
    assert set(task["trivial"]) == {"constant", "copy", "part", "pattern"}
    row = pd.read_parquet(tmp_path / "data/meta_valid/plus_one_test.parquet").iloc[0]
    assert [turn["role"] for turn in row["messages"]] == ["system", "user", "assistant"]
    assert prepare_data.main([*flags, "--skip-existing"]) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert prepare_data.main(["--suite", "rules", "--samples-per-task", "400", "--output-dir", "more"]) == 2
    assert "lower --samples-per-task" in capsys.readouterr().err


# ---- documentation --------------------------------------------------------------------------------------------------


def test_the_page_lists_the_rules_as_they_are(built):
    assert (ROOT / "docs/rules.md").read_text(encoding="utf-8") == table.page(built), "make rules"
