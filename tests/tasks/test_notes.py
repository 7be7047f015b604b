"""The notes that come with sift: their form, and that each answer follows from its message."""

import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from sift_cli.tasks.sources import BUILTIN
from tests.support.notes import (
    MONTHS,
    SHORT,
    WEEKDAYS,
    days,
    has_deadline,
    times,
    words_of,
)

CARD = Path(__file__).parents[2] / "docs" / "builtin-notes.md"
Splits = dict[str, list[list[dict[str, str]]]]

KINDS = ("event", "task", "buy", "fact")
DAY = (
    rf"(?:today|tomorrow|(?:every )?(?:{'|'.join(WEEKDAYS)})|every day"
    rf"|[1-9]\d? (?:{'|'.join(MONTHS)})|[1-9]\d?(?:st|nd|rd|th))"
)
TIME = r"(?:[01]\d|2[0-3]):[0-5]\d"
WHEN = rf"-|(?P<by>by )?(?:(?P<day>{DAY})(?: (?P<time>{TIME}))?|(?P<alone>{TIME}))"


@dataclass(frozen=True)
class Note:
    """An answer in parts, with all that its user had said by then, first to last."""

    said: tuple[str, ...]
    kind: str
    when: str
    what: str
    where: str

    @property
    def text(self) -> str:
        """All that the user said."""
        return " ".join(one if one[-1] in ".!?" else f"{one}." for one in self.said)


@pytest.fixture(scope="module")
def splits() -> Splits:
    texts = {name: BUILTIN / "notes" / f"{name}.jsonl" for name in ("train", "validation")}
    return {
        name: [
            json.loads(line)["messages"]
            for line in path.read_text(encoding="utf-8").strip().split("\n")
        ]
        for name, path in texts.items()
    }


@pytest.fixture(scope="module")
def notes(splits: Splits) -> list[Note]:
    return [note for part in splits.values() for messages in part for note in notes_of(messages)]


def notes_of(messages: list[dict[str, str]]) -> Iterator[Note]:
    for at in range(1, len(messages), 2):
        fields = messages[at]["content"].split(" | ")
        said = tuple(message["content"] for message in messages[:at:2])
        assert len(fields) == 4, fields
        yield Note(said, *fields)


def parted(when: str) -> tuple[bool, str | None, str | None]:
    """Whether it is a deadline, its day, its time."""
    match = re.fullmatch(WHEN, when)
    assert match, when
    return bool(match["by"]), match["day"], match["time"] or match["alone"]


def is_within(words: list[str], text: list[str]) -> bool:
    """Whether the words stand in the text in this order, others among them or not."""
    rest = iter(text)
    return all(word in rest for word in words)


def is_run(words: list[str], text: list[str]) -> bool:
    """Whether the words stand in the text side by side."""
    return any(text[at : at + len(words)] == words for at in range(len(text)))


def test_there_are_enough_notes_of_each_kind(splits: Splits) -> None:
    for split, least, share in (("train", 400, 60), ("validation", 100, 15)):
        assert len(splits[split]) >= least
        kinds = Counter(messages[-1]["content"].split(" | ")[0] for messages in splits[split])
        assert set(kinds) == set(KINDS)
        assert min(kinds.values()) >= share


def test_a_row_is_one_turn_or_two(splits: Splits) -> None:
    for split, least in (("train", 30), ("validation", 8)):
        turns = Counter(len(messages) // 2 for messages in splits[split])
        assert set(turns) == {1, 2}
        assert turns[2] >= least
        for messages in splits[split]:
            roles = [message["role"] for message in messages]
            assert roles == ["user", "assistant"] * (len(messages) // 2)
            assert all(set(message) == {"role", "content"} for message in messages)


def test_every_answer_has_the_form(notes: list[Note]) -> None:
    for note in notes:
        assert note.kind in KINDS
        parted(note.when)
        for field in (note.what, note.where):
            assert field
            assert field == field.strip()
            assert field[-1] not in ".,!?;:"
        assert note.what != "-"
        assert not note.what[0].islower()
        assert (note.when == "-" and note.where != "-") or note.kind != "fact", note
        assert len(f"{note.kind} | {note.when} | {note.what} | {note.where}") <= 100


def test_the_time_follows_from_the_message(notes: list[Note]) -> None:
    sure = 0
    for note in notes:
        if note.kind != "fact":
            time, possible = parted(note.when)[2], times(note.text)
            assert (time in possible) if time else not possible, (note, possible)
            sure += len(possible) < 2
    assert sure > 450


def test_the_day_follows_from_the_message(notes: list[Note]) -> None:
    sure = 0
    for note in notes:
        if note.kind != "fact":
            day, possible = parted(note.when)[1], days(note.text)
            assert (day in possible) if day else not possible, (note, possible)
            sure += len(possible) < 2
    assert sure > 450


def test_a_deadline_is_one_in_the_message_too(notes: list[Note]) -> None:
    for note in notes:
        if note.kind != "fact":
            deadline = parted(note.when)[0]
            assert deadline or not has_deadline(note.text), note
            assert not deadline or re.search(r"\b(?:by|before|until)\b", note.text.lower()), note


def test_every_word_of_an_answer_comes_from_its_message(notes: list[Note]) -> None:
    for note in notes:
        what, where = words_of(note.what), words_of(note.where)
        text = words_of(note.text)
        assert set(what) <= set(text), note
        assert note.where == "-" or is_run(where, text), note
        if len(note.said) == 1:
            assert is_within(what, text), note
            assert note.where == "-" or note.where.lower() in note.said[0].lower(), note


def test_the_verb_of_buying_is_left_out(notes: list[Note]) -> None:
    for note in notes:
        if note.kind == "buy":
            assert words_of(note.what)[0] not in ("buy", "get", "order", "need", "pick"), note


def test_names_keep_their_letters(notes: list[Note]) -> None:
    for note in notes:
        for field in (note.what, note.where):
            for word in field.split()[1:]:
                if word not in ("-", "&", "+"):
                    assert word.strip(",") in note.text, note


def test_articles_places_and_days_are_left_out(notes: list[Note]) -> None:
    dates = {*WEEKDAYS, *MONTHS, *SHORT, "today", "tonight", "tomorrow"}
    for note in notes:
        for field in (note.what, note.where):
            assert words_of(field)[0] not in ("a", "an", "the", "some"), note
        if note.kind == "fact":
            assert words_of(note.where)[0] not in ("is", "are", "was", "were"), note
        else:
            assert words_of(note.where + " ")[0] not in ("at", "in", "on", "to", "from"), note
            assert not dates & set(note.what.split()), note
            assert not dates & set(note.where.split()), note


@pytest.mark.parametrize(
    ("said", "time", "day"),
    [
        ("Half six on Fridays.", "18:30", "every Friday"),
        ("At three on the 3rd of May.", "15:00", "3 May"),
        ("Tonight at eight.", "20:00", "today"),
        ("Tomorrow at eight.", "08:00", "tomorrow"),
        ("A quarter to seven, Monday.", "18:45", "Monday"),
        ("Every night.", "21:00", "every day"),
        ("At 6:50 in the morning on the fourteenth.", "06:50", "14th"),
    ],
)
def test_days_and_times_are_read_as_the_card_says(said: str, time: str, day: str) -> None:
    assert (times(said), days(said)) == ({time}, {day})


def test_the_card_shows_rows_and_tells_how_many(splits: Splits) -> None:
    text = CARD.read_text(encoding="utf-8")
    shown = re.findall(r"^(.+)\n(.+ \| .+)$", text.split("```")[1], re.MULTILINE)
    rows = [tuple(message["content"] for message in messages) for messages in splits["train"]]
    assert len(shown) == len(KINDS)
    assert set(shown) <= set(rows)
    numbers = {split: len(part) for split, part in splits.items()}
    assert f"{numbers['train']}\nconversations" in text
    assert f"and {numbers['validation']} to validate on" in text


def test_no_note_occurs_twice(splits: Splits) -> None:
    for of in (0, -1):
        every = Counter(
            tuple(words_of(messages[of]["content"]))
            for part in splits.values()
            for messages in part
        )
        assert [words for words, count in every.items() if count > 1] == []


def test_the_splits_of_the_notes_share_no_run_of_six_words(splits: Splits) -> None:
    runs = {split: set(_runs(part)) for split, part in splits.items()}
    assert len(runs["train"]) > 2000
    assert runs["train"] & runs["validation"] == set()


def _runs(part: list[list[dict[str, str]]]) -> Iterator[tuple[str, ...]]:
    for messages in part:
        for message in messages[::2]:
            words = words_of(message["content"])
            yield from (tuple(words[at : at + 6]) for at in range(len(words) - 5))
