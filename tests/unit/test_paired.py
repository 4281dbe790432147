"""The paired comparison: estimates against independent calculations, error rates by simulation, and refusals."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from scipy import stats

import compare_methods
from metasft.paired import (
    ALL_SHOTS,
    check_pairing,
    compare_pair,
    crossed_estimate,
    holm,
    mean_estimate,
    paired_table,
    parse_side,
    read_evaluation,
    run_estimate,
)

SETTINGS = {
    "seed": 1,
    "adaptation_steps": 10,
    "adaptation_batch_size": 4,
    "adaptation_optimizer": "sgd",
    "adaptation_lr": 0.05,
    "adaptation_origin": "checkpoint",
    "max_new_tokens": 48,
    "max_length": 1024,
    "decoding": "greedy",
    "dtype": "float32",
    "base_model": "models/tiny",
    "data_sha256": {"calculus_support.parquet": "aa", "calculus_test.parquet": "bb", "logic_test.parquet": "cc"},
}


def write_evaluation(folder, model_type, correct, losses=None, *, changes=None, items=None, shots="s"):
    """``correct``: (task, N) -> [runs][items] of 0 and 1; ``losses``: (task, N) -> one per run."""
    folder.mkdir(parents=True, exist_ok=True)
    predictions, cells, results = [], [], {}
    for (task, n), runs in correct.items():
        for run, answers in enumerate(runs):
            place = {"task": task, "n_shots": n, "run": run}
            names = items or [f"{task}-{i}" for i in range(len(answers))]
            predictions += [
                {**place, "example_id": name, "correct": bool(c), "formatted": True, "output": "a\u2028b"}
                for name, c in zip(names, answers, strict=True)
            ]
            loss = (losses or {}).get((task, n), [1.0] * len(runs))[run]
            chosen = [f"{shots}-{task}-{run}-{i}" for i in range(n)]
            cells.append({**place, "n_test": len(answers), "loss": loss, "shots": chosen})
        results.setdefault(task, {})[str(n)] = {}
    (folder / f"{model_type}_results.json").write_text(json.dumps(results))
    (folder / f"{model_type}_settings.json").write_text(json.dumps({**SETTINGS, **(changes or {})}))
    for name, lines in (("predictions", predictions), ("cells", cells)):
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        (folder / f"{model_type}_{name}.jsonl").write_text(text, encoding="utf-8")
    return folder


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


# ---- estimates ------------------------------------------------------------------------------------------------------


def test_one_run_by_hand():
    """12 items, 4 won, 1 lost: with the two made-up items 14 differences, sum 3, sum of squares 5 + 1."""
    estimate = crossed_estimate([[1, 1, 1, 1, -1] + [0] * 7])
    assert estimate.difference == pytest.approx(3 / 12)
    assert estimate.centre == pytest.approx(3 / 14)
    assert estimate.error**2 == pytest.approx((6 - 14 * (3 / 14) ** 2) / 13 / 14)
    assert estimate.freedom == pytest.approx(13)
    half = stats.t.ppf(0.975, 13) * estimate.error
    assert estimate.interval() == pytest.approx((3 / 14 - half, 3 / 14 + half))
    assert estimate.p_difference() == pytest.approx(2 * stats.t.sf(3 / 14 / estimate.error, 13))


def test_several_runs_by_hand():
    values = np.array([[1, 0, 0, -1], [1, 1, 0, 0], [0, 1, 0, 0]], dtype=float)
    by_item = values.mean(axis=0)
    items = ((by_item**2).sum() + 1 - by_item.sum() ** 2 / 6) / 5 / 6
    runs = values.mean(axis=1).var(ddof=1) / 3
    estimate = crossed_estimate(values)
    assert estimate.error**2 == pytest.approx(items + runs)
    assert estimate.freedom == pytest.approx((items + runs) ** 2 / (items**2 / 5 + runs**2 / 2))


@pytest.mark.parametrize(("won", "lost"), [(30, 12), (18, 15), (40, 5), (9, 4)])
def test_one_run_agrees_with_the_exact_mcnemar_test(won, lost):
    """An independent test of the same hypothesis from the discordant items alone."""
    p = crossed_estimate([[1] * won + [-1] * lost + [0] * (200 - won - lost)]).p_difference()
    exact = stats.binomtest(won, won + lost).pvalue
    assert (p < 0.05) == (exact < 0.05)
    assert abs(math.log10(p) - math.log10(exact)) < 0.8


def test_losses_are_a_paired_t_test_over_runs():
    a, b = [1.10, 1.02, 0.98, 1.05], [1.20, 1.06, 1.09, 1.07]
    estimate = run_estimate(np.subtract(a, b))
    theirs = stats.ttest_rel(a, b)
    assert estimate.p_difference() == pytest.approx(theirs.pvalue)
    assert estimate.interval() == pytest.approx(tuple(theirs.confidence_interval(0.95)))
    assert run_estimate([0.3]).parts == ()


def test_equivalence_is_the_interval_of_twice_the_level():
    """Two one-sided tests at 5% decide as the 90% interval does."""
    values = [[1] * 14 + [-1] * 10 + [0] * 376]
    estimate = crossed_estimate(values)
    low, high = estimate.interval(0.90)
    assert low < 0 < high
    assert estimate.p_equivalence(high + 1e-6) < 0.05 < estimate.p_equivalence(high - 1e-6)
    assert estimate.p_above(low - 1e-6) < 0.05 < estimate.p_above(low + 1e-6)


def test_agreement_on_every_item_is_evidence_only_where_there_are_many():
    few, many = (crossed_estimate(np.zeros((1, n))) for n in (20, 400))
    assert few.p_difference() == many.p_difference() == 1.0
    assert few.interval()[1] > 0.05 and few.p_equivalence(0.03) > 0.2
    assert many.interval()[1] < 0.01 and many.p_equivalence(0.03) < 0.001


def test_pooled_tasks_weigh_the_same_and_their_variances_add_up():
    one, two = crossed_estimate([[1, 0, 0, 0, 1, 0, 1]]), crossed_estimate([[-1] + [0] * 49])
    both = mean_estimate([one, two])
    assert both.difference == pytest.approx((3 / 7 - 1 / 50) / 2)
    assert both.error == pytest.approx(math.hypot(one.error, two.error) / 2)
    assert min(one.freedom, two.freedom) <= both.freedom <= one.freedom + two.freedom
    assert mean_estimate([run_estimate([0.1]), run_estimate([0.1, 0.3])]).parts == ()


def test_holm_by_hand():
    assert holm([0.01, 0.04, None, 0.03, 0.005]) == pytest.approx([0.03, 0.06, None, 0.06, 0.02], nan_ok=True)
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([None]) == [None]


# ---- error rates ----------------------------------------------------------------------------------------------------


def simulated(rng, runs, items, effect, run_spread):
    """Differences A - B of answers whose items differ in difficulty and whose runs differ in luck."""
    difficulty = rng.normal(0, 1, items)
    sides = []
    for shift in (effect, 0.0):
        luck = rng.normal(0, run_spread, (runs, 1))
        sides.append(rng.normal(0, 1, (runs, items)) + difficulty + luck + shift - 0.5 > 0)
    return sides[0].astype(float) - sides[1].astype(float)


def true_difference(effect, run_spread):
    scale = math.sqrt(2 + run_spread**2)
    return stats.norm.cdf((effect - 0.5) / scale) - stats.norm.cdf(-0.5 / scale)


@pytest.mark.parametrize(
    ("runs", "items", "effect", "run_spread"),
    [(1, 60, 0.0, 0.0), (1, 60, 0.5, 0.0), (3, 100, 0.0, 0.0), (3, 100, 0.4, 0.15), (5, 60, 0.4, 0.15)],
)
def test_intervals_cover_the_known_effect(runs, items, effect, run_spread):
    """95% nominal; binomial noise of 600 trials is about 0.9%. The estimate of the variance errs on the wide side."""
    rng, covered, widths, rejected = np.random.default_rng(5), 0, [], 0
    truth = true_difference(effect, run_spread)
    for _ in range(600):
        estimate = crossed_estimate(simulated(rng, runs, items, effect, run_spread))
        low, high = estimate.interval()
        covered += low <= truth <= high
        rejected += estimate.p_difference() < 0.05
        widths.append(high - low)
    assert covered / 600 > 0.93
    assert np.mean(widths) < 0.45  # covering by being endless would prove nothing
    if effect == 0:
        assert rejected / 600 < 0.07
    else:
        assert rejected / 600 > 0.2


def test_equivalence_is_rarely_claimed_at_the_margin_and_usually_found_without_a_difference():
    rng = np.random.default_rng(6)

    def rate(won, lost, items, margin=0.03):
        draws = rng.choice([1.0, -1.0, 0.0], p=[won, lost, 1 - won - lost], size=(400, 1, items))
        return np.mean([crossed_estimate(d).p_equivalence(margin) < 0.05 for d in draws])

    assert rate(0.08, 0.05, 800) < 0.08  # the true difference is the margin itself: at most about 5%
    assert rate(0.12, 0.05, 800) < 0.01
    assert rate(0.03, 0.03, 2000) > 0.9
    assert rate(0.03, 0.03, 60) < 0.05  # too few items to tell


# ---- rows -----------------------------------------------------------------------------------------------------------


def both(shots_values):
    return {(task, n): values for task in ("calculus", "logic") for n, values in shots_values.items()}


def test_rows_of_tasks_shots_and_pools(pair):
    a = both({0: [[1, 0, 1, 0]], 5: [[1, 1, 1, 0], [1, 1, 0, 0]], 10: [[1, 1, 1, 1], [1, 1, 1, 0]]})
    b = both({0: [[0, 0, 1, 0]], 5: [[1, 0, 1, 0], [0, 1, 0, 0]], 10: [[1, 1, 0, 1], [1, 0, 1, 0]]})
    losses_a = {("calculus", 5): [1.0, 1.2], ("logic", 5): [2.0, 2.1], ("calculus", 10): [0.5, 0.7]}
    rows = {(row.task, row.n_shots): row for row in compare_pair(*pair(a, b, losses_a))}
    assert list(rows) == [(t, n) for t in ("calculus", "logic", "all") for n in (0, 5, 10, ALL_SHOTS)]
    assert rows["calculus", 5].accuracy["a"] == 5 / 8
    assert rows["calculus", 5].accuracy["difference"] == pytest.approx(2 / 8)
    assert (rows["calculus", 5].n_items, rows["calculus", 5].n_runs) == (4, 2)
    assert (rows["all", 5].n_items, rows["all", 0].n_runs) == (8, 1)
    # Over shot counts, each item of each run is averaged first.
    averaged = (np.subtract(a["calculus", 5], b["calculus", 5]) + np.subtract(a["calculus", 10], b["calculus", 10])) / 2
    expected = crossed_estimate(averaged)
    assert rows["calculus", ALL_SHOTS].accuracy["ci95"] == pytest.approx(list(expected.interval()))
    assert rows["calculus", ALL_SHOTS].loss["a"] == pytest.approx((1.1 + 0.6) / 2)
    assert rows["calculus", 0].loss["ci95"] is None and rows["calculus", 0].loss["p_holm"] is None
    assert rows["all", 5].loss["difference"] == pytest.approx((0.1 + 1.05) / 2)
    for row in rows.values():
        assert row.accuracy["p_holm"] >= row.accuracy["p"]


def test_items_are_paired_by_their_ids_not_by_their_place(tmp_path):
    correct = [1, 0, 1, 1, 0, 0, 1, 0]
    names = [f"item-{i}" for i in range(8)]
    one = write_evaluation(tmp_path / "one", "base", {("calculus", 0): [correct]}, items=names)
    other = write_evaluation(tmp_path / "two", "base", {("calculus", 0): [correct[::-1]]}, items=names[::-1])
    (row,) = compare_pair(read_evaluation("one", one), read_evaluation("two", other))
    assert row.accuracy["difference"] == 0
    zeros = crossed_estimate(np.zeros((1, 8)))
    assert row.accuracy["ci95"] == pytest.approx(list(zeros.interval()))


def test_sides_change_the_sign_and_nothing_else(pair):
    rng = np.random.default_rng(1)
    a, b = ({("calculus", 5): rng.integers(0, 2, (3, 40)).tolist()} for _ in range(2))
    one, two = pair(a, b, {("calculus", 5): [1.0, 1.1, 1.3]})
    (there,), (back,) = compare_pair(one, two), compare_pair(two, one)
    assert there.accuracy["difference"] == -back.accuracy["difference"]
    assert there.accuracy["ci95"] == pytest.approx([-x for x in reversed(back.accuracy["ci95"])])
    for key in ("p", "equivalence_p"):
        assert there.accuracy[key] == pytest.approx(back.accuracy[key])
    assert there.loss["p"] == pytest.approx(back.loss["p"])


def test_the_table_says_what_is_shown(pair):
    rng = np.random.default_rng(2)
    good, bad = np.ones((3, 300), int), (rng.random((3, 300)) < 0.5).astype(int)
    same = (rng.random((3, 300)) < 0.5).astype(int)
    a = {("calculus", 5): good.tolist(), ("logic", 5): same.tolist()}
    b = {("calculus", 5): bad.tolist(), ("logic", 5): same.tolist()}
    one, two = pair(a, b)
    rows = compare_pair(one, two)
    lines = paired_table(one, two, rows, margin=0.03, notes=["a note"]).splitlines()
    cells = {tuple(c[1:3]): c for line in lines if len(c := [x.strip() for x in line.split("|")]) > 10}
    header = cells["Task", "Shots"]
    shown = header.index("Accuracy: shown")
    assert cells["calculus", "5"][shown] == "a is higher; a is not worse by 3 points"
    assert cells["logic", "5"][shown] == "equivalent within 3 points"
    assert cells["logic", "5"][header.index("Difference (points)")].startswith("+0.0 [")
    assert all(len(c) == len(header) for c in cells.values())
    assert "- a note" in lines


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
    assert [(row.task, row.n_shots) for row in compare_pair(a, b)] == [("calculus", 0), ("calculus", 5)]


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
        ('"loss": 1.0', '"loss": NaN', r"line 1 of base_cells.jsonl.loss is nan, not a finite number"),
        ('"n_shots": 5', '"n_shots": "5"', r"line 2 of base_cells.jsonl.n_shots is '5', not a whole number"),
        ('"run": 0', '"run": [1]', r"line 1 of base_cells.jsonl.run is \[1\], not a whole number"),
        ("}\n", "}]\n", r"line 1 of base_cells.jsonl is no JSON"),
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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--paired", "results/meta_lora", "results/meta_lora"], "--paired has two sides named meta_lora"),
        (["--paired", "results/meta_lora", "results/nowhere"], "results/nowhere is no <model type>_results.json file"),
        (["--paired", "a=results/meta_lora", "b=results/meta_lora", "--margin", "3"], "--margin is 3.0"),
        (["--paired", "results/meta_lora", "results/fomaml", "--shots", "5"], "--shots has no meaning with --paired"),
        (["--margin", "0.1"], "--margin has no meaning without --paired"),
        (["--speed", "--table", "x.md"], "--table has no meaning with --speed"),
    ],
)
def test_unusable_arguments_are_one_line_and_exit_code_2(work, capsys, arguments, message):
    assert compare_methods.main(arguments) == 2
    stderr = capsys.readouterr().err
    assert message in stderr
    assert len(stderr.splitlines()) == 1


def test_labels():
    assert parse_side("results/a/")[0] == "a"
    label, path = parse_side("META LORA=results/a")
    assert (label, str(path)) == ("META LORA", "results/a")
