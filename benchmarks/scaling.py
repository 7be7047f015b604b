"""The tables of docs/scaling.md: bytes sent and held by each device, counted and not measured.

usage: python benchmarks/scaling.py
"""

from collections.abc import Iterable

from sift_cli.analysis.memory import PARTS
from sift_cli.analysis.sharded import POSITION, Rows
from sift_cli.analysis.sizes import sent

# name: all parameters, those of the linear layers of its blocks, and how many blocks
LLAMAS = {
    "7B": (6_738_415_616, 6_476_005_376, 32),
    "70B": (68_976_648_192, 68_451_041_280, 80),
}
DENSITY = 0.01
ENTRY = {"masters and moments": 12, "gradients": 4, "positions": 4}  # bytes of each
BF16 = 2


def main() -> None:
    """Prints the tables, in GB."""
    print("| model, devices | sift | LoRA of equal size | full, bf16 |\n| --- | --- | --- | --- |")
    for name, (total, linear, _) in LLAMAS.items():
        for devices in (8, 64):
            cells = sent(round(DENSITY * linear), total, "bfloat16", devices)
            print(f"| {name}, {devices} |", row(cells[key] for key in ("sift", "lora", "full")))
    print("\n| model | weights |", " | ".join(ENTRY), "|\n" + "| --- " * 5 + "|")
    for name, (total, linear, _) in LLAMAS.items():
        held = [BF16 * total, *(each * DENSITY * linear for each in ENTRY.values())]
        print(f"| {name} |", row(held))
    print("\n| model, ranks x copies | purpose | sift | LoRA of equal size | full, bf16 |")
    print("| --- " * 5 + "|")
    for name in LLAMAS:
        for ranks, copies in ((8, 1), (64, 1), (8, 8)):
            every = in_rows(name, ranks, copies).sent(entries(name), 0, 0, "bfloat16")
            for purpose in ("weights", "gradients", *(["between_copies"] if copies > 1 else [])):
                cells = [every[key][purpose] for key in ("sift", "lora", "full")]
                said = purpose.replace("_", " ")
                print(f"| {name}, {ranks} x {copies} | {said} |", row(cells))
    print("\n| part | one device | a rank of 8 in rows |\n| --- | --- | --- |")
    alone, rank = memory("70B", 8)
    for part, nbytes in rank.items():
        if nbytes:
            print(f"| {part.replace('_', ' ')} |", row([alone.get(part, 0), nbytes]))
    print("| sum |", row([sum(alone.values()), sum(rank.values())]))


def entries(name: str) -> int:
    """The entries that train."""
    return round(DENSITY * LLAMAS[name][1])


def in_rows(name: str, ranks: int, copies: int) -> Rows:
    """The model in rows; vectors of a block's norms are left to the root."""
    total, linear, blocks = (LLAMAS[name][at] for at in range(3))
    block = linear // blocks
    return Rows(ranks, copies, BF16 * total, BF16 * (total - linear), BF16 * block)


def memory(name: str, ranks: int) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes by part of sift on one device and on a rank, without activations and tables."""
    count = entries(name)
    alone = dict.fromkeys(PARTS, 0) | {
        "weights": BF16 * LLAMAS[name][0],
        "positions": POSITION * count,
        "masters": 4 * count,
        "gradients": 4 * count,
        "moments": 8 * count,
    }
    held = in_rows(name, ranks, 1).hold(alone, alone["gradients"], POSITION * count)
    return alone, held


def row(cells: Iterable[float]) -> str:
    """Cells of a table."""
    return " | ".join(f"{one / 1e9:.3g}" for one in cells) + " |"


if __name__ == "__main__":
    main()
