"""`sift predict` and `sift chat` on a language model: what is asked, what is told, what ends it."""

import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sift_cli.cli import chatting
from sift_cli.errors import SiftError
from sift_cli.system.terminal import visible
from sift_cli.tasks import generation, language
from sift_cli.tasks.conversations import Message
from sift_cli.tasks.generation import Answer, Said
from tests.support.causal import save_talker
from tests.support.chats import CHATML, TWO_BEGINNINGS
from tests.support.command import ENV, process, sift
from tests.support.models import tiny_model, tiny_tokenizer

LONGEST = 8


def save_classifier(folder: Path) -> Path:
    tiny_model("bert", torch.float32, 2).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_talker(tmp_path_factory.mktemp("talker") / "model")


def plainly(folder: Path, turns: list[tuple[str, str]], longest: int = LONGEST) -> str:
    """What transformers alone answers, greedily."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    chat = [{"role": role, "content": text} for role, text in turns]
    given = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    settings = {"do_sample": False, "temperature": None, "top_p": None}
    found = model.generate(**given, **settings, max_new_tokens=longest)
    return str(tokenizer.decode(found[0, given["input_ids"].shape[1] :], skip_special_tokens=True))


# predict


def test_a_file_of_rows_to_a_file_of_answers(talker: Path, tmp_path: Path) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "new" / "out.jsonl"
    rows = [{"instruction": f"what is {at}?", "output": f"it is {at}"} for at in range(3)]
    source.write_text("\n".join(map(json.dumps, rows)))
    done = sift("predict", talker, "--input", source, "--output", out, "--max-new-tokens", LONGEST)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert lines == [
        {
            "row": at,
            "prompt": f"what is {at}?",
            "answer": plainly(talker, [("user", f"what is {at}?")]),
            "tokens": LONGEST,
            "ended": False,
            "expected": f"it is {at}",
        }
        for at in range(3)
    ]
    assert len({line["answer"] for line in lines}) > 1
    again = sift("predict", talker, "--input", source, "--max-new-tokens", LONGEST, "--json")
    assert json.loads(again.stdout)["predictions"] == lines


def test_arguments_and_lines_are_asked_alike(talker: Path, tmp_path: Path) -> None:
    source = tmp_path / "in.txt"
    source.write_text("one?\ntwo?\n")
    texts = sift("predict", talker, "one?", "two?", "--max-new-tokens", LONGEST, "--json")
    found = json.loads(texts.stdout)["predictions"]
    assert [one["answer"] for one in found] == [
        plainly(talker, [("user", text)]) for text in ("one?", "two?")
    ]
    lines = sift("predict", talker, "--input", source, "--max-new-tokens", LONGEST, "--json")
    read = json.loads(lines.stdout)["predictions"]
    assert [one["answer"] for one in read] == [one["answer"] for one in found]
    table = sift("predict", talker, "--input", source, "--max-new-tokens", LONGEST)
    assert [line.split("\t")[0] for line in table.stdout.splitlines()] == ["text", "one?", "two?"]


def test_each_prompt_is_tokenised_once(talker: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, ids = [], generation.prompt_ids
    monkeypatch.setattr(generation, "prompt_ids", lambda *one: seen.append(one) or ids(*one))
    assert sift("predict", talker, "one?", "two?", "--max-new-tokens", 1).returncode == 0
    assert len(seen) == 2


def test_lines_are_written_as_they_come(
    talker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, source, held = tmp_path / "out.jsonl", tmp_path / "in.txt", []
    source.write_text("one?\ntwo?\nthree?\n")

    def slow(*args: object, **more: object) -> Answer:
        held.append(out.read_text().count("\n") if out.exists() else 0)
        if len(held) == 3:
            raise KeyboardInterrupt
        return Answer("a", 1, True)

    monkeypatch.setattr(language, "answer_to", slow)
    done = sift("predict", talker, "--input", source, "--output", out)
    assert done.returncode == 130
    assert held == [0, 1, 2]
    assert [json.loads(one)["row"] for one in out.read_text().splitlines()] == [0, 1]
    assert done.stderr.startswith(f"{out} holds 2 of 3 rows; --resume goes on with it")
    asked: list[object] = []
    monkeypatch.setattr(
        language, "answer_to", lambda *one, **_: asked.append(one) or Answer("b", 1, True)
    )
    again = sift("predict", talker, "--input", source, "--output", out, "--resume")
    assert (again.returncode, again.stderr, len(asked)) == (0, "", 1)
    lines = [json.loads(one) for one in out.read_text().splitlines()]
    assert [(one["row"], one["answer"]) for one in lines] == [(0, "a"), (1, "a"), (2, "b")]


def test_a_prompt_without_room_is_told_before_the_first_answer(
    talker: Path, tmp_path: Path
) -> None:
    source, out = tmp_path / "in.txt", tmp_path / "out.jsonl"
    source.write_text("one?\n" + "b" * 300)
    done = sift("predict", talker, "--input", source, "--output", out)
    assert done.returncode == 2
    assert done.stderr.startswith(f"--input {source}: row 1: the prompt has 3")
    assert "the model takes 256" in done.stderr
    assert not out.exists()


def test_what_predict_refuses(talker: Path, tmp_path: Path) -> None:
    source, there = tmp_path / "in.txt", tmp_path / "there.jsonl"
    source.write_text("one?\n")
    there.write_text("kept")
    base = save_classifier(tmp_path / "base")
    for args, said in (
        ((talker,), "give texts to predict, or a file of them with --input"),
        ((talker, "a", "--input", source), "one of the two"),
        ((talker, "a", "--output", there), "they are for the rows of --input"),
        ((talker, "--input", source, "--output", there), f"--output {there}: exists already"),
        ((talker, "--input", source, "--output", tmp_path / "a.csv"), "must end in .jsonl"),
        ((talker, "a", "--pair", "b"), "takes one text at a time"),
        ((base, "--input", source), f"--input {source}: use one of .csv, .tsv, .jsonl, .parquet"),
        ((talker, "--input", tmp_path / "no.jsonl"), "no such file"),
    ):
        done = sift("predict", *args)
        assert done.returncode == 2, said
        assert said in done.stderr
    assert there.read_text() == "kept"


@pytest.mark.parametrize("command", [("predict", "{}", "a"), ("chat", "{}", "--once", "a")])
def test_a_prompt_with_two_beginnings_is_refused(tmp_path: Path, command: tuple[str, ...]) -> None:
    # rule 3.1
    folder = save_talker(tmp_path / "model", TWO_BEGINNINGS, begins=True)
    done = sift(*(one.format(folder) for one in command))
    assert done.returncode == 2
    assert "the prompt: it begins with two" in done.stderr


def test_one_beginning_where_the_tokenizer_puts_one_too(tmp_path: Path) -> None:
    # rule 3.1: the template's beginning, rendered and tokenised again, would come twice
    folder = save_talker(tmp_path / "model", "{{ bos_token }}" + CHATML, begins=True)
    wanted = plainly(folder, [("user", "one?")])
    done = sift("chat", folder, "--once", "one?", "--max-new-tokens", LONGEST)
    assert done.stdout == wanted + "\n"
    told = sift("predict", folder, "one?", "--max-new-tokens", LONGEST, "--json")
    assert json.loads(told.stdout)["predictions"][0]["answer"] == wanted


def test_a_model_without_a_template_goes_on_from_a_text(tmp_path: Path) -> None:
    folder = save_talker(tmp_path / "model", None)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    given = tokenizer("a text", return_tensors="pt")
    found = model.generate(
        given["input_ids"], do_sample=False, max_new_tokens=LONGEST, temperature=None, top_p=None
    )
    wanted = tokenizer.decode(found[0, given["input_ids"].shape[1] :], skip_special_tokens=True)
    told = sift("predict", folder, "a text", "--max-new-tokens", LONGEST, "--json")
    assert json.loads(told.stdout)["predictions"][0]["answer"] == wanted
    done = sift("chat", folder, "--once", "a")
    assert done.returncode == 2
    assert "has no chat template; `sift predict`" in done.stderr


# chat


def test_once_prints_the_answer_alone(talker: Path) -> None:
    # rule 3.8: greedy, whatever the model ships
    wanted = plainly(talker, [("user", "one?")])
    done = process("chat", talker, "--once", "one?", "--max-new-tokens", LONGEST)
    assert (done.stdout, done.stderr) == (wanted + "\n", "")
    told = sift("chat", talker, "--once", "one?", "--max-new-tokens", LONGEST, "--json")
    assert json.loads(told.stdout) == {
        "prompt": "one?",
        "answer": wanted,
        "tokens": LONGEST,
        "ended": False,
    }


def test_a_system_prompt(talker: Path) -> None:
    wanted = plainly(talker, [("system", "be brief"), ("user", "one?")])
    assert wanted != plainly(talker, [("user", "one?")])
    done = sift(
        "chat", talker, "--once", "one?", "--system", "be brief", "--max-new-tokens", LONGEST
    )
    assert done.stdout == wanted + "\n"


def test_one_prompt_from_stdin(talker: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = plainly(talker, [("user", "one?\ntwo?")])
    monkeypatch.setattr(sys, "stdin", io.StringIO("one?\ntwo?\n"))
    done = sift("chat", talker, "--max-new-tokens", LONGEST)
    assert done.stdout == wanted + "\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(" \n"))
    done = sift("chat", talker)
    assert done.returncode == 2
    assert "nothing is asked" in done.stderr


def test_a_classifier_does_not_chat(tmp_path: Path) -> None:
    done = sift("chat", save_classifier(tmp_path / "base"), "--once", "a")
    assert done.returncode == 2
    assert "is no language model; `sift predict`" in done.stderr


Reply = str | type[BaseException] | SiftError


class Terminal:
    """Who types `lines`, and a model that gives `replies` and keeps what it was asked."""

    def __init__(self, lines: list[str | type[BaseException]], replies: list[Reply]) -> None:
        self.lines, self.replies = iter(lines), iter(replies)
        self.asked: list[list[str]] = []

    def read(self, _: str) -> str:
        line = next(self.lines)
        if isinstance(line, str):
            return line
        raise line

    def ask(self, messages: list[Message], said: Said | None) -> Answer:
        assert said is not None
        self.asked.append([f"{one.role}: {one.content}" for one in messages])
        reply = next(self.replies)
        if reply is KeyboardInterrupt:
            said("begun")
            raise KeyboardInterrupt
        if isinstance(reply, SiftError):
            raise reply
        assert isinstance(reply, str)
        said(reply)
        return Answer(reply, 1, not reply.endswith("..."))


@pytest.fixture
def converse(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[list[list[str]], str]]:
    monkeypatch.setattr(chatting.signal, "signal", lambda *_: None)

    def run(
        lines: list[str | type[BaseException]], replies: list[Reply]
    ) -> tuple[list[list[str]], str]:
        terminal = Terminal(lines, replies)
        chatting._converse(terminal.ask, terminal.read)
        return terminal.asked, capsys.readouterr().out

    return run


def test_turns_build_on_each_other_until_reset(
    converse: Callable[..., tuple[list[list[str]], str]],
) -> None:
    asked, out = converse(["a", "", "b", "/reset", "/what", "c", "/exit", "d"], ["1", "2", "3"])
    assert asked == [
        ["user: a"],
        ["user: a", "assistant: 1", "user: b"],
        ["user: c"],
    ]
    assert out == "1\n2\n3\n"


def test_an_answer_that_is_stopped_stays_as_far_as_it_came(
    converse: Callable[..., tuple[list[list[str]], str]],
) -> None:
    lines = ["a", KeyboardInterrupt, "b", EOFError]
    asked, out = converse(lines, [KeyboardInterrupt, "2"])
    assert asked == [["user: a"], ["user: a", "assistant: begun", "user: b"]]
    assert out == "begun (stopped)\n\n2\n\n"


def test_a_question_that_cannot_be_asked_is_forgotten(
    converse: Callable[..., tuple[list[list[str]], str]],
) -> None:
    asked, out = converse(["a", "b", EOFError], [SiftError("no room"), "cut..."])
    assert asked == [["user: a"], ["user: b"]]
    assert out == "cut... (cut after 1 tokens)\n\n"


def test_what_a_model_says_moves_no_cursor(
    converse: Callable[..., tuple[list[list[str]], str]],
) -> None:
    _, out = converse(["a", EOFError], ["\x1b[2Jgone\r"])
    assert out == "\\x1b[2Jgone\\r\n\n"


def test_a_request_to_end_is_no_ctrl_c(monkeypatch: pytest.MonkeyPatch) -> None:
    handlers = {}
    monkeypatch.setattr(chatting.signal, "signal", handlers.__setitem__)
    terminal = Terminal([EOFError], [])
    chatting._converse(terminal.ask, terminal.read)
    with pytest.raises(SystemExit) as end:
        handlers[signal.SIGTERM](signal.SIGTERM, None)
    assert end.value.code == 130


def test_a_terminal(talker: Path) -> None:
    first = plainly(talker, [("user", "one?")])
    second = plainly(talker, [("user", "one?"), ("assistant", first), ("user", "two?")])
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "sift_cli", "chat", str(talker), "--max-new-tokens", "8"]
    with subprocess.Popen(command, stdin=theirs, stdout=subprocess.PIPE, bufsize=0, env=ENV) as run:
        os.close(theirs)

        def heard() -> str:
            """What is printed up to the next prompt."""
            assert run.stdout is not None
            text = b""
            while not text.endswith(b"> "):
                byte = run.stdout.read(1)
                assert byte, text
                text += byte
            return text.removesuffix(b"> ").decode()

        heard()
        os.write(ours, b"one?\n")
        assert heard() == visible(first) + " (cut after 8 tokens)\n"
        run.send_signal(signal.SIGINT)  # at the prompt, it ends nothing
        for _ in range(30):
            if select.select([run.stdout], [], [], 2)[0]:
                break
            run.send_signal(signal.SIGINT)  # the first came just before it began to read
        heard()
        os.write(ours, b"two?\n")
        assert heard() == visible(second) + " (cut after 8 tokens)\n"
        os.write(ours, b"\x04")
        assert run.wait(120) == 0
    os.close(ours)
