"""Versions and devices, for a bug report."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version

import torch

from sift_cli import __version__

PACKAGES = ("torch", "transformers", "datasets", "safetensors", "tokenizers", "numpy", "peft")


def describe() -> dict[str, str]:
    """What a bug report needs."""
    found = {"sift": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    found["platform"] = platform.platform()
    found["processors"] = f"{os.cpu_count()}, {torch.get_num_threads()} threads"
    cards = [torch.cuda.get_device_name(at) for at in range(torch.cuda.device_count())]
    found["cuda"] = f"{torch.version.cuda}: {', '.join(cards)}" if cards else "none"
    found["mps"] = "yes" if torch.backends.mps.is_available() else "none"
    return found
