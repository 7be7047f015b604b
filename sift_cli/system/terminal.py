"""Text of others on a terminal."""

import io
import sys
import unicodedata

KEPT = "\n\t"
UNSEEN = ("Cc", "Cf", "Cs", "Zl", "Zp")  # control, format, surrogate, and line separators


def visible(text: str, kept: str = KEPT) -> str:
    r"""The text with what moves a cursor or cannot be seen spelt out: an escape reads `\x1b`.

    Letters in `kept` stay as they are.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        one if one in kept or unicodedata.category(one) not in UNSEEN else _spelt(one)
        for one in text
    )


def _spelt(letter: str) -> str:
    return letter.encode("unicode_escape").decode("ascii")


def spell_out() -> None:
    r"""Lets the console spell out what its encoding cannot say: `\u2192` for an arrow."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
