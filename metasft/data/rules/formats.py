"""Rules that write a record in another format."""

from __future__ import annotations

import json

from metasft.data.rules.inputs import CAPITALS, NAMES, NOUNS, SURNAMES, fill, listed, some
from metasft.data.rules.rule import rule

FULL_NAME = fill("{} {}", NAMES, SURNAMES)
CITIES = list(CAPITALS.values())
FILE = fill("{}{}.{}", NOUNS, range(1, 100), listed("pdf txt csv png doc zip"))
OPTION = some(3, listed("max open file user name time limit cache size log level page count port host path"))


# ---- names ----------------------------------------------------------------------------------------------------------


@rule("name_order", FULL_NAME)
def surname_first(text: str) -> str:
    """``Maria Lopez`` as ``Lopez, Maria``."""
    first, last = text.split()
    return f"{last}, {first}"


@rule("name_order", fill("{}, {}", SURNAMES, NAMES))
def surname_last(text: str) -> str:
    """``Lopez, Maria`` as ``Maria Lopez``."""
    last, first = text.split(", ")
    return f"{first} {last}"


@rule("name_order", fill("{} {} {}", NAMES, NAMES, SURNAMES))
def three_names(text: str) -> str:
    """``Maria Anna Lopez`` as ``Lopez, Maria Anna``."""
    *first, last = text.split()
    return f"{last}, {' '.join(first)}"


@rule("name_order", fill("{} {} ({})", NAMES, SURNAMES, ("Dr", "Mr", "Prof")))
def title_first(text: str) -> str:
    """``Maria Lopez (Dr)`` as ``Dr Maria Lopez``."""
    first, last, title = text.split()
    return f"{title[1:-1]} {first} {last}"


@rule("name_short", FULL_NAME)
def first_initial(text: str) -> str:
    """``Maria Lopez`` as ``M. Lopez``."""
    first, last = text.split()
    return f"{first[0]}. {last}"


@rule("name_short", fill("{} {} {}", NAMES, NAMES, SURNAMES))
def middle_initial(text: str) -> str:
    """``Maria Anna Lopez`` as ``Maria A. Lopez``."""
    first, middle, last = text.split()
    return f"{first} {middle[0]}. {last}"


@rule("name_short", FULL_NAME)
def last_initial(text: str) -> str:
    """``Maria Lopez`` as ``Maria L.``."""
    first, last = text.split()
    return f"{first} {last[0]}."


@rule("name_short", fill("{} {} {}", NAMES, SURNAMES, range(10, 100)))
def initials_and_number(text: str) -> str:
    """``Maria Lopez 47`` as ``ML47``."""
    first, last, number = text.split()
    return first[0] + last[0] + number


@rule("handles", fill("{} {} {}", NAMES, SURNAMES, range(1960, 2010)))
def user_name(text: str) -> str:
    """``Maria Lopez 1987`` as ``mlopez87``."""
    first, last, year = text.split()
    return f"{first[0]}{last}{year[2:]}".lower()


@rule("handles", fill("{} {} {}", NAMES, SURNAMES, ("mail", "post", "web")))
def address(text: str) -> str:
    """``Maria Lopez mail`` as ``maria.lopez@mail.org``."""
    first, last, host = text.lower().split()
    return f"{first}.{last}@{host}.org"


@rule("handles", FULL_NAME)
def mention(text: str) -> str:
    """``Maria Lopez`` as ``@maria_lopez``."""
    return "@" + text.lower().replace(" ", "_")


@rule("handles", fill("{}.{}@{}.org", [*map(str.lower, NAMES)], [*map(str.lower, SURNAMES)], ("mail", "post")))
def name_of_address(text: str) -> str:
    """``maria.lopez@mail.org`` as ``Maria Lopez``."""
    return text.partition("@")[0].replace(".", " ").title()


# ---- data -----------------------------------------------------------------------------------------------------------


@rule("json", fill("{} {}", NOUNS, range(2, 100)))
def pair_to_json(text: str) -> str:
    """``lemon 4`` as ``{"lemon": 4}``."""
    name, number = text.split()
    return json.dumps({name: int(number)})


@rule("json", some(3, NOUNS))
def list_to_json(text: str) -> str:
    """``lemon tin boat`` as ``["lemon", "tin", "boat"]``."""
    return json.dumps(text.split())


TWO_PAIRS = fill("{}: {}, {}: {}", NOUNS, range(2, 100), NOUNS, range(2, 100))


@rule("key_value", TWO_PAIRS)
def with_equals_signs(text: str) -> str:
    """``lemon: 4, tin: 2`` as ``lemon=4 tin=2``."""
    return text.replace(": ", "=").replace(",", "")


@rule("key_value", TWO_PAIRS)
def values_first(text: str) -> str:
    """``lemon: 4, tin: 2`` as ``4 lemon, 2 tin``."""
    return ", ".join(" ".join(reversed(pair.split(": "))) for pair in text.split(", "))


@rule("record_phrase", fill("{},{},{}", NAMES, range(18, 90), CITIES))
def record_to_phrase(text: str) -> str:
    """``Maria,31,Lima`` as ``Maria (31) from Lima``."""
    name, age, city = text.split(",")
    return f"{name} ({age}) from {city}"


@rule("record_phrase", fill("{} from {} is {}", NAMES, CITIES, range(18, 90)))
def phrase_to_record(text: str) -> str:
    """``Maria from Lima is 31`` as ``Maria,31,Lima``."""
    name, _, city, _, age = text.split()
    return f"{name},{age},{city}"


@rule("record_phrase", fill("{},{},{}", NAMES, range(18, 90), CITIES))
def record_with_names(text: str) -> str:
    """``Maria,31,Lima`` as ``name Maria, age 31, city Lima``."""
    name, age, city = text.split(",")
    return f"name {name}, age {age}, city {city}"


# ---- writing --------------------------------------------------------------------------------------------------------


@rule("identifiers", OPTION)
def snake_case(text: str) -> str:
    """``max open file`` as ``max_open_file``."""
    return text.replace(" ", "_")


@rule("identifiers", OPTION)
def camel_case(text: str) -> str:
    """``max open file`` as ``maxOpenFile``."""
    first, *others = text.split()
    return first + "".join(word.capitalize() for word in others)


@rule("identifiers", OPTION)
def kebab_case(text: str) -> str:
    """``max open file`` as ``max-open-file``."""
    return text.replace(" ", "-")


@rule("identifiers", some(3, listed("max open file user name time limit cache size log level page"), "_"))
def words_of_snake(text: str) -> str:
    """``max_open_file`` as ``max open file``."""
    return text.replace("_", " ")


@rule("digit_groups", lambda rng: f"{rng.randrange(10**9, 10**10)}")
def phone_number(text: str) -> str:
    """``5551234567`` as ``555-123-4567``."""
    return f"{text[:3]}-{text[3:6]}-{text[6:]}"


@rule("digit_groups", fill("{}", range(100_000, 1_000_000)))
def thousands(text: str) -> str:
    """``481237`` as ``481,237``."""
    return f"{int(text):,}"


@rule("markup", some(2, NOUNS))
def bold_last(text: str) -> str:
    """``lemon tin`` as ``lemon **tin**``."""
    first, last = text.split()
    return f"{first} **{last}**"


@rule("markup", some(3, NOUNS))
def brackets(text: str) -> str:
    """``lemon tin boat`` as ``[lemon] [tin] [boat]``."""
    return " ".join(f"[{word}]" for word in text.split())


@rule("markup", some(2, NOUNS))
def html_bold_first(text: str) -> str:
    """``lemon tin`` as ``<b>lemon</b> tin``."""
    first, last = text.split()
    return f"<b>{first}</b> {last}"


@rule("markup", some(3, NOUNS))
def quotes(text: str) -> str:
    """``lemon tin boat`` as ``'lemon' 'tin' 'boat'``."""
    return " ".join(f"'{word}'" for word in text.split())


@rule("file_names", FILE)
def backup_name(text: str) -> str:
    """``lemon7.pdf`` as ``lemon7.bak``."""
    return f"{text.partition('.')[0]}.bak"


@rule("file_names", FILE)
def copy_name(text: str) -> str:
    """``lemon7.pdf`` as ``lemon7_copy.pdf``."""
    return text.replace(".", "_copy.")
