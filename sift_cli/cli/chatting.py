"""The command that talks with a language model."""

import contextlib
import signal
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer

from sift_cli.cli.checks import check_tuned
from sift_cli.cli.options import BaseModelPath, Device, Longest, Tuned, print_json, stderr
from sift_cli.errors import ExitCode, SiftError
from sift_cli.system.terminal import visible
from sift_cli.tasks.table import LONGEST_ANSWER

if TYPE_CHECKING:
    from sift_cli.tasks.conversations import Message
    from sift_cli.tasks.generation import Answer, Said

HELP = "/reset begins anew, /exit or Ctrl-D ends, Ctrl-C stops an answer"
Ask = Callable[["list[Message]", "Said | None"], "Answer"]  # the answer to a conversation


def chat(
    tuned: Tuned,
    once: Annotated[
        str | None, typer.Option(help="Ask this alone, and print nothing but the answer.")
    ] = None,
    system: Annotated[
        str | None, typer.Option(help="The system prompt, if not the one of its training.")
    ] = None,
    longest: Longest = LONGEST_ANSWER,
    base: BaseModelPath = None,
    device: Device = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the one answer as a JSON object.")
    ] = False,
) -> None:
    """Talk with a language model: a run, a delta on its base, or any model folder.

    Without a terminal, and without --once, it answers the one prompt that stdin holds.

    Example: sift chat runs/chats --once "Tea with Kofi on Thursday at four."
    """
    check_tuned(tuned, device)
    talks = once is None and sys.stdin.isatty()
    if talks and as_json:
        raise SiftError('--json tells one answer; ask with --once "..."')
    asked = once if talks or once is not None else sys.stdin.read().strip()
    if not talks and not (asked or "").strip():
        raise SiftError('nothing is asked; give --once "...", or a prompt on stdin')
    ask = _opened(tuned, system, longest, base, device)
    if asked is None:
        return _converse(ask)
    from sift_cli.tasks.conversations import Message

    shows = sys.stdout.isatty() and not as_json
    answer = ask([Message("user", asked)], _show if shows else None)
    if as_json:
        print_json({"prompt": asked, **answer.to_json()})
    else:
        typer.echo("" if shows else answer.text)


def _opened(
    tuned: str, system: str | None, longest: int, base: str | None, device: str | None
) -> Ask:
    """What answers for the model."""
    from dataclasses import replace

    from sift_cli.models.devices import pick_device
    from sift_cli.runs.tuned import load_tuned, task_of_loaded
    from sift_cli.tasks.conversations import Conversation
    from sift_cli.tasks.generation import answer
    from sift_cli.tasks.language import Language

    loaded, recipe = load_tuned(tuned, base)
    task = task_of_loaded(loaded, recipe)
    if not isinstance(task, Language):
        raise SiftError(f"{tuned} is no language model; `sift predict` classifies texts with it")
    coder = task.coder(loaded.tokenizer)
    if coder.template is None:
        raise SiftError(f"{tuned} has no chat template; `sift predict` lets it go on from a text")
    if system is not None:
        coder = replace(coder, system=system)
    loaded.model.to(pick_device(device))  # type: ignore[arg-type]

    def ask(messages: "list[Message]", said: "Said | None") -> "Answer":
        chat = Conversation(tuple(messages))
        return answer(loaded.model, coder, chat, longest=longest, said=said)

    return ask


def _converse(ask: Ask, read: Callable[[str], str] = input) -> None:
    """Questions from a terminal and their answers, until it is left."""
    from sift_cli.tasks.conversations import Message

    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # gives `input` its history and keys
    signal.signal(signal.SIGINT, signal.default_int_handler)  # some shells start it deaf to Ctrl-C
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(int(ExitCode.INTERRUPTED)))
    stderr.print(HELP, style="dim", highlight=False)
    messages: list[Message] = []
    while True:
        try:
            asked = read("> ").strip()
            if asked == "/exit":
                return
            if asked == "/reset":
                messages = []
            elif asked.startswith("/"):
                stderr.print(HELP, style="dim", highlight=False)
            elif asked:
                answer = _turn(ask, [*messages, Message("user", asked)])
                if answer:
                    messages += [Message("user", asked), Message("assistant", answer)]
        except EOFError:
            typer.echo()
            return
        except KeyboardInterrupt:
            typer.echo()
            stderr.print(HELP, style="dim", highlight=False)


def _turn(ask: Ask, messages: "list[Message]") -> str:
    """The answer, shown as it comes, or what of it came before it was stopped."""
    pieces: list[str] = []

    def said(piece: str) -> None:
        pieces.append(piece)
        _show(piece)

    try:
        found = ask(messages, said)
    except KeyboardInterrupt:
        typer.echo(" (stopped)")
        return "".join(pieces)
    except SiftError as error:
        stderr.print(f"{error}; or begin anew with /reset", markup=False, highlight=False)
        return ""
    typer.echo("" if found.ended else f" (cut after {found.tokens:,} tokens)")
    return found.text


def _show(piece: str) -> None:
    typer.echo(visible(piece), nl=False)
    sys.stdout.flush()
