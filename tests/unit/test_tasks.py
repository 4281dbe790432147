"""Examples and scorers: distinct, short, reproducible questions whose gold answers, and only right answers, score."""

import itertools
import json
import re
import subprocess
import sys
import time

import pandas as pd
import pytest

from metasft.data import embedded_tasks as tasks
from metasft.data import prepare
from metasft.data.answers import Score, extract_answer
from metasft.data.embedded_tasks import generate_examples
from metasft.data.examples import Example, messages_for, row_for
from metasft.data.scoring import score
from metasft.data.trivial import majority_baseline

FAMILIES = [family for families in tasks.all_tasks().values() for family in families]


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
    code = "import sys, metasft.data.embedded_tasks\n"
    code += "print([m for m in ('torch', 'sympy', 'reasoning_gym') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("task", tasks.all_tasks())
def test_examples_are_distinct_short_and_mixed(task):
    examples = generate_examples(task, 60, seed=3)
    families = tasks.all_tasks()[task]
    assert len({e.example_id for e in examples}) == 60
    # So that ids differ between tasks too.
    assert len(set(FAMILIES)) == len(FAMILIES)
    assert all(e.example_id.startswith(f"{e.extra_info['family']}-") for e in examples)
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
        assert messages_for(e) == [
            {"role": "user", "content": e.prompt},
            {"role": "assistant", "content": e.response},
        ]
        assert set(row_for(e)) >= {"messages", "extra_info", "answer", "prompt", "response"}


def test_format_instructions_of_the_families_are_gone(by_family):
    conflicting = ("your final answer", "as your answer", "please follow", "Format your answer", "Round all decimal")
    for examples in by_family.values():
        for e in examples:
            assert not any(text in e.prompt for text in conflicting), e.prompt


def test_asking_for_more_examples_only_appends():
    assert generate_examples("number_theory", 90, seed=2)[:40] == generate_examples("number_theory", 40, seed=2)


def test_neighbouring_seeds_give_other_examples():
    """reasoning-gym's own seeds overlap: item i+1 of seed 1 is item i of seed 2."""
    one, two = (generate_examples("word_problems", 60, seed=seed) for seed in (1, 2))
    shared = {e.prompt for e in one} & {e.prompt for e in two}
    assert len(shared) < 10


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
        assert score(example.response, example) == Score(True, True, extract_answer(example.response))
        assert score(f"Let me think.\n{example.response}\n", example).correct
        assert score(f"**{example.response}**", example).correct
        wrong = wrong_answer(example, examples)
        assert score(f"Answer: {wrong}", example).correct is False, (example.answer, wrong)
        assert not answered(example, f"{example.answer} or something else")
        for garbage in ("garbage", "nan", "(nan, nan)", "inf", "×", ",", "()", "1/0", "\\frac{}{}", "1e999999999", "°"):
            assert not answered(example, garbage), garbage
        assert score("", example) == Score(False, False, None)
        assert score("Answer:", example) == Score(False, False, None)
        assert score(example.answer, example).formatted is False  # right, but not in the format asked for


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


@pytest.mark.parametrize("family", ["polynomial_multiplication", "simple_integration"])
def test_formulas_of_a_data_file_are_never_run(family, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = "__import__('pathlib').Path('scored').touch()"
    assert not score("Answer: x", reasoning_gym_row(family, code, integrand=code, variable="x")).correct
    assert not list(tmp_path.iterdir())


def test_an_unevaluated_integral_is_no_answer():
    """Its derivative is the integrand, so the family's own verifier accepts it."""
    row = reasoning_gym_row("simple_integration", "x**2 + C", integrand="2*x", variable="x")
    assert score("Answer: x**2 + C", row).correct
    assert score("Answer: x**2 + 7", row).correct  # any constant will do
    assert not score("Answer: Integral(2*x, x)", row).correct


# Outputs written by hand. Per scorer: a row, answers that are right, answers that are wrong (units, LaTeX, near misses,
# malformed). Strict where the question says what the answer has to look like.
HAND_MADE = {
    "simple_equations": (reasoning_gym_row("simple_equations", "7"),
     ["7"],
     ["-7", "8", "77", "7 apples", "7 cm", r"7\text{ cm}", r"\frac{14}{2}", "14/2", "x = 8", "seven", "7,0"]),
    "polynomial_equations": (reasoning_gym_row("polynomial_equations", "-2.4495, 2.4495"),
     ["-2.4495, 2.4495", "2.4495, -2.4495", "-2.4495,2.4495", "-2.45, 2.45"],
     ["2.4495", "-2.4, 2.4", "2.4495, 2.4495", "-2.4495, 2.4495, 1", "±2.4495", r"\pm\sqrt{6}", "2.4495 m, -2.4495 m",
      "-2.4495; 2.4495", "sqrt(6)", ","]),
    "polynomial_multiplication": (reasoning_gym_row("polynomial_multiplication", "15*x**4 - 6*x**3 + 30*x**2 - 12*x"),
     ["15*x**4 - 6*x**3 + 30*x**2 - 12*x", "-12*x + 30*x**2 - 6*x**3 + 15*x**4", "15*x**4-6*x**3+30*x**2-12*x"],
     ["(3*x**2 + 6)*(5*x**2 - 2*x)", "3*x*(5*x**3 - 2*x**2 + 10*x - 4)", "15*x**4 - 6*x**3 + 30*x**2", "15*x**4",
      "15*x**4 + 6*x**3 + 30*x**2 - 12*x", "15x^4 - 6x^3 + 30x^2 - 12x", r"15x^{4} - 6x^{3}", "15*y**4 - 6*y**3",
      "15*x**4 - 6*x**3 + 30*x**2 - 12*x cm", "15*x**4 -", "15 x 4"]),
    "complex_arithmetic": (reasoning_gym_row("complex_arithmetic", "-36.0 + 72.0i", result=[-36, 72]),
     ["-36.0 + 72.0i", "-36 + 72i", "-36+72i", "-36 + 72j"],
     ["-36 - 72i", "36 + 72i", "-36", "72i", "-36.5 + 72i", "(-36, 72)", "-36 + 72i apples", "72 - 36i", "-36 + 7.2i",
      r"-36 + 72\mathrm{i}", "-36 + i"]),
    "simple_geometry": (reasoning_gym_row("simple_geometry", "21"),
     ["21"],
     ["21°", "21 degrees", r"21^\circ", "159", "12", "-21", "20.999", "21 22", "0.367 rad", "twenty-one", "21°C"]),
    "advanced_geometry, angle": (reasoning_gym_row("advanced_geometry", "56.31°", task_type="angle_measure"),
     ["56.31°", "56.31", "56.310°", "56.310"],
     ["56.32°", "56.3°", "-56.31°", "56.31 degrees", r"56.31^\circ", "0.983 rad", "56,31", "56.31° or 123.69°", "°",
      "56.31°°", "5631"]),
    "advanced_geometry, point": (reasoning_gym_row("advanced_geometry", "(1.000, -0.857)", task_type="orthocenter",
     ortho=["1", "-6/7"]),
     ["(1.000, -0.857)", "(1, -0.857)", "(1.0, -0.8571)", "1.000, -0.857"],
     ["(1.000, -0.857, 5)", "1.000, -0.857, nonsense", "((1.000, -0.857", "(-0.857, 1.000)", "(1.000, 0.857)",
      "(1.000; -0.857)", "x = 1.000, y = -0.857", "(1.000, -0.857) cm", "(1.000)", "(1.001, -0.857)",
      r"\left(1, -\frac{6}{7}\right)"]),
    "advanced_geometry, radius": (reasoning_gym_row("advanced_geometry", "0.468", task_type="incircle_radius",
     incircle_radius_exact="0.468213"),
     ["0.468"],
     ["0.469", "0.47", "0.5", "0.468 units", "0.468 cm", "-0.468", "4.68", "0,468", r"\frac{468}{1000}", "r = 0.5",
      "0.468°°"]),
    "gcd": (reasoning_gym_row("gcd", "6"),
     ["6", "6.", "$6$", "`6`", '"6"'],
     ["6 apples", "-6", "60", "3", "12", "6 cm", "six", r"\gcd(54, 42)", "GCD = 6", "06", "6, 6", "6/1"]),
    "lcm": (reasoning_gym_row("lcm", "40"),
     ["40"],
     ["-40", "80", "2", "4", "40 units", "forty", r"\text{lcm} = 40", "LCM: 40", "40/1", "2 × 40", "4 0"]),
    "prime_factorization": (reasoning_gym_row("prime_factorization", "2 × 2 × 227"),
     ["2 × 2 × 227", "2×2×227", "227 × 2 × 2"],
     ["2 × 227", "4 × 227", "908", "2 × 2 × 227 × 1", "× 2 × 2 × 227", "2 × 2 × 227 ×", "2^2 × 227", "2, 2, 227",
      r"2 \times 2 \times 227", "2 × 2 × 227 m", "2 × 2 × 228"]),
    "fraction_simplification": (reasoning_gym_row("fraction_simplification", "15/17", numerator=135, denominator=153,
     simplified_numerator=15, simplified_denominator=17),
     ["15/17", "15 / 17", r"\frac{15}{17}", r"\dfrac{15}{17}"],
     ["135/153", "45/51", "-15/17", "17/15", "0.882", "15/17 apples", "15/17/1", r"\frac{15}{17} + 1",
      r"2\frac{15}{17}", r"\frac{15}{17} cm", "15:17", "15"]),
    "base_conversion": (reasoning_gym_row("base_conversion", "10"),
     ["10"],
     ["8", "01", "1010", "10_8", "(10)_8", "0o10", r"10_{8}", "10 (base 8)", "ten", "10.0", "1 0"]),
    "count_primes": (reasoning_gym_row("count_primes", "2"),
     ["2"],
     ["3", "1", "59, 61", "59 and 61", "2 primes", "two", "-2", "22", "0", r"\pi(65) - \pi(57)", "2.5"]),
    "coin_flip": (reasoning_gym_row("coin_flip", "0.9375"),
     ["0.9375", "15/16", "0.93752", ".9375", "0.93750"],
     ["0.938", "0.0625", "1/16", "93.75%", "93.75", "15 in 16", "9375", "-0.9375", r"\frac{1}{16}", "15/0", "16/15"]),
    "coin_flip, rare event": (reasoning_gym_row("coin_flip", "3.0517578125e-05"),
     ["3.0517578125e-05", "1/32768", "0.0000305", "3.05e-5"],
     ["0", "0.0", "0.0001", "-0.00005", "1/30000", "0.003%", "0.00003", "1/16384", "2/32768", "0.305", "1e-5"]),
    "dice": (reasoning_gym_row("dice", "3/4"),
     ["3/4"],
     ["6/8", "1/4", "4/3", "0.75", "75%", "3:4", "3 to 4", r"\frac{1}{4}", "-3/4", "3/4 odds", "3/44"]),
    "gsm_symbolic": (reasoning_gym_row("gsm_symbolic", "336800"),
     ["336800", "336800.0", "$336800", "336,800", "$336,800", "336,800.00"],
     ["-336800", "33680", "336", "336800.5", "336800 dollars", r"336800\text{ dollars}", "336.800", "33,6800", "336,80",
      "336800 + 5", "8 or 336800"]),
    "leg_counting": (reasoning_gym_row("leg_counting", "80"),
     ["80"],
     ["8", "800", "80 legs", "eighty", "-80", "72", "72 + 8", r"80\text{ legs}", "8 0", "80 or 82", "9 spiders"]),
    "chain_sum": (reasoning_gym_row("chain_sum", "1010"),
     ["1010", "1,010", "1010.0", "+1010", "1010.00"],
     ["-1010", "101", "10100", "10,10", "101,0", "1,0,1,0", "1010.5", "1010 apples", "1.010", r"1010\text{ m}",
      "1010 + 0"]),
    "simple_integration": (reasoning_gym_row("simple_integration", "-3*x**3 + C", integrand="-9*x**2", variable="x"),
     ["-3*x**3 + C", "-3*x**3", "C - 3*x**3", "-9*x**3/3 + C", "-3*x**3 + 7"],
     ["3*x**3 + C", "-9*x**2", "-3*x**2 + C", "-3*x**3 + C*x", "-18*x", "-3x^3 + C", r"-3x^{3} + C", "C", "-3*t**3 + C",
      "-3*x**3 + C cm", "-3*x**3 +"]),
    "intermediate_integration": (reasoning_gym_row("intermediate_integration", "3*x**3 - 15*x**2 + 25*x + C",
     integrand="(3*x - 5)**2", variable="x"),
     ["3*x**3 - 15*x**2 + 25*x + C", "(3*x - 5)**3/9 + C", "(3*x - 5)**3/9"],
     ["(3*x - 5)**3/3 + C", "(3*x - 5)**2", "3*x**3 + C", "3*x**3 - 15*x**2 + 25 + C", "(3x-5)^3/9 + C",
      r"\frac{(3x-5)^3}{9} + C", "6*(3*x - 5)", "C", "3*x**3 - 15*x**2 + 25*x + C m", "Integral((3*x - 5)**2, x)",
      "(3*x"]),
    "knights_knaves": (reasoning_gym_row("knights_knaves", "Daniel is a sinner, and Aiden is a saint."),
     ["Daniel is a sinner, and Aiden is a saint.", "Aiden is a saint and Daniel is a sinner",
      "Daniel is a sinner, Aiden is a saint", "daniel is a sinner, and aiden is a saint"],
     ["Daniel is a saint, and Aiden is a sinner.", "Daniel is a sinner", "Daniel is a sinner or Aiden is a saint",
      "It is not true that Daniel is a sinner, and Aiden is a saint",
      "Daniel is not a sinner, and Aiden is not a saint", "Daniel is a sinner, and Aiden is a saint or a sinner",
      "sinner, saint", "Daniel: sinner, Aiden: saint", "Yes",
      "Daniel is a sinner, and Aiden is a saint, and Aiden is a sinner", "If Daniel is a sinner, Aiden is a saint",
      "Daniel is a sinner, Aiden is a saint, and Bob is a saint"]),
    "syllogism": (reasoning_gym_row("syllogism", "Yes"),
     ["Yes", "Yes."],
     ["No", "Yes and No", "Yes/No", "Yes, it does", "True", "Y", "Maybe", r"\text{No}", "1", "Yes No", "Not Yes"]),
    "circuit_logic": (reasoning_gym_row("circuit_logic", "1"),
     ["1"],
     ["0", "10", "01", "True", "A", "OUT = 0", "1 V", "high", "-1", r"\neg 0", "0 or 1"]),
    "monomial_derivative": (reasoning_gym_row("monomial_derivative", "12*x**3"),
     ["12*x**3", "12 * x ** 3", "12*X**3"],
     ["12*x", "12x^3", "12*x**4", "3*4*x**3", "-12*x**3", "12*x**3 + C", "12", "x**3", "12*x*3", "2*x**3", r"12x^{3}"]),
    "slope_at_point": (reasoning_gym_row("slope_at_point", "24"),
     ["24", "24."],
     ["-24", "2 4", "23", "24*x", "24.0", "x = 24", "240", "24/1", "twenty-four", "2", "4", "24 m"]),
    "slope_sign": (reasoning_gym_row("slope_sign", "increasing"),
     ["increasing", "Increasing", "INCREASING", "increasing."],
     ["decreasing", "neither", "increasing or decreasing", "not increasing", "up", "+", "positive", "increase",
      "it is"]),
    "constant_integral": (reasoning_gym_row("constant_integral", "18"),
     ["18", "18."],
     ["-18", "18 + C", "18x", "2*9", "18.5", "81", "1", "180", "eighteen", "18 cm", "9"]),
    "number_statements": (reasoning_gym_row("number_statements", "True"),
     ["True", "true", "TRUE"],
     ["False", "Yes", "1", "T", "true and false", "not True", "True or False", "correct", "both", "neither", "No"]),
    "if_then": (reasoning_gym_row("if_then", "Ben does not dance"),
     ["Ben does not dance", "ben does not dance", "Ben does not dance."],
     ["Ben dances", "Ben", "Anna does not dance", "Ben does not sing", "Ben does not dance or sing", "Yes", "nothing",
      "not dance", "Ben doesn't dance", "Anna sings", "Ben does dance"]),
    "counterexample": (reasoning_gym_row("counterexample", "25"),
     ["25"],
     ["52", "25, 30", "30", "-25", "25 and 30", "None", "the third", "2", "5", "250", "twenty-five"]),
    "number_sequence": (reasoning_gym_row("number_sequence", "-38"),
     ["-38"],
     ["38", "-38, -46", "-37", "- 38", "-380", "-3", "8", "-38.5", "x = -38", "?", "minus 38"]),
    "number_sorting": (reasoning_gym_row("number_sorting", "['2.0', '7.0', '44.0']", direction="ascending"),
     ["['2.0', '7.0', '44.0']", "['2', '7', '44']", "[2.0, 7.0, 44.0]", '["2.0", "7.0", "44.0"]'],
     ["['44.0', '7.0', '2.0']", "2, 7, 44", "['2.0', '7.0']", "['2.5', '7.0', '44.0']",
      "['2.0', '7.0', '44.0', '50.0']", "[]", "[2.0, 7.0, 44.0", "['2.0' '7.0' '44.0']",
      "sorted", "['a', 'b', 'c']", "['7.0', '2.0', '44.0']"]),
    "number_filtering": (reasoning_gym_row("number_filtering", "['16', '20']"),
     ["['16', '20']"],
     ["['20', '16']", "['16']", "[]", "16, 20", "['16', '20', '73']", "['73']", "['16' '20']", "16", "[16; 20]", "20",
      "['1', '20']"]),
    "calendar_arithmetic": (reasoning_gym_row("calendar_arithmetic", "Thursday",
     task="weekday_of_date_from_first_date"),
     ["Thursday", " Thursday "],
     ["Friday", "thursday", "Thu", "4", "Thursday or Friday", "January", "THURSDAY", "on Thursday", "Thursdays",
      "day 4", "Thurs"]),
    "time_intervals": (reasoning_gym_row("time_intervals", "01:07", task_type="time"),
     ["01:07"],
     ["01:08", "1 hour", "67", "01:06", "10:07", "01:07:30", "-01:07", "00:67", "1:70", "01-07", "7 days"]),
    "LaTeX": ({"data_source": "some/contest", "answer": r"\frac{1}{2}", "extra_info": "{}"},
     [r"\frac{1}{2}", "1/2", "0.5", r"\frac12", r"\dfrac{1}{2}", r"\frac{2}{4}", r"\tfrac{1}{2}"],
     ["2", "half", r"\frac{2}{1}", r"\frac{1}{3}", "-1/2", "0.05", r"\frac{1}{2} or \frac{1}{3}", r"\sqrt{2}", "50",
      "1", "(1, 2)"]),
    "text": ({"data_source": "some/quiz", "answer": "New  York", "extra_info": "{}"},
     ["New York", "new york", "NEW YORK", "New   York", "New York."],
     ["York", "New", "New York City", "NewYork", "Boston", "New York or Boston", "New York, USA", r"\text{York}",
      "N.Y.", "New-York", "York New"]),
}  # fmt: skip

# The text around an answer, for every scorer: {g} is a right answer, {w} a wrong one.
RIGHT_FORMS = (
    "Answer: {g}", "Answer:{g}", "Let me think.\nAnswer: {g}", "Answer: {w}\nNo, wait.\nAnswer: {g}", "**Answer:** {g}",
    "**Answer: {g}**", "Answer: `{g}`", "Answer: ${g}$", "Answer: {g}\nThat is all.", r"It is \boxed{{{g}}}",
    r"Answer: \boxed{{{g}}}",
)  # fmt: skip
WRONG_FORMS = (
    "", " ", "\n\n", "Answer:", "Answer: \n{g}", "answer: {g}", "The answer is {g}", "{g}", "Answer: {g}\nAnswer: {w}",
    "Answer: I do not know", "Answer: ?", "Answer: -", "Answer: {g} or {w}", r"\boxed{{", "Answer: <answer>",
    "Answer: nan",
    "Answer: inf", r"Answer: \frac{{}}{{}}", "Answer: {g} {g}", "Reply: {g}",
)  # fmt: skip


@pytest.mark.parametrize("scorer", HAND_MADE)
def test_outputs_written_by_hand(scorer):
    row, right, wrong = HAND_MADE[scorer]
    around = {"g": right[0], "w": wrong[0]}
    correct = {form.format(**around) for form in RIGHT_FORMS} | {f"Answer: {answer}" for answer in right}
    incorrect = {form.format(**around) for form in WRONG_FORMS} | {f"Answer: {answer}" for answer in wrong}
    assert len(correct | incorrect) >= 40 and not correct & incorrect
    assert [text for text in sorted(correct) if not score(text, row).correct] == []
    assert [text for text in sorted(incorrect) if score(text, row).correct] == []


def test_every_scorer_has_outputs_written_by_hand():
    assert {name.split(",")[0] for name in HAND_MADE} == {*FAMILIES, "LaTeX", "text"}


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


EXTRACTED = {
    "13": ["Answer: 13", "Answer:13", "Answer: 13\nThat is all.", "**Answer:** 13", "**Answer: 13**", "Answer: **13**.",
           "So 5 + 8 = 13.\n\nAnswer:   13  ", "Answer: \\boxed{13}"],
    "2": ["Answer: 1\nNo, wait.\nAnswer: 2", "\\boxed{1} but Answer: 2"],
    "\\frac{1}{2}": ["Answer: $\\frac{1}{2}$", "It is \\boxed{1} or rather \\boxed{\\frac{1}{2}}."],
    "2*x**3 + C": ["Answer: 2*x**3 + C"],
    "3 × 5": ["Answer: 3 × 5"],
    "(1.000, -0.857)": ["Answer: (1.000, -0.857)"],
    "1.5": ["Answer: 1.5"],
    "Lily is a saint, and Jack is a sinner": ["Answer: Lily is a saint, and Jack is a sinner."],
    None: ["13", "", "Answer:", "Answer: \nanother line", "The answer is 13", "answer: 13", "\\boxed{", "\\boxed{1",
           "\\boxed{}"],
}  # fmt: skip


def test_extraction():
    assert {text: extract_answer(text) for texts in EXTRACTED.values() for text in texts} == {
        text: answer for answer, texts in EXTRACTED.items() for text in texts
    }


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
    assert len(yes_no) == 15 and majority_baseline(yes_no) == 8 / 15


@pytest.mark.parametrize("task", [*tasks.VALID_TASKS, *tasks.TEST_TASKS])
def test_no_constant_answers_most_questions_of_a_family(task):
    """Of the default test set: labels are in turns, but a hash decides what is in it."""
    test = prepare.fixed_order(generate_examples(task, 300, seed=1))[:200]
    for family in tasks.all_tasks()[task]:
        of_family = [e for e in test if e.extra_info["family"] == family]
        assert len(of_family) > 20 and majority_baseline(of_family) <= 0.6, family


def test_validation_families_are_in_no_other_task():
    assert len(FAMILIES) == len(set(FAMILIES))
    assert {tasks.role(task) for task in tasks.VALID_TASKS} == {"valid"}
