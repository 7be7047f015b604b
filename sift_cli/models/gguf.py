"""GGUF files, which hold quantised models, as ordinary model folders."""

from __future__ import annotations

import importlib.util
from contextlib import redirect_stderr
from functools import cache
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants

from sift_cli.errors import ExitCode, SiftError
from sift_cli.system.files import new_folder, sha256_of

SUFFIX = ".gguf"
NEEDED = ("gguf", "accelerate")  # by transformers, to read such files


def folder_of(file: Path) -> Path:
    """The folder that `file` becomes, in bfloat16, beside the hub's cache; made if not there yet.

    Its name and its tensors depend on the file's bytes alone. Raises SiftError where a package is
    lacking, and (exit code 3) for a file that is damaged or of an unknown kind.
    """
    found = file.stat()
    digest = _digest(file.resolve(), found.st_size, found.st_mtime_ns)
    folder = Path(constants.HF_HOME) / "sift" / f"{file.stem}-{digest[:16]}"
    if (folder / "config.json").is_file():
        return folder
    lacking = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if lacking:
        raise SiftError(
            f"model.path: {file} needs the package {lacking[0]}; "
            "`pip install 'sift-cli[quickstart-llm]'` brings it"
        )
    with new_folder(folder) as partial:
        _dequantise(file, partial)
    return folder


@cache
def _digest(file: Path, size: int, changed: int) -> str:
    """SHA-256 of a file, read once a process for as long as size and time of change stay."""
    return sha256_of(file)


def _dequantise(file: Path, into: Path) -> None:
    """Writes the file's model and tokenizer as transformers does.

    Blocks become float32 and are rounded once: in bfloat16 their arithmetic would not be the same
    in every version of transformers.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    auto: Any = AutoModelForCausalLM
    try:
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        with redirect_stderr(StringIO()):  # a bar that no setting turns off
            model, info = auto.from_pretrained(
                file.parent,
                gguf_file=file.name,
                dtype=torch.float32,
                quantization_config=GgufConfig(dequantize=True),
                output_loading_info=True,
            )
    except Exception as error:  # readers of damaged files raise whatever comes
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise _unusable(file, said) from error
    if info["missing_keys"]:
        raise _unusable(file, f"it lacks {min(info['missing_keys'])}")
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config  # it is not quantised any more
    tokenizer.save_pretrained(into)
    model.to(torch.bfloat16).save_pretrained(into)


def _unusable(file: Path, said: str) -> SiftError:
    return SiftError(
        f"model.path: {file} cannot be read as a language model: {said}; "
        "give another file, or the model's folder of safetensors",
        ExitCode.WRONG_FILE,
    )
