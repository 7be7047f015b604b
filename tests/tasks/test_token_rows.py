"""Rows as tokens within a limit: what is cut, split, dropped, counted and kept on disk."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import hypothesis.strategies as st
import pytest
from datasets import Dataset
from hypothesis import given, settings
from transformers import PreTrainedTokenizerFast

from sift_cli.errors import ExitCode, SiftError
from sift_cli.tasks import tokens
from sift_cli.tasks.coder import TRAIN_ON, Coded, Coder
from sift_cli.tasks.conversations import Completion, Conversation, Message, Row, Text, line_of
from sift_cli.tasks.supervision import code
from sift_cli.tasks.token_rows import (
    CUT_AWAY,
    LONG,
    NOTHING,
    Limit,
    count_targets,
    encode_rows,
    fit,
    spread_of,
    tokenise,
)
from sift_cli.tasks.tokens import UNSEEN, Encoded
from tests.support import chats
from tests.tasks.test_conversations import chat
from tests.tasks.test_supervision import TURNS, coder, conversations


def source(*rows: Row) -> Dataset:
    numbers = [100 + at for at in range(len(rows))]
    return Dataset.from_dict({"value": [line_of(row) for row in rows], "row": numbers})


def encoded(rows: Sequence[Row], length: int = 999, too_long: str = "drop") -> Encoded:
    return encode_rows(source(*rows), coder(), Limit(length, too_long), "train")


def refusal(rows: Sequence[Row], one: Coder | None = None, **limit: Any) -> str:
    with pytest.raises(SiftError) as caught:
        encode_rows(source(*rows), one or coder(), Limit(**{"length": 999, **limit}), "train")
    assert caught.value.code == ExitCode.USAGE
    return str(caught.value)


def asked(words: int) -> Conversation:
    return chat(f"user: {'q' * words}", "assistant: ab")


def test_rows_hold_ids_labels_and_counts() -> None:
    data = encoded([TURNS, asked(2)])
    (first, second) = (one for one in code(coder(), [TURNS, asked(2)]) if isinstance(one, Coded))
    assert data.take([1, 0]) == [
        {"input_ids": one.ids, "labels": one.labels} for one in (second, first)
    ]
    assert data.numbers([0, 1]) == [100, 101]
    assert data.lengths == data.uncut == [len(first.ids), len(second.ids)]
    assert data.targets == [len("two") + len("four") + 2, len("ab") + 1]
    assert (data.truncated, data.dropped) == (0, {})


def test_a_target_is_predicted_from_something() -> None:
    """The first token of a row is learnt from nothing, so it is no target."""
    assert count_targets([5, 6, UNSEEN, 7]) == 2
    data = encode_rows(source(Text("abc")), coder(), Limit(99), "train")
    assert data.rows["labels"][0] == data.rows["input_ids"][0]
    assert data.targets == [3]


@settings(deadline=None)
@given(conversations(), st.integers(1, 80))
def test_cuts_at_every_length_keep_the_mask(row: Conversation, length: int) -> None:
    """TRL#3927: a mask that is made after the cut breaks off; it comes before."""
    # rule 3.2
    (whole,) = code(coder(), [row])
    assert isinstance(whole, Coded)
    found = fit(whole.ids, whole.labels, Limit(length, "cut-end"))
    expected = (whole.ids[:length], whole.labels[:length])
    if not count_targets(expected[1]):
        assert (found.parts, found.dropped) == ([], CUT_AWAY)
    else:
        assert (found.parts, found.dropped) == ([expected], None)
        assert found.cut == (len(whole.ids) > length)


@given(st.integers(2, 40), st.integers(2, 45))
def test_parts_of_a_text_learn_each_token_once(count: int, length: int) -> None:
    ids = list(range(count))
    found = fit(ids, ids, Limit(length, "split"))
    assert [one for part, _ in found.parts for one in part[1:]] == ids[1:]
    assert all(2 <= len(part) <= length and part == labels for part, labels in found.parts)
    assert sum(count_targets(labels) for _, labels in found.parts) == count - 1
    assert found.cut == (count > length)


def test_one_token_leaves_nothing_to_predict() -> None:
    assert fit([1, 2], [1, 2], Limit(1, "split")).dropped == LONG
    assert fit([1, 2], [1, 2], Limit(1, "cut-end")).dropped == CUT_AWAY


def test_too_long_rows_are_dropped_and_counted() -> None:
    short = len(encoded([asked(2)]).rows["input_ids"][0])
    rows = [*[asked(2)] * 3, asked(9), asked(2)]
    data = encoded(rows, short)
    assert data.numbers(range(4)) == [100, 101, 102, 104]
    assert data.lengths == [short] * 4
    assert data.uncut == [short] * 3 + [short + 7, short]
    assert data.dropped == {LONG: [103]}
    assert len(data) == len(data.targets) == 4


def test_a_row_whose_answer_is_cut_away_is_dropped_and_counted() -> None:
    """Such rows have a loss of nothing: trl#6668."""
    short = len(encoded([asked(2)]).rows["input_ids"][0])
    rows = [*[asked(2)] * 9, asked(40), asked(3)]
    data = encoded(rows, short - 1, "cut-end")
    assert data.dropped == {CUT_AWAY: [109]}
    assert data.truncated == 10
    assert data.numbers([9]) == [110]
    assert set(data.lengths) == {short - 1}
    assert data.targets == [3] * 9 + [2]


def test_an_error_where_any_row_is_too_long() -> None:
    rows = [asked(2), asked(90), asked(95)]
    said = refusal(rows, length=60, too_long="error")
    assert said.startswith("data.too_long: 2 of 3 rows of the train split are longer than ")
    assert "60 tokens, such as row 101, 102; the longest has 1" in said
    assert len(encoded(rows, 300, "error")) == 3


def test_rows_with_nothing_to_learn_are_dropped_and_counted() -> None:
    # rule 3.5
    untrained = Conversation((Message("user", "q"), Message("assistant", "a", train=False)))
    data = encoded([*[TURNS] * 4, untrained])
    assert data.dropped == {NOTHING: [104]}
    assert len(data) == 4
    said = refusal([untrained])
    assert said == (
        "data: all rows of the train split are dropped (1 nothing to learn); `sift data show` "
        "shows one"
    )


@pytest.mark.parametrize("train_on", TRAIN_ON)
def test_an_empty_answer_of_a_whole_row_is_dropped_and_counted(train_on: str) -> None:
    """It would teach to stop at once; `conversations` gives such a row nothing to learn."""
    silent = (chat("user: q", "assistant: ", given=2), Completion("q", " \n"))
    rows = source(*[TURNS] * 8, *silent)
    data = encode_rows(rows, coder(train_on=train_on), Limit(999), "train")
    assert data.dropped == {NOTHING: [108, 109]}
    assert len(data) == 8


def test_more_than_a_fifth_dropped_is_an_error() -> None:
    """A loss of 0.0 over no token succeeds elsewhere: trl#6668, unsloth#2900."""
    # rule 3.5
    short = len(encoded([asked(2)]).rows["input_ids"][0])
    fifth = [*[asked(2)] * 8, *[asked(3)] * 2]
    assert len(encoded(fifth, short)) == 8
    said = refusal([*fifth, asked(3)], length=short)
    assert said.startswith("data: 3 of 11 rows of the train split are dropped (3 too long); their ")
    assert f"p50 {short}, p95 {short + 1}, max {short + 1}, and data.max_length is {short}" in said
    assert refusal([asked(3)], length=short).startswith("data: all rows of the train split are dr")
    data = tokenise(source(*fifth, asked(3)), coder(), Limit(short), "train")
    assert len(data.dropped[LONG]) == 3


def test_texts_are_split_and_counted_once() -> None:
    data = encode_rows(source(Text("a" * 10), Text("b")), coder(), Limit(5, "split"), "train")
    assert [len(ids) for ids in data.rows["input_ids"]] == data.lengths == [5, 5, 3, 2]
    assert data.numbers(range(4)) == [100, 100, 100, 101]
    assert (data.uncut, data.truncated, sum(data.targets)) == ([11, 2], 1, 11)


def test_a_refused_row_is_named_by_its_number() -> None:
    spoken = Conversation((Message("system", "s"), *TURNS.messages))
    one = coder(chats.NO_SYSTEM)
    said = refusal([TURNS, spoken, TURNS, spoken], one)
    assert said == (
        "data: the train split, row 101: the template refuses it: no system turn (so with row 103)"
    )


def test_the_template_is_asked_before_the_rows() -> None:
    assert refusal([TURNS], coder(chats.MARKS_NOTHING)).startswith("data.template: model superv")
    assert refusal([TURNS], coder(chats.ENDS_NO_TURN)).startswith("data.template: model: answers")
    data = encode_rows(source(Completion("q", "a")), coder(chats.MARKS_NOTHING), Limit(9), "train")
    assert len(data) == 1


def test_a_template_for_rows_that_take_none_is_an_error() -> None:
    rows = [Completion("q", "a")]
    assert refusal(rows, coder(system="s")).startswith("data.system: rows of text take no template")
    named = Coder(coder().tokenizer, chats_template(), coder().stops)
    assert refusal(rows, named).startswith("data.template: rows of text take no template")


def chats_template() -> Any:
    from sift_cli.tasks.templates import choose_template

    return choose_template("chatml", chats.byte_tokenizer(None))


def test_percentiles_are_lengths_that_there_are() -> None:
    assert spread_of([7]) == {"p50": 7, "p95": 7, "max": 7}
    assert spread_of(list(range(1, 101))) == {"p50": 50, "p95": 95, "max": 100}


def test_many_rows_are_kept_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr(tokens, "CACHED_FROM", 2)
    calls: list[int] = []
    plain = PreTrainedTokenizerFast.apply_chat_template

    def counted(self: Any, chats: Any, **kwargs: Any) -> Any:
        calls.append(len(chats))
        return plain(self, chats, **kwargs)

    monkeypatch.setattr(PreTrainedTokenizerFast, "apply_chat_template", counted)
    rows = source(*[TURNS] * 5, asked(80))

    def made(one: Coder, length: int = 99, too_long: str = "drop") -> tuple[Encoded, bool]:
        calls.clear()
        data = encode_rows(rows, one, Limit(length, too_long), "train")
        return data, any(count > 2 for count in calls)  # the probe asks of two at once

    first, anew = made(coder())
    assert anew
    again, anew = made(coder())
    assert not anew
    assert again.take(range(5)) == first.take(range(5))
    for name in ("lengths", "targets", "uncut", "dropped", "truncated"):
        assert getattr(again, name) == getattr(first, name)
    assert again.dropped == {LONG: [105]}
    others = (
        coder(train_on="last-answer"),
        coder(system="s"),
        coder(chats.MARKED),
        coder(vocabulary=999),
    )
    for one in others:
        assert made(one)[1]
    assert made(coder(), 98)[1]
    assert made(coder(), too_long="cut-end")[1]
