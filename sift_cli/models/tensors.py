"""Safetensors files tensor by tensor: read, written and listed, one tensor in memory at a time."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sift_cli.errors import ExitCode, SiftError
from sift_cli.models.fingerprints import tensor_bytes

DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
DTYPES_BY_NAME = {name: dtype for dtype, name in DTYPE_NAMES.items()}
LONGEST_HEADER = 100_000_000  # bytes, as in safetensors itself


@dataclass(frozen=True)
class Place:
    """Where a tensor lies: its bytes in `file` begin at `start`."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def bytes(self) -> int:
        """What the tensor takes on disk."""
        return prod(self.shape) * self.dtype.itemsize

    def read(self) -> Tensor:
        """The tensor, in memory of its own."""
        return self._read(self.start, self.shape)

    def rows(self, first: int, last: int) -> Tensor:
        """Its rows [first, last) alone."""
        row = prod(self.shape[1:]) * self.dtype.itemsize
        return self._read(self.start + first * row, (last - first, *self.shape[1:]))

    def _read(self, start: int, shape: tuple[int, ...]) -> Tensor:
        tensor = torch.empty(shape, dtype=self.dtype)
        with self.file.open("rb", buffering=0) as file:
            file.seek(start)
            left = tensor_bytes(tensor)
            while len(left):
                count = file.readinto(left)
                if not count:
                    raise SiftError(f"{self.file}: damaged: it ends early", ExitCode.WRONG_FILE)
                left = left[count:]
        return tensor


@dataclass(frozen=True)
class Listing:
    """What a safetensors file says it holds: `places` by key, in the order of their bytes."""

    text: str
    metadata: dict[str, str]
    places: dict[str, Place]


def list_file(file: Path) -> Listing:
    """The listing of a safetensors file; SiftError (exit code 3) where it is damaged."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if size < 8 or length > min(size - 8, LONGEST_HEADER):
            raise SiftError(f"{file}: damaged: no safetensors header", ExitCode.WRONG_FILE)
        raw = opened.read(length)
    try:
        text = raw.decode()
        rows, metadata = listed(text)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SiftError(f"{file}: damaged header: {error}", ExitCode.WRONG_FILE) from error
    places = {}
    at = 8 + length
    for key, (dtype, shape) in rows.items():
        places[key] = Place(file, dtype, shape, at)
        at += places[key].bytes
    if at != size:
        raise SiftError(
            f"{file}: damaged: {size} bytes, and its header tells of {at}", ExitCode.WRONG_FILE
        )
    return Listing(text, metadata, places)


def listed(
    text: str,
) -> tuple[dict[str, tuple[torch.dtype, tuple[int, ...]]], dict[str, str]]:
    """What a header lists: dtype and shape by key, in the order of their bytes; its metadata.

    Raises ValueError, KeyError, TypeError or AttributeError where it is none.
    """
    header = json.loads(text)
    metadata = header.pop("__metadata__", {})
    rows = {}
    at = 0
    for key, row in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        dtype, shape = DTYPES_BY_NAME[row["dtype"]], tuple(map(int, row["shape"]))
        end = at + prod(shape) * dtype.itemsize
        if min(shape, default=0) < 0 or row["data_offsets"] != [at, end]:
            raise ValueError(f"{key} does not fit its place")
        rows[key] = dtype, shape
        at = end
    return rows, metadata


def header_text(
    rows: Iterable[tuple[str, torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str]
) -> str:
    """The header for tensors (key, dtype, shape) in this order."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for key, dtype, shape in rows:
        end = at + prod(shape) * dtype.itemsize
        header[key] = {
            "dtype": DTYPE_NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [at, end],
        }
        at = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False)
    return text + " " * (-len(text.encode()) % 8)


def write_file(file: Path, text: str, tensors: Iterable[Tensor]) -> None:
    """A file of this header and the tensors, each asked for when its turn has come."""
    raw = text.encode()
    with file.open("wb") as opened:
        opened.write(len(raw).to_bytes(8, "little") + raw)
        for tensor in tensors:
            opened.write(tensor_bytes(tensor))
