"""Versions and devices, for a bug report."""

import os
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from sift_cli import __version__

PACKAGES = (
    "torch",
    "transformers",
    "datasets",
    "safetensors",
    "tokenizers",
    "huggingface_hub",
    "pydantic",
    "pyyaml",
    "numpy",
    "scipy",
    "scikit-learn",
    "triton",
    "peft",
    "tensorboard",
    "wandb",
)
VARIABLES = (  # that change what a run does; none of them holds a secret
    "CUDA_VISIBLE_DEVICES",
    "CUBLAS_WORKSPACE_CONFIG",
    "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF",
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "HF_HUB_OFFLINE",
    "TOKENIZERS_PARALLELISM",
    "TRITON_INTERPRET",
)
TOKEN_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY")


def describe() -> dict[str, str]:
    """Versions, devices and settings by name; of tokens, only which are set."""
    facts = {"sift": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            facts[name] = version(name)
        except PackageNotFoundError:
            facts[name] = "not installed"
    facts["platform"] = platform.platform()
    facts["processors"] = f"{os.cpu_count()}, {torch.get_num_threads()} threads"
    facts["memory"] = f"{memory() / 1e9:.1f} GB"
    facts["disk"] = f"{shutil.disk_usage(Path.cwd()).free / 1e9:.1f} GB free here"
    cards = [
        f"{card.name}, {card.total_memory / 1e9:.0f} GB"
        for card in map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    ]
    facts["cuda"] = f"{torch.version.cuda}: {'; '.join(cards)}" if cards else "none"
    facts["mps"] = "yes" if torch.backends.mps.is_available() else "none"
    set_here = [f"{name}={os.environ[name]}" for name in VARIABLES if name in os.environ]
    facts["variables"] = ", ".join(set_here) or "none"
    facts["tokens"] = (
        ", ".join(name for name in TOKEN_VARIABLES if name in os.environ) or "none set"
    )
    return facts


def memory() -> int:
    """Bytes of memory of this machine."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
