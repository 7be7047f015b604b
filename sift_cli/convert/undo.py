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
from sift_cli.models.loading import INDEX_FILE, load_tokenizer, quiet
from sift_cli.models.tensors import Listing, Place, header_text, list_file, listed, write_file

RECORD_FILE = "sift/merge.json"
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
    "generation_config.json",
    "chat_template*",
    "additional_chat_templates/*",
    "LICENSE*",
    "NOTICE*",
)
TOKENIZER_CONFIG = "tokenizer_config.json"
REWRITTEN = ("config.json", TOKENIZER_CONFIG, INDEX_FILE)


@dataclass(frozen=True)
class Record:
    """`headers` of the base's files word for word, the model's name for each of their keys,
    fingerprints of what the model has no place for, and the base's text of each file that reads
    otherwise in the merged folder (None where the base has none).
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
    ) -> "Record":
        """The record for the folder `out` made from `base`."""
        texts = {}
        for name in REWRITTEN:
            before, after = _text(base / name), _text(out / name)
            if before != after:
                texts[name] = before
        headers = {file: listing.text for file, listing in listings.items()}
        return cls(headers, dict(names), dict(dropped), texts)

    def save(self, folder: Path) -> None:
        """Writes it into the merged folder."""
        file = folder / RECORD_FILE
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    def restore_texts(self, folder: Path, but: Sequence[str] = ()) -> None:
        """Gives the files in `folder` the base's text again, those in `but` excepted."""
        for name, text in self.texts.items():
            if name in but:
                continue
            if text is None:
                (folder / name).unlink(missing_ok=True)
            else:
                (folder / name).write_bytes(text.encode())


def save_dropped(folder: Path, dropped: Mapping[str, Place], most: int) -> dict[str, str]:
    """Sets aside what the model has no place for, unless it has more than `most` bytes together.

    Returns the fingerprints.
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
    """What a merged folder has aside."""
    file = folder / DROPPED_FILE
    return list_file(file).places if file.is_file() else {}


def read_record(folder: Path) -> Record | None:
    """The record in a merged folder; None where it has none, as one that others saved anew.

    Raises SiftError (exit code 3) where it is damaged.
    """
    file = folder / RECORD_FILE
    if not file.is_file():
        return None
    try:
        record = Record(**json.loads(file.read_text(encoding="utf-8")))
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
    found = {file for pattern in SIDE_FILES for file in folder.glob(pattern) if file.is_file()}
    return sorted(file.relative_to(folder) for file in found)


def copy_side_files(folder: Path, out: Path) -> None:
    """Copies them."""
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
    said: dict[str, Any] = json.loads(_text(out / TOKENIZER_CONFIG) or "{}")
    said["pad_token"] = wanted.pad_token
    text = json.dumps(said, indent=2, ensure_ascii=False) + "\n"
    (out / TOKENIZER_CONFIG).write_text(text, encoding="utf-8")


def _text(file: Path) -> str | None:
    return file.read_bytes().decode() if file.is_file() else None
