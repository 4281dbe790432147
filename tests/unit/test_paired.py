"""The paired comparison: estimates against independent calculations, error rates by simulation, and refusals."""

from __future__ import annotations

import json

import numpy as np
import pytest
from experiment_folder import SETTINGS, write_evaluation
from scipy import stats

import compare_methods
from metasft.reporting.compare import paired, parse_side
from metasft.reporting.comparisons import ALL_SHOTS
from metasft.reporting.evaluations import check_pairing, read_evaluation
from metasft.reporting.statistics import crossed_estimate


@pytest.fixture
def pair(tmp_path):
    """Writes both sides with the same data and reads them."""

    def make(a, b, losses_a=None, losses_b=None):
        sides = (("a", "meta_lora", a, losses_a), ("b", "fomaml", b, losses_b))
        return [
            read_evaluation(name, write_evaluation(tmp_path / name, kind, correct, losses))
            for name, kind, correct, losses in sides
        ]

    return make


# ---- rows -----------------------------------------------------------------------------------------------------------


def rows_of(a, b):
    return paired(a, b)[0]["rows"]


def both(shots_values):
    return {(task, n): values for task in ("calculus", "logic") for n, values in shots_values.items()}


def test_rows_of_tasks_shots_and_pools(pair):
    a = both({0: [[1, 0, 1, 0]], 5: [[1, 1, 1, 0], [1, 1, 0, 0]], 10: [[1, 1, 1, 1], [1, 1, 1, 0]]})
    b = both({0: [[0, 0, 1, 0]], 5: [[1, 0, 1, 0], [0, 1, 0, 0]], 10: [[1, 1, 0, 1], [1, 0, 1, 0]]})
    losses_a = {("calculus", 5): [1.0, 1.2], ("logic", 5): [2.0, 2.1], ("calculus", 10): [0.5, 0.7]}
    rows = {(row["task"], row["n_shots"]): row for row in rows_of(*pair(a, b, losses_a))}
    assert list(rows) == [(t, n) for t in ("calculus", "logic", "all") for n in (0, 5, 10, ALL_SHOTS)]
    assert rows["calculus", 5]["accuracy"]["a"] == 5 / 8
    assert rows["calculus", 5]["accuracy"]["difference"] == pytest.approx(2 / 8)
    assert (rows["calculus", 5]["n_items"], rows["calculus", 5]["n_runs"]) == (4, 2)
    assert (rows["all", 5]["n_items"], rows["all", 0]["n_runs"]) == (8, 1)
    # Over shot counts, each item of each run is averaged first.
    averaged = (np.subtract(a["calculus", 5], b["calculus", 5]) + np.subtract(a["calculus", 10], b["calculus", 10])) / 2
    expected = crossed_estimate(averaged)
    assert rows["calculus", ALL_SHOTS]["accuracy"]["ci95"] == pytest.approx(list(expected.interval()))
    assert rows["calculus", ALL_SHOTS]["loss"]["a"] == pytest.approx((1.1 + 0.6) / 2)
    assert rows["calculus", 0]["loss"]["ci95"] is None and rows["calculus", 0]["loss"]["p_holm"] is None
    assert rows["all", 5]["loss"]["difference"] == pytest.approx((0.1 + 1.05) / 2)
    for row in rows.values():
        assert row["accuracy"]["p_holm"] >= row["accuracy"]["p"]


NINE = {f"rule_{i}": f"group_{i // 2 if i < 2 else i}" for i in range(9)}  # the first two are of one group


def test_the_mean_of_enough_groups_is_about_new_tasks(tmp_path):
    rng = np.random.default_rng(3)
    right = [  # A knows every other task
        {(task, 5): (rng.random((2, 12)) < (0.9, 0.2)[i % 2] * side + 0.05).tolist() for i, task in enumerate(NINE)}
        for side in (1, 0.5)
    ]
    for group, of, n_groups in (
        (NINE, "new tasks", 8),
        (dict.fromkeys(NINE, "one"), "these tasks", 1),
        (None, "new tasks", 9),
    ):
        a, b = (
            write_evaluation(
                tmp_path / f"{of}-{n_groups}-{i}", "base", right[i], changes={"group": group} if group else {}
            )
            for i in range(2)
        )
        *alone, row = rows_of(read_evaluation("a", a), read_evaluation("b", b))
        assert {r["of"] for r in alone} == {"these tasks"} and not any(r["beats"] or r["needed"] for r in alone)
        assert (row["task"], row["of"], row["n_tasks"], row["n_groups"]) == ("all", of, 9, n_groups)
        if of == "these tasks":
            assert row["beats"] is None and row["needed"] == []
    by_task = [np.mean(right[0][task, 5]) - np.mean(right[1][task, 5]) for task in NINE]
    assert row["accuracy"]["difference"] == pytest.approx(np.mean(by_task))
    wins = np.mean([0.5 if abs(d) < 1e-9 else d > 0 for d in by_task])
    assert row["beats"]["probability"] == pytest.approx(wins)
    assert row["beats"]["ci95"][0] < wins < row["beats"]["ci95"][1]
    (needed,) = row["needed"]
    assert needed["seeds"] == 1 and needed["equivalence"] >= needed["superiority"] > 9
    half = stats.t.ppf(0.975, 8) * np.std(by_task, ddof=1) / 3
    assert row["accuracy"]["ci95"] == pytest.approx([np.mean(by_task) - half, np.mean(by_task) + half])
    page = paired(read_evaluation("a", a), read_evaluation("b", b))[1]
    assert "9 tasks in 9 groups" in page and "new task" in page


def test_groups_are_checked(tmp_path):
    folder = write_evaluation(tmp_path, "base", {("calculus", 0): [[1]]}, changes={"group": {"calculus": 1}})
    with pytest.raises(ValueError, match=r"group.*1"):
        read_evaluation("a", folder)


def test_items_are_paired_by_their_ids_not_by_their_place(tmp_path):
    correct = [1, 0, 1, 1, 0, 0, 1, 0]
    names = [f"item-{i}" for i in range(8)]
    one = write_evaluation(tmp_path / "one", "base", {("calculus", 0): [correct]}, items=names)
    other = write_evaluation(tmp_path / "two", "base", {("calculus", 0): [correct[::-1]]}, items=names[::-1])
    (row,) = rows_of(read_evaluation("one", one), read_evaluation("two", other))
    assert row["accuracy"]["difference"] == 0
    zeros = crossed_estimate(np.zeros((1, 8)))
    assert row["accuracy"]["ci95"] == pytest.approx(list(zeros.interval()))


def test_sides_change_the_sign_and_nothing_else(pair):
    rng = np.random.default_rng(1)
    a, b = ({("calculus", 5): rng.integers(0, 2, (3, 40)).tolist()} for _ in range(2))
    one, two = pair(a, b, {("calculus", 5): [1.0, 1.1, 1.3]})
    (there,), (back,) = rows_of(one, two), rows_of(two, one)
    assert there["accuracy"]["difference"] == -back["accuracy"]["difference"]
    assert there["accuracy"]["ci95"] == pytest.approx([-x for x in reversed(back["accuracy"]["ci95"])])
    for key in ("p", "equivalence_p"):
        assert there["accuracy"][key] == pytest.approx(back["accuracy"][key])
    assert there["loss"]["p"] == pytest.approx(back["loss"]["p"])


def test_the_table_says_what_is_shown(pair):
    rng = np.random.default_rng(2)
    good, bad = np.ones((3, 300), int), (rng.random((3, 300)) < 0.5).astype(int)
    same = (rng.random((3, 300)) < 0.5).astype(int)
    a = {("calculus", 5): good.tolist(), ("logic", 5): same.tolist()}
    b = {("calculus", 5): bad.tolist(), ("logic", 5): same.tolist()}
    one, two = pair(a, b)
    lines = paired(one, two)[1].splitlines()
    cells = {tuple(c[1:3]): c for line in lines if len(c := [x.strip() for x in line.split("|")]) > 10}
    header = cells["Task", "Shots"]
    shown = header.index("Accuracy: shown")
    assert cells["calculus", "5"][shown] == "a is higher; a is not worse by 3 points"
    assert cells["logic", "5"][shown] == "equivalent within 3 points"
    assert cells["logic", "5"][header.index("Difference (points)")].startswith("+0.0 [−")
    assert all(len(c) == len(header) for c in cells.values())


# ---- what may not be paired -----------------------------------------------------------------------------------------

CORRECT = {("calculus", 0): [[1, 0, 1]], ("calculus", 5): [[1, 0, 1], [1, 1, 1]]}


def refused(tmp_path, correct=CORRECT, **how):
    one = write_evaluation(tmp_path / "one", "base", CORRECT)
    two = write_evaluation(tmp_path / "two", "base", correct, **how)
    a, b = read_evaluation("one", one), read_evaluation("two", two)
    with pytest.raises(ValueError) as error:
        check_pairing(a, b)
    return str(error.value), a, b


def test_other_items_are_refused(tmp_path):
    message, *_ = refused(tmp_path, {key: [[1, 0] for _ in runs] for key, runs in CORRECT.items()})
    assert "calculus at 0 shots: the test items differ (3 of one, 2 of two, 2 in common" in message
    message, *_ = refused(tmp_path, items=["calculus-0", "calculus-1", "calculus-9"])
    assert "--limit" in message


def test_other_shots_runs_and_data_are_refused(tmp_path):
    message, *_ = refused(tmp_path, shots="t")
    assert "calculus at 5 shots: one and two adapted on different shots in run 0" in message and "--seed" in message
    message, *_ = refused(tmp_path, {**CORRECT, ("calculus", 5): [[1, 0, 1]]})
    assert "one has 2 runs (shot sets), two has 1" in message
    data = {**SETTINGS["data_sha256"], "calculus_test.parquet": "zz"}
    message, *_ = refused(tmp_path, changes={"data_sha256": data})
    assert "the data of one and two differ: calculus_test.parquet has SHA-256 bb... and zz..." in message
    message, *_ = refused(tmp_path, changes={"data_sha256": None})
    assert "the settings of two hold no data_sha256" in message
    message, *_ = refused(tmp_path, {("logic", 5): [[1]]})
    assert "no task and shot count in common" in message


def test_data_of_a_task_that_is_not_compared_may_differ(tmp_path):
    data = {**SETTINGS["data_sha256"], "logic_test.parquet": "zz"}
    one = write_evaluation(tmp_path / "one", "base", CORRECT)
    two = write_evaluation(tmp_path / "two", "base", CORRECT, changes={"data_sha256": data})
    assert check_pairing(read_evaluation("one", one), read_evaluation("two", two)) == []


def test_another_protocol_is_refused_unless_allowed(tmp_path):
    changes = {"adaptation_lr": 1e-3, "adaptation_optimizer": "adamw", "adaptation_origin": "flags", "seed": 1}
    message, a, b = refused(tmp_path, changes=changes)
    assert "adaptation_optimizer: 'sgd' and 'adamw'; adaptation_lr: 0.05 and 0.001" in message
    assert "adaptation_origin" not in message and "--allow-different-protocol" in message
    (note,) = check_pairing(a, b, allow_different_protocol=True)
    assert "adaptation_lr: 0.05 and 0.001" in note


@pytest.mark.parametrize(("trials", "alike"), [(12, True), (7, False)])
def test_what_equal_searches_chose_is_no_other_protocol(trials, alike, tmp_path):
    def searched(name, lr, trials):
        search = {"searched_on": "search tasks", "tasks": ["x"], "trials_per_shot_count": trials, "choice": {"5": lr}}
        changes = {"adaptation_lr": lr, "adaptation_by_shots": {"5": f"adamw {lr}"}, "search": search}
        return read_evaluation(name, write_evaluation(tmp_path / name, "base", CORRECT, changes=changes))

    notes = check_pairing(searched("a", 1e-3, 12), searched("b", 3e-3, trials), allow_different_protocol=True)
    assert (notes == []) is alike


@pytest.mark.parametrize(
    "changes", [{"chat_template_sha256": "ab"}, {"chat_template_kwargs": {"enable_thinking": False}}], ids=str
)
def test_other_prompts_are_another_protocol(changes, tmp_path):
    prompts = {"chat_template_sha256": "aa", "chat_template_kwargs": {}}
    a = read_evaluation("a", write_evaluation(tmp_path / "a", "meta_lora", CORRECT, changes=prompts))
    b = read_evaluation("b", write_evaluation(tmp_path / "b", "base", CORRECT, changes={**prompts, **changes}))
    with pytest.raises(ValueError, match=f"adaptation protocol of a and b differs .*{min(changes)}"):
        check_pairing(a, b)
    (note,) = check_pairing(a, b, allow_different_protocol=True)
    assert min(changes) in note


def test_what_only_one_side_has_is_left_out_and_said(tmp_path):
    one = write_evaluation(tmp_path / "one", "base", {**CORRECT, ("logic", 0): [[1, 0]]})
    two = write_evaluation(tmp_path / "two", "base", CORRECT, changes={"base_model": "models/other"})
    a, b = read_evaluation("one", one), read_evaluation("two", two)
    assert check_pairing(a, b) == [
        "The base models differ: models/tiny and models/other.",
        "Only one was evaluated on logic at 0 shots: left out.",
    ]
    found = paired(a, b)[0]
    assert [(row["task"], row["n_shots"]) for row in found["rows"]] == [("calculus", 0), ("calculus", 5)]


def test_unfinished_and_foreign_files_are_refused(tmp_path):
    folder = write_evaluation(tmp_path / "one", "base", CORRECT)
    predictions = folder / "base_predictions.jsonl"
    whole = predictions.read_text(encoding="utf-8").split("\n")
    for text, message in (
        ("\n".join(whole[:-2]) + "\n", "2 predictions for the 3 items"),
        ("\n".join([*whole[:-1], whole[-2]]) + "\n", "is there twice"),
        ("[]\n", "unfinished or of another format"),
        ("", "0 predictions"),
    ):
        predictions.write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=message):
            read_evaluation("one", folder)
    predictions.write_text("\n".join(whole), encoding="utf-8")
    cells = folder / "base_cells.jsonl"
    good = cells.read_text(encoding="utf-8")
    for old, new, message in (
        ('"loss": 1.0', '"loss": NaN', r"line 1 of base_cells.jsonl: loss=nan"),
        ('"n_shots": 5', '"n_shots": "5"', r"line 2 of base_cells.jsonl: n_shots='5'"),
        ('"run": 0', '"run": [1]', r"line 1 of base_cells.jsonl: run=\[1\]"),
        ("}\n", "}]\n", r"line 1 of base_cells.jsonl is not JSON"),
    ):
        cells.write_text(good.replace(old, new), encoding="utf-8")
        with pytest.raises(ValueError, match=message + r".*run evaluate_few_shot.py again"):
            read_evaluation("one", folder)
    cells.unlink()
    with pytest.raises(ValueError, match=r"base_cells\.jsonl does not exist"):
        read_evaluation("one", folder)


# ---- the script -----------------------------------------------------------------------------------------------------


@pytest.fixture
def work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_evaluation(tmp_path / "results" / "meta_lora", "meta_lora", CORRECT)
    write_evaluation(tmp_path / "results" / "fomaml", "fomaml", CORRECT, changes={"adaptation_lr": 1e-3})
    return tmp_path


def test_the_script_writes_json_and_a_table(work, capsys):
    arguments = ["--paired", "results/meta_lora", "FOMAML=results/fomaml/fomaml_results.json", "--margin", "0.1"]
    assert compare_methods.main(arguments) == 2
    assert "the adaptation protocol of meta_lora and FOMAML differs" in capsys.readouterr().err
    assert compare_methods.main([*arguments, "--allow-different-protocol"]) == 0
    document = json.loads((work / "results" / "paired_meta_lora_FOMAML.json").read_text())
    assert (document["a"]["label"], document["b"]["label"], document["margin"]) == ("meta_lora", "FOMAML", 0.1)
    assert document["a"]["results"] == "results/meta_lora/meta_lora_results.json"
    assert [(row["task"], row["n_shots"]) for row in document["rows"]] == [("calculus", 0), ("calculus", 5)]
    assert document["rows"][0]["accuracy"]["difference"] == 0
    assert "adaptation_lr: 0.05 and 0.001" in document["notes"][0]
    table = (work / "results" / "paired_meta_lora_FOMAML.md").read_text()
    assert table in capsys.readouterr().out
    assert table.startswith("# meta_lora against FOMAML, paired")


def test_labels():
    assert parse_side("results/a/")[0] == "a"
    label, path = parse_side("META LORA=results/a")
    assert (label, str(path)) == ("META LORA", "results/a")
