r"""Scorers of the public benchmarks: each reads a generated text and judges it against the gold answer.

A data row names its scorer in ``extra_info["scorer"]``, with what else the scorer needs:

    boxed        LaTeX in ``\boxed{...}``, judged by math-verify
    gsm8k        the number after ``####``, else the last number of the text
    choice       a letter, or the text of one option; needs ``choices``
    number       a number, with ``relative_tolerance`` and ``unit`` where given; a list of numbers likewise
    boolean      true or false, yes or no
    text         equality up to case, white space and surrounding quotes
    bare         the whole text up to white space; a label, one of ``choices``, also up to case
    exact_match  the whole text, but for white space around it: data without a scorer

All but the last two also accept a last line ``Answer: <answer>``. ``formatted`` tells whether the form asked for was
there: what a scorer finds by looking further counts as correct, not as formatted.

Lenient scoring, whatever the scorer, asks whether the answer is there when its form does not count. The answer is the
first line of the text that is not empty, or what follows a lead-in such as "The answer is" in it, up to the end of that
sentence, without quotes and emphasis. It is right where the scorer accepts it, also when stated as "Answer: ...", or
where it is the gold answer but for case and white space. What is right by the scorer itself is right leniently too.
"""

from __future__ import annotations

import ast
import functools
import math
import re
import threading
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

from metasft.data.answers import Score, extract_answer, last_boxed, normalised, shape, unwrap

BARE = "bare"
EXACT_MATCH = "exact_match"
MAX_SCORED_CHARS = 300  # whatever is longer is no final answer, and may be slow to judge

_ANSWER_IS = re.compile(r"\banswer is:?\s*(.+?)(?:\.(?=\s|$)|\n|$)", re.IGNORECASE)
_DECIMAL = r"(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d*)?|\.\d+"
_NUMBER = re.compile(rf"[-+]?\$?(?:{_DECIMAL})")


def judge(text: str, gold: str, info: Mapping[str, Any]) -> Score:
    """Score a generated text with the scorer that ``info`` names.

    Args:
        text: what the model wrote.
        gold: the right answer.
        info: ``extra_info`` of the row.

    Raises:
        ValueError: there is no such scorer, or ``info`` lacks what it needs.
    """
    _check_info(info)
    scorer = SCORERS.get(info["scorer"])
    if scorer is None:
        raise ValueError(
            f"extra_info names the scorer {info['scorer']!r}, which does not exist: choose from {', '.join(SCORERS)}"
        )
    return scorer(text, gold, info)


_LEAD_IN = re.compile(
    r"\b(?:answer|output|result|label|response|it|this)(?:\s+(?:is|would be)\b\s*:?|\s*(?::|=|->|→))\s*",
    re.IGNORECASE,
)
_NEXT_SENTENCE = re.compile(r"(?<=[^\s.])[.!?](?:\s.*)?$")


def correct_leniently(text: str, gold: str, correct: Callable[[str], bool]) -> bool:
    """Whether a text holds the right answer, form aside: see the top of this module.

    Args:
        correct: the strict verdict on a text.
    """
    line = next((line.strip() for line in text.split("\n") if line.strip()), "")
    if not line or len(line) > MAX_SCORED_CHARS:
        return correct(text)
    lead_in = _LEAD_IN.search(line)
    bare = unwrap(line[lead_in.end() :] if lead_in else line)
    answers = dict.fromkeys((line, bare, unwrap(_NEXT_SENTENCE.sub("", bare))))
    return (
        any(normalised(answer) == normalised(unwrap(gold)) for answer in answers)
        or correct(text)
        or any(correct(form) for answer in answers for form in (answer, f"Answer: {answer}"))
    )


def _check_info(info: Mapping[str, Any]) -> None:
    """Raise ValueError for an entry of another type than the scorers read; files may be anybody's."""
    choices, tolerance = info.get("choices"), info.get("relative_tolerance", 0.0)
    right = {
        "scorer": isinstance(info["scorer"], str),
        "choices": choices is None or (isinstance(choices, list) and all(isinstance(text, str) for text in choices)),
        "relative_tolerance": type(tolerance) in (int, float) and 0 <= tolerance < math.inf,
        "unit": isinstance(info.get("unit"), str | None),
    }
    if wrong := next((name for name, fits in right.items() if not fits), None):
        raise ValueError(f"extra_info has {wrong}={info[wrong]!r}, which no scorer can use: make the files again")


def _verdict(formatted: str | None, found: str | None, correct: Callable[[str], bool]) -> Score:
    """Judge the answer in the form asked for, else one found otherwise."""
    answer = formatted if formatted is not None else found
    return Score(answer is not None and correct(answer), formatted is not None, answer)


def _stated(text: str) -> str | None:
    """What a sentence "the answer is ..." says, None where there is none."""
    found = _ANSWER_IS.findall(text)
    return (unwrap(found[-1]) or None) if found else None


def _final(text: str) -> str | None:
    """What a text gives as its answer; "Answer: the answer is 5" gives 5."""
    answer = extract_answer(text)
    return answer and (_stated(answer) or answer)


def _bare(answer: str) -> str:
    r"""Without ``\(...\)`` or ``\[...\]`` around it, and ``\text{...}`` within."""
    return _TEXT.sub(r"\1", unwrap(re.sub(r"^\\[(\[]\s*(.*?)\s*\\[)\]]$", r"\1", unwrap(answer))))


def boxed_answer(solution: str) -> str | None:
    r"""The final answer of a worked solution: the last ``\boxed{...}``, also written ``\boxed 5`` or ``\fbox{5}``."""
    solution = solution.replace(r"\fbox{", r"\boxed{")
    return last_boxed(re.sub(r"\\boxed\s+([^\s${}]+?)(?=\.?(?:[\s$]|$))", r"\\boxed{\1}", solution)) or None


# ---- mathematics ----------------------------------------------------------------------------------------------------


def _boxed(text: str, gold: str, info: Mapping[str, Any]) -> Score:
    answer = boxed_answer(text) or _final(text)
    return _verdict(answer, _stated(text), lambda a: equal_mathematics(gold, a))


_SIZES = re.compile(r"\\(?:left|right|displaystyle|limits|!|,|;|:|quad|qquad)(?![a-zA-Z])|(?<!\\)\\ |~")
_DEGREES_AND_SIGNS = re.compile(r"\^\{?\s*\\circ\s*\}?|\\degree|°|\\%|%|\\\$|\$")
_TEXT = re.compile(r"\\(?:text|mbox|textbf|mathrm|textrm|mathbf)\s*\{([^{}]*)\}")
_UNIT_AFTER_VALUE = re.compile(r"(?<=[\d}])\s*\\(?:text|mbox|mathrm|textrm)\s*\{[^{}]*\}(?:\^\{?\d\}?)?$")
_ASSIGNMENT = re.compile(r"^\s*[a-zA-Z]{1,2}\s*(?:=|\\in(?![a-zA-Z]))\s*([^=]+)$")
_PLAIN_NUMBER = re.compile(rf"[-+]?(?:{_DECIMAL})")
_NUMBER_OR_FRACTION = re.compile(rf"[-+]?(?:{_DECIMAL})(?:/\d+)?|[-+]?\\frac\{{[-+]?\d+\}}\{{\d+\}}")


def simplified_latex(answer: str) -> str:
    r"""LaTeX without spacing, sizes, units after a value, ``x =``, and degree, percent and dollar signs."""
    answer = _bare(_UNIT_AFTER_VALUE.sub("", _SIZES.sub("", unwrap(answer))))
    answer = _DEGREES_AND_SIGNS.sub("", answer)
    answer = answer.replace("{,}", ",").replace(r"\dfrac", r"\frac").replace(r"\tfrac", r"\frac")
    answer = re.sub(r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}", answer)
    assignment = _ASSIGNMENT.match(answer)
    return re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", assignment[1] if assignment else answer)  # "1 2" is not 12


def equal_mathematics(gold: str, answer: str) -> bool:
    r"""Whether an answer in LaTeX (or plain text) has the value of the gold one.

    math-verify decides. Its ``verify(gold, target)`` is not symmetric and accepts what it cannot tell apart, so both
    orders have to agree, and what it would accept without being an answer is rejected beforehand: alternatives ("1 or
    2"), for a gold answer that is a plain number anything but a number or a fraction (``2+3`` for 5), a set for a pair
    or for a single value, and an interval with other ends.
    """
    if len(answer) > MAX_SCORED_CHARS:
        return False
    right, given = simplified_latex(gold), simplified_latex(answer)
    if not given:
        return False
    if right.casefold() == given.casefold():
        return True
    if re.search(r"\bor\b|\bnan\b", answer, re.IGNORECASE):
        return False
    if given.startswith(r"\{") and (right.startswith("(") or not ("," in right or right.startswith(r"\{"))):
        return False
    if _PLAIN_NUMBER.fullmatch(right) and not _NUMBER_OR_FRACTION.fullmatch(given):
        return False
    interval = re.fullmatch(r"\[.+[\])]|\(.+\]", right)
    if interval and (right[0], right[-1]) != (given[0], given[-1]):
        return False
    from math_verify import parse, verify

    # Its time limits use signals, which only the main thread may set. They are of wall-clock time, hence generous: on a
    # busy machine a short one would turn right answers into wrong ones.
    limit = 20 if threading.current_thread() is threading.main_thread() else None
    try:
        gold_parsed = _parsed_gold(right)
        target = parse(rf"\boxed{{{given}}}", parsing_timeout=limit)
        return bool(
            gold_parsed
            and target
            and verify(gold_parsed, target, timeout_seconds=limit)
            and verify(target, gold_parsed, timeout_seconds=limit)
        )
    except (ValueError, ArithmeticError, RecursionError):  # of sympy, on expressions that it cannot evaluate
        return False


@functools.lru_cache(maxsize=4096)
def _parsed_gold(answer: str) -> list[Any]:
    from math_verify import parse

    return parse(rf"\boxed{{{answer}}}", parsing_timeout=None)  # our own data: no limit


# ---- numbers --------------------------------------------------------------------------------------------------------


def read_number(text: str) -> Fraction | None:
    r"""A number as written: thousands separators, ``$``, ``%``, fractions, ``1.2e-3``, ``1.2 \times 10^{-3}``.

    Returns:
        Its exact value (12% is 12), or None when the text is not one number, or longer than any answer.
    """
    if len(text) > MAX_SCORED_CHARS:
        return None
    text = simplified_latex(text)
    text = re.sub(r"\\frac\{([^{}]+)\}\{([^{}]+)\}", r"\1/\2", text)
    text = re.sub(r"(?:\\times|\\cdot|×|\*|x)10(?:\^|\*\*)\{?([-+]?\d+)\}?", r"e\1", text)
    text = re.sub(r"^(?:≈|\\approx(?![a-zA-Z]))", "", text.replace("−", "-"))
    match = re.fullmatch(rf"([-+]?(?:{_DECIMAL}))(?:e([-+]?\d{{1,3}}))?(?:/(\d+))?", text, re.IGNORECASE)
    if match is None or (match[3] and not int(match[3])):
        return None
    value = Fraction(match[1].replace(",", "").rstrip(".") or "0") * Fraction(10) ** int(match[2] or 0)
    return value / int(match[3]) if match[3] else value


def last_number(text: str) -> str | None:
    """The last number that occurs in a text."""
    found = [match.rstrip(".,") for match in _NUMBER.findall(text)]
    return found[-1] if found else None


def _same_number(gold: str, answer: str) -> bool:
    right, given = read_number(gold), read_number(answer)
    return right is not None and right == given


def _gsm8k(text: str, gold: str, info: Mapping[str, Any]) -> Score:
    text = text.replace("−", "-")
    # The first one: a model that continues with another question after its answer has answered.
    marked = re.search(r"####\s*([-+]?\$?[\d.,]*\d(?:e[-+]?\d+)?(?:/\d+)?)", text)
    answer = marked[1] if marked else _without_words(_final(text))
    return _verdict(answer, last_number(text), lambda a: _same_number(gold, a))


def _without_words(answer: str | None) -> str | None:
    """The number of "18 dollars" and of "3 * 6 = 18"; "17 or 18" stays what it is, which is no number."""
    if answer is None or read_number(answer) is not None:
        return answer
    found = _NUMBER.findall(answer.rpartition("=")[2])
    return found[0].rstrip(".,") if len(found) == 1 else answer


def _number(text: str, gold: str, info: Mapping[str, Any]) -> Score:
    return _verdict(
        _final(text),
        _stated(text),
        lambda a: close_numbers(gold, a, info.get("relative_tolerance", 0.0), info.get("unit")),
    )


def close_numbers(gold: str, answer: str, relative_tolerance: float = 0.0, unit: str | None = None) -> bool:
    """Whether an answer is the gold number, or list of numbers, within a tolerance relative to the gold.

    Args:
        gold: a number, or a list such as ``[1, 2.5]``, in this order.
        answer: likewise; a list may also be written without brackets or in round ones.
        relative_tolerance: largest difference as a share of the gold number; integers in ``gold`` must be met exactly.
        unit: that the answer may carry; another one is wrong, none is right. None: no unit is accepted.
    """
    if len(answer) > MAX_SCORED_CHARS:
        return False
    rights = _number_list(gold)
    if rights is not None:
        given = _number_list(answer if answer.strip()[:1] in ("[", "(") else f"[{answer}]")
        return (
            given is not None
            and len(given) == len(rights)
            and all(close_numbers(r, g, relative_tolerance) for r, g in zip(rights, given, strict=True))
        )
    answer = _bare(answer).rstrip(" .")  # with its unit, which read_number would not accept
    if unit and answer.endswith(unit):
        answer = answer[: -len(unit)].rstrip("\\ ~$")
    right, given = read_number(gold), read_number(answer)
    if right is None or given is None:
        return False
    tolerance = 0.0 if re.fullmatch(r"[-+]?[\d,]+", gold.strip()) else relative_tolerance
    return abs(given - right) <= abs(right) * Fraction(tolerance) if tolerance else given == right


def _number_list(text: str) -> list[str] | None:
    """The elements of a list of numbers as texts, None when the text is no list."""
    text = text.strip()
    if text[:1] not in ("[", "(") or text[-1:] not in ("]", ")"):
        return None
    try:
        values = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None
    if not isinstance(values, list | tuple):
        return None
    numbers = [type(v) is int or (type(v) is float and math.isfinite(v)) for v in values]
    return [repr(value) for value in values] if numbers and all(numbers) else None


# ---- choices and words ----------------------------------------------------------------------------------------------


def _choice(text: str, gold: str, info: Mapping[str, Any]) -> Score:
    if not info.get("choices"):
        raise ValueError(
            "the scorer 'choice' needs the option texts as 'choices' in extra_info: make the files with "
            "prepare_math_science_data.py"
        )
    answer = _final(text)
    found = _stated(text)
    if found is None and len(text.strip()) <= MAX_SCORED_CHARS:
        found = text.strip().split("\n", 1)[0] or None  # a bare "B", or a bare option
    return _verdict(answer, found, lambda a: chosen_letter(a, info["choices"]) == gold.strip().upper().strip("()"))


_LETTER_AND_TEXT = re.compile(
    r"(?:option|choice|answer)?\s*(?:[(\[]([A-Z])[)\]]|([A-Z])(?=[).:,\s]|$))[).:,]*\s*(?:[-–—]\s+)?(.*)",
    re.IGNORECASE | re.DOTALL,
)


def chosen_letter(answer: str, choices: list[str]) -> str | None:
    """The letter of the option that an answer names, by letter or by its text.

    ``B``, ``(B)``, ``B.``, ``B) four``, ``B - four``, ``option B`` and ``four`` all name the second option where it is
    "four"; a letter together with another option's text names none, nor does a text that two options share.
    """
    letters = [chr(ord("A") + index) for index in range(len(choices))]
    texts = [normalised(_bare(choice)) for choice in choices]
    answer = _bare(answer).strip()
    by_text = [letter for letter, text in zip(letters, texts, strict=True) if text == normalised(answer)]
    if len(by_text) == 1:
        return by_text[0]
    match = _LETTER_AND_TEXT.fullmatch(answer)
    if match is None:
        return None
    letter, rest = (match[1] or match[2]).upper(), normalised(unwrap(re.sub(r"^\((.*)\)$", r"\1", match[3])))
    if letter not in letters or (rest and rest != texts[letters.index(letter)]):
        return None
    return letter


_BOOLEANS = {"true": True, "yes": True, "correct": True, "false": False, "no": False, "incorrect": False}


def read_boolean(text: str) -> bool | None:
    """True or false by any of its words, None for another text."""
    return _BOOLEANS.get(normalised(_bare(text)))


def _boolean(text: str, gold: str, info: Mapping[str, Any]) -> Score:
    right = read_boolean(gold)
    found = _stated(text)
    if found is None and read_boolean(text) is not None:
        found = text.strip()
    return _verdict(_final(text), found, lambda a: right is not None and read_boolean(a) == right)


def _text(text: str, gold: str, info: Mapping[str, Any]) -> Score:
    return _verdict(
        _final(text),
        _stated(text),
        lambda a: normalised(_bare(a)) == normalised(unwrap(gold)),
    )


def _bare_answer(text: str, gold: str, info: Mapping[str, Any]) -> Score:
    answer, right, labels = " ".join(text.split()), " ".join(gold.split()), info.get("choices")
    if labels:
        answer = answer.casefold()
        known = [label.casefold() for label in labels]
        return Score(correct=answer == right.casefold(), formatted=answer in known, extracted=answer or None)
    # Another answer to a task of this kind looks like the gold one: as many numbers, words and signs.
    return Score(correct=answer == right, formatted=shape(answer) == shape(right), extracted=answer or None)


def _exact_match(text: str, gold: str, info: Mapping[str, Any]) -> Score:
    text = text.strip()
    return Score(correct=text == gold.strip(), formatted=True, extracted=text or None)


SCORERS: dict[str, Callable[[str, str, Mapping[str, Any]], Score]] = {
    "boxed": _boxed,
    "gsm8k": _gsm8k,
    "choice": _choice,
    "number": _number,
    "boolean": _boolean,
    "text": _text,
    BARE: _bare_answer,
    EXACT_MATCH: _exact_match,
}
