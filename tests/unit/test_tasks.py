"""Examples and scorers: distinct, short, reproducible questions whose gold answers, and only right answers, score."""

import itertools
import json
import re
import subprocess
import sys
import threading
import time

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metasft import tasks
from metasft.tasks import Example, extract_answer, generate_examples, majority_baseline, row_for, score, stream_examples

FAMILIES = [family for families in tasks.all_tasks().values() for family in families]
TASK_OF = {family: task for task, families in tasks.all_tasks().items() for family in families}


@pytest.fixture(scope="module")
def by_family() -> dict[str, list[Example]]:
    """At least 12 examples of every family."""
    found = {}
    for task, families in tasks.all_tasks().items():
        for example in generate_examples(task, 12 * len(families), seed=5):
            found.setdefault(example.extra_info["family"], []).append(example)
    return found


def wrong_answer(example: Example, others: list[Example]) -> str:
    """A plausible answer that is wrong: the gold with its first digit changed, or the gold of another example."""
    digit = re.search(r"\d", example.answer)
    if digit:
        changed = str((int(digit.group()) + 1) % 10)
        return example.answer[: digit.start()] + changed + example.answer[digit.end() :]
    return next(other.answer for other in others if other.answer != example.answer)


def answered(example: Example, answer: str) -> bool:
    return score(f"Answer: {answer}", example).correct


def reasoning_gym_row(family: str, answer: str, **metadata) -> dict:
    extra_info = json.dumps({"family": family, "metadata": metadata})
    return {"data_source": f"reasoning_gym/{family}", "answer": answer, "extra_info": extra_info}


# ------------------------------------------------------------------------------------------------ generation


def test_import_is_light():
    code = "import sys, metasft.tasks; print([m for m in ('torch', 'sympy', 'reasoning_gym') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("task", tasks.all_tasks())
def test_examples_are_distinct_short_and_mixed(task):
    examples = generate_examples(task, 60, seed=3)
    families = tasks.all_tasks()[task]
    assert len({e.example_id for e in examples}) == 60
    assert len({" ".join(e.prompt.lower().split()) for e in examples}) == 60
    # Families take turns, so any stretch holds them in equal parts.
    assert [e.extra_info["family"] for e in examples] == list(itertools.islice(itertools.cycle(families), 60))
    for e in examples:
        assert e.task == task
        assert e.prompt.endswith('End with "Answer: <answer>".')
        assert e.prompt.count("\n") >= 1
        assert e.response == f"Answer: {e.answer}"
        assert 0 < len(e.answer) <= 60
        assert len(e.prompt) <= 400
        assert json.loads(json.dumps(e.extra_info)) == e.extra_info
        assert tasks.messages_for(e) == [
            {"role": "user", "content": e.prompt},
            {"role": "assistant", "content": e.response},
        ]
        assert set(row_for(e)) >= {"messages", "extra_info", "answer", "prompt", "response"}


def test_format_instructions_of_the_families_are_gone(by_family):
    conflicting = ("your final answer", "as your answer", "please follow", "Format your answer", "Round all decimal")
    for examples in by_family.values():
        for e in examples:
            assert not any(text in e.prompt for text in conflicting), e.prompt


def test_ids_do_not_collide_across_tasks():
    ids = [e.example_id for task in tasks.all_tasks() for e in generate_examples(task, 30, seed=1)]
    assert len(set(ids)) == len(ids)


def test_asking_for_more_examples_only_appends():
    assert generate_examples("number_theory", 90, seed=2)[:40] == generate_examples("number_theory", 40, seed=2)


def test_neighbouring_seeds_give_other_examples():
    """reasoning-gym's own seeds overlap: item i+1 of seed 1 is item i of seed 2."""
    one, two = (generate_examples("word_problems", 60, seed=seed) for seed in (1, 2))
    shared = {e.prompt for e in one} & {e.prompt for e in two}
    assert len(shared) < 10


def test_same_examples_under_every_hash_seed():
    """Python's per-process hash seed reaches reasoning-gym through sets of sympy terms."""
    code = (
        "import hashlib, json, random\n"
        "from metasft import tasks\n"
        "random.seed()\n"
        "rows = [tasks.row_for(e) for t in tasks.all_tasks() for e in tasks.generate_examples(t, 60, 4)]\n"
        "print(hashlib.sha256(json.dumps(rows).encode()).hexdigest())"
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env={"PYTHONHASHSEED": seed})
        for seed in ("0", "1", "12345")
    ]
    digests = [process.communicate(timeout=120)[0].strip() for process in processes]
    assert len(digests[0]) == 64
    assert len(set(digests)) == 1


def test_same_problem_in_other_words_counts_once():
    examples = generate_examples("number_theory", 600, seed=1)
    for name in ("Greatest Common Divisor", "Least Common Multiple"):
        pairs = [tuple(sorted(re.findall(r"\d+", e.prompt))) for e in examples if name in e.prompt]
        assert len(pairs) > 50
        assert len(set(pairs)) == len(pairs)


def test_dry_family_is_topped_up_from_the_others():
    examples = generate_examples("probability", 667, seed=1)
    counts = pd.Series([e.extra_info["family"] for e in examples]).value_counts()
    assert counts["coin_flip"] < 300 < counts["dice"]
    assert len({e.prompt for e in examples}) == 667


def test_too_few_distinct_questions(monkeypatch):
    monkeypatch.setitem(tasks.TRAIN_TASKS, "probability", ("coin_flip",))
    with pytest.raises(ValueError, match=r"'probability' has 2\d\d distinct questions, 400 are needed.*--tasks"):
        generate_examples("probability", 400, seed=1)


def test_wrong_requests():
    with pytest.raises(ValueError, match=r"unknown task 'poetry'.*algebra"):
        generate_examples("poetry", 1, seed=1)
    with pytest.raises(ValueError, match="count is 0"):
        generate_examples("algebra", 0, seed=1)


def test_unsound_problems_are_left_out():
    geometry = generate_examples("geometry", 200, seed=1)
    angles = [float(e.answer) for e in geometry if e.extra_info["family"] == "simple_geometry"]
    assert angles and all(0 < angle < 180 for angle in angles)
    algebra = generate_examples("algebra", 200, seed=1)
    products = [e.prompt for e in algebra if e.extra_info["family"] == "polynomial_multiplication"]
    assert products and all("*(" in prompt or ")*" in prompt for prompt in products)
    calculus = generate_examples("calculus", 100, seed=1)
    assert not any("Integral" in e.answer for e in calculus)


def test_progress_counts_examples():
    seen = []
    generate_examples("word_problems", 25, seed=1, progress=seen.append)
    assert sum(seen) == 25


# ------------------------------------------------------------------------------------------------ scoring


@pytest.mark.parametrize("family", FAMILIES)
def test_gold_scores_and_wrong_answers_do_not(family, by_family):
    examples = by_family[family]
    assert len(examples) >= 12
    for example in examples:
        assert score(example.response, example) == tasks.Score(True, True, extract_answer(example.response))
        assert score(f"Let me think.\n{example.response}\n", example).correct
        assert score(f"**{example.response}**", example).correct
        wrong = wrong_answer(example, examples)
        assert score(f"Answer: {wrong}", example).correct is False, (example.answer, wrong)
        if family != "knights_knaves":  # its verifier looks for names and roles among other words
            assert not answered(example, f"{example.answer} or something else")
        for garbage in ("garbage", "nan", "(nan, nan)", "inf", "×", ",", "()", "1/0", "\\frac{}{}", "1e999999999", "°"):
            assert not answered(example, garbage), garbage
        assert score("", example) == tasks.Score(False, False, None)
        assert score("Answer:", example) == tasks.Score(False, False, None)
        assert score(example.answer, example).formatted is False  # right, but not in the format asked for


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=60, deadline=None)
@given(text=st.one_of(st.text(max_size=80), st.text("0123456789.,+-*/()xeEijC× °nai", max_size=40)))
def test_no_text_makes_a_scorer_raise(family, text):
    example = next(e for e in _first_of_each(TASK_OF[family]) if e.extra_info["family"] == family)
    assert score(f"Answer: {text}", example).correct in (True, False)
    assert score(text, example).correct in (True, False)


def _first_of_each(task: str, cache: dict = {}) -> list[Example]:  # noqa: B006 - a cache
    if task not in cache:
        cache[task] = list(itertools.islice(stream_examples(task, 9), len(tasks.all_tasks()[task])))
    return cache[task]


@pytest.mark.parametrize(
    "answer",
    [
        "9**9**9**9",
        "(9**9)**(x - x + 99999)**9",
        "((x+1)**60+1)**60",
        "(x+1)**(x-x+99999)",
        "sin(x)*cos(x)*tan(x)*sin(2*x)*sin(3*x)*exp(x)",
        "(" * 290,
        "-" * 290 + "1",
        "x" * 1000,
        "Integral(x**2, x)",
        "__import__('pathlib').Path('scored').touch()",
        "().__class__",
        "lambda: x",
        "1e999999999",
    ],
)
def test_hostile_answers_are_wrong_quickly_and_never_run(answer, by_family, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for family in ("polynomial_multiplication", "simple_integration", "intermediate_integration", "coin_flip"):
        start = time.perf_counter()
        assert not answered(by_family[family][0], answer)
        assert time.perf_counter() - start < 3
    assert not list(tmp_path.iterdir())


def test_an_unevaluated_integral_is_no_answer():
    """Its derivative is the integrand, so the family's own verifier accepts it."""
    row = reasoning_gym_row("simple_integration", "x**2 + C", integrand="2*x", variable="x")
    assert score("Answer: x**2 + C", row).correct
    assert score("Answer: x**2 + 7", row).correct  # any constant will do
    assert not score("Answer: Integral(2*x, x)", row).correct


@pytest.mark.parametrize(
    ("row", "right", "wrong"),
    [
        (reasoning_gym_row("gcd", "13"), ["13", "13.", "$13$", "`13`", '"13"'], ["1", "31", "13 apples", "013"]),
        (reasoning_gym_row("gsm_symbolic", "408"), ["408", "408.0", "$408"], ["-408", "408 + 5 = 413", "4080"]),
        (reasoning_gym_row("chain_sum", "1010"), ["1,010", "1010.0", "+1010"], ["101", "10100"]),
        (reasoning_gym_row("polynomial_equations", "-2.4495, 2.4495"), ["2.4495, -2.4495"], ["2.4495", "-2.4, 2.4"]),
        (reasoning_gym_row("complex_arithmetic", "9.00i", result=[0, 9]), ["9i", "0 + 9i"], ["9", "9 + i", "-9i"]),
        (
            reasoning_gym_row("polynomial_multiplication", "-18*x**2 + 36*x - 18"),
            ["36*x - 18*x**2 - 18"],
            ["-18*(x - 1)**2 + 1", "-18*x**2"],
        ),
        (reasoning_gym_row("coin_flip", "0.109375"), ["7/64", "0.1094"], ["0.11", "109375"]),
        (reasoning_gym_row("prime_factorization", "3 × 3 × 37"), ["37 × 3 × 3"], ["3 × 111", "333", "3 × 37"]),
        (
            reasoning_gym_row("knights_knaves", "Lily is a saint, and Jack is a sinner."),
            ["Jack is a sinner, Lily is a saint"],
            ["Lily is a saint, and Jack is a saint.", "Lily is a saint"],
        ),
        (reasoning_gym_row("syllogism", "Yes"), ["Yes", "Yes."], ["No", "Yes and No"]),
    ],
    ids=lambda value: value["data_source"].split("/")[1] if isinstance(value, dict) else "",
)
def test_equivalent_answers(row, right, wrong):
    assert [answer for answer in right if not score(f"Answer: {answer}", row).correct] == []
    assert [answer for answer in wrong if score(f"Answer: {answer}", row).correct] == []


def test_verdicts_survive_parquet(by_family, tmp_path):
    examples = [example for members in by_family.values() for example in members]
    pd.DataFrame([row_for(example) for example in examples]).to_parquet(tmp_path / "rows.parquet")
    frame = pd.read_parquet(tmp_path / "rows.parquet")
    assert len(frame) == len(examples)
    for (_, row), example in zip(frame.iterrows(), examples, strict=True):
        wrong = wrong_answer(example, by_family[example.extra_info["family"]])
        for text in (example.response, f"Answer: {wrong}", "Answer: garbage", example.answer):
            assert score(text, row) == score(text, example)
        assert json.loads(row["extra_info"]) == example.extra_info


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Answer: 13", "13"),
        ("Answer:13", "13"),
        ("Answer: 13\nThat is all.", "13"),
        ("Answer: 1\nNo, wait.\nAnswer: 2", "2"),
        ("So 5 + 8 = 13.\n\nAnswer:   13  ", "13"),
        ("**Answer:** 13", "13"),
        ("**Answer: 13**", "13"),
        ("Answer: **13**.", "13"),
        ("Answer: 2*x**3 + C", "2*x**3 + C"),
        ("Answer: 3 × 5", "3 × 5"),
        ("Answer: (1.000, -0.857)", "(1.000, -0.857)"),
        ("Answer: Lily is a saint, and Jack is a sinner.", "Lily is a saint, and Jack is a sinner"),
        ("Answer: $\\frac{1}{2}$", "\\frac{1}{2}"),
        ("Answer: \\boxed{13}", "13"),
        ("It is \\boxed{1} or rather \\boxed{\\frac{1}{2}}.", "\\frac{1}{2}"),
        ("\\boxed{1} but Answer: 2", "2"),
        ("Answer: 1.5", "1.5"),
        ("13", None),
        ("", None),
        ("Answer:", None),
        ("Answer: \nanother line", None),
        ("The answer is 13", None),
        ("answer: 13", None),
        ("\\boxed{", None),
        ("\\boxed{1", None),
        ("\\boxed{}", None),
    ],
)
def test_extraction(text, expected):
    assert extract_answer(text) == expected


LATEX_ROW = {"data_source": "some/contest", "answer": r"\frac{1}{2}", "extra_info": "{}"}


@pytest.mark.parametrize(
    ("answer", "correct"),
    [(r"\frac{1}{2}", True), ("1/2", True), ("0.5", True), (r"\boxed{\frac12}", True), ("2", False), ("half", False)],
)
def test_latex_answers(answer, correct):
    assert score(f"Answer: {answer}", LATEX_ROW).correct is correct


def test_latex_answers_outside_the_main_thread():
    """math-verify's time limits use signals, which only the main thread may set."""
    verdicts = []

    def judge():
        verdicts.extend(score(f"Answer: {answer}", LATEX_ROW).correct for answer in ("1/2", "1/3"))

    thread = threading.Thread(target=judge)
    thread.start()
    thread.join(timeout=60)
    assert verdicts == [True, False]


def test_other_sources_compare_text():
    row = {"data_source": "some/quiz", "answer": "New  York", "extra_info": "{}"}
    assert score("Answer: new york", row).correct
    assert not score("Answer: York", row).correct


def test_unusable_rows():
    with pytest.raises(ValueError, match="no column 'answer'"):
        score("Answer: 1", {"data_source": "reasoning_gym/gcd"})
    with pytest.raises(ValueError, match="scorer of data_source 'reasoning_gym/poetry'"):
        score("Answer: 1", reasoning_gym_row("poetry", "1"))
    with pytest.raises(ValueError, match="needs 'family' and 'metadata'"):
        score("Answer: 1", {"data_source": "reasoning_gym/gcd", "answer": "1", "extra_info": "{}"})


def test_majority_baseline_by_hand():
    assert majority_baseline([reasoning_gym_row("gcd", answer) for answer in ("1", "2", "1", "6")]) == 0.5
    # The constant is scored, not counted: 0.5 also answers the row whose gold is written 1/2.
    coins = [reasoning_gym_row("coin_flip", answer) for answer in ("0.5", "0.25", "0.5", "1/2")]
    assert majority_baseline(coins) == 0.75
    # A tie goes to the alphabetically first: 'No' fits half of these rows, as 'Yes' would.
    ties = [reasoning_gym_row("syllogism", answer) for answer in ("Yes", "No")]
    assert majority_baseline(ties) == majority_baseline(reversed(ties)) == 0.5
    with pytest.raises(ValueError, match="at least one row"):
        majority_baseline([])


def test_majority_baseline_is_high_on_yes_no_questions():
    examples = generate_examples("theorem_proving", 90, seed=1)
    yes_no = [e for e in examples if e.extra_info["family"] == "syllogism"]
    assert 0.5 <= majority_baseline(yes_no) <= 0.9
    assert majority_baseline(yes_no) == pd.Series([e.answer for e in yes_no]).value_counts(normalize=True).max()
