"""The one class of errors that users see, with the exit code that each kind ends with."""

from enum import IntEnum


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
    """A mistake that the user can mend: the message names the thing, the place and the way out."""

    def __init__(self, message: str, code: ExitCode = ExitCode.USAGE) -> None:
        super().__init__(message)
        self.code = code
