"""Faults of disks and memories, explained in one line with what to change."""

import errno
import re

from sift_cli.errors import SiftError

FREE_SPACE = "free some space, or choose another --out"
OTHER_PLACE = "make it writable, or choose another --out"
FAULTS = {
    errno.ENOSPC: ("no space is left on the disk", FREE_SPACE),
    errno.EDQUOT: ("the disk quota is used up", FREE_SPACE),
    errno.EFBIG: ("the file is larger than this process may write", FREE_SPACE),
    errno.EROFS: ("the disk is read-only", OTHER_PLACE),
    errno.EACCES: ("permission denied", OTHER_PLACE),
    errno.EPERM: ("not permitted", OTHER_PLACE),
    errno.EIO: ("the disk fails to read or write", "see to the disk"),
    errno.ESTALE: ("the network folder is gone", "mount it again"),
    errno.ENOENT: ("it vanished while it was needed", "bring it back"),
    errno.ENOTDIR: ("a folder is needed here, and this is a file", "choose another --out"),
    errno.EEXIST: ("a folder is needed here, and this is a file", "choose another --out"),
}
LESS_MEMORY = (
    "halve train.batch_size and double train.accumulate, which changes no result; or set "
    "train.gradient_checkpointing: true, a smaller data.max_length or eval.batch_size"
)


def fault_of(error: Exception, where: object = "") -> SiftError | None:
    """The error as a SiftError with the way out, where it is a fault of disk or memory; else None.

    `where` names the place if the error does not.
    """
    message = str(error).strip().partition("\n")[0]  # the rest is advice and traces
    if isinstance(error, MemoryError | RuntimeError):
        if isinstance(error, RuntimeError) and not _is_memory(message):
            return None
        on_host = isinstance(error, MemoryError) or "out of memory" not in message
        what = "on the host" if on_host else message.partition(". ")[0]
        return SiftError(f"out of memory: {what}; {LESS_MEMORY}")
    number = re.search(r"os error (\d+)", message)  # of safetensors, which raises no OSError
    code = error.errno if isinstance(error, OSError) else number and int(number[1])
    if code not in FAULTS:
        return None
    what, way_out = FAULTS[code]
    place = (error.filename if isinstance(error, OSError) else None) or where
    return SiftError(f"{place}: {what}; {way_out}" if place else f"{what}; {way_out}")


def _is_memory(message: str) -> bool:
    return "out of memory" in message or "can't allocate memory" in message
