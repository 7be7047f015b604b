"""Time and peak memory of `sift merge` beside copying the base's files.

usage: python benchmarks/merge.py DELTA BASE [--rounds 3] [--no-verify]

Each merge runs in a process of its own; its peak is the largest resident size, of which importing
torch and transformers is a part that is shown by itself.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from sift_cli.models.shards import weight_files
from sift_cli.models.tensors import list_file

CHILD = """
import json, re, sys, time
from pathlib import Path
from transformers import AutoModelForSequenceClassification, AutoTokenizer
import transformers.models.llama.modeling_llama, transformers.models.bert.modeling_bert
from sift_cli.convert.merge import merge
status = Path("/proc/self/status")
peak = lambda: 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", status.read_text())[1])
before = peak()
began = time.perf_counter()
delta, base, out, verify = sys.argv[1:]
merge(Path(delta), Path(out), base=base, verify=verify == "yes")
print(json.dumps({"s": time.perf_counter() - began, "peak": peak(), "imports": before}))
"""


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("delta", type=Path)
    parser.add_argument("base", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    files = weight_files(given.base)
    largest = max(place.bytes for file in files for place in list_file(file).places.values())
    total = sum(file.stat().st_size for file in files)
    print(f"{given.base.name}: {total / 1e6:.0f} MB, largest tensor {largest / 1e6:.0f} MB")
    copies: list[float] = []
    merges: dict[str, list[dict[str, float]]] = {"no": [], "yes": []}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(given.rounds):
            began = time.perf_counter()
            copy = Path(folder) / "copy"
            copy.mkdir()
            for file in files:
                shutil.copyfile(file, copy / file.name)
            copies.append(time.perf_counter() - began)
            shutil.rmtree(copy)
            for verify, found in merges.items():
                out = Path(folder) / "out"
                command = [sys.executable, "-c", CHILD, given.delta, given.base, out, verify]
                done = subprocess.run([*map(str, command)], capture_output=True, check=True)
                found.append(json.loads(done.stdout))
                shutil.rmtree(out)
    print(f"copying the files: {median(copies):.2f} s")
    print("| verify | seconds | peak, MB | of which imports | bound, MB |")
    print("| --- | --- | --- | --- | --- |")
    bound = 3 * largest + 300e6
    for verify, found in merges.items():
        peak = max(one["peak"] for one in found)
        print(
            f"| {verify} | {median(one['s'] for one in found):.2f} | {peak / 1e6:.0f} | "
            f"{max(one['imports'] for one in found) / 1e6:.0f} | {bound / 1e6:.0f} |"
        )


if __name__ == "__main__":
    main()
