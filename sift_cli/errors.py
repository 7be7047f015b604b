"""The one class of errors that users see, with the exit code that each kind ends with."""

import difflib
from collections.abc import Sequence
from enum import IntEnum

LISTED = 10  # names in a message


class ExitCode(IntEnum):
    """What the process ends with."""

    DONE = 0
    BUG = 1
    USAGE = 2
    WRONG_FILE = 3
    NOT_FINITE = 4
    NOT_VERIFIED = 5
    INTERRUPTED = 130


class SiftError(Exception):
    """A mistake that the user can mend: the message names the thing, the place and the way out.

    `first` says that no other process of the run had one before.
    """

    def __init__(self, message: str, code: ExitCode = ExitCode.USAGE) -> None:
        super().__init__(message)
        self.code = code
        self.first = False


class NotHere(SiftError):
    """What a recipe names is not on this machine, so that a plan has to do without it."""


def counted(count: int, one: str, many: str) -> str:
    """A number with the words that go with it, such as `1 tensor differs`, `2 tensors differ`."""
    return f"{count:,} {one if count == 1 else many}"


def in_lines(names: Sequence[str]) -> str:
    """The first few of many names for a message, an indented line each, and how many more."""
    more = f"\n  and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return "\n  ".join(names[:LISTED]) + more


def nearest(word: str, known: Sequence[str]) -> str:
    """The end of an error on an unknown word: the known one that is nearest, or all of them."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {near[0]}?" if near else f"; known: {', '.join(known)}"
