"""Rules on dates, weekdays and times of day."""

from __future__ import annotations

import random
from datetime import date, datetime, timedelta

from metasft.data.rules.inputs import (
    MONTHS,
    WEEKDAYS,
    clock,
    clock_12,
    draw_date,
    either,
    fill,
    iso,
    long_date,
    written,
    year_and_month,
)
from metasft.data.rules.rule import rule


def read_written(text: str) -> date:
    day, month, year = text.split()
    return date(int(year), MONTHS.index(month) + 1, int(day))


# ---- writing --------------------------------------------------------------------------------------------------------


@rule("date_order", iso)
def day_first(text: str) -> str:
    """``2021-03-14`` as ``14/03/2021``."""
    return "/".join(reversed(text.split("-")))


@rule("date_order", iso)
def month_first(text: str) -> str:
    """``2021-03-14`` as ``03/14/2021``."""
    year, month, day = text.split("-")
    return f"{month}/{day}/{year}"


@rule("date_order", iso)
def day_first_dots(text: str) -> str:
    """``2021-03-14`` as ``14.03.2021``."""
    return ".".join(reversed(text.split("-")))


@rule("date_order", iso)
def compact_date(text: str) -> str:
    """``2021-03-14`` as ``20210314``."""
    return text.replace("-", "")


@rule("month_names", iso)
def write_month(text: str) -> str:
    """``2021-03-14`` as ``14 March 2021``."""
    return written(date.fromisoformat(text))


@rule("month_names", long_date)
def read_month(text: str) -> str:
    """``14 March 2021`` as ``2021-03-14``."""
    return read_written(text).isoformat()


@rule("month_names", iso)
def short_month(text: str) -> str:
    """``2021-03-14`` as ``14 Mar 2021``."""
    day, month, year = written(date.fromisoformat(text)).split()
    return f"{day} {month[:3]} {year}"


@rule("month_names", long_date)
def month_name_first(text: str) -> str:
    """``14 March 2021`` as ``March 14, 2021``."""
    day, month, year = text.split()
    return f"{month} {day}, {year}"


def _year_in_the_middle(rng: random.Random) -> str:
    day = draw_date(rng)
    return f"{MONTHS[day.month - 1]} {day.year}, {day.day}"


ANY_DATE = either(iso, long_date, _year_in_the_middle)


@rule("date_part", ANY_DATE)
def year_of(text: str) -> str:
    """The year of a date written in one of three ways."""
    return next(part for part in text.replace("-", " ").replace(",", "").split() if len(part) == 4 and part.isdigit())


@rule("date_part", ANY_DATE)
def month_of(text: str) -> str:
    """The month's name of a date written in one of three ways."""
    named = [part for part in text.split() if part in MONTHS]
    return named[0] if named else MONTHS[int(text.split("-")[1]) - 1]


# ---- moving ---------------------------------------------------------------------------------------------------------


@rule("day_shift", iso)
def next_day(text: str) -> str:
    """The day after."""
    return (date.fromisoformat(text) + timedelta(days=1)).isoformat()


@rule("day_shift", long_date)
def day_before(text: str) -> str:
    """The day before."""
    return written(read_written(text) - timedelta(days=1))


@rule("day_shift", iso)
def week_later(text: str) -> str:
    """The day a week later."""
    return (date.fromisoformat(text) + timedelta(days=7)).isoformat()


def moved_month(text: str, months: int) -> str:
    name, year = text.split()
    index = int(year) * 12 + MONTHS.index(name) + months
    return f"{MONTHS[index % 12]} {index // 12}"


MONTH_AND_YEAR = fill("{} {}", MONTHS, range(1900, 2030))


@rule("month_shift", MONTH_AND_YEAR)
def next_month(text: str) -> str:
    """The month after."""
    return moved_month(text, 1)


@rule("month_shift", iso)
def year_later(text: str) -> str:
    """The date with the next year."""
    year, rest = text.split("-", 1)
    return f"{int(year) + 1}-{rest}"


@rule("month_shift", MONTH_AND_YEAR)
def month_before(text: str) -> str:
    """The month before."""
    return moved_month(text, -1)


@rule("month_shift", MONTH_AND_YEAR)
def ten_years_later(text: str) -> str:
    """The month ten years later."""
    return moved_month(text, 120)


WEEKDAY_AND_TIME = fill("{} {}", WEEKDAYS, clock)


def moved_weekday(text: str, days: int) -> str:
    name, time = text.split()
    return f"{WEEKDAYS[(WEEKDAYS.index(name) + days) % 7]} {time}"


@rule("weekday_shift", WEEKDAY_AND_TIME)
def next_weekday(text: str) -> str:
    """The same time on the next weekday."""
    return moved_weekday(text, 1)


@rule("weekday_shift", WEEKDAY_AND_TIME)
def weekday_before(text: str) -> str:
    """The same time on the weekday before."""
    return moved_weekday(text, -1)


@rule("clock", clock)
def to_12_hours(text: str) -> str:
    """``15:40`` as ``3:40 pm``."""
    hour, minute = text.split(":")
    return f"{(int(hour) - 1) % 12 + 1}:{minute} {'pm' if int(hour) >= 12 else 'am'}"


@rule("clock", clock_12)
def to_24_hours(text: str) -> str:
    """``3:40 pm`` as ``15:40``."""
    time, half = text.split()
    hour, minute = time.split(":")
    return f"{int(hour) % 12 + 12 * (half == 'pm'):02}:{minute}"


@rule("clock", clock)
def with_h(text: str) -> str:
    """``15:40`` as ``15h40``."""
    return text.replace(":", "h")


@rule("clock", fill("{}-{}", clock, clock))
def from_to(text: str) -> str:
    """``09:10-15:40`` as ``from 09:10 to 15:40``."""
    start, end = text.split("-")
    return f"from {start} to {end}"


def later(time: str, minutes: int) -> str:
    """A time as 15:40, so many minutes later."""
    return (datetime.strptime(time, "%H:%M") + timedelta(minutes=minutes)).strftime("%H:%M")


@rule("time_shift", clock)
def hour_later(text: str) -> str:
    """One hour later."""
    return later(text, 60)


@rule("time_shift", fill("{}, {}", clock, clock))
def half_hour_later(text: str) -> str:
    """Both times half an hour later."""
    return ", ".join(later(time, 30) for time in text.split(", "))


# ---- comparing ------------------------------------------------------------------------------------------------------


@rule("which_date", fill("{} {} {}", year_and_month, year_and_month, year_and_month))
def earliest(text: str) -> str:
    """The earliest of three months."""
    return min(text.split())


@rule("which_date", fill("{} {} {}", year_and_month, year_and_month, year_and_month))
def latest(text: str) -> str:
    """The latest of three months."""
    return max(text.split())


@rule("which_date", fill("{} {} {}", clock, clock, clock))
def earliest_time(text: str) -> str:
    """The earliest of three times."""
    return min(text.split())
