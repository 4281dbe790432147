"""Rules on words: their letters, their meaning, and small sentences."""

from __future__ import annotations

import random
from collections.abc import Callable

from metasft.data.rules.inputs import (
    ADJECTIVES,
    ANIMALS,
    CAPITALS,
    COLOURS,
    FOODS,
    GERMAN,
    KIND_OF,
    NAMES,
    NOUNS,
    OBJECT_VERBS,
    OPPOSITES,
    REGULAR,
    SPANISH,
    THINGS,
    VEHICLES,
    VERBS,
    fill,
    only,
    shuffled,
    some,
)
from metasft.data.rules.rule import rule

VOWELS = "aeiou"


def each(text: str, change: Callable[[str], str]) -> str:
    """Every word changed."""
    return " ".join(change(word) for word in text.split())


# ---- letters --------------------------------------------------------------------------------------------------------


@rule("initials", some(3, NOUNS))
def first_letters(text: str) -> str:
    """The first letters of the words, as one word."""
    return "".join(word[0] for word in text.split())


@rule("initials", some(3, NOUNS))
def last_letters(text: str) -> str:
    """The last letters of the words, as one word."""
    return "".join(word[-1] for word in text.split())


@rule("initials", some(3, NOUNS))
def dotted_initials(text: str) -> str:
    """The first letters with dots: ``lemon tin boat`` as ``l.t.b.``."""
    return "".join(f"{word[0]}." for word in text.split())


@rule("initials", some(3, NOUNS))
def first_two_letters(text: str) -> str:
    """The first two letters of each word."""
    return each(text, lambda word: word[:2])


@rule("upper_case", some(3, NOUNS))
def all_upper(text: str) -> str:
    """All in capitals."""
    return text.upper()


@rule("upper_case", some(3, NOUNS))
def last_upper(text: str) -> str:
    """The last word in capitals."""
    *others, last = text.split()
    return " ".join([*others, last.upper()])


def _lengths_differ(text: str) -> bool:
    lengths = sorted(len(word) for word in text.split())
    return lengths[0] < lengths[1] and lengths[-2] < lengths[-1]


@rule("length_pick", only(some(4, NOUNS), _lengths_differ))
def longest_word(text: str) -> str:
    """The longest of four words."""
    return max(text.split(), key=len)


@rule("length_pick", only(some(4, NOUNS), _lengths_differ))
def shortest_word(text: str) -> str:
    """The shortest of four words."""
    return min(text.split(), key=len)


@rule("length_pick", only(some(3, NOUNS), lambda text: len({len(word) for word in text.split()}) == 3))
def by_length(text: str) -> str:
    """Three words from the shortest to the longest."""
    return " ".join(sorted(text.split(), key=len))


@rule("alphabet", some(3, NOUNS))
def alphabetical(text: str) -> str:
    """The words in alphabetical order."""
    return " ".join(sorted(text.split()))


@rule("alphabet", some(4, NOUNS))
def first_in_alphabet(text: str) -> str:
    """The word that is first in alphabetical order."""
    return min(text.split())


@rule("alphabet", some(4, NOUNS))
def last_in_alphabet(text: str) -> str:
    """The word that is last in alphabetical order."""
    return max(text.split())


SHORT = [word for word in NOUNS if len(word) <= 5]


@rule("spelling", some(2, SHORT))
def spell_with_dashes(text: str) -> str:
    """The words with dashes between their letters."""
    return each(text, "-".join)


@rule("spelling", some(2, SHORT))
def spell_last(text: str) -> str:
    """The letters of the last word, apart."""
    return " ".join(text.split()[-1])


@rule("spelling", some(2, SHORT))
def spell_first_dotted(text: str) -> str:
    """The first word with dots between its letters."""
    first, last = text.split()
    return f"{'.'.join(first)} {last}"


@rule("vowels", some(2, NOUNS))
def drop_vowels(text: str) -> str:
    """The words without their vowels."""
    return "".join(letter for letter in text if letter not in VOWELS)


@rule("vowels", some(2, NOUNS))
def star_vowels(text: str) -> str:
    """A star in the place of every vowel."""
    return "".join("*" if letter in VOWELS else letter for letter in text)


@rule("vowels", some(3, NOUNS))
def only_vowels(text: str) -> str:
    """The vowels of each word."""
    return each(text, lambda word: "".join(letter for letter in word if letter in VOWELS))


@rule("vowels", some(2, NOUNS))
def o_for_vowels(text: str) -> str:
    """An o in the place of every vowel."""
    return "".join("o" if letter in VOWELS else letter for letter in text)


@rule("suffix", some(3, REGULAR))
def plurals(text: str) -> str:
    """The words in the plural."""
    return each(text, "{}s".format)


@rule("suffix", some(3, VERBS))
def ing_forms(text: str) -> str:
    """The verbs with -ing."""
    return each(text, "{}ing".format)


@rule("suffix", some(3, VERBS))
def past_forms(text: str) -> str:
    """The verbs in the past tense."""
    return each(text, "{}ed".format)


@rule("suffix", some(2, NOUNS))
def less_forms(text: str) -> str:
    """The words with -less."""
    return each(text, "{}less".format)


@rule("trim", some(3, NOUNS))
def drop_first_letter(text: str) -> str:
    """Each word without its first letter."""
    return each(text, lambda word: word[1:])


@rule("trim", some(3, NOUNS))
def drop_last_letter(text: str) -> str:
    """Each word without its last letter."""
    return each(text, lambda word: word[:-1])


# ---- meaning --------------------------------------------------------------------------------------------------------


@rule("pick_kind", shuffled(lambda rng: [rng.choice(ANIMALS), rng.choice(FOODS), rng.choice(THINGS)]))
def the_animal(text: str) -> str:
    """The animal among an animal, a food and a thing."""
    return next(word for word in text.split() if word in ANIMALS)


@rule("pick_kind", shuffled(lambda rng: [rng.choice(ANIMALS), rng.choice(FOODS), rng.choice(THINGS)]))
def the_food(text: str) -> str:
    """The food among an animal, a food and a thing."""
    return next(word for word in text.split() if word in FOODS)


def _two_and_one(rng: random.Random) -> list[str]:
    pair, single = rng.sample((ANIMALS, FOODS, COLOURS, VEHICLES), 2)
    return [*rng.sample(pair, 2), rng.choice(single)]


@rule("odd_one_out", shuffled(_two_and_one))
def odd_kind(text: str) -> str:
    """The word that is not of the kind of the two others."""
    kinds = [KIND_OF[word] for word in text.split()]
    return next(word for word, kind in zip(text.split(), kinds, strict=True) if kinds.count(kind) == 1)


@rule("odd_one_out", only(some(3, NOUNS), lambda text: len({word[0] for word in text.split()}) == 2))
def odd_initial(text: str) -> str:
    """The word that does not start with the letter of the two others."""
    initials = [word[0] for word in text.split()]
    return next(word for word in text.split() if initials.count(word[0]) == 1)


@rule("kind_names", some(2, (*ANIMALS, *FOODS, *VEHICLES, *COLOURS)))
def name_kinds(text: str) -> str:
    """What each of two words is: animal, food, vehicle, colour."""
    return each(text, KIND_OF.__getitem__)


@rule("kind_names", lambda rng: some(3, rng.choice((ANIMALS, FOODS, VEHICLES, COLOURS)))(rng))
def shared_kind(text: str) -> str:
    """What three words of one kind are: animal, food, vehicle, colour."""
    return KIND_OF[text.split()[0]]


@rule("kind_names", fill("{} {}", ADJECTIVES, (*ANIMALS, *FOODS, *VEHICLES)))
def kind_of_noun(text: str) -> str:
    """The adjective with the kind of the noun: ``small tiger`` as ``small animal``."""
    adjective, noun = text.split()
    return f"{adjective} {KIND_OF[noun]}"


BOTH_WAYS = {**OPPOSITES, **{other: word for word, other in OPPOSITES.items()}}


@rule("opposites", some(2, list(BOTH_WAYS)))
def opposites_of_both(text: str) -> str:
    """The opposites of both words."""
    return each(text, BOTH_WAYS.__getitem__)


@rule("opposites", some(2, list(BOTH_WAYS)))
def opposite_of_last(text: str) -> str:
    """The last word is replaced by its opposite."""
    first, last = text.split()
    return f"{first} {BOTH_WAYS[last]}"


@rule("capitals", some(2, list(CAPITALS)))
def capitals_of(text: str) -> str:
    """The capitals of two countries."""
    return each(text, CAPITALS.__getitem__)


@rule("capitals", some(2, list(CAPITALS.values())))
def countries_of(text: str) -> str:
    """The countries of two capitals."""
    countries = {city: country for country, city in CAPITALS.items()}
    return each(text, countries.__getitem__)


@rule("capitals", fill("{} {}", list(CAPITALS), range(10, 100)))
def capital_with_number(text: str) -> str:
    """The country is replaced by its capital, the number stays."""
    country, number = text.split()
    return f"{CAPITALS[country]} {number}"


@rule("capitals", fill("{} in {}", NAMES, list(CAPITALS)))
def name_in_capital(text: str) -> str:
    """The name and the capital of the country: ``Anna in Peru`` as ``Anna, Lima``."""
    name, _, country = text.split()
    return f"{name}, {CAPITALS[country]}"


@rule("translate", some(2, list(SPANISH)))
def to_spanish(text: str) -> str:
    """Two words in Spanish."""
    return each(text, SPANISH.__getitem__)


@rule("translate", some(2, list(GERMAN)))
def to_german(text: str) -> str:
    """Two words in German."""
    return each(text, GERMAN.__getitem__)


@rule("translate", some(2, list(SPANISH.values())))
def from_spanish(text: str) -> str:
    """Two Spanish words in English."""
    return each(text, {word: english for english, word in SPANISH.items()}.__getitem__)


@rule("translate", some(2, list(GERMAN.values())))
def from_german(text: str) -> str:
    """Two German words in English."""
    return each(text, {word: english for english, word in GERMAN.items()}.__getitem__)


# ---- sentences ------------------------------------------------------------------------------------------------------


@rule("sentences", fill("{} {}s the {} {}", NAMES, OBJECT_VERBS, ADJECTIVES, ANIMALS))
def negate(text: str) -> str:
    """The sentence denied: ``Anna calls the old dog`` as ``Anna does not call the old dog``."""
    name, verb, *rest = text.split()
    return " ".join([name, "does not", stem(verb), *rest])


@rule("sentences", fill("{} {}s the {} {}", NAMES, OBJECT_VERBS, ADJECTIVES, ANIMALS))
def ask(text: str) -> str:
    """The sentence as a question: ``Anna calls the old dog`` as ``Does Anna call the old dog?``."""
    name, verb, *rest = text.split()
    return " ".join(["Does", name, stem(verb), *rest]) + "?"


def stem(verb: str) -> str:
    return verb.removesuffix("s")
