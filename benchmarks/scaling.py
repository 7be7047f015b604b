"""The tables of docs/scaling.md: bytes sent and held by each device, counted and not measured.

usage: python benchmarks/scaling.py
"""

from sift_cli.analysis.sizes import sent

# name: all parameters, and those of the linear layers of its blocks
LLAMAS = {"7B": (6_738_415_616, 6_476_005_376), "70B": (68_976_648_192, 68_451_041_280)}
DENSITY = 0.01
ENTRY = {"masters and moments": 12, "gradients": 4, "positions": 4}  # bytes of each


def main() -> None:
    """Prints both tables, in GB."""
    print("| model, devices | sift | LoRA of equal size | full, bf16 |\n| --- | --- | --- | --- |")
    for name, (total, linear) in LLAMAS.items():
        for devices in (8, 64):
            cells = sent(round(DENSITY * linear), total, "bfloat16", devices)
            shown = " | ".join(f"{cells[key] / 1e9:.3g}" for key in ("sift", "lora", "full"))
            print(f"| {name}, {devices} | {shown} |")
    print("\n| model | weights |", " | ".join(ENTRY), "|\n" + "| --- " * 5 + "|")
    for name, (total, linear) in LLAMAS.items():
        held = [2 * total, *(each * DENSITY * linear for each in ENTRY.values())]
        print(f"| {name} | " + " | ".join(f"{one / 1e9:.3g}" for one in held) + " |")


if __name__ == "__main__":
    main()
