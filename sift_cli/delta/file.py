"""The delta file, format version 1: `docs/delta-format.md` in code."""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from sift_cli.delta.coding import decode_positions, encode_positions
from sift_cli.delta.header import Envelope, Header, WeightRow, check_name, split_header
from sift_cli.delta.planes import decode_bits, encode_bits
from sift_cli.errors import ExitCode, SiftError
from sift_cli.models.fingerprints import dtype_name, fingerprint, kind_of, tensor_bytes
from sift_cli.sparse import Support
from sift_cli.system.files import replacing, sha256_of

FORMAT = 1
CODING = "rice-deflate"
STREAMS = "weights"  # the tensor that holds all positions and bits
# By bytes of a weight's entry: how its bits are held, and how torch can compare and XOR them.
BITS = {1: torch.uint8, 2: torch.uint16, 4: torch.uint32, 8: torch.uint64}
SIGNED = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True, eq=False)
class WeightDelta:
    """The change of one weight: coded positions (None: every entry) and trained XOR base.

    `bits` has shape [count] and an unsigned dtype as wide as the weight's. `base` and `trained` are
    fingerprints of the weight, of all its entries, before and after training.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    count: int
    base: str
    trained: str
    coded: Tensor | None
    bits: Tensor

    @property
    def support(self) -> Support:
        """The changed entries; raises ValueError where the stream is not a valid one."""
        if self.coded is None:
            return Support(self.shape)
        return Support(self.shape, decode_positions(self.coded, self.count, self.shape))

    def toggle_(self, weight: Tensor) -> None:
        """Turns the base's weight into the trained one, or back, bit for bit and in place."""
        support = self.support.to(weight.device)
        signed = SIGNED[weight.element_size()]
        flipped = _view(support.gather(weight), signed) ^ _view(self.bits, signed).to(weight.device)
        support.scatter_(weight, flipped.view(weight.dtype))


@dataclass(frozen=True, eq=False)
class Delta:
    """A delta file in memory.

    `weights` and `dense` go by parameter name; `dense` holds the tensors that the base lacks, such
    as a new head. `rest` has eight hex digits of fingerprint for each tensor of the base that is in
    neither, in the order of their sorted names. `header` says where the delta comes from.
    """

    weights: dict[str, WeightDelta]
    dense: dict[str, Tensor]
    rest: str
    header: Header
    # Methods of serving.py and attached.py, which know this file: the package attaches them.
    of: ClassVar[Callable[[nn.Module], "Delta"]]
    apply_: ClassVar[Callable[["Delta", nn.Module], None]]
    undo_: ClassVar[Callable[["Delta", nn.Module], None]]
    swap_: ClassVar[Callable[["Delta", nn.Module], None]]

    @property
    def about(self) -> dict[str, Any]:
        """A copy of the header as a plain dict, its keys sorted as in the file."""
        about: dict[str, Any] = json.loads(_canonical(self.header.to_json()))
        return about

    @property
    def entries(self) -> int:
        """Changed entries, without the dense tensors."""
        return sum(weight.count for weight in self.weights.values())

    @classmethod
    def load(cls, path: str | Path) -> "Delta":
        """The delta in a file; raises SiftError as `load_delta` does."""
        return load_delta(Path(path))

    def save(self, path: str | Path) -> str:
        """Writes the delta file, complete or not at all; returns its SHA-256."""
        return save_delta(Path(path), self)


def weight_delta(
    support: Support, base: Tensor, trained: Tensor, base_mark: str, weight: Tensor
) -> WeightDelta:
    """The change of one weight from its entries before and after ([K], both in the weight's dtype).

    `base_mark` is the fingerprint before training, `weight` the trained weight with all entries.
    """
    signed = SIGNED[trained.element_size()]
    bits = _view(base.cpu(), signed) ^ _view(trained.cpu(), signed)
    positions = support.positions if len(support) < support.size else None
    return WeightDelta(
        support.shape,
        weight.dtype,
        len(support),
        base_mark,
        fingerprint(weight),
        None if positions is None else encode_positions(positions, support.shape),
        bits.view(BITS[trained.element_size()]),
    )


def _view(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The same bits as another dtype of the same width."""
    return tensor.contiguous().view(dtype)


def save_delta(path: Path, delta: Delta) -> str:
    """Writes the file, complete or not at all; returns its SHA-256.

    The same delta gives the same bytes.
    """
    table, streams = {}, [torch.empty(0, dtype=torch.uint8)]
    for name, weight in sorted(delta.weights.items()):
        positions = streams[0] if weight.coded is None else weight.coded
        bits = encode_bits(weight.bits, weight.dtype)
        streams += [positions, bits]
        table[name] = [
            list(weight.shape),
            dtype_name(weight.dtype),
            weight.count,
            len(positions),
            len(bits),
            weight.base,
            weight.trained,
        ]
    tensors = {STREAMS: torch.cat(streams)}
    for name, tensor in delta.dense.items():
        tensors[f"dense/{name}"] = tensor.detach().cpu().contiguous()
    header = {
        **delta.header.to_json(),
        "format": FORMAT,
        "coding": CODING,
        "weights": table,
        "rest": delta.rest,
    }
    header["digest"] = _digest(header, tensors)
    with replacing(path) as partial:
        save_file(tensors, partial, metadata={"sift": _canonical(header)})
        partial.chmod(0o644)  # safetensors makes files private
    return sha256_of(path)


def load_delta(path: Path) -> Delta:
    """Reads and checks a delta file.

    Raises SiftError: exit code 2 where there is none, 3 where it is no delta, damaged, or of a
    newer format.
    """
    if not path.is_file():
        raise SiftError(f"{path}: no such delta file")
    try:
        with safe_open(path, framework="pt") as file:
            values = _read_header(path, (file.metadata() or {}).get("sift"))
            envelope, header = split_header(values)  # all claims, before anything they describe
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        del values["digest"]
        if envelope.digest != _digest(values, tensors):
            raise ValueError("its contents do not match its digest")
        return _parse(envelope, header, tensors)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "header"
        raise _damaged(path, f"{place}: {first['msg']}") from error
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise _damaged(path, str(error)) from error


def _read_header(path: Path, text: str | None) -> dict[str, Any]:
    """The JSON object in the file's metadata, of a format that this version reads."""
    if text is None:
        raise SiftError(f"{path}: a safetensors file, but no sift delta", ExitCode.WRONG_FILE)
    header = json.loads(text)
    if not isinstance(header, dict):
        raise ValueError("its header is no object")
    written, coding = header.get("format"), header.get("coding")
    if isinstance(written, int) and written > FORMAT:
        raise SiftError(
            f"{path}: format {written} is newer than this sift reads ({FORMAT}); update sift",
            ExitCode.WRONG_FILE,
        )
    if written != FORMAT or coding != CODING:
        raise SiftError(
            f"{path}: format {written} ({coding}) is not what this sift reads ({FORMAT}, "
            f"{CODING}); read it with the sift that wrote it",
            ExitCode.WRONG_FILE,
        )
    return header


def _parse(envelope: Envelope, header: Header, tensors: dict[str, Tensor]) -> Delta:
    """The delta in `tensors`; ValueError where they do not hold what the envelope promises."""
    streams = tensors.pop(STREAMS, None)
    if streams is None or streams.dtype != torch.uint8 or streams.dim() != 1:
        raise ValueError(f"there is no stream of bytes called {STREAMS}")
    weights = _decode_weights(envelope.weights, streams)
    dense = {}
    for name, tensor in tensors.items():
        kind, _, parameter = name.partition("/")
        if kind != "dense":
            raise ValueError(f"{name[:80]!r} belongs to no weight")
        check_name(parameter)
        dense[parameter] = tensor
    return Delta(weights, dense, envelope.rest, header)


def _decode_weights(rows: Mapping[str, WeightRow], streams: Tensor) -> dict[str, WeightDelta]:
    """The change of each weight from the one stream ([B], uint8) of all, in the order of names."""
    weights, at = {}, 0
    for name, row in sorted(rows.items()):
        shape, count, dtype = tuple(row.shape), row.count, getattr(torch, row.dtype)
        middle = at + row.positions
        end = middle + row.bits
        if (middle == at) != (count == prod(shape)) or end > len(streams):
            raise ValueError(f"{name}: {row.positions} bytes for {count} of {list(shape)}")
        coded = streams[at:middle].clone() if middle > at else None
        packed, at = streams[middle:end], end
        bits = decode_bits(packed, count, dtype).view(BITS[dtype.itemsize])
        weights[name] = WeightDelta(shape, dtype, count, row.base, row.trained, coded, bits)
        try:
            _ = weights[name].support  # refuses a stream out of range
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    if at != len(streams):
        raise ValueError(f"{len(streams) - at} bytes belong to no weight")
    return weights


def _damaged(path: Path, why: str) -> SiftError:
    return SiftError(f"{path}: damaged, or no delta file: {why}", ExitCode.WRONG_FILE)


def _digest(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over the header without its digest, and over names, kinds and bytes of tensors."""
    digest = hashlib.sha256(_canonical(header).encode())
    for name in sorted(tensors):
        digest.update(f"{name}{kind_of(tensors[name])}".encode())
        digest.update(tensor_bytes(tensors[name]))
    return digest.hexdigest()


def _canonical(value: object) -> str:
    """The one way that a value is written: a digest is over these bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
