"""Sizes and speeds of delta files on the masks of real runs, beside what PEFT and others write.

usage: python benchmarks/delta_size.py RUN... [--rounds 9]

RUN is a folder that `sift train` wrote. Sizes are of whole files less the head's values, over the
trained entries of the other weights; PEFT's adapters are saved with as many entries, within a rank.
Speeds are medians, in seconds of one core's work, so that other processes disturb them less.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from math import prod
from pathlib import Path
from statistics import median

import methods
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sift_cli.delta import Delta, load_delta
from sift_cli.delta.coding import COLUMNS, decode_positions, encode_positions
from sift_cli.delta.planes import decode_bits, encode_bits
from sift_cli.models.loading import DTYPES, load_model, model_folder
from sift_cli.runs.folder import DELTA_FILE
from sift_cli.runs.tuned import load_tuned
from sift_cli.tasks.kinds import task_of

PEFT = {"LoRA": methods.lora, "SHiRA": methods.shira, "Super-Tuning": methods.super_tuning}
LARGE = (4096, 11008)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--rounds", type=int, default=9)
    given = parser.parse_args()
    torch.set_num_threads(1)
    deltas = {run.name: load_delta(run / DELTA_FILE) for run in given.runs}
    print("| run | file | entries | bytes per entry | exact |\n| --- | --- | --- | --- | --- |")
    for run in given.runs:
        for name, count, size, exact in sizes(run, deltas[run.name]):
            print(f"| {run.name} | {name} | {count:,} | {size / count:.3f} | {exact} |", flush=True)
    print("\n| positions of | entries | bits | by columns | coded, M/s | decoded, M/s |")
    print("| --- " * 6 + "|")
    supports = {
        name: [
            (w.shape, w.support.positions) for w in delta.weights.values() if w.coded is not None
        ]
        for name, delta in deltas.items()
    }
    supports |= {"random, 4096 x 11008": [large(0.0)], "uneven columns": [large(1.5)]}
    for name, group in supports.items():
        print(f"| {name} | {' | '.join(position_speeds(group, given.rounds))} |", flush=True)
    print("\n| bits of | bytes per entry | coded, M/s | decoded, M/s |\n| --- | --- | --- | --- |")
    for name, delta in deltas.items():
        print(f"| {name} | {' | '.join(bit_speeds(delta, given.rounds))} |", flush=True)


def sizes(run: Path, delta: Delta) -> Iterator[tuple[str, int, int, str]]:
    """Name, entries, bytes of each kind of file, and whether it gives the trained model exactly."""
    count = delta.entries
    density = count / sum(prod(weight.shape) for weight in delta.weights.values())
    head = sum(tensor.nbytes for tensor in delta.dense.values())
    yield "sift", count, (run / DELTA_FILE).stat().st_size - head, "and back"
    held = delta.header.base
    with tempfile.TemporaryDirectory() as folder:
        trained = dict(load_tuned(str(run))[0].model.named_parameters())
        plain: dict[str, Tensor] = {}
        for name, weight in delta.weights.items():
            if weight.support.positions is not None:
                plain[f"{name}.positions"] = weight.support.positions
            plain[f"{name}.values"] = weight.support.gather(trained[name])
        for dtype in sorted({held.dtype, "bfloat16"}, reverse=True):
            kept = {k: v.to(DTYPES[dtype]) if "values" in k else v for k, v in plain.items()}
            save_file(kept, f"{folder}/plain")
            exact = "yes" if dtype == held.dtype else "no"
            yield f"int32 + {dtype}", count, Path(folder, "plain").stat().st_size, exact
        base = model_folder(held.path, held.revision)
        for name, method in PEFT.items():
            task = task_of(delta.header)
            config = task.configure(base)
            model = load_model(base, task.auto, config, DTYPES[held.dtype], new_head=True).model
            ready = method(model, {}, list(delta.dense), density)
            ready.model.save_pretrained(f"{folder}/{name}")
            file = Path(folder, name, "adapter_model.safetensors")
            heads = {parameter.partition(".")[0] for parameter in delta.dense}
            whole = [v for k, v in load_file(file).items() if heads & set(k.split("."))]
            entries = ready.entries - sum(tensor.numel() for tensor in whole)
            size = file.stat().st_size - sum(tensor.nbytes for tensor in whole)
            yield f"PEFT {name}", entries, size, "no"


def large(unevenness: float) -> tuple[tuple[int, int], Tensor]:
    """A random support of 1 % of a large weight, some columns likelier than others."""
    generator = torch.Generator().manual_seed(0)
    columns = torch.exp(unevenness * torch.randn(LARGE[1], generator=generator))
    chance = 0.01 * columns / columns.mean()
    chosen = torch.rand(LARGE, generator=generator) < chance
    return LARGE, chosen.view(-1).nonzero().view(-1).int()


def position_speeds(group: Sequence[tuple[tuple[int, ...], Tensor]], rounds: int) -> list[str]:
    """Entries, bits per position, share coded by columns, millions per second."""
    count = sum(len(positions) for _, positions in group)
    coded = [(encode_positions(one, shape), len(one), shape) for shape, one in group]
    by_columns = sum(n for stream, n, _ in coded if int(stream[0]) == COLUMNS) / count
    encode = seconds(lambda: [encode_positions(one, shape) for shape, one in group], rounds)
    decode = seconds(lambda: [decode_positions(*one) for one in coded], rounds)
    bits = 8 * sum(len(stream) for stream, _, _ in coded) / count
    speeds = [f"{count / taken / 1e6:.0f}" for taken in (encode, decode)]
    return [f"{count:,}", f"{bits:.2f}", f"{by_columns:.0%}", *speeds]


def bit_speeds(delta: Delta, rounds: int) -> list[str]:
    """Bytes per entry, millions per second."""
    weights = list(delta.weights.values())
    coded = [(encode_bits(one.bits, one.dtype), one.count, one.dtype) for one in weights]
    encode = seconds(lambda: [encode_bits(one.bits, one.dtype) for one in weights], rounds)
    decode = seconds(lambda: [decode_bits(*one) for one in coded], rounds)
    size = sum(len(stream) for stream, _, _ in coded) / delta.entries
    return [f"{size:.3f}", *(f"{delta.entries / taken / 1e6:.0f}" for taken in (encode, decode))]


def seconds(work: Callable[[], object], rounds: int) -> float:
    """The processor's time for `work`, median."""
    times = []
    for _ in range(rounds + 1):
        began = time.process_time()
        work()
        times.append(time.process_time() - began)
    return median(times[1:])


if __name__ == "__main__":
    main()
