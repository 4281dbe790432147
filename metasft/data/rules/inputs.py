"""What rules are applied to: word lists, and functions that draw an input from them."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from datetime import date, timedelta
from typing import Any

Draw = Callable[[random.Random], str]
"""Makes one input; the same generator state gives the same input."""


def listed(text: str) -> list[str]:
    """The words of a text."""
    return text.split()


def paired(text: str) -> dict[str, str]:
    """A mapping written as a/b c/d."""
    return dict(pair.split("/") for pair in text.split())


ANIMALS = listed(
    "tiger horse rabbit monkey spider goat duck eagle whale mouse sheep wolf bear lion camel turtle frog shark snake "
    "donkey zebra panda otter owl ant bee cow pig fox deer crow crab hen goose squirrel elephant iguana octopus"
)
FOODS = listed(
    "lemon bread cheese apple butter carrot onion potato tomato rice soup honey pasta banana cherry garlic pepper "
    "salad sugar coffee cake cookie melon mango bean corn egg olive orange noodle pizza yogurt peach plum biscuit pea"
)
THINGS = listed(
    "tin boat hammer chair table window pencil bottle ladder mirror candle basket button carpet clock drum kettle "
    "lamp needle pillow rope spoon towel umbrella wallet bell brush cup door fork key nail pot shelf engine arrow "
    "ball bucket coin desk guitar jacket magnet notebook oven piano rocket shovel ticket violin wheel"
)
VEHICLES = listed("car bus train truck tram bicycle scooter ferry plane van tractor taxi")
COLOURS = listed("red blue green yellow black white brown pink purple grey")
NOUNS = (*ANIMALS, *FOODS, *THINGS)
KIND_OF = {
    word: kind
    for kind, words in {"animal": ANIMALS, "food": FOODS, "vehicle": VEHICLES, "colour": COLOURS}.items()
    for word in words
}
_IRREGULAR = listed("sheep wolf shelf deer corn garlic bread butter sugar yogurt pasta")
REGULAR = [word for word in NOUNS if word[-1] not in "syhxeo" and word not in _IRREGULAR]
"""Nouns whose plural is the word with an s."""
ADJECTIVES = listed("old new small big fresh dirty heavy light rare common soft hard cheap strange pretty plain")

OPPOSITES = paired(
    "hot/cold big/small old/new fast/slow high/low hard/soft rich/poor wet/dry full/empty open/closed light/dark "
    "long/short strong/weak early/late happy/sad clean/dirty near/far thick/thin loud/quiet sweet/bitter "
    "up/down left/right day/night first/last buy/sell win/lose push/pull start/stop love/hate come/go"
)
CAPITALS = paired(
    "France/Paris Peru/Lima Norway/Oslo Japan/Tokyo Egypt/Cairo Kenya/Nairobi Italy/Rome Spain/Madrid "
    "Cuba/Havana China/Beijing Greece/Athens Poland/Warsaw Austria/Vienna Ireland/Dublin Iran/Tehran Iraq/Baghdad "
    "Germany/Berlin Portugal/Lisbon Russia/Moscow Chile/Santiago Thailand/Bangkok Turkey/Ankara Sweden/Stockholm "
    "Finland/Helsinki Denmark/Copenhagen Hungary/Budapest Belgium/Brussels Canada/Ottawa"
)
SPANISH = paired(
    "red/rojo blue/azul green/verde white/blanco black/negro house/casa water/agua bread/pan milk/leche dog/perro "
    "cat/gato book/libro table/mesa night/noche day/día sun/sol moon/luna friend/amigo city/ciudad hand/mano "
    "one/uno two/dos three/tres four/cuatro five/cinco good/bueno big/grande small/pequeño"
)
GERMAN = paired(
    "red/rot blue/blau green/grün white/weiß black/schwarz house/Haus water/Wasser bread/Brot milk/Milch dog/Hund "
    "cat/Katze book/Buch table/Tisch night/Nacht day/Tag sun/Sonne moon/Mond friend/Freund city/Stadt hand/Hand "
    "one/eins two/zwei three/drei four/vier five/fünf good/gut big/groß small/klein"
)

NAMES = listed(
    "Anna Maria Clara Julia Nina Laura Sofia Emma Alice Rosa Helen Lucy Martha Diana Carol Irene Olga Paula Grace Eva "
    "Ben Paul Tom Peter David Marco Felix Oscar Simon Victor Hugo James Robert Henry Carlos Adam Leo Mark George Ivan"
)
SURNAMES = listed(
    "Lopez Miller Rossi Novak Silva Weber Tanaka Walker Garcia Fischer Moreau Jensen Carter Santos Keller Parker Olsen "
    "Turner Wagner Brown Costa Meyer Bauer Harris Ivanov Murphy Kim Lee Singh Chen Adams Baker Clark Cooper Davis "
    "Evans Foster Gray Hall Hill Hughes Jones King Lewis Martin Mason Morris Nelson Price Reed Roberts Scott Stone "
    "Taylor Ward White Young Bennett"
)
VERBS = listed("walk jump talk cook paint work play help call visit follow answer lift pull thank greet wait cover")
"""That take -s, -ed and -ing without a change of the stem."""
OBJECT_VERBS = listed("call visit follow help lift pull thank greet answer cover")

MONTHS = listed("January February March April May June July August September October November December")
WEEKDAYS = listed("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
DIGIT_WORDS = listed("zero one two three four five six seven eight nine")


def some(count: int, pool: Sequence[Any], separator: str = " ") -> Draw:
    """``count`` different members of a pool."""
    return lambda rng: separator.join(map(str, rng.sample(pool, count)))


def fill(template: str, *pools: Sequence[Any] | Draw) -> Draw:
    """A template with ``{}`` for one member of each pool, or for one drawn input."""
    return lambda rng: template.format(*(pool(rng) if callable(pool) else rng.choice(pool) for pool in pools))


def either(*draws: Draw) -> Draw:
    """An input by one of several draws, each as likely as the others."""
    return lambda rng: rng.choice(draws)(rng)


def only(draw: Draw, accept: Callable[[str], bool]) -> Draw:
    """Inputs that fulfil a condition."""

    def drawn(rng: random.Random) -> str:
        while not accept(text := draw(rng)):
            pass
        return text

    return drawn


def shuffled(draw: Callable[[random.Random], list[str]], separator: str = " ") -> Draw:
    """Parts in any order."""

    def drawn(rng: random.Random) -> str:
        parts = draw(rng)
        return separator.join(rng.sample(parts, len(parts)))

    return drawn


def draw_date(rng: random.Random) -> date:
    """A day from 1950 to 2029."""
    return date(1950, 1, 1) + timedelta(days=rng.randrange(365 * 80))


def iso(rng: random.Random) -> str:
    """A day as 2021-03-14."""
    return draw_date(rng).isoformat()


def year_and_month(rng: random.Random) -> str:
    """A month as 2021-03."""
    return iso(rng)[:7]


def long_date(rng: random.Random) -> str:
    """A day as 14 March 2021."""
    return written(draw_date(rng))


def written(day: date) -> str:
    """14 March 2021."""
    return f"{day.day} {MONTHS[day.month - 1]} {day.year}"


def clock(rng: random.Random) -> str:
    """A time as 15:40."""
    return f"{rng.randrange(24):02}:{rng.randrange(60):02}"


def clock_12(rng: random.Random) -> str:
    """A time as 3:40 pm."""
    return f"{rng.randrange(1, 13)}:{rng.randrange(60):02} {rng.choice(('am', 'pm'))}"


def decimals(low: int, high: int, places: int) -> Draw:
    """A decimal number from ``low`` up to ``high``, with so many places."""
    scale = 10**places
    return lambda rng: f"{rng.randrange(low * scale, high * scale) / scale:.{places}f}"
