"""The scorers of the public benchmarks: answers written by hand, and agreement with lm-eval's own metrics."""

import importlib.util
import threading
from pathlib import Path

import pytest
import yaml

from metasft.data import benchmark_scorers
from metasft.data import embedded_tasks as tasks
from metasft.data.benchmark_scorers import judge
from metasft.data.scoring import score, score_leniently
from metasft.data.trivial import majority_baseline

PLANETS = ["Mars", "Venus", "The Moon", "Neither of them"]


def correct(output: str, gold: str, **info) -> bool:
    return judge(output, gold, info).correct


# Scorer -> (gold, further info, outputs that are right, outputs that are wrong).
HAND_MADE = {
    "boxed": (r"\frac{3}{4}", {},
     [r"\boxed{\frac{3}{4}}", r"So it is $\boxed{\frac34}$.", r"\boxed{3/4}", r"\boxed{0.75}", r"\boxed{\dfrac{3}{4}}",
      r"\boxed{x = \frac{3}{4}}", r"\fbox{\frac{3}{4}}", r"\boxed{\(\frac{3}{4}\)}",
      r"First \boxed{1}, no: \boxed{\frac{6}{8}}", "Answer: 3/4", "The answer is 0.75.",
      r"\boxed{\tfrac{3}{4}\text{ cm}}"],
     ["", r"\boxed{}", r"\boxed{\frac{4}{3}}", r"\boxed{0.7}", r"\boxed{-\frac{3}{4}}", r"\boxed{3}", "3/4",
      r"\boxed{\frac{3}{4} or \frac{1}{4}}", r"\boxed{\frac{3}{4}}, or rather \boxed{1}", r"\boxed{75}",
      r"\boxed{\frac{3}{4}", r"\boxed{nan}", r"\boxed{(3,4)}", r"\boxed{1\frac{3}{4}}", r"\boxed{\{\frac{3}{4}\}}",
      r"\boxed{\frac{3}{4}x}", r"\boxed{\pm\frac{3}{4}}"]),
    "boxed, a plain number": ("12", {},
     [r"\boxed{12}", r"\boxed{12.0}", r"\boxed{\$12}", r"\boxed{12\%}", r"\boxed{12^\circ}",
      r"\boxed{12\text{ apples}}", r"\boxed{n=12}", r"\boxed{\frac{24}{2}}", r"It is $\boxed 12$.", r"So \boxed 12.",
      r"\boxed{12\,\mathrm{cm}}", r"\boxed{12~\text{cm}^2}", r"\boxed{\mathbf{12}}", "Answer: the answer is 12"],
     [r"\boxed{7+5}", r"\boxed{3\cdot 4}", r"\boxed{12x}", r"\boxed{1,2}", r"\boxed{\{12\}}", r"\boxed{-12}",
      r"\boxed{1200\%}", r"\boxed{12!}", r"\boxed{11.999}", r"\boxed{12}\boxed{13}", r"\boxed{12 or 13}",
      r"\boxed{12\pm1}", r"\boxed 12.5"]),
    "boxed, a pair": ("(2,5)", {},
     [r"\boxed{(2,5)}", r"\boxed{\left(2,\,5\right)}"],
     [r"\boxed{\{2,5\}}", r"\boxed{[2,5]}", r"\boxed{[2,5)}", r"\boxed{(5,2)}", r"\boxed{(2.5)}", r"\boxed{(2,5,1)}"]),
    "boxed, a matrix": (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", {},
     [r"\boxed{\begin{pmatrix} 1 \\ 2 \end{pmatrix}}", r"\boxed{\begin{pmatrix}1\\2\end{pmatrix}}"],
     [r"\boxed{\begin{pmatrix} 2 \\ 1 \end{pmatrix}}", r"\boxed{\begin{pmatrix} 1 & 2 \end{pmatrix}}",
      r"\boxed{(1,2)}"]),
    "boxed, a union": (r"(-\infty,2]\cup[3,\infty)", {},
     [r"\boxed{[3,\infty)\cup(-\infty,2]}", r"\boxed{(-\infty, 2] \cup [3, \infty)}"],
     [r"\boxed{(-\infty,2)\cup(3,\infty)}", r"\boxed{(-\infty,2]\cup(3,\infty)}", r"\boxed{[2,3]}"]),
    "boxed, alternatives": (r"x=1 \text{ or } x=2", {},
     [r"\boxed{x=1\text{ or }x=2}"],
     [r"\boxed{x=1}", r"\boxed{1}", r"\boxed{x=1 or x=3}"]),
    "boxed, an interval": (r"[2,5)", {},
     [r"\boxed{[2,5)}", r"\boxed{\left[2, 5\right)}", r"\boxed{[2,\,5)}"],
     [r"\boxed{[2,5]}", r"\boxed{(2,5)}", r"\boxed{(2,5]}", r"\boxed{2,5}", r"\boxed{[2,6)}", r"\boxed{2}"]),
    "gsm8k": ("1450", {},
     ["#### 1450", "She has 29 * 50 = 1450.\n#### 1,450", "#### $1450", "#### 1450.00", "So it is 1450", "1450.",
      "Answer: 1,450", "Answer: 1450 dollars", "Answer: 29 * 50 = 1450", "#### 2900/2", "#### 1450/day",
      "#### **1450**", "#### 1450\n\nQuestion: and 3 more?\n#### 1453", r"\boxed{1450}"],
     ["", "####", "#### 145", "#### 14500", "#### -1450", "So it is 1450, or rather 1451", "Answer: 1451", "#### 1.450",
      "1450 and then 12", "no number", "#### 1450/2", "#### 1450e2", "#### 3,1450", "Answer: 3 or 1450",
      "Answer: 3, 1450", "#### −1450", "So −1450"]),
    "gsm8k, below zero": ("-5", {}, ["#### -5", "#### −5", "So −5", "Answer: −5"], ["#### 5", "5", "Answer: 4 - 5"]),
    "choice": ("B", {"choices": PLANETS},
     ["Answer: B", "Answer: (B)", "Answer: B.", "Answer: b", "Answer: Venus", "Answer: B. Venus", "Answer: (B) Venus",
      "Answer: option B", r"\boxed{B}", r"\boxed{\text{Venus}}", "The answer is B.", "the correct answer is (B)", "B",
      "Venus", "Mars is closer.\nAnswer: B", "Answer: **B**", "Answer: [B]", "Answer: B - Venus", "Answer: B, Venus",
      "Answer: B (Venus)", r"Answer: \(B\)", "Answer: the answer is (B)."],
     ["", "Answer:", "Answer: A", "Answer: C", "Answer: E", "Answer: Mars", "Answer: B. Mars", "Answer: A or B",
      "Answer: A, B", "Answer: Both", "Answer: Venus and Mars", "Answer: Beyond", "A", "The answer is C.", "Answer: 2",
      "Answer: B - Mars", "Answer: B (Mars)", "Answer: A-B", "Answer: B/C", "Answer: not B", "Answer: Mars (B)",
      "Answer: A, not B"]),
    "number": ("9.81", {"relative_tolerance": 0.01, "unit": "m/s^2"},
     ["Answer: 9.81", "Answer: 9.8", "Answer: 9.81 m/s^2", r"Answer: 9.81 \text{ m/s^2}", "Answer: 9.90",
      "The answer is 9.8.", r"\boxed{9.81}", "Answer: 981 x 10^{-2}", r"Answer: \approx 9.8", "Answer: ≈ 9.8",
      r"Answer: \(9.81\)", "Answer: the answer is 9.81", r"Answer: 981 \times 10^{-2}", "Answer: 9.81e0",
      "Answer: 981/100", "Answer: +9.81"],
     ["", "Answer: 9.6", "Answer: 10", "Answer: -9.81", "Answer: 9.81 km", "Answer: 9.81 m", "Answer: 981",
      "Answer: 9.81 or 9.8", "Answer: .981", "Answer: −9.81", "Answer: > 9.81", "Answer: nine", "9.81 m/s^2 is it",
      "Answer: inf", "Answer: nan", "Answer: 9.81 9.81"]),
    "number, a fraction": ("0.25", {},
     ["Answer: .25", "Answer: 1/4", r"Answer: \frac{1}{4}"],
     ["Answer: 25", "Answer: 0,25", "Answer: 25%", "Answer: -.25"]),
    "number, an integer": ("1000", {"relative_tolerance": 0.04},
     ["Answer: 1000", "Answer: 1,000", "Answer: 1000.0", "Answer: 1e3", "Answer: $1000$"],
     ["Answer: 1001", "Answer: 990", "Answer: 1000 m", "Answer: 100", "Answer: 10,00"]),
    "number, a list": ("[1, 2.5]", {"relative_tolerance": 0.04},
     ["Answer: [1, 2.5]", "Answer: 1, 2.5", "Answer: (1, 2.5)", "Answer: [1, 2.45]", "Answer: [1.0, 2.5]"],
     ["Answer: [2.5, 1]", "Answer: [1]", "Answer: [1, 2.5, 3]", "Answer: 1", "Answer: [1, 3]", "Answer: [1.1, 2.5]",
      "Answer: [1, 'x']", "Answer: [[1, 2.5]]", "Answer: __import__('os')"]),
    "boolean": ("True", {},
     ["Answer: True", "Answer: true.", "Answer: Yes", "The answer is true.", r"\boxed{\text{True}}", "True", "yes"],
     ["", "Answer: False", "Answer: No", "Answer: True or False", "Answer: 1", "Answer: not True", "Answer: maybe",
      "It may be true that it is", "The answer is false."]),
    "text": ("apple river stone", {},
     ["Answer: apple river stone", "Answer: Apple  River Stone.", 'Answer: "apple river stone"',
      "The answer is apple river stone.", r"\boxed{\text{apple river stone}}"],
     ["", "Answer: apple stone river", "Answer: apple, river, stone", "apple river stone", "Answer: apple river",
      "Answer: apple river stone tower"]),
    "bare": ("2 9 Four", {},
     ["2 9 Four", " 2  9 Four\n"],
     ["", "2 9", "2 9 four", "2 9 Four.", "Answer: 2 9 Four", "2 9 Four\n2 9 Four", "2, 9, Four"]),
    "bare, a label": ("tork", {"choices": ["blip", "tork"]},
     ["tork", "Tork", " tork\n"],
     ["", "blip", "tork tork", "Answer: tork", "tor"]),
    "exact_match": (" Dear Ms Ödön,\n\nthank you.", {},
     ["Dear Ms Ödön,\n\nthank you.", "  Dear Ms Ödön,\n\nthank you.\n"],
     ["", "dear Ms Ödön,\n\nthank you.", "Dear Ms Ödön, thank you.", "Dear Ms Ödön,\n\nthank you",
      "Answer: Dear Ms Ödön,\n\nthank you.", "Dear Ms Odon,\n\nthank you."]),
}  # fmt: skip


@pytest.mark.parametrize("case", HAND_MADE)
def test_outputs_written_by_hand(case):
    gold, info, right, wrong = HAND_MADE[case]
    info = {"scorer": case.split(",")[0], **info}
    assert [output for output in right if not judge(output, gold, info).correct] == []
    assert [output for output in wrong if judge(output, gold, info).correct] == []


@pytest.mark.parametrize("case", HAND_MADE)
def test_what_is_right_is_right_leniently_too(case):
    gold, info, right, _ = HAND_MADE[case]
    row = {"data_source": "x", "answer": gold, "extra_info": {"scorer": case.split(",")[0], **info}}
    assert [output for output in right if not score_leniently(output, row)] == []


LENIENT = {
    # scorer: gold, further info, outputs that are right leniently alone, outputs that are wrong all the same
    "bare": ("4 9 2", {},
     ["4 9 2\n\nInput: 3 1 7", "Answer: 4 9 2", "The output is 4 9 2.", "So the answer is: **4 9 2**",
      "Output: 4 9 2. I sorted them.", "I think that the answer is 4 9 2!"],
     ["", "4 9 2 7", "4 9", "The numbers are sorted.\n4 9 2", "It is 4 9 3.", "Input: 4 9 2"]),
    "bare, a label": ("blip", {"choices": ["blip", "krim"]},
     ["Label: BLIP", "blip\nblip", "It is blip!", "This is **blip**"],
     ["krim or blip", "krim\nblip", "blips", "It is krim, or it is blip", "limit is blip"]),
    "bare, a word": ("cat", {}, ["Cat", "the answer is CAT"], ["the cat", "dog cat", "cat dog"]),
    "exact_match": ("Thank you.", {}, ["thank you", "Response: Thank you.\nBye."], ["No. Thank you."]),
    "boxed": ("12", {}, ["12", "12.\nBecause", "So the result is $12$"], ["13", "12 or 13"]),
    "boolean": ("True", {}, ["It is true.", "Yes. Since 4 is even"], ["It is not true"]),
    "text": ("Lima", {}, ["lima", "Lima. It lies in Peru"], ["Lima, Peru"]),
    "choice": ("B", {"choices": PLANETS}, ["It is Venus.", "Output: (b)"], ["A", "It is Mars"]),
}  # fmt: skip


@pytest.mark.parametrize("case", LENIENT)
def test_lenient_scoring_looks_at_the_first_line_and_past_its_form(case):
    gold, info, right, wrong = LENIENT[case]
    row = {"data_source": "x", "answer": gold, "extra_info": {"scorer": case.split(",")[0], **info}}
    assert [output for output in right if score(output, row).correct] == []
    assert [output for output in right if not score_leniently(output, row)] == []
    assert [output for output in wrong if score_leniently(output, row)] == []


def test_lenient_scoring_of_verified_families():
    (example,) = tasks.generate_examples("number_theory", 1, seed=3)
    assert not score(example.answer, example).correct
    assert score_leniently(f"{example.answer}\nand so on", example)
    assert not score_leniently("", example) and not score_leniently("no idea", example)


def test_every_scorer_has_outputs_written_by_hand():
    assert {case.split(",")[0] for case in HAND_MADE} == set(benchmark_scorers.SCORERS)


@pytest.mark.parametrize(
    ("scorer", "output", "formatted"),
    [
        ("boxed", r"\boxed{1}", True),
        ("boxed", "The answer is 1.", False),
        ("gsm8k", "#### 1", True),
        ("gsm8k", "So 1.", False),
        ("choice", "Answer: A", True),
        ("choice", "A", False),
        ("boolean", "true", False),
        ("number", "Answer: 3", True),
        ("text", "nothing", False),
        ("bare", "Y", True),
        ("bare", "1", False),
        ("exact_match", "nothing", True),
    ],
)
def test_format_is_apart_from_correctness(scorer, output, formatted):
    assert judge(output, "1", {"scorer": scorer, "choices": ["x", "y"]}).formatted is formatted


def test_rows_of_data_files_are_scored_by_the_scorer_they_name():
    row = {"data_source": "mmlu/astronomy", "answer": "B", "extra_info": '{"scorer": "choice", "choices": ["x", "y"]}'}
    assert score("Answer: y", row).correct
    assert majority_baseline([row, {**row, "answer": "A"}]) == 0.5
    free = {"data_source": "mine", "answer": "Thank you.", "extra_info": '{"scorer": "exact_match"}'}
    assert majority_baseline([free, free, {**free, "answer": "No."}]) == pytest.approx(2 / 3)
    bare = {"data_source": "rules/sort_up", "answer": "2 9", "extra_info": '{"scorer": "bare"}'}
    assert majority_baseline([bare, {**bare, "answer": "3 4"}]) == 0.5
    assert [score(text, bare).formatted for text in ("4 4", "4 4 4", "4, 4", "two 9")] == [True, *[False] * 3]


def test_unusable_rows():
    with pytest.raises(ValueError, match=r"scorer 'poetry', which does not exist: choose from boxed"):
        judge("Answer: 1", "1", {"scorer": "poetry"})
    with pytest.raises(ValueError, match="option texts as 'choices'"):
        judge("Answer: 1", "1", {"scorer": "choice"})


def test_two_options_with_one_text_are_told_apart_by_letter_only():
    options = ["four", "four", "five"]
    assert benchmark_scorers.chosen_letter("four", options) is None
    assert benchmark_scorers.chosen_letter("B", options) == "B"
    assert benchmark_scorers.chosen_letter("A", ["B", "A"]) == "B"  # an option whose text looks like another letter


@pytest.mark.parametrize("first_order", [True, False])
def test_mathematics_needs_both_orders_of_verify(monkeypatch, first_order):
    """math-verify's verify(gold, target) is not symmetric: one order alone would accept what the other rejects."""
    import math_verify

    calls = []

    def one_way(gold, target, **_):
        calls.append((str(gold[0]), str(target[0])))
        return (len(calls) == 1) is first_order

    monkeypatch.setattr(math_verify, "verify", one_way)
    assert not benchmark_scorers.equal_mathematics(r"\sqrt{2}", "x+1")
    assert calls[0] == tuple(reversed(calls[1])) if first_order else len(calls) == 1


def test_mathematics_outside_the_main_thread():
    verdicts = []
    thread = threading.Thread(
        target=lambda: verdicts.extend(
            benchmark_scorers.equal_mathematics(r"\frac{1}{2}", a) for a in (r"\frac{2}{4}", r"\frac13")
        )
    )
    thread.start()
    thread.join(timeout=120)
    assert verdicts == [True, False]


# ---- agreement with lm-eval -----------------------------------------------------------------------------------------


def lm_eval_folder() -> Path:
    import lm_eval

    return Path(lm_eval.__file__).parent / "tasks"


def lm_eval_exact_match(config: dict, output: str, reference: str, filter_name: str) -> bool:
    """lm-eval's filters and metric of one task, as its own YAML sets them up."""
    from lm_eval.api.metrics import exact_match_hf_evaluate
    from lm_eval.filters.extraction import RegexFilter, WhitespaceFilter

    responses = [[output]]
    filters = {entry["name"]: entry["filter"] for entry in config.get("filter_list", [])}
    for step in filters.get(filter_name, []):
        arguments = {key: value for key, value in step.items() if key != "function"}
        if step["function"] == "regex":
            responses = list(RegexFilter(**arguments).apply(responses, [{}]))
        elif step["function"] == "remove_whitespace":
            responses = list(WhitespaceFilter().apply(responses, [{}]))
        else:
            assert step["function"] == "take_first"
    metric = dict(config["metric_list"][0])
    settings = {k: v for k, v in metric.items() if k not in ("metric", "aggregation", "higher_is_better")}
    return bool(exact_match_hf_evaluate([responses[0][0]], [reference], **settings)["exact_match"] == 1)


def hendrycks_math_utils():
    spec = importlib.util.spec_from_file_location("lm_eval_math", lm_eval_folder() / "hendrycks_math" / "utils.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# Gold -> answers: both call them right, both call them wrong, and right by value where lm-eval compares writing.
BOXED_ANSWERS = {
    r"\frac{1}{2}": ([r"\frac{1}{2}", r"\frac12", r"\dfrac{1}{2}", r"\tfrac{1}{2}", "1/2", "0.5"],
     ["2", r"\frac{1}{3}", "0.2", "-1/2"],
     [r"\frac{2}{4}", "0.50"]),
    "5": (["5", "x=5", r"5^\circ", r"5\%", r"\$5", "5 "], ["-5", "6", "55", "0.5", "5x"], ["5.0"]),
    "(2,3)": (["(2,3)", "(2, 3)", r"\left(2,3\right)"], ["(3,2)", "(2,4)", "2"], []),
    "[2,5)": (["[2,5)", r"\left[2,5\right)"], ["[2,5]", "(2,5)", "[2,6)"], []),
    r"\sqrt{2}": ([r"\sqrt{2}", r"\sqrt2"], [r"\sqrt{3}", "2", "1.5"], []),
    r"3\pi": ([r"3\pi", r"3 \pi"], [r"\pi", r"6\pi", "3"], [r"\pi\cdot 3"]),
    "x^2+1": (["x^2+1", "x^2 + 1"], ["x^2-1", "x^2", "x+1"], ["1+x^2"]),
    r"\text{even}": ([r"\text{even}"], [r"\text{odd}", "5"], ["even"]),
    "1000": (["1000"], ["100", "10000", "1001"], ["1,000"]),
    r"12\text{ cm}": ([r"12\text{ cm}", "12"], ["13", "1.2"], []),
}  # fmt: skip


def test_boxed_agrees_with_lm_eval():
    lm_eval = hendrycks_math_utils()
    agreed = 0
    for gold, (right, wrong, by_value) in BOXED_ANSWERS.items():
        for answer in (*right, *wrong, *by_value):
            output = rf"We compute, and so it is $\boxed{{{answer}}}$."
            theirs = lm_eval.is_equiv(lm_eval.remove_boxed(lm_eval.last_boxed_only_string(output)), gold)
            ours = correct(output, gold, scorer="boxed")
            assert ours is (answer not in wrong), (gold, answer)
            assert theirs is (answer in right), (gold, answer)
            agreed += ours == theirs
    assert agreed >= 50


def test_exact_match_agrees_with_lm_eval():
    """Its metric without options, of outputs without white space around them as generation tasks give it."""
    config = {"filter_list": [{"name": "x", "filter": [{"function": "remove_whitespace"}]}], "metric_list": [{}]}
    texts = ["Thank you.", "thank you.", "Thank you", "Thank  you.", "Dank u.", "感谢", "1", "1.0", "a\nb", "a b"]
    for gold in texts:
        for output in (*texts, f"  {gold}"):
            theirs = lm_eval_exact_match(config, output, gold, "x")
            assert correct(output, gold, scorer="exact_match") is theirs, (gold, output)


def test_gsm8k_agrees_with_lm_eval():
    """With the mark as lm-eval's strict-match, without it as its flexible-extract."""
    config = yaml.safe_load((lm_eval_folder() / "gsm8k" / "gsm8k.yaml").read_text())
    outputs = 0
    for gold in ("18", "1450", "3", "120", "7"):
        values = [gold, f"{int(gold):,}", str(int(gold) + 1), f"-{gold}", f"{gold}0"]
        for value in values:
            for output in (
                f"So {value} in all.\n#### {value}",
                f"#### {value}\n\nQuestion: 1 + 1?\n#### 2",
                f"It is {value}",
            ):
                name = "strict-match" if "####" in output else "flexible-extract"
                theirs = lm_eval_exact_match(config, output, f"Reasoning.\n#### {gold}", name)
                assert correct(output, gold, scorer="gsm8k") is theirs, (gold, output)
                outputs += 1
    assert outputs >= 50


def test_choice_agrees_with_lm_eval():
    """lm-eval's prompts end with "Answer:", and what follows is compared with the letter."""
    config = yaml.safe_load((lm_eval_folder() / "mmlu" / "generative" / "_default_template_yaml").read_text())
    outputs = 0
    for gold in "ABCD":
        for answer in ("A", "B", "C", "D", "a", "d", " A", "B.", "(C)", "A)", "E", "None", "A and B", "?", "(d)"):
            theirs = lm_eval_exact_match(config, answer, gold, "get_response")
            assert correct(f"Answer: {answer}", gold, scorer="choice", choices=PLANETS) is theirs, (gold, answer)
            outputs += 1
    assert outputs >= 50


BBH_OUTPUTS = {
    "boolean": (("True", "False"), ("True", "False", "true", "false", "TRUE", "True.", "False.", '"True"', "", "None",
     "True False", "not True", "Truee", " False", "False and True", "F", "T", "falsehood", "true!", "maybe",
     "True or False", "0", "1", "untrue", "fals"), {}),
    "number": (("8", "-23"), ("8", "-23", "9", "-8", "23", "8.", "-23.", "", "eight", "80", " 8", "8 8", "-", "88",
     "-2", "3", "8 or 9", "x", "-230", "0", "08x", "+", "18", "28", "7"), {}),
    "text": (("] } )", "apple river stone"), ("] } )", "]})", "] ) }", "] }", "apple river stone", "Apple River Stone",
     "apple stone river", "apple river", "river", "", "apple river stone.", '"apple river stone"', "] } ).",
     "apple-river-stone", "stone", "( ] } )", "] } ) ]", "apple river stones", "pear river stone", "} ] )", "valid",
     "no", "apple river stone x", "a", ")"), {}),
    "choice": (("(A)", "(C)"), ("(A)", "(B)", "(C)", "(D)", "(a)", "(c)", "(A).", "", "(A) (C)", "(E)", "none", "(AB)",
     " (C)", "(A) or (B)", "()", "(1)", "A C", "(Z)", "((", "( )", "x", "yes", "(AC)", "(C).", "(c)."), {"choices":
     PLANETS}),
}  # fmt: skip


@pytest.mark.parametrize("scorer", BBH_OUTPUTS)
def test_bbh_agrees_with_lm_eval(scorer):
    config = yaml.safe_load((lm_eval_folder() / "bbh" / "zeroshot" / "_zeroshot_template_yaml").read_text())
    golds, answers, info = BBH_OUTPUTS[scorer]
    outputs = 0
    for gold in golds:
        for answer in answers:
            theirs = lm_eval_exact_match(config, answer.strip(), gold, "")
            assert correct(f"Answer: {answer}", gold, scorer=scorer, **info) is theirs, (gold, answer)
            outputs += 1
    assert outputs >= 50


@pytest.mark.parametrize(
    ("scorer", "gold", "answer", "info"),
    [
        ("boolean", "True", "Yes", {}),
        ("choice", "(A)", "A", {"choices": PLANETS}),
        ("choice", "(A)", "Mars", {"choices": PLANETS}),
        ("number", "8", "8.0", {}),
        ("text", "valid", " VALID ", {}),
    ],
)
def test_what_is_right_here_and_wrong_for_lm_eval(scorer, gold, answer, info):
    """Known and wanted: the same answer in other writing."""
    config = yaml.safe_load((lm_eval_folder() / "bbh" / "zeroshot" / "_zeroshot_template_yaml").read_text())
    assert correct(f"Answer: {answer}", gold, scorer=scorer, **info)
    assert not lm_eval_exact_match(config, answer, gold, "")
