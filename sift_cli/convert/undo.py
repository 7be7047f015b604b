"""What a merged folder keeps of its base beside the weights, so that undo can give it back."""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import AutoTokenizer

from sift_cli.errors import ExitCode, SiftError
from sift_cli.models.fingerprints import fingerprint
from sift_cli.models.loading import TOKENIZER_CONFIG, load_tokenizer, quiet
from sift_cli.models.shards import INDEX_FILE
from sift_cli.models.tensors import Listing, Place, header_text, list_file, listed, write_file
from sift_cli.tasks.templates import GENERATION_FILE, TEMPLATE_FILE

RECORD_FILE = "sift/merge.json"
COMPOSED_FILE = "sift/composed.safetensors"  # a composition as one delta
DROPPED_FILE = "sift/dropped.safetensors"
# What belongs to a model beside its configuration and its weights, and is copied as it is.
SIDE_FILES = (
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.codes",
    "special_tokens_map.json",
    "added_tokens.json",
    GENERATION_FILE,
    "chat_template*",
    "additional_chat_templates/*",
    "LICENSE*",
    "NOTICE*",
)
REWRITTEN = ("config.json", TOKENIZER_CONFIG, GENERATION_FILE, TEMPLATE_FILE, INDEX_FILE)


@dataclass(frozen=True)
class MergeRecord:
    """The content of RECORD_FILE.

    `headers` are those of the base's weight files word for word, `names` the model's name for each
    of their keys, `dropped` the fingerprint of each tensor that the model has no place for (empty
    where it was not kept). `texts` are the base's versions of the files that read otherwise in the
    merged folder, None where the base has no such file.
    """

    headers: dict[str, str]
    names: dict[str, str]
    dropped: dict[str, str]
    texts: dict[str, str | None]
    format: int = 1

    @classmethod
    def of(
        cls,
        base: Path,
        out: Path,
        listings: Mapping[str, Listing],
        names: Mapping[str, str],
        dropped: Mapping[str, str],
    ) -> "MergeRecord":
        """The record for the folder `out` made from `base`."""
        texts = {}
        for name in REWRITTEN:
            before, after = _text(base / name), _text(out / name)
            if before != after:
                texts[name] = before
        headers = {file: listing.text for file, listing in listings.items()}
        return cls(headers, dict(names), dict(dropped), texts)

    def save(self, folder: Path) -> None:
        """Writes the record into the merged folder."""
        file = folder / RECORD_FILE
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    def restore_texts(self, folder: Path, but: Sequence[str] = ()) -> None:
        """Gives the files in `folder` the base's text again, except those in `but`."""
        for name, text in self.texts.items():
            if name in but:
                continue
            if text is None:
                (folder / name).unlink(missing_ok=True)
            else:
                (folder / name).write_bytes(text.encode())


def save_dropped(folder: Path, dropped: Mapping[str, Place], most: int) -> dict[str, str]:
    """Keeps the tensors that the model has no place for, if they have at most `most` bytes.

    Returns the fingerprint of each, empty where they were not kept.
    """
    file = folder / DROPPED_FILE
    file.parent.mkdir(exist_ok=True)
    marks = dict.fromkeys(dropped, "")

    def tensors() -> Iterator[Tensor]:
        for key, place in dropped.items():
            tensor = place.read()
            marks[key] = fingerprint(tensor)
            yield tensor

    if dropped and sum(place.bytes for place in dropped.values()) <= most:
        rows = [(key, place.dtype, place.shape) for key, place in dropped.items()]
        write_file(file, header_text(rows, {}), tensors())
    return marks


def dropped_places(folder: Path) -> dict[str, Place]:
    """Where the tensors lie that a merge kept for undo, by key in the base's files."""
    file = folder / DROPPED_FILE
    return list_file(file).places if file.is_file() else {}


def read_record(folder: Path) -> MergeRecord | None:
    """The record in a merged folder; None where there is none, as once others saved it anew.

    Raises SiftError (exit code 3) where it is damaged.
    """
    file = folder / RECORD_FILE
    if not file.is_file():
        return None
    try:
        record = MergeRecord(**json.loads(file.read_text(encoding="utf-8")))
        plain = all(Path(name).name == name != "" for name in record.headers)
        if record.format != 1 or not plain or not {*record.texts} <= {*REWRITTEN}:
            raise ValueError("not what sift writes")
        for text in record.headers.values():
            listed(text)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SiftError(
            f"{file}: damaged ({error}); without it, undo gives back the weights under the "
            "model's own names",
            ExitCode.WRONG_FILE,
        ) from error
    return record


def side_files(folder: Path) -> list[Path]:
    """The files of a model folder, relative to it, that a merge copies byte for byte."""
    files = {file for pattern in SIDE_FILES for file in folder.glob(pattern) if file.is_file()}
    return sorted(file.relative_to(folder) for file in files)


def copy_side_files(folder: Path, out: Path) -> None:
    """Copies the side files of a model folder into the folder `out`."""
    for name in side_files(folder):
        (out / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(folder / name, out / name)


def keep_padding(base: Path, out: Path) -> None:
    """Tells the copied tokenizer to pad as in training, where the base's does not say how."""
    wanted = load_tokenizer(base)
    with quiet():
        copied = AutoTokenizer.from_pretrained(out, trust_remote_code=False)
    if copied.pad_token == wanted.pad_token:
        return
    config: dict[str, Any] = json.loads(_text(out / TOKENIZER_CONFIG) or "{}")
    config["pad_token"] = wanted.pad_token
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    (out / TOKENIZER_CONFIG).write_text(text, encoding="utf-8")


def _text(file: Path) -> str | None:
    """The text of a file, its line ends as they are; None where there is no file."""
    return file.read_bytes().decode() if file.is_file() else None
