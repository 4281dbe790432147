"""Rules on lists of numbers and on the digits of numbers."""

from __future__ import annotations

from collections.abc import Iterable

from metasft.data.rules.inputs import DIGIT_WORDS, fill, listed, only, some
from metasft.data.rules.rule import rule

TWO_DIGITS = range(10, 100)
DIGITS = range(10)


def ints(text: str) -> list[int]:
    return [int(part) for part in text.split()]


def row(values: Iterable[object]) -> str:
    return " ".join(map(str, values))


# ---- order ----------------------------------------------------------------------------------------------------------


@rule("reverse", some(3, TWO_DIGITS))
def reverse_numbers(text: str) -> str:
    """The three numbers in reverse order."""
    return row(reversed(text.split()))


@rule("reverse", fill("{}", range(10_000, 100_000)))
def reverse_digits(text: str) -> str:
    """The digits of the number in reverse order."""
    return text[::-1]


@rule("reorder", some(4, TWO_DIGITS))
def rotate_left(text: str) -> str:
    """The first of four numbers moves to the end."""
    first, *rest = text.split()
    return row([*rest, first])


@rule("reorder", some(4, TWO_DIGITS))
def swap_ends(text: str) -> str:
    """The first and the last of four numbers change places."""
    first, *middle, last = text.split()
    return row([last, *middle, first])


@rule("reorder", some(4, TWO_DIGITS))
def swap_neighbours(text: str) -> str:
    """The first two of four numbers change places, and so do the last two."""
    a, b, c, d = text.split()
    return row([b, a, d, c])


@rule("reorder", some(4, TWO_DIGITS))
def rotate_right(text: str) -> str:
    """The last of four numbers moves to the front."""
    *others, last = text.split()
    return row([last, *others])


@rule("sort", some(3, TWO_DIGITS))
def sort_up(text: str) -> str:
    """The numbers from the smallest to the largest."""
    return row(sorted(ints(text)))


@rule("sort", some(4, DIGITS))
def sort_down(text: str) -> str:
    """The digits from the largest to the smallest."""
    return row(sorted(ints(text), reverse=True))


@rule("sort", some(3, TWO_DIGITS))
def sort_by_last_digit(text: str) -> str:
    """The numbers by their last digits, those with the same one as they come."""
    return row(sorted(ints(text), key=lambda n: n % 10))


@rule("sort", some(4, TWO_DIGITS))
def even_first(text: str) -> str:
    """The even numbers before the odd ones, as they come."""
    return row(sorted(ints(text), key=lambda n: n % 2))


# ---- choosing -------------------------------------------------------------------------------------------------------


@rule("extremes", some(4, TWO_DIGITS))
def largest_number(text: str) -> str:
    """The largest of four numbers."""
    return str(max(ints(text)))


@rule("extremes", some(4, TWO_DIGITS))
def smallest_number(text: str) -> str:
    """The smallest of four numbers."""
    return str(min(ints(text)))


@rule("filter", only(some(5, TWO_DIGITS), lambda text: any(n % 2 == 0 for n in ints(text))))
def keep_even(text: str) -> str:
    """The even ones of five numbers."""
    return row(n for n in ints(text) if n % 2 == 0)


@rule("filter", only(some(5, TWO_DIGITS), lambda text: any(n > 50 for n in ints(text))))
def keep_above_fifty(text: str) -> str:
    """Those of five numbers that are above 50."""
    return row(n for n in ints(text) if n > 50)


@rule("filter", some(4, TWO_DIGITS))
def drop_smallest(text: str) -> str:
    """All but the smallest number."""
    return row(n for n in ints(text) if n > min(ints(text)))


@rule("filter", some(4, TWO_DIGITS))
def drop_first(text: str) -> str:
    """All but the first number."""
    return row(text.split()[1:])


@rule("mask", some(4, TWO_DIGITS))
def mask_second(text: str) -> str:
    """An x in the place of the second number."""
    first, _, *others = text.split()
    return row([first, "x", *others])


@rule("mask", some(3, TWO_DIGITS))
def mask_last_digits(text: str) -> str:
    """An x in the place of each number's last digit."""
    return row(part[:-1] + "x" for part in text.split())


@rule("mask", some(4, TWO_DIGITS))
def mask_ends(text: str) -> str:
    """An x in the place of the first and the last number."""
    return row(["x", *text.split()[1:-1], "x"])


@rule("digit_pick", fill("{}", range(10_000, 100_000)))
def outer_digits(text: str) -> str:
    """The first and the last digit of the number."""
    return text[0] + text[-1]


@rule("digit_pick", some(3, TWO_DIGITS))
def last_digits(text: str) -> str:
    """The last digit of each number."""
    return row(part[-1] for part in text.split())


# ---- repeating and counting -----------------------------------------------------------------------------------------


@rule("repeat", some(3, TWO_DIGITS))
def each_twice(text: str) -> str:
    """Every number twice in a row."""
    return row(part for part in text.split() for _ in range(2))


@rule("repeat", some(3, TWO_DIGITS))
def there_and_back(text: str) -> str:
    """The numbers forwards and then backwards, the last one once."""
    return row([*text.split(), *text.split()[-2::-1]])


@rule("repeat", some(3, TWO_DIGITS))
def twice_over(text: str) -> str:
    """The list twice, one after the other."""
    return f"{text} {text}"


@rule("repeat", some(2, TWO_DIGITS))
def first_thrice(text: str) -> str:
    """The first number three times, then the second."""
    first, second = text.split()
    return row([first, first, first, second])


@rule("count", fill("{} {} {} {} {} {}", *[(7, 7, 1, 4, 9)] * 6))
def count_sevens(text: str) -> str:
    """How many of six digits are a 7."""
    return str(text.count("7"))


@rule("count", fill("{} {} {} {} {}", *[(*TWO_DIGITS, *range(100, 190))] * 5))
def count_three_digits(text: str) -> str:
    """How many of five numbers have three digits."""
    return str(sum(len(part) == 3 for part in text.split()))


# ---- values ---------------------------------------------------------------------------------------------------------


@rule("successor", some(2, TWO_DIGITS))
def plus_one(text: str) -> str:
    """Each number plus 1."""
    return row(n + 1 for n in ints(text))


@rule("successor", fill("{}", range(1000, 10_000)))
def before_and_after(text: str) -> str:
    """The number before and the number after."""
    return row((int(text) - 1, int(text) + 1))


@rule("number_words", some(3, DIGITS))
def spell_digits(text: str) -> str:
    """The digits as words."""
    return row(DIGIT_WORDS[n] for n in ints(text))


@rule("number_words", some(3, DIGIT_WORDS))
def read_digits(text: str) -> str:
    """Words for digits as one number."""
    return "".join(str(DIGIT_WORDS.index(word)) for word in text.split())


TENS = listed("twenty thirty forty fifty sixty seventy eighty ninety")
TEENS = listed("ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen")


def number_word(number: int) -> str:
    """Of a number from 10 to 99."""
    tens, ones = divmod(number, 10)
    if tens == 1:
        return TEENS[ones]
    return TENS[tens - 2] + (f"-{DIGIT_WORDS[ones]}" if ones else "")


@rule("number_words", some(2, TWO_DIGITS))
def spell_numbers(text: str) -> str:
    """Two numbers as words: ``47 12`` as ``forty-seven twelve``."""
    return row(number_word(n) for n in ints(text))


def run_without(start: int, gap: int) -> str:
    return row(start + step for step in range(5) if step != gap)


@rule("run", lambda rng: run_without(rng.randrange(1, 900), rng.randrange(1, 4)))
def missing_in_run(text: str) -> str:
    """The number that is missing in a run of consecutive numbers."""
    first, *_, last = ints(text)
    return str(next(n for n in range(first, last) if n not in ints(text)))


@rule("run", lambda rng: row(range(start := rng.randrange(1, 400), start + 3 * (step := rng.choice((2, 5, 10))), step)))
def continue_run(text: str) -> str:
    """The number that follows in steps of 2, 5 or 10."""
    *_, before, last = ints(text)
    return str(last + last - before)


@rule("run", lambda rng: row(range(start := rng.randrange(10, 900), start - 3, -1)))
def count_down(text: str) -> str:
    """The two numbers that follow counting down."""
    last = ints(text)[-1]
    return row((last - 1, last - 2))


@rule("run", lambda rng: row((start := rng.randrange(10, 900), start + rng.choice((3, 4)))))
def run_between(text: str) -> str:
    """All numbers from the first to the second."""
    first, last = ints(text)
    return row(range(first, last + 1))


@rule("rounding", fill("{}", range(100, 1000)))
def round_to_ten(text: str) -> str:
    """The number rounded to tens, halves up."""
    return str((int(text) + 5) // 10 * 10)


@rule("rounding", fill("{}", range(1000, 10_000)))
def cut_to_hundred(text: str) -> str:
    """The number with zeros in the place of its last two digits."""
    return text[:-2] + "00"


@rule("rounding", fill("{}", range(10_000, 100_000)))
def round_to_hundred(text: str) -> str:
    """The number rounded to hundreds, halves up."""
    return str((int(text) + 50) // 100 * 100)
