"""Masks: what is learnt of a row, by marks and by prefixes, and every way a template can fail."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings
from transformers import PreTrainedTokenizerFast

from sift_cli.errors import SiftError
from sift_cli.models.loading import load_tokenizer
from sift_cli.tasks.coder import Coded, Coder, Refused, open_coder
from sift_cli.tasks.conversations import Completion, Conversation, Message, Row, Text
from sift_cli.tasks.supervision import code, probe, prompt_ids
from sift_cli.tasks.templates import Template, choose_template, stop_tokens
from sift_cli.tasks.tokens import UNSEEN
from tests.support import chats
from tests.support.chats import BEGIN, CHATML, END, START, byte_tokenizer, save_chat_model
from tests.tasks.test_conversations import chat

TURNS = chat("user: one", "assistant: two", "user: three", "assistant: four")


def coder(template: str | None = CHATML, begins: bool = False, **more: Any) -> Coder:
    tokenizer = byte_tokenizer(template, begins=begins)
    named = None if template is None else Template("model", template)
    return Coder(tokenizer, named, (tokenizer.convert_tokens_to_ids(END),), **more)


def coded(one: Coder, row: Row) -> Coded:
    (found,) = code(one, [row])
    assert isinstance(found, Coded), found
    return found


def learnt(one: Coder, row: Row) -> list[str]:
    """The text of each span that is learnt."""
    found = coded(one, row)
    return [one.word(found.ids[start:end]) for start, end in found.spans]


def refusal(one: Coder, row: Row) -> str:
    (found,) = code(one, [row])
    assert isinstance(found, Refused), found
    return found.why


def oracle(row: Conversation, tokenizer: PreTrainedTokenizerFast) -> tuple[list[int], list[int]]:
    """Ids and labels of ChatML, put together from parts that are tokenised alone."""
    ids: list[int] = []
    labels: list[int] = []
    last = row.answers[-1]
    for at, one in enumerate(row.messages[: last + 1]):
        for text, seen in (
            (f"{START}{one.role}\n", False),
            (one.content + END, at in row.answers),
            ("\n", False),
        ):
            part = tokenizer(text, add_special_tokens=False)["input_ids"]
            ids += part
            labels += part if seen else [UNSEEN] * len(part)
    return ids, labels


# Which tokens


@pytest.mark.parametrize("template", [CHATML, chats.MARKED, chats.MARKS_LINE_END])
def test_every_answer_is_learnt_with_its_end_of_turn_and_no_line_end(template: str) -> None:
    """TRL#1623: without the end-of-turn token a model never stops."""
    # rule 3.3
    assert learnt(coder(template), TURNS) == ["two<|im_end|>", "four<|im_end|>"]
    assert learnt(coder(template, train_on="last-answer"), TURNS) == ["four<|im_end|>"]
    every = coded(coder(template, train_on="all-tokens"), TURNS)
    assert every.labels == every.ids


@pytest.mark.parametrize("template", [CHATML, chats.MARKED, chats.MARKS_TWICE])
def test_train_false_leaves_one_message_out(template: str) -> None:
    first, last = TURNS.messages[1], TURNS.messages[3]
    row = replace(
        TURNS, messages=(TURNS.messages[0], replace(first, train=False), *TURNS.messages[2:])
    )
    spans = ["f", "our<|im_end|>"] if template is chats.MARKS_TWICE else ["four<|im_end|>"]
    assert learnt(coder(template), row) == spans
    row = replace(TURNS, messages=(*TURNS.messages[:3], replace(last, train=False)))
    spans = ["t", "wo<|im_end|>"] if template is chats.MARKS_TWICE else ["two<|im_end|>"]
    assert learnt(coder(template), row) == spans
    assert learnt(coder(template, train_on="last-answer"), row) == spans
    # what follows the last message to learn from is not read in vain
    assert (
        coded(coder(template), row).ids
        == coded(coder(template), replace(row, messages=row.messages[:2])).ids
    )


def test_train_false_beside_all_tokens_is_refused() -> None:
    row = replace(TURNS, messages=(replace(TURNS.messages[0], train=False), *TURNS.messages[1:]))
    assert "all-tokens leaves none out" in refusal(coder(train_on="all-tokens"), row)


def test_a_row_whose_answers_are_all_flagged_away_has_no_span() -> None:
    row = Conversation((TURNS.messages[0], replace(TURNS.messages[1], train=False)))
    assert coded(coder(), row).spans == []
    assert coded(coder(chats.MARKED), row).spans == []


def test_given_answers_are_not_learnt() -> None:
    assert learnt(coder(), replace(TURNS, given=3)) == ["four<|im_end|>"]
    assert learnt(coder(system="s"), replace(TURNS, given=3)) == ["four<|im_end|>"]


@pytest.mark.parametrize("template", [CHATML, chats.MARKED])
def test_an_empty_answer_teaches_to_stop(template: str) -> None:
    row = chat("user: one", "assistant: ", "user: three", "assistant: four")
    assert learnt(coder(template), row) == ["<|im_end|>", "four<|im_end|>"]


@pytest.mark.parametrize("template", [CHATML, chats.MARKED])
def test_an_answer_that_holds_the_end_token_as_text_is_learnt_whole(template: str) -> None:
    row = chat("user: one", f"assistant: a{END}b", "user: c", f"assistant: d{END}")
    assert learnt(coder(template), row) == [f"a{END}b{END}", f"d{END}{END}"]


def test_system_turns() -> None:
    begun = coder(system="be kind")
    assert begun.word(coded(begun, TURNS).ids).startswith(
        f"{START}system\nbe kind{END}\n{START}user"
    )
    for role in ("system", "developer"):
        own = replace(TURNS, messages=(Message(role, "own"), *TURNS.messages))
        assert "be kind" not in begun.word(coded(begun, own).ids)
        assert learnt(begun, own) == ["two<|im_end|>", "four<|im_end|>"]


def test_tool_turns_are_seen_and_not_learnt() -> None:
    call = {"function": {"name": "f", "arguments": {}}}
    row = Conversation(
        (
            Message("user", "q"),
            Message("assistant", "", more={"tool_calls": [call]}),
            Message("tool", "42"),
            Message("assistant", "a"),
        ),
        tools=({"function": {"name": "f"}},),
    )
    with_tools = coder(chats.WITH_TOOLS)
    assert learnt(with_tools, row) == [f"{[call]}{END}", f"a{END}"]
    assert with_tools.word(coded(with_tools, row).ids).startswith(START + '[{"function"')


def test_tools_that_a_template_does_not_show_are_not_lost_without_a_word() -> None:
    row = Conversation(TURNS.messages, tools=({"function": {"name": "f"}},))
    assert refusal(coder(), row) == "it has tools, which the template does not show"
    calling = replace(TURNS.messages[1], more={"tool_calls": [{"function": {}}]})
    row = Conversation((TURNS.messages[0], calling))
    assert refusal(coder(), row) == "it has tool_calls, which the template does not show"


def test_ids_are_those_of_one_call_of_the_template() -> None:
    # rule 3.1
    one = coder()
    whole = [message.shown() for message in TURNS.messages]
    expected = one.tokenizer.apply_chat_template(whole, tokenize=True, return_dict=True)
    assert coded(one, TURNS).ids == expected["input_ids"]


def test_pad_is_eos_and_the_end_is_learnt_all_the_same() -> None:
    """The end token pads as well: comparing ids with it would unlearn every end."""
    # rule 3.4
    one = coder()
    assert one.tokenizer.pad_token_id == one.tokenizer.eos_token_id == one.stops[0]
    found = coded(one, TURNS)
    at = found.spans[0][1] - 1
    assert found.labels[at] == found.ids[at] == one.tokenizer.pad_token_id


CONTENT = st.text(st.sampled_from("ab \n.é☃"), max_size=6)
ROLES = st.sampled_from(["user", "assistant", "tool", "system"])
FLAG = st.sampled_from([None, None, False])


@st.composite
def conversations(draw: st.DrawFn) -> Conversation:
    """Any order of turns, some answers flagged away; a last answer is learnt."""
    turns = [Message("user", draw(CONTENT))]
    for role in draw(st.lists(ROLES, max_size=5)):
        turns.append(Message(role, draw(CONTENT), draw(FLAG) if role == "assistant" else None))
    given_ones = draw(st.integers(0, len(turns)))
    turns.append(Message("assistant", draw(CONTENT)))
    turns += [Message("user", "x")] * draw(st.integers(0, 1))
    return Conversation(tuple(turns), given=given_ones)


BY_PREFIX, BY_MARKS, LINE_END = (coder(one) for one in (CHATML, chats.MARKED, chats.MARKS_LINE_END))


@settings(max_examples=60, deadline=None)
@given(st.lists(conversations(), min_size=1, max_size=3))
def test_the_mask_covers_exactly_the_answers(rows: list[Conversation]) -> None:
    """In batches of random conversations, against ids put together from parts."""
    # rule 3.2
    for one in (BY_PREFIX, BY_MARKS, LINE_END):
        for row, found in zip(rows, code(one, rows), strict=True):
            assert isinstance(found, Coded), found
            ids, labels = oracle(row, one.tokenizer)
            joined = [at for at in range(1, len(ids)) if "\n\n" in one.word(ids[at - 1 : at + 1])]
            if not joined:  # two line ends are one token where they meet
                assert found.ids == ids
                assert found.labels == labels
            text = one.word([label for label in found.labels if label != UNSEEN])
            said = "".join(row.messages[at].content + END for at in row.answers)
            assert text.replace("\n", "") == said.replace("\n", "")


def test_a_token_across_the_boundary_is_no_answers_alone() -> None:
    """The header's line end and the answer's are one token, which no prompt ends with."""
    row = chat("user: q", "assistant: \nfour")
    assert learnt(coder(), row) == ["four<|im_end|>"]
    found = coded(coder(), row)
    assert coder().word(found.ids[found.spans[0][0] - 1 : found.spans[0][0]]) == "\n\n"


# Templates that fail


def test_marks_without_prefixes_and_prefixes_without_marks() -> None:
    """transformers' mask of a template without marks is all zero; it is not asked for one."""
    # rule 3.2
    assert learnt(coder(CHATML), TURNS) == learnt(coder(chats.MARKED), TURNS)


THINKS = chat(
    "user: q", "assistant: <think>x</think>two", "user: r", "assistant: <think>y</think>four"
)


def test_a_template_that_drops_earlier_thinking_is_refused_with_the_way_out() -> None:
    # rule 3.2
    said = refusal(coder(chats.DROPS_THINKING), THINKS)
    assert "rewrites what came before an answer" in said
    assert "data.train_on: last-answer" in said
    last = coder(chats.DROPS_THINKING, train_on="last-answer")
    assert learnt(last, THINKS) == ["<think>y</think>four<|im_end|>"]
    assert last.word(coded(last, THINKS).ids).count("think") == 2
    assert learnt(coder(chats.DROPS_THINKING), TURNS) == ["two<|im_end|>", "four<|im_end|>"]


def test_a_template_without_the_prefix_property_is_refused() -> None:
    row = replace(TURNS, messages=(Message("system", "s"), *TURNS.messages))
    assert "set data.train_on: last-answer" in refusal(coder(chats.MOVES_SYSTEM), row)
    assert learnt(coder(chats.MOVES_SYSTEM, train_on="last-answer"), row) == [f"{START}four{END}"]


def test_a_prompt_that_goes_on_otherwise_is_no_boundary_within_a_token() -> None:
    """A generation prompt that ends with a token of its own, such as <think>."""
    forced = CHATML.replace("assistant\\n' }}{% endif %}", "assistant\\nT' }}{% endif %}")
    assert forced != CHATML
    assert "rewrites" in refusal(coder(forced), TURNS)


def test_a_template_that_does_not_end_turns_is_an_error() -> None:
    said = r"^data.template: model: answers end with '.', and generation stops at '<\|im_end\|>'"
    for template in (chats.ENDS_NO_TURN, chats.MARKS_NO_END):
        with pytest.raises(SiftError, match=said):
            probe(coder(template))


def test_turns_must_end_with_a_token_at_which_generation_stops() -> None:
    # rule 3.3
    other = replace(coder(), stops=(coder().tokenizer.convert_tokens_to_ids("<|endoftext|>"),))
    with pytest.raises(
        SiftError, match=r"end with '<\|im_end\|>', and generation stops at '<\|endof"
    ):
        probe(other)
    with pytest.raises(SiftError, match="name the token in eos_token_id"):
        probe(replace(other, train_on="all-tokens"))
    probe(replace(other, stops=(*other.stops, coder().stops[0])))


@pytest.mark.parametrize("template", [chats.SHOWS_NO_ANSWER, chats.MARKS_NOTHING])
def test_a_template_that_supervises_nothing_is_an_error(template: str) -> None:
    with pytest.raises(SiftError, match=r"^data.template: model supervises nothing"):
        probe(coder(template))


@pytest.mark.parametrize(
    "template", [CHATML, chats.MARKED, chats.MARKS_TWICE, chats.DROPS_THINKING, chats.NO_SYSTEM]
)
def test_a_good_template_passes_the_probe(template: str) -> None:
    probe(coder(template))


def test_two_beginnings_are_an_error() -> None:
    """OpenRLHF#393: a beginning by the template and one by the tokenizer."""
    # rule 3.1
    assert refusal(coder(chats.TWO_BEGINNINGS), TURNS).startswith(f"it begins with two '{BEGIN}'")
    assert refusal(coder(begins=True), Text(f"{BEGIN}a")).startswith("it begins with two")
    single = coder("{{ bos_token }}" + CHATML, begins=True)
    assert coded(single, TURNS).ids.count(single.tokenizer.bos_token_id) == 1


def test_a_token_without_an_embedding_is_an_error() -> None:
    size = len(coder().tokenizer)
    assert "no embedding" in refusal(coder(vocabulary=size - 3), TURNS)
    assert coded(coder(vocabulary=size), TURNS)


def test_what_a_template_refuses_is_told_of_its_row() -> None:
    rows = [TURNS, replace(TURNS, messages=(Message("system", "s"), *TURNS.messages)), TURNS]
    found = code(coder(chats.NO_SYSTEM), rows)
    assert [type(one) for one in found] == [Coded, Refused, Coded]
    assert found[1] == Refused("the template refuses it: no system turn")


def test_a_row_that_begins_with_an_answer() -> None:
    row = chat("assistant: hi", "user: q", "assistant: a")
    assert "begins with an answer" in refusal(coder(), row)
    assert learnt(coder(chats.MARKED), row) == ["hi<|im_end|>", "a<|im_end|>"]
    silent = replace(row, messages=(replace(row.messages[0], train=False), *row.messages[1:]))
    assert learnt(coder(), silent) == ["a<|im_end|>"]


# Rows without a template


@pytest.mark.parametrize("begins", [False, True])
def test_a_completion_keeps_its_boundary_and_gets_its_end(begins: bool) -> None:
    one = coder(None, begins)
    for prompt, completion in (("q: ", "a"), ("q\n", "\na"), ("", "a"), ("q", f"a{END}")):
        found = coded(one, Completion(prompt, completion))
        first = [one.tokenizer.bos_token_id] if begins else []
        before = one.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        after = one.tokenizer(completion.removesuffix(END), add_special_tokens=False)["input_ids"]
        assert found.ids == [*first, *before, *after, one.end]
        assert found.spans == [(len(first) + len(before), len(found.ids))]
        assert prompt_ids(one, Completion(prompt, completion)) == first + before
    every = coded(replace(one, train_on="all-tokens"), Completion("q", "a"))
    assert every.labels == every.ids


def test_every_token_of_a_text_is_learnt_and_its_end() -> None:
    one = coder(None, begins=True)
    found = coded(one, Text("ab"))
    assert one.word(found.ids) == f"{BEGIN}ab{END}"
    assert found.labels == found.ids


def test_rows_of_several_kinds_come_back_in_order() -> None:
    rows: list[Row] = [Text("t"), TURNS, Completion("q", "a"), TURNS]
    found = code(coder(), rows)
    assert [one.labels for one in found if isinstance(one, Coded)] == [
        coded(coder(), row).labels for row in rows
    ]


def test_a_prompt_is_what_training_has_before_the_answer() -> None:
    # rule 3.1
    for template in (CHATML, chats.MARKED):
        one = coder(template, system="s")
        found = coded(one, TURNS)
        start = found.spans[-1][0]
        assert prompt_ids(one, TURNS) == found.ids[:start]
        asked = replace(TURNS, messages=TURNS.messages[:3])
        assert prompt_ids(one, asked) == found.ids[:start]
    with pytest.raises(SiftError, match="no system turn"):
        prompt_ids(coder(chats.NO_SYSTEM, system="s"), TURNS)


# Choosing


def test_a_base_without_a_template_names_the_choices(tmp_path: Path) -> None:
    folder = save_chat_model(tmp_path, None)
    one = open_coder(folder, load_tokenizer(folder))
    with pytest.raises(
        SiftError, match=r"no chat template of its own; choose alpaca, chatml or FILE"
    ):
        code(one, [TURNS])
    with pytest.raises(SiftError, match="no chat template"):
        probe(one)
    assert coded(one, Completion("q", "a"))
    for name in ("chatml", "alpaca"):
        probe(open_coder(folder, load_tokenizer(folder), template=name))


def test_chatml_is_what_it_is_elsewhere() -> None:
    tokenizer = byte_tokenizer(None)
    found = choose_template("chatml", tokenizer)
    assert found is not None
    assert coded(replace(coder(), template=found), TURNS) == coded(coder(), TURNS)


def test_alpaca_with_and_without_input() -> None:
    tokenizer = byte_tokenizer(None)
    one = replace(coder(None), template=choose_template("alpaca", tokenizer))
    bare = coded(one, chat("user: do it", "assistant: done", "user: again", "assistant: so"))
    assert one.word(bare.ids) == (
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n### Instruction:\ndo it\n\n### Response:\ndone<|im_end|>"
        "\n\n### Instruction:\nagain\n\n### Response:\nso<|im_end|>"
    )
    assert [one.word(bare.ids[a:b]) for a, b in bare.spans] == ["done<|im_end|>", "so<|im_end|>"]
    asked = Message("user", "do it\n\nnow", more={"instruction": "do it", "input": "now"})
    row = Conversation((asked, Message("assistant", "done")))
    assert one.word(coded(one, row).ids) == (
        "Below is an instruction that describes a task, paired with an input that provides further "
        "context. Write a response that appropriately completes the request.\n\n### Instruction:\n"
        "do it\n\n### Input:\nnow\n\n### Response:\ndone<|im_end|>"
    )
    spoken = Conversation((Message("system", "Be kind."), *TURNS.messages))
    assert one.word(coded(one, spoken).ids).startswith("Be kind.\n\n### Instruction:\none\n\n###")
    assert "no turn of tool" in refusal(one, chat("user: q", "tool: t", "assistant: a"))


def test_shipped_templates_begin_as_the_tokenizer_does() -> None:
    for begins in (False, True):
        tokenizer = byte_tokenizer(None, begins=begins)
        for name in ("alpaca", "chatml"):
            one = replace(
                coder(None), tokenizer=tokenizer, template=choose_template(name, tokenizer)
            )
            assert coded(one, TURNS).ids.count(tokenizer.bos_token_id) == int(begins)
            assert len(coded(one, TURNS).spans) == 2


def test_a_template_of_a_file(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(None)
    file = tmp_path / "mine.jinja"
    file.write_text(chats.MARKED)
    assert choose_template(str(file), tokenizer) == Template(str(file), chats.MARKED)
    file.write_text("{% for x in messages %}\n{{ x }\n{% endfor %}")
    with pytest.raises(SiftError, match=r"mine.jinja:2: no Jinja template: "):
        choose_template(str(file), tokenizer)
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(SiftError, match="not a text file"):
        choose_template(str(file), tokenizer)
    with pytest.raises(SiftError, match=r"'llama' is none of model, alpaca, chatml, or a file"):
        choose_template("llama", tokenizer)


def test_a_template_that_needs_a_token_the_vocabulary_lacks_is_an_error(tmp_path: Path) -> None:
    """No vocabulary is made larger for it."""
    # rule 3.4
    tokenizer = byte_tokenizer(None, lacks=(START,))
    said = r"chatml needs the token <\|im_start\|>, which the model's vocabulary lacks"
    with pytest.raises(SiftError, match=said):
        choose_template("chatml", tokenizer)
    file = tmp_path / "mine.jinja"
    file.write_text("{# <|not_needed|> #}{{ '<|turn|>' + messages[0].content }}")
    with pytest.raises(SiftError, match=r"mine.jinja needs the token <\|turn\|>"):
        choose_template(str(file), tokenizer)
    unending = byte_tokenizer(None, lacks=(END,))
    with pytest.raises(SiftError, match="alpaca needs a eos_token, and the tokenizer has none"):
        choose_template("alpaca", unending)


def test_where_generation_stops(tmp_path: Path) -> None:
    folder = save_chat_model(tmp_path / "a", stops=[0, 7])
    tokenizer = load_tokenizer(folder)
    assert stop_tokens(folder, tokenizer) == (0, 7)
    (folder / "generation_config.json").write_text("{}")
    assert stop_tokens(folder, tokenizer) == (tokenizer.eos_token_id,)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": None}))
    assert stop_tokens(folder, tokenizer) == (tokenizer.eos_token_id,)
    (folder / "generation_config.json").write_text("[")
    with pytest.raises(SiftError, match=r"generation_config.json: damaged"):
        stop_tokens(folder, tokenizer)
    (folder / "generation_config.json").write_text('{"eos_token_id": "x"}')
    with pytest.raises(SiftError, match="names no token that ends a text"):
        stop_tokens(folder, tokenizer)


def test_a_row_without_a_template_ends_where_generation_stops() -> None:
    one = coder()
    assert one.end == one.tokenizer.eos_token_id
    assert replace(one, stops=(9, 8)).end == 9
