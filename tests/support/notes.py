"""The rules of docs/builtin-notes.md for days, times and words, read off a message alone."""

import re

PARTS = {"morning": 9, "afternoon": 15, "evening": 19, "night": 21, "tonight": 21}
CLOCKS = {"noon": "12:00", "midday": "12:00", "midnight": "00:00"}
UNITS = [
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
]
TENS = {"thirty": 30, "forty": 40, "fifty": 50}
PAST = {"five": 5, "ten": 10, "quarter": 15, "twenty": 20, "twenty-five": 25, "half": 30}
WEEKDAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
SHORT = dict(zip(["mon", "tue", "wed", "thu", "fri", "sat", "sun"], WEEKDAYS, strict=True)) | {
    "tues": "Tuesday",
    "thurs": "Thursday",
}
MONTHS = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
]
ORDINALS = [
    "first",
    "second",
    "third",
    "fourth",
    "fifth",
    "sixth",
    "seventh",
    "eighth",
    "ninth",
    "tenth",
    "eleventh",
    "twelfth",
    "thirteenth",
    "fourteenth",
    "fifteenth",
    "sixteenth",
    "seventeenth",
    "eighteenth",
    "nineteenth",
    "twentieth",
]

_HOUR = rf"(?P<hour>{'|'.join(UNITS)}|1[0-2]|[1-9])"
_HALF = r"(?P<half>am|pm)\b"
_MONTH = rf"(?P<month>{'|'.join(MONTHS).lower()})\b"
_ORDINAL = rf"(?:\b(?P<day>\d{{1,2}})(?:st|nd|rd|th)?|\b(?P<word>{'|'.join(ORDINALS)}))\b"
_WEEKDAY = rf"(?:{'|'.join(WEEKDAYS).lower()}|{'|'.join(SHORT)})"
_AFTER = (  # what may follow a bare hour: the end, a comma, a part of the day, a day, a place
    r"\b(?=\s*(?:[.,!?;:)]|$|sharp\b|in the (?:morning|afternoon|evening)\b|at (?:night|the|home)\b"
    rf"|tonight\b|today\b|tomorrow\b|on\b|at\b|to\b|in\b|about\b|because\b|for\b|{_WEEKDAY}\b))"
)
_TIMES = (
    rf"\b(?P<past>{'|'.join(sorted(PAST, reverse=True))}) (?P<side>past|to) {_HOUR}\b",
    rf"\bhalf {_HOUR}\b",
    rf"\b(?P<digits>\d{{1,2}})[:.](?P<minutes>\d\d)\b(?: ?{_HALF})?",
    rf"\b{_HOUR} ?{_HALF}",
    rf"\b(?P<spelled>{'|'.join(UNITS)}) (?P<tens>{'|'.join(TENS)})\b",
    rf"\b{_HOUR} (?:o'clock|sharp)",
    rf"\b(?:at|by|around|from|before|after|until) {_HOUR}{_AFTER}",
    rf"\bat (?P<hour>{'|'.join(UNITS)})\b",
    rf"\b{_HOUR} (?:in the|at night|tonight)\b",
    rf"(?:tonight|today|{_WEEKDAY}),? {_HOUR}{_AFTER}",
    rf"\bit's {_HOUR}{_AFTER}",
)


def words_of(text: str) -> list[str]:
    """Its words in small letters, without the punctuation around them."""
    stripped = (word.strip('.,!?;:()"').lower() for word in text.split())
    return [word for word in stripped if word]


def _number(word: str) -> int:
    return int(word) if word.isdigit() else UNITS.index(word) + 1


def _minutes(match: re.Match[str]) -> int:
    """Minutes after midnight or noon, as the clock shows them."""
    found = match.groupdict()
    if found.get("digits"):
        return int(found["digits"]) * 60 + int(found["minutes"])
    if found.get("spelled"):
        return _number(found["spelled"]) * 60 + TENS[found["tens"]]
    hour = _number(found["hour"]) * 60
    if found.get("past"):
        return hour + PAST[found["past"]] * (1 if found["side"] == "past" else -1)
    return hour + (30 if match[0].startswith("half ") else 0)


def _clock(minutes: int, half: str | None) -> str:
    """In 24 hours; without a half of the day, 1:00 to 6:59 are after noon."""
    if half is None:
        minutes += 720 if 60 <= minutes < 420 else 0
    elif minutes < 780:
        minutes = minutes % 720 + (720 if half == "pm" else 0)
    return f"{minutes // 60:02}:{minutes % 60:02}"


def times(message: str) -> set[str]:
    """The times it may mean: one where it says one; several in a correction."""
    text = re.sub(r"\b([ap])\.m\.", r"\1m", message.lower())
    parts = re.findall(rf"\b(?:{'|'.join(PARTS)})\b", text)
    halves = {"am" if part == "morning" else "pm" for part in parts} or {None}
    found = {CLOCKS[word] for word in re.findall(rf"\b(?:{'|'.join(CLOCKS)})\b", text)}
    for pattern in _TIMES:
        for match in re.finditer(pattern, text):
            own = match.groupdict().get("half")
            found |= {_clock(_minutes(match), half) for half in ([own] if own else halves)}
        text = re.sub(pattern, "~", text)
    return found or {f"{PARTS[part]:02}:00" for part in parts}


def days(message: str) -> set[str]:
    """The days it may mean: one where it says one; several in a correction."""
    text = message.lower()
    found = set()
    if re.search(r"\btoday\b|\btonight\b|\bthis (?:morning|afternoon|evening)\b", text):
        found.add("today")
    if re.search(r"\b(?:tomorrow|tmrw)\b", text):
        found.add("tomorrow")
    if re.search(r"\bevery (?:day|morning|afternoon|evening|night)\b", text):
        found.add("every day")
    for every, name, plural in re.findall(rf"(every )?\b({_WEEKDAY})(s?)\b(?!')", text):
        day = SHORT.get(name) or name.capitalize()
        found.add(f"every {day}" if every or plural else day)
    for match in (
        *re.finditer(rf"{_ORDINAL} (?:of )?{_MONTH}", text),
        *re.finditer(rf"{_MONTH} (?:the )?{_ORDINAL}", text),
    ):
        found.add(f"{_date(match)} {match['month'].capitalize()}")
    for match in re.finditer(rf"\bthe {_ORDINAL}(?! (?:of )?{_MONTH})", text):
        number = _date(match)
        end = (
            "th" if 4 <= number % 100 <= 20 else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
        )
        found.add(f"{number}{end}")
    return found


def _date(match: re.Match[str]) -> int:
    return int(match["day"]) if match["day"] else ORDINALS.index(match["word"]) + 1


def has_deadline(message: str) -> bool:
    """Whether a word of deadlines stands before a day or a time."""
    day = rf"{_WEEKDAY}|today|tonight|tomorrow|noon|midday|midnight|(?:the )?{_ORDINAL}"
    return bool(re.search(rf"\b(?:by|before|until) (?:{day}|{_HOUR})\b", message.lower()))
