"""Rules on quantities: units, money and shares."""

from __future__ import annotations

from metasft.data.rules.inputs import REGULAR, decimals, fill, listed
from metasft.data.rules.rule import rule

NAMES = {
    "kg": "kilograms",
    "g": "grams",
    "km": "kilometres",
    "m": "metres",
    "cm": "centimetres",
    "mm": "millimetres",
    "l": "litres",
    "ml": "millilitres",
    "s": "seconds",
    "min": "minutes",
    "h": "hours",
    "W": "watts",
    "V": "volts",
    "lb": "pounds",
}
SIGNS = {"$": "USD", "€": "EUR", "£": "GBP"}
MEASURES = {
    "weight": ("kg", "g", "lb", "tons", "ounces"),
    "length": ("km", "m", "cm", "feet", "miles"),
    "time": ("s", "min", "hours", "days", "weeks"),
    "volume": ("l", "ml", "gallons", "pints", "cups"),
}
MEASURE_OF = {unit: measure for measure, units in MEASURES.items() for unit in units}
METRIC, IMPERIAL = ("kg", "g", "km", "m", "cm", "mm", "l", "ml"), ("lb", "ounces", "feet", "miles", "inches", "gallons")


@rule("metric", fill("{} m", range(2, 1000)))
def metres_in_cm(text: str) -> str:
    """Metres in centimetres."""
    return f"{text.split()[0]}00 cm"


@rule("metric", fill("{} kg", range(2, 1000)))
def kilograms_in_g(text: str) -> str:
    """Kilograms in grams."""
    return f"{text.split()[0]}000 g"


@rule("clock_units", fill("{} h {} min", range(1, 10), range(1, 60)))
def all_in_minutes(text: str) -> str:
    """Hours and minutes in minutes."""
    hours, _, minutes, _ = text.split()
    return f"{int(hours) * 60 + int(minutes)} min"


@rule("clock_units", fill("{} min", range(61, 600)))
def hours_and_minutes(text: str) -> str:
    """Minutes in hours and minutes."""
    hours, minutes = divmod(int(text.split()[0]), 60)
    return f"{hours} h {minutes} min"


@rule("clock_units", fill("{} min {} s", range(1, 10), range(1, 60)))
def all_in_seconds(text: str) -> str:
    """Minutes and seconds in seconds."""
    minutes, _, seconds, _ = text.split()
    return f"{int(minutes) * 60 + int(seconds)} s"


@rule("unit_names", fill("{} {}", range(2, 100), list(NAMES)))
def spell_unit(text: str) -> str:
    """The unit as a word."""
    amount, unit = text.split()
    return f"{amount} {NAMES[unit]}"


@rule("unit_names", fill("{} {}", range(2, 100), list(NAMES.values())))
def shorten_unit(text: str) -> str:
    """The unit's symbol for its name."""
    amount, name = text.split()
    return f"{amount} {next(unit for unit, one in NAMES.items() if one == name)}"


@rule("unit_names", fill("{} {}, {} {}", range(2, 100), list(NAMES), range(2, 100), list(NAMES)))
def spell_two_units(text: str) -> str:
    """Both units as words."""
    return ", ".join(spell_unit(part) for part in text.split(", "))


@rule("currency", fill("{}{}", list(SIGNS), decimals(1, 100, 2)))
def sign_to_code(text: str) -> str:
    """A price with the currency's code for its sign: ``$5.20`` as ``5.20 USD``."""
    return f"{text[1:]} {SIGNS[text[0]]}"


@rule("currency", fill("{} {}", decimals(1, 100, 2), list(SIGNS.values())))
def code_to_sign(text: str) -> str:
    """A price with the currency's sign for its code: ``5.20 USD`` as ``$5.20``."""
    amount, code = text.split()
    return next(sign for sign, one in SIGNS.items() if one == code) + amount


@rule("quantity_kind", fill("{} {}", range(2, 200), list(MEASURE_OF)), "weight length time volume")
def measured(text: str) -> int:
    """What is measured: weight, length, time or volume."""
    return list(MEASURES).index(MEASURE_OF[text.split()[1]])


@rule("quantity_kind", fill("{} {}", range(200, 600), (*METRIC, *IMPERIAL)), "metric imperial")
def unit_system(text: str) -> int:
    """Whether a unit is metric or imperial."""
    return text.split()[1] in IMPERIAL


@rule("quantity_kind", fill("{} {}", range(600, 1000), list(MEASURE_OF)), "scale ruler clock jug")
def instrument(text: str) -> int:
    """What one measures with: scale, ruler, clock or jug."""
    return measured(text)


@rule("percent", fill("{}%", decimals(1, 100, 1)))
def percent_to_decimal(text: str) -> str:
    """A percentage as a decimal: ``35.2%`` as ``0.352``."""
    return f"0.{int(text[:-1].replace('.', '')):03}"


@rule("percent", fill("0.{}", range(100, 1000)))
def decimal_to_percent(text: str) -> str:
    """A decimal as a percentage: ``0.352`` as ``35.2%``."""
    return f"{text[2:4]}.{text[4]}%"


@rule("counting_units", fill("{} dozen {}s", range(2, 11), REGULAR))
def dozens(text: str) -> str:
    """Dozens as a number of pieces."""
    count, _, what = text.split()
    return f"{int(count) * 12} {what}"


@rule("counting_units", fill("{} pairs of {}", range(2, 60), listed("shoes socks gloves boots skates wings")))
def pairs(text: str) -> str:
    """Pairs as a number of pieces."""
    count, _, _, what = text.split()
    return f"{int(count) * 2} {what}"


@rule("counting_units", fill("{} hundred {}s", range(2, 20), REGULAR))
def hundreds(text: str) -> str:
    """Hundreds as a number of pieces."""
    count, _, what = text.split()
    return f"{count}00 {what}"
