"""Answers: greedy against a loop of argmax, where they end, how long they are, how they stream."""

from dataclasses import replace
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from transformers import PreTrainedModel

from sift_cli.errors import SiftError
from sift_cli.models.loading import positions_of
from sift_cli.tasks.coder import Coder
from sift_cli.tasks.conversations import Row, Text
from sift_cli.tasks.generation import Answer, _Stream, answer
from sift_cli.tasks.supervision import code, prompt_ids
from sift_cli.tasks.templates import Template
from tests.support.causal import causal_model
from tests.support.chats import BEGIN, CHATML, END, TWO_BEGINNINGS, byte_tokenizer
from tests.tasks.test_conversations import chat

ASKED = chat("user: what is one?")


def coder(template: str = CHATML, **more: Any) -> Coder:
    tokenizer = byte_tokenizer(template, **more)
    return Coder(
        tokenizer,
        Template("model", template),
        (tokenizer.convert_tokens_to_ids(END),),
        len(tokenizer),
    )


CODER = coder()


def talker(**more: Any) -> PreTrainedModel:
    """A random model of the tokens of CODER, whose logits are far from flat."""
    return causal_model("llama", torch.float32, vocab_size=len(CODER.tokenizer), **more)


def expected(model: PreTrainedModel, one: Coder, row: Row, longest: int) -> list[int]:
    """The likeliest token each time, by whole forward passes without a cache."""
    ids = prompt_ids(one, row)
    made: list[int] = []
    with torch.no_grad():
        while len(made) < longest and not (made and made[-1] in one.stops):
            logits = model(torch.tensor([ids + made]), use_cache=False).logits[0, -1]
            made.append(int(logits.argmax()))
    return made


def spoken(one: Coder, ids: list[int]) -> str:
    return str(one.tokenizer.decode(ids, skip_special_tokens=True))


@pytest.mark.parametrize("seed", range(4))
def test_the_likeliest_token_each_time(seed: int) -> None:
    model = talker(seed=seed)
    made = expected(model, CODER, ASKED, 20)
    assert answer(model, CODER, ASKED, longest=20) == Answer(spoken(CODER, made), 20, False)
    assert len(set(made)) > 3  # no model that says one thing alone


def test_settings_that_a_model_ships_are_neither_obeyed_nor_lost(
    capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    model = talker()
    made = expected(model, CODER, ASKED, 20)
    model.generation_config.update(
        do_sample=True,
        temperature=5.0,
        top_p=0.9,
        repetition_penalty=3.0,
        suppress_tokens=made,
        max_length=7,
        min_new_tokens=19,
        use_cache=False,
    )
    model.config.use_cache = False
    shipped = model.generation_config.to_dict()
    model.train()
    state = torch.get_rng_state()
    for _ in range(2):
        assert answer(model, CODER, ASKED, longest=20).text == spoken(CODER, made)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.generation_config.to_dict() == shipped
    assert model.config.use_cache is False
    assert model.training
    assert capfd.readouterr() == ("", "")
    assert not recwarn.list


def test_the_cache_is_on_after_training_turned_it_off() -> None:
    # rule 3.8
    model = talker()
    model.config.use_cache = False
    lengths = []
    model.register_forward_pre_hook(
        lambda _, args, given: lengths.append(given["input_ids"].shape[1]), with_kwargs=True
    )
    answer(model, CODER, ASKED, longest=5)
    assert lengths[1:] == [1] * 4


def test_an_answer_ends_at_the_token_that_ended_the_turns_it_learnt() -> None:
    # rule 3.3: what training puts at an answer's end and what generation stops at are one token
    model = talker()
    made = expected(model, CODER, ASKED, 20)
    stop = made[5]
    first = made.index(stop)
    ends = replace(CODER, stops=(*CODER.stops, stop))
    found = answer(model, ends, ASKED, longest=20)
    assert found == Answer(spoken(CODER, made[:first]), first + 1, True)
    (row,) = code(CODER, [chat("user: what is one?", "assistant: one")])
    assert row.ids[row.spans[-1][1] - 1] in CODER.stops  # type: ignore[union-attr]


def test_an_answer_is_shortened_to_what_room_there_is() -> None:
    asked = len(prompt_ids(CODER, ASKED))
    roomy, narrow = (talker(max_position_embeddings=asked + more) for more in (40, 3))
    assert answer(narrow, CODER, ASKED, longest=20).tokens == 3
    assert answer(roomy, CODER, ASKED, longest=20).tokens == 20
    full = talker(max_position_embeddings=asked)
    with pytest.raises(SiftError, match=f"has {asked} tokens and the model takes {asked}, which"):
        answer(full, CODER, ASKED)


def test_a_prompt_of_nothing() -> None:
    with pytest.raises(SiftError, match="an empty prompt"):
        answer(talker(), CODER, Text(""))


def test_two_beginnings_are_refused() -> None:
    # rule 3.1: a template's own and the tokenizer's
    for one, row in (
        (coder(TWO_BEGINNINGS, begins=True), ASKED),
        (coder(begins=True), Text(f"{BEGIN}a")),
    ):
        with pytest.raises(SiftError, match="the prompt: it begins with two"):
            answer(talker(), one, row)


def test_pieces_make_the_text() -> None:
    for seed in range(4):
        said: list[str] = []
        found = answer(talker(seed=seed), CODER, ASKED, longest=30, said=said.append)
        assert "".join(said) == found.text
        assert len(said) > 5
        assert all(said)


@settings(max_examples=50)
@given(st.text(max_size=12), st.booleans())
def test_no_letter_is_shown_in_parts(text: str, ended: bool) -> None:
    said: list[str] = []
    stream = _Stream(CODER, said.append)
    stream.put(torch.tensor([[1, 2, 3]]))
    ids = CODER.tokenizer(text, add_special_tokens=False)["input_ids"]
    for one in [*ids, *CODER.stops] if ended else ids:
        stream.put(torch.tensor([one]))
    stream.end()
    assert "".join(said) == spoken(CODER, ids)
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in said)


def test_positions() -> None:
    assert positions_of(talker(max_position_embeddings=77)) == 77
    assert positions_of(causal_model("gpt2")) == 128
    assert positions_of(causal_model("mamba")) is None
