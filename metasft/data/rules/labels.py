"""Rules that label an input: arbitrary words, different ones for every rule, stand for a real distinction."""

from __future__ import annotations

from itertools import pairwise

from metasft.data.rules.inputs import (
    ADJECTIVES,
    ANIMALS,
    CAPITALS,
    FOODS,
    MONTHS,
    NAMES,
    NOUNS,
    REGULAR,
    SURNAMES,
    THINGS,
    VERBS,
    WEEKDAYS,
    clock,
    either,
    fill,
    listed,
    long_date,
    some,
)
from metasft.data.rules.rule import rule

# ---- numbers --------------------------------------------------------------------------------------------------------


@rule("parity", fill("{}", range(10_000, 100_000)), "blip tork")
def even_number(text: str) -> bool:
    """Whether the number is even."""
    return int(text) % 2 == 0


@rule("parity", some(2, range(10, 100)), "fenn gulo")
def same_parity(text: str) -> bool:
    """Whether both numbers are even or both are odd."""
    first, second = map(int, text.split())
    return (first - second) % 2 == 0


@rule("parity", fill("{}", range(10_000, 100_000)), "nold carfe")
def even_first_digit(text: str) -> bool:
    """Whether the first digit is even."""
    return int(text[0]) % 2 == 0


@rule("threshold", fill("{}", range(1000, 10_000)), "marn sibo")
def above_5000(text: str) -> bool:
    """Whether the number is 5000 or more."""
    return int(text) >= 5000


@rule("threshold", fill("{} ${}", THINGS, range(2, 60)), "dask ploon")
def dear(text: str) -> bool:
    """Whether the thing costs $20 or more."""
    return int(text.partition("$")[2]) >= 20


@rule("order", some(2, range(10, 100)), "wex orla")
def rising_pair(text: str) -> bool:
    """Whether the second number is larger than the first."""
    first, second = map(int, text.split())
    return first < second


@rule("order", some(2, NOUNS), "krim juno")
def alphabetical_pair(text: str) -> bool:
    """Whether the two words are in alphabetical order."""
    first, second = text.split()
    return first < second


@rule("order", some(3, range(10, 100)), "ulm zeft prin")
def place_of_largest(text: str) -> int:
    """Whether the first, second or third number is the largest."""
    numbers = [int(part) for part in text.split()]
    return numbers.index(max(numbers))


# ---- meaning --------------------------------------------------------------------------------------------------------


@rule("word_class", either(fill("{} {}", ADJECTIVES, ANIMALS), fill("{} {}", ADJECTIVES, FOODS)), "zant molpe")
def animal_or_food(text: str) -> bool:
    """Whether it is a food rather than an animal."""
    return text.split()[1] in FOODS


@rule(
    "word_class",
    either(fill("{} {}", NAMES, range(10, 100)), fill("{} {}", list(CAPITALS.values()), range(10, 100))),
    "hib quar",
)
def person_or_city(text: str) -> bool:
    """Whether it names a city rather than a person."""
    return text.split()[0] in CAPITALS.values()


@rule("word_class", fill("{} {}", ADJECTIVES, NOUNS), "tam holk viss")
def animal_food_thing(text: str) -> int:
    """Whether it is an animal, a food or a thing."""
    noun = text.split()[1]
    return 0 if noun in ANIMALS else 1 if noun in FOODS else 2


@rule(
    "word_class",
    either(fill("{} {}", VERBS, range(100, 500)), fill("{} {}", ADJECTIVES, range(100, 500))),
    "bask ludo",
)
def verb_or_adjective(text: str) -> bool:
    """Whether it is an adjective rather than a verb."""
    return text.split()[0] in ADJECTIVES


GOOD = listed("loved enjoyed liked praised admired adored")
BAD = listed("hated disliked despised blamed cursed avoided")
FINE = listed("wonderful great lovely excellent brilliant charming")
POOR = listed("terrible awful boring horrible dreadful ugly")


@rule("sentiment", fill("{} {} the {}", NAMES, (*GOOD, *BAD), (*FOODS, *THINGS)), "vorp lanu")
def liked(text: str) -> bool:
    """Whether somebody liked something."""
    return text.split()[1] in GOOD


@rule("sentiment", fill("the {} was {} {}", NOUNS, ("very", "quite", "really"), (*FINE, *POOR)), "sull breen")
def praised(text: str) -> bool:
    """Whether something is praised."""
    return text.split()[-1] in FINE


@rule(
    "sentiment",
    fill("{} {} the {}", ("could you", "would you", "you must", "you shall"), ("bring", "fix", "sell", "move"), THINGS),
    "ferm jolk",
)
def polite(text: str) -> bool:
    """Whether it is a polite question rather than an order."""
    return text.split()[1] == "you"


@rule("time_of", fill("at {}, {}", clock, NAMES), "oxen dral")
def afternoon(text: str) -> bool:
    """Whether the time is after noon."""
    return text[3:5] >= "12"


@rule("time_of", fill("{} at {}", WEEKDAYS, clock), "nim tavo")
def weekend(text: str) -> bool:
    """Whether the day is a Saturday or a Sunday."""
    return text.startswith("S")


@rule("time_of", fill("{} {}", clock, WEEKDAYS), "sarn oble chiv")
def part_of_day(text: str) -> int:
    """Before noon, from noon to six, or after six."""
    return (text >= "12") + (text >= "18")


@rule("time_of", long_date, "wint alby")
def summer_half(text: str) -> bool:
    """Whether the date is in the months from April to September."""
    return text.split()[1] in MONTHS[3:9]


@rule("grammar", either(fill("{} {}", ADJECTIVES, REGULAR), fill("{} {}s", ADJECTIVES, REGULAR)), "pell yusk")
def plural(text: str) -> bool:
    """Whether the noun is in the plural."""
    return text.endswith("s")


@rule("grammar", fill("{} {}{} {}", NAMES, VERBS, ("s", "ed"), ("today", "here", "alone", "again")), "grom ista")
def past_tense(text: str) -> bool:
    """Whether the sentence is in the past tense."""
    return text.split()[1].endswith("ed")


# ---- letters --------------------------------------------------------------------------------------------------------


@rule("first_letter", some(2, NOUNS), "tribb eno")
def starts_with_vowel(text: str) -> bool:
    """Whether the first word starts with a vowel."""
    return text[0] in "aeiou"


@rule("first_letter", fill("{} {}", NAMES, SURNAMES), "culp rado")
def surname_after_k(text: str) -> bool:
    """Whether the surname starts with a letter after K."""
    return text.split()[1][0] > "K"


@rule("first_letter", some(2, NOUNS), "pogg nerl")
def second_starts_with_vowel(text: str) -> bool:
    """Whether the second word starts with a vowel."""
    return text.split()[1][0] in "aeiou"


SHORT_OR_LONG = [word for word in NOUNS if len(word) <= 4 or len(word) >= 6]


@rule("word_length", fill("{} {}", SHORT_OR_LONG, NOUNS), "jup welto")
def long_first_word(text: str) -> bool:
    """Whether the first word is long: six letters or more rather than four or fewer."""
    return len(text.split()[0]) >= 6


@rule("word_length", some(2, NOUNS), "arb skeet")
def same_length(text: str) -> bool:
    """Whether both words have the same number of letters."""
    first, second = text.split()
    return len(first) == len(second)


def has_double(word: str) -> bool:
    return any(one == following for one, following in pairwise(word))


@rule("letter_presence", some(2, NOUNS), "dovo snip")
def contains_e(text: str) -> bool:
    """Whether there is an e in either word."""
    return "e" in text


@rule("letter_presence", some(2, NOUNS), "flam urst")
def double_letter(text: str) -> bool:
    """Whether a letter occurs twice in a row."""
    return has_double(text)


@rule("letter_case", either(some(2, NOUNS), lambda rng: some(2, NOUNS)(rng).capitalize()), "bront ilp")
def capitalised(text: str) -> bool:
    """Whether the first word has a capital."""
    return text[0].isupper()


@rule(
    "letter_case",
    fill(
        "{} {}",
        NOUNS,
        either(
            fill("{} {}", NOUNS, [word.upper() for word in NOUNS]),
            fill("{} {}", [word.upper() for word in NOUNS], NOUNS),
        ),
    ),
    "quam defo",
)
def capitals_last(text: str) -> bool:
    """Whether the word in capitals is the last one rather than the middle one."""
    return text.split()[-1].isupper()


@rule("letter_case", fill("{} {}", [*map(str.capitalize, NOUNS), *map(str.upper, NOUNS)], NOUNS), "hask rilo")
def all_or_first_capital(text: str) -> bool:
    """Whether all letters of the first word are capitals rather than the first alone."""
    return text.split()[0].isupper()


@rule("sameness", some(2, NOUNS), "lork spay")
def same_initial(text: str) -> bool:
    """Whether both words start with the same letter."""
    first, second = text.split()
    return first[0] == second[0]


@rule("sameness", fill("{} {} {} {}", *[range(10)] * 4), "humb vico")
def repeated_digit(text: str) -> bool:
    """Whether a digit occurs twice."""
    return len(set(text.split())) < 4
