"""Every kernel of a selected gradient beside the dense product: for the constants of `choose`.

usage: python benchmarks/products.py [--shapes 768x768] [--densities .001 .01] [--tokens 1024]

Prints the median time of each in milliseconds, in alternation, and which one `choose` takes.
"""

import argparse
from collections import defaultdict
from statistics import median

import torch
from steps import now

from sift_cli.models.devices import pick_device
from sift_cli.sparse import Support
from sift_cli.sparse.kernels import KERNELS, choose


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="+", default=["768x768", "3072x768", "768x3072"])
    parser.add_argument("--densities", nargs="+", type=float, default=[0.001, 0.01, 0.05])
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--device")
    given = parser.parse_args()
    device, dtype = pick_device(given.device), getattr(torch, given.dtype)
    names = [name for name in KERNELS if name != "triton" or device.type == "cuda"]
    print(f"| weight | density | {' | '.join(f'{name}, ms' for name in names)} | chosen |")
    print("| --- " * (len(names) + 3) + "|")
    for shape in given.shapes:
        rows, columns = map(int, shape.split("x"))
        grad_out = torch.randn(given.tokens, rows, device=device, dtype=dtype)
        inputs = torch.randn(given.tokens, columns, device=device, dtype=dtype)
        for density in given.densities:
            count = max(1, round(density * rows * columns))
            positions = torch.randperm(rows * columns)[:count].to(device)
            support = Support.of((rows, columns), positions)
            kernels = {name: KERNELS[name](support) for name in names}
            times = defaultdict(list)
            for _ in range(given.rounds + 1):
                for name, kernel in kernels.items():
                    kept = inputs if kernel.columns is None else inputs[:, kernel.columns]
                    began = now(device)
                    kernel.gradient(grad_out, kept)
                    times[name].append(1e3 * (now(device) - began))
            shown = " | ".join(f"{median(times[name][1:]):.3f}" for name in names)
            chosen = choose(support, device).name
            print(f"| {shape} | {density:g} | {shown} | {chosen} |", flush=True)


if __name__ == "__main__":
    main()
