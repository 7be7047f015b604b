"""The codes of positions and of XOR bits, against a reader written from docs/delta-format.md."""

import zlib
from itertools import accumulate
from math import prod

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from torch import Tensor

from sift_cli.delta.coding import BLOCK, COLUMNS, LARGEST_SIZE, ROWS, RUN
from sift_cli.delta.coding import decode_positions as decode
from sift_cli.delta.coding import encode_positions as encode
from sift_cli.delta.planes import decode_bits, encode_bits

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn]
SIGNED = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def plain_positions(data: bytes, count: int, shape: tuple[int, ...]) -> list[int]:
    """The page's words, one bit at a time."""

    def bits(start: int) -> list[int]:
        return [byte >> at & 1 for byte in data[start:] for at in range(8)]

    gaps: list[int] = []
    used = 1
    while len(gaps) < count:
        n = min(65536, count - len(gaps))
        ks = data[used + 4 : used + 4 + (n + 63) // 64]
        end = used + 4 + len(ks)
        run = [0] * n
        for plane in range(max(ks)):
            held = [at for at in range(n) if ks[at // 64] > plane]
            for at, bit in zip(held, bits(end), strict=False):
                run[at] |= bit << plane
            end += (len(held) + 7) // 8
        at, high = 0, 0
        for bit in bits(end):
            if bit and at < n:
                run[at] += high << ks[at // 64]
                at, high = at + 1, -1
            high += 1
        used = end + int.from_bytes(data[used : used + 4], "little")
        gaps += run
    positions = [one - 1 for one in accumulate(gap + 1 for gap in gaps)]
    if data[0] == 1:
        rows, columns = shape[0], prod(shape[1:])
        positions = sorted(one % rows * columns + one // rows for one in positions)
    assert used == len(data)
    return positions


def plain_bits(data: bytes, count: int, width: int, rotated: bool) -> list[int]:
    """The page's words again, one value at a time."""
    planes, used = [], 0
    for _ in range(width):
        length = int.from_bytes(data[used : used + 8], "little")
        plane = data[used + 8 : used + 8 + length]
        planes.append(plane if length == count else zlib.decompress(plane, -15))
        used += 8 + length
    values = [int.from_bytes(bytes(value), "little") for value in zip(*planes, strict=True)]
    if not rotated:
        return values
    low = 8 * width - 9  # where the exponent begins
    exponents = [value >> low & 0xFF for value in values]
    return [
        value & ~(0xFF << low) | (one >> 1 | (one & 1) << 7) << low
        for value, one in zip(values, exponents, strict=True)
    ]


@st.composite
def supports(draw: st.DrawFn) -> tuple[tuple[int, ...], Tensor]:
    """A shape and sorted positions in it: at any density, with full and empty rows and columns."""
    shape = tuple(draw(st.lists(st.integers(1, 24), min_size=0, max_size=3)))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    chance = np.full(shape, draw(st.floats(0.0, 1.0)))
    if len(shape) > 1 and draw(st.booleans()):
        chance = chance * random.random(shape[1:]) ** 4
    if shape and draw(st.booleans()):
        chance = (chance.T * random.random(shape[0]) ** 4).T
    flat = torch.from_numpy(np.flatnonzero(random.random(shape) < chance))
    return shape, flat.to(draw(st.sampled_from([torch.int32, torch.int64])))


@given(supports())
def test_positions_round_trip_at_every_shape_and_density(
    support: tuple[tuple[int, ...], Tensor],
) -> None:
    shape, positions = support
    coded = encode(positions, shape)
    assert coded.dtype == torch.uint8
    assert torch.equal(coded, encode(positions.long(), shape))  # one input, one file
    again = decode(coded, len(positions), shape)
    assert again.dtype == torch.int32
    assert again.tolist() == positions.tolist()
    if len(positions):
        assert plain_positions(coded.numpy().tobytes(), len(positions), shape) == again.tolist()


@given(st.sets(st.integers(0, LARGEST_SIZE - 1), min_size=1), st.integers(0, 5))
def test_positions_far_beyond_int32(positions: set[int], beyond: int) -> None:
    ordered = torch.tensor(sorted(positions))
    shape = (min(int(ordered[-1]) + 1 + beyond, LARGEST_SIZE),)
    assert torch.equal(decode(encode(ordered, shape), len(ordered), shape).long(), ordered)


def test_a_weight_of_more_than_2_to_the_31_entries() -> None:
    shape = (2**20, 2**13)
    rows = torch.arange(0, 2**20, 4)
    for positions in (rows * 2**13 + 5, torch.arange(2**33 - 200_000, 2**33, 3)):
        coded = encode(positions, shape)
        assert len(coded) < len(positions)
        assert torch.equal(decode(coded, len(positions), shape), positions)


@pytest.mark.parametrize("count", [1, BLOCK - 1, BLOCK, BLOCK + 1, RUN - 1, RUN, RUN + 1, 2 * RUN])
def test_blocks_and_runs_end_anywhere(count: int) -> None:
    random = np.random.default_rng(count)
    positions = torch.from_numpy(np.cumsum(random.geometric(random.choice([0.9, 0.01], count))))
    shape = (int(positions[-1]) + 1,)
    assert torch.equal(decode(encode(positions, shape), count, shape).long(), positions)


def test_positions_take_8_3_bits_at_one_per_cent_and_fewer_where_they_cluster() -> None:
    random = np.random.default_rng(0)
    shape = (1000, 2000)

    def bits(chance: object) -> float:
        flat = torch.from_numpy(np.flatnonzero(random.random(shape) < chance))
        return 8 * len(encode(flat, shape)) / len(flat)

    assert bits(0.01) < 8.3
    uneven = random.lognormal(0, 1.5, 2000)
    by_columns = bits(0.01 * uneven / uneven.mean())
    by_rows = bits(0.01 * np.repeat(uneven[:1000] / uneven[:1000].mean(), 2000).reshape(shape))
    assert by_columns < 7.7
    assert by_rows < 7.7


def test_each_order_is_taken_where_it_is_shorter() -> None:
    column = torch.arange(0, 4096, 64)
    assert int(encode(column, (64, 64))[0]) == COLUMNS
    assert int(encode(torch.arange(64), (64, 64))[0]) == ROWS


@given(supports(), st.data())
def test_a_damaged_stream_is_refused_or_holds_valid_positions(
    support: tuple[tuple[int, ...], Tensor], data: st.DataObject
) -> None:
    shape, positions = support
    stream = bytearray(encode(positions, shape).numpy().tobytes())
    for _ in range(data.draw(st.integers(0, 3))):
        if stream:
            stream[data.draw(st.integers(0, len(stream) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(stream)))
    kept = stream[:cut] if data.draw(st.booleans()) else stream
    count = data.draw(st.sampled_from([len(positions), 0, 1, 10**9, -1]))
    wide = data.draw(st.sampled_from([shape, (2**31 - 1,), (2**31, 2**31), (2**40, 2), (0, 5)]))
    try:
        found = decode(torch.tensor(list(kept), dtype=torch.uint8), count, wide).tolist()
    except ValueError:
        return
    assert len(found) == count
    assert found == sorted(set(found))
    assert all(0 <= one < prod(wide) for one in found)


@given(st.integers(1, 62), st.integers(0, 70), st.integers(1, 3))
@example(30, 1, 2)
def test_sums_of_gaps_past_the_integers_are_refused(k: int, zeros: int, count: int) -> None:
    """Every gap fits on its own; together they leave 31 or 63 bits."""
    low = np.packbits(np.ones(count, np.uint8), bitorder="little").tobytes() * k
    ones = np.concatenate([np.zeros(zeros, np.uint8), [1]] * count).astype(np.uint8)
    unary = np.packbits(ones, bitorder="little").tobytes()
    stream = bytes([0]) + len(unary).to_bytes(4, "little") + bytes([k]) + low + unary
    coded = torch.tensor(list(stream), dtype=torch.uint8)
    gap = (zeros << k) + (1 << k) - 1
    for size in (2**31 - 1, LARGEST_SIZE):
        fits = count * (gap + 1) <= size
        if fits:
            wanted = [(at + 1) * (gap + 1) - 1 for at in range(count)]
            assert decode(coded, count, (size,)).tolist() == wanted
        else:
            with pytest.raises(ValueError, match=r"beyond|parameter"):
                decode(coded, count, (size,))


@settings(max_examples=50)
@given(st.sampled_from(DTYPES), st.integers(0, 400), st.floats(0, 1), st.integers(0, 2**32))
def test_bits_round_trip(dtype: torch.dtype, count: int, change: float, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    before = torch.randn(count, generator=random, dtype=torch.float64)
    after = before + change**4 * torch.randn(count, generator=random, dtype=torch.float64)
    signed = SIGNED[dtype.itemsize]
    bits = before.to(dtype).view(signed) ^ after.to(dtype).view(signed)
    coded = encode_bits(bits, dtype)
    assert torch.equal(decode_bits(coded, count, dtype).view(signed), bits)
    rotated = dtype in (torch.float32, torch.bfloat16)
    plain = plain_bits(coded.numpy().tobytes(), count, dtype.itemsize, rotated)
    assert plain == [value % 2 ** (8 * dtype.itemsize) for value in bits.tolist()]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_value_of_16_bits_comes_back(dtype: torch.dtype) -> None:
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    coded = encode_bits(bits, dtype)
    assert torch.equal(decode_bits(coded, 2**16, dtype).view(torch.int16), bits)


@pytest.mark.parametrize(("dtype", "most"), [(torch.bfloat16, 1.25), (torch.float32, 3.25)])
@pytest.mark.parametrize("change", [1e-4, 1e-3, 5e-3])
def test_bits_take_few_bytes(dtype: torch.dtype, most: float, change: float) -> None:
    random = torch.Generator().manual_seed(0)
    before = torch.randn(20_000, generator=random) * 0.03
    after = before + change * torch.randn(20_000, generator=random)
    signed = SIGNED[dtype.itemsize]
    bits = before.to(dtype).view(signed) ^ after.to(dtype).view(signed)
    assert len(encode_bits(bits, dtype)) < most * 20_000


def test_planes_that_inflate_to_more_or_less_are_refused() -> None:
    count = 64_000
    squeeze = zlib.compressobj(9, zlib.DEFLATED, -15)
    bomb = squeeze.compress(bytes(count)) + squeeze.flush()
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_HUFFMAN_ONLY)
    plane = deflate.compress(bytes(count)) + deflate.flush()

    def stream(*planes: bytes) -> Tensor:
        whole = b"".join(len(one).to_bytes(8, "little") + one for one in planes)
        return torch.tensor(list(whole), dtype=torch.uint8)

    assert not decode_bits(stream(plane, plane), count, torch.bfloat16).any()
    for bad, said in (
        (stream(plane, bomb), "a plane of|cannot hold"),
        (stream(bomb, bytes(count)), "a plane of"),
        (stream(plane, plane[:-1]), "does not inflate"),
        (stream(plane, plane + b"0"), "does not inflate"),
        (stream(plane, plane, b""), "left over"),
        (stream(plane, bytes(count - 1)), "does not inflate"),
    ):
        with pytest.raises(ValueError, match=said):
            decode_bits(bad, count, torch.bfloat16)
    with pytest.raises(ValueError, match="does not inflate"):
        decode_bits(stream(plane, plane), count + 1, torch.bfloat16)
    with pytest.raises(ValueError, match="cannot hold"):
        decode_bits(stream(plane, plane), 2**40, torch.bfloat16)
