"""XOR bits of a weight's changed entries as a byte stream: planes, deflated where that saves."""

import zlib

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# Of these, sign and exponent take nine bits, one more than a plane has: they are rotated.
EIGHT_BIT_EXPONENT = (torch.float32, torch.bfloat16)
LENGTH = np.dtype("<u8")  # of a plane, before its bytes
BITS_PER_BYTE = 8  # Huffman codes have at least a bit: no plane deflates below an eighth

Bytes = NDArray[np.uint8]


def encode_bits(bits: Tensor, dtype: torch.dtype) -> Tensor:
    """Codes XOR bits ([K], integers as wide as `dtype`) as uint8 ([B]).

    `docs/delta-format.md` specifies the code. Where an exponent has eight bits, one plane holds it
    with the sign, the next the bits of the significand: only the first has much to deflate.
    """
    width = bits.element_size()
    planes = bits.contiguous().view(torch.uint8).numpy().reshape(-1, width).T.copy()
    if dtype in EIGHT_BIT_EXPONENT:
        low, high = planes[-2].copy(), planes[-1].copy()
        planes[-1] = (high & 0x80) | (high << 1 & 0x7E) | (low >> 7)
        planes[-2] = (high << 1 & 0x80) | (low & 0x7F)
    parts = []
    for plane in planes:
        deflate = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS, 9, zlib.Z_HUFFMAN_ONLY)
        packed = deflate.compress(plane.data) + deflate.flush()
        kept = np.frombuffer(packed, np.uint8) if len(packed) < len(plane) else plane
        parts += [np.array([len(kept)], dtype=LENGTH).view(np.uint8), kept]
    return torch.from_numpy(np.concatenate(parts))


def decode_bits(coded: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """XOR bits ([count], uint8 view of `dtype`'s width per entry) from their code.

    Takes at most eight times the memory of the stream, whatever `count` says. Raises ValueError
    where the stream does not hold `count` values.
    """
    data, width = coded.numpy(), dtype.itemsize
    if count * width > BITS_PER_BYTE * len(data):
        raise ValueError(f"{len(data)} bytes cannot hold the bits of {count} entries")
    planes, at = np.empty((width, count), dtype=np.uint8), 0
    for plane in planes:
        length = int.from_bytes(data[at : at + LENGTH.itemsize].tobytes(), "little")
        at += LENGTH.itemsize
        packed = data[at : at + length]
        if len(packed) < length or not count <= BITS_PER_BYTE * length <= BITS_PER_BYTE * count:
            raise ValueError(
                f"a plane of {count} bytes takes {length}, and {len(packed)} are there"
            )
        plane[:] = packed if length == count else _inflate(packed, count)
        at += length
    if at != len(data):
        raise ValueError(f"{len(data) - at} bytes are left over")
    if dtype in EIGHT_BIT_EXPONENT:
        low, high = planes[-2].copy(), planes[-1].copy()
        planes[-1] = (high & 0x80) | (low >> 1 & 0x40) | (high >> 1 & 0x3F)
        planes[-2] = (high << 7) | (low & 0x7F)
    return torch.from_numpy(planes.T.copy()).reshape(-1)


def _inflate(packed: Bytes, count: int) -> Bytes:
    """`count` bytes from a deflated plane."""
    inflate = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        plane = inflate.decompress(packed.data, count + 1)
    except zlib.error as error:
        raise ValueError(f"a plane does not inflate: {error}") from error
    if len(plane) != count or not inflate.eof or inflate.unused_data:
        raise ValueError(f"a plane does not inflate to {count} bytes")
    return np.frombuffer(plane, np.uint8)
