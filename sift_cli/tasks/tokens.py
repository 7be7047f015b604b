"""Rows as tokens: encoding, and which rows fit into a batch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sift_cli.errors import SiftError
from sift_cli.tasks.columns import refuse

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

UNSEEN = -100  # the label of a token that no loss is taken of
CACHED_FROM = 20_000  # rows; fewer are tokenised in about a second
Tokenise = Callable[[dict[str, list[Any]]], dict[str, list[Any]]]  # columns to columns


class PlainRows:
    """Rows that someone asks about, by column, in the ways of a Dataset that encoding takes.

    `datasets`, pyarrow and pandas take longer to import than a few texts to answer.
    """

    def __init__(self, columns: Mapping[str, Sequence[Any]]) -> None:
        self.columns = {name: list(values) for name, values in columns.items()}

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), ()))

    def __getitem__(self, key: str | Sequence[int]) -> Any:
        """A column, or the rows at some places by column."""
        if isinstance(key, str):
            return self.columns[key]
        return {name: [values[at] for at in key] for name, values in self.columns.items()}

    @property
    def column_names(self) -> list[str]:
        """The names of the columns."""
        return list(self.columns)

    def remove_columns(self, names: Sequence[str]) -> PlainRows:
        """The rows without some of their columns."""
        return PlainRows({name: self.columns[name] for name in self.columns if name not in names})

    def mapped(self, function: Tokenise, removed: Sequence[str]) -> PlainRows:
        """The rows with the columns that `function` makes of them, without those `removed`."""
        return PlainRows(self.remove_columns(removed).columns | function(self.columns))


@dataclass(frozen=True)
class Encoded:
    """Tokenised rows: columns `input_ids` (and what else the tokenizer gives), `label`, `row`.

    `lengths` counts the tokens of each row, `truncated` the rows that were cut. Rows of a language
    model have `labels`, a token or UNSEEN for each token, in place of `label`; `targets` counts the
    tokens of each that are learnt and predicted, `uncut` the tokens of every row of the source, and
    `dropped` holds the numbers of those that are left out, by why.
    """

    rows: Dataset  # or PlainRows
    lengths: list[int]
    truncated: int
    targets: list[int] = field(default_factory=list)
    uncut: list[int] = field(default_factory=list)
    dropped: Mapping[str, list[int]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.lengths)

    def take(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Features of the rows at `indices`, ready to collate."""
        batch = self.rows[list(indices)]
        keys = [key for key in batch if key != "row"]
        return [{key: batch[key][at] for key in keys} for at in range(len(indices))]

    def numbers(self, indices: Sequence[int]) -> list[int]:
        """Row numbers in the source split."""
        return [int(row) for row in self.rows[list(indices)]["row"]]


def decoded(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """What tokens stand for, the special ones among them, with no space taken away."""
    text = tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text


def encode(
    rows: Dataset | PlainRows, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Encoded:
    """Tokenises every row, cut to `max_length` tokens, and counts the rows that were cut.

    What CACHED_FROM rows or more become is kept among the files that `datasets` caches, and read
    from there the next time. Raises SiftError where the special tokens alone are more.
    """

    def tokenise(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        texts = (batch["text"], batch["pair"]) if "pair" in batch else (batch["text"],)
        encoded = tokenizer(*texts, truncation=True, max_length=max_length, padding=False)
        lengths = [len(ids) for ids in encoded["input_ids"]]
        return {
            **encoded,
            "length": lengths,
            "cut": _were_cut(tokenizer, texts, lengths, max_length),
        }

    removed = [name for name in rows.column_names if name not in ("label", "row")]

    encoded = _tokenised(rows, tokenise, removed, tokenizer, "", max_length)
    lengths, cut = list(encoded["length"]), sum(encoded["cut"])
    if max(lengths, default=0) > max_length:
        raise SiftError(f"data.max_length: {max_length} tokens leave no room for any text")
    return Encoded(encoded.remove_columns(["length", "cut"]), lengths, cut)


def require_readable(data: Encoded, config: PretrainedConfig, having: str) -> None:
    """Raises SiftError, with their numbers, for rows that a model of `config` cannot read.

    These are rows of no token, rows with tokens that the model has no embedding of, and for
    encoder-decoders, whose head reads the end of a text, rows with no end or several. `having`
    begins the message, as in `the train split has`.
    """
    text = config.get_text_config()
    size, end = getattr(text, "vocab_size", None), text.eos_token_id

    def check(what: str, wrong: Callable[[list[int]], bool]) -> None:
        refuse(f"{having} {what}", data.rows["row"][:], [wrong(x) for x in data.rows["input_ids"]])

    if 0 in data.lengths:
        check("rows of no token", lambda ids: not ids)
    if size is not None and _highest(data) >= size:
        check(
            f"tokens beyond the {size:,} that the model has embeddings of (take the tokenizer of "
            "its weights, or give it more embeddings)",
            lambda ids: max(ids) >= size,
        )
    if config.is_encoder_decoder and isinstance(end, int) and not data.targets:
        check(f"texts with no end token ({end}), or several", lambda ids: ids.count(end) != 1)


def _highest(data: Encoded) -> int:
    """The highest token id of all rows."""
    if isinstance(data.rows, PlainRows):
        return max(chain.from_iterable(data.rows["input_ids"]), default=0)
    from pyarrow import compute

    ids = data.rows.with_format("arrow")[:]["input_ids"]
    return compute.max(compute.list_flatten(ids)).as_py() or 0


def encode_words(
    rows: Dataset | PlainRows, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Encoded:
    """Tokenises rows of words, joined by blanks, as `encode` does rows of texts.

    `firsts` are the places of each word's first piece, and `label` the tags of these words alone:
    those that were cut away have none. Raises SiftError where the special tokens alone are more,
    for a row of which no word is left, and for a tokenizer that tells no places.
    """
    if not tokenizer.is_fast:
        raise SiftError("data.task: tags needs a tokenizer that tells where its pieces lie")

    def tokenise(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        texts = [" ".join(words) for words in batch["words"]]
        encoded = dict(
            tokenizer(
                texts,
                truncation=True,
                max_length=max_length,
                padding=False,
                return_offsets_mapping=True,
            )
        )
        pieces = encoded.pop("offset_mapping")
        places = [first_pieces(*one) for one in zip(batch["words"], pieces, strict=True)]
        lengths = [len(ids) for ids in encoded["input_ids"]]
        return {
            **encoded,
            "firsts": [[one for one in some if one is not None] for some in places],
            "label": [
                [tag for tag, place in zip(tags, some, strict=True) if place is not None]
                for tags, some in zip(batch["label"], places, strict=True)
            ],
            "length": lengths,
            "cut": _were_cut(tokenizer, (texts,), lengths, max_length),
        }

    encoded = _tokenised(rows, tokenise, ["words"], tokenizer, "words", max_length)
    if max(encoded["length"], default=0) > max_length:
        raise SiftError(f"data.max_length: {max_length} tokens leave no room for any text")
    if bare := [
        row for row, some in zip(encoded["row"], encoded["firsts"], strict=True) if not some
    ]:
        raise SiftError(
            f"data: of {len(bare):,} rows, such as row {bare[0]}, no word is left among "
            f"{max_length} tokens"
        )
    lengths, cut = list(encoded["length"]), sum(encoded["cut"])
    return Encoded(encoded.remove_columns(["length", "cut"]), lengths, cut)


def _tokenised(
    rows: Dataset | PlainRows,
    tokenise: Tokenise,
    removed: list[str],
    tokenizer: PreTrainedTokenizerBase,
    kind: str,
    max_length: int,
) -> Any:
    """What `tokenise` makes of rows, kept as `cached` does; `kind` tells it from its like."""
    if isinstance(rows, PlainRows):
        return rows.mapped(tokenise, removed)

    def run(cache: Path | None) -> Dataset:
        return rows.map(
            tokenise,
            batched=True,
            remove_columns=removed,
            keep_in_memory=cache is None,
            load_from_cache_file=cache is not None,
            cache_file_name=None if cache is None else str(cache),
            new_fingerprint="-".join(
                str(one) for one in ("sift", kind, rows._fingerprint, max_length) if one
            ),
        )

    options = f"{kind} {max_length} {tokenizer.truncation_side}".strip()
    return cached(run, rows, tokenizer, options)


def first_pieces(words: Sequence[str], pieces: Sequence[tuple[int, int]]) -> list[int | None]:
    """Which piece is the first of each word, of the words joined by blanks; None where none is.

    `pieces` are the places of tokens in that text; those of special tokens are empty.
    """
    found: list[int | None] = []
    start = at = 0
    for word in words:
        end = start + len(word)
        while at < len(pieces) and (pieces[at][1] <= start or pieces[at][0] == pieces[at][1]):
            at += 1
        inside = at < len(pieces) and pieces[at][0] < end
        found.append(at if inside else None)
        at += inside
        start = end + 1
    return found


def _were_cut(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[list[str]],
    lengths: Sequence[int],
    max_length: int,
) -> list[bool]:
    """Which rows of `texts` (of pairs, both) have more tokens than the `lengths` that are left."""
    full = [at for at, length in enumerate(lengths) if length >= max_length]
    cut = [False] * len(lengths)
    if full:  # only these can have been cut
        again = [[one[at] for at in full] for one in texts]
        whole = tokenizer(*again, truncation=False, padding=False, verbose=False)["input_ids"]
        for at, ids in zip(full, whole, strict=True):
            cut[at] = len(ids) > max_length
    return cut


def cached(
    run: Callable[[Path | None], Dataset],
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    options: str,
) -> Dataset:
    """What `run` makes of CACHED_FROM rows or more, kept in a file.

    Its name says all that it depends on: rows, tokenizer, `options` and versions. `run` gets the
    file, or None where nothing is to be kept.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if len(rows) < CACHED_FROM or backend is None:
        return run(None)
    from datasets import config
    from pyarrow import ArrowInvalid

    name = _key(rows, backend.to_str(), options)
    cache = Path(config.HF_DATASETS_CACHE) / "sift-tokens" / f"{name}.arrow"
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        try:
            return run(cache)
        except ArrowInvalid:  # a damaged file
            cache.unlink()
            return run(cache)
    except OSError:  # no space, or no permission
        return run(None)


def _key(rows: Dataset, tokenizer: str, options: str) -> str:
    """SHA-256 of the rows, the tokenizer (as JSON) but for what calls leave in it, and options."""
    import pyarrow
    import tokenizers
    import transformers

    described = json.loads(tokenizer) | {"truncation": None, "padding": None}
    versions = f"{tokenizers.__version__} {transformers.__version__}"
    digest = hashlib.sha256(f"{options} {versions} {json.dumps(described)}".encode())
    table = rows.with_format("arrow")[:]
    stream = pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_stream(stream, table.schema) as writer:
        writer.write_table(table)
    digest.update(stream.getvalue())
    return digest.hexdigest()


def cut(
    rows: Sequence[int], lengths: Sequence[int], most_rows: int, most_tokens: int | None
) -> list[list[int]]:
    """Consecutive `rows` in batches of at most `most_rows`, and of `most_tokens` once padded.

    `lengths` has the tokens of every row there is. A row that is longer than `most_tokens` stands
    alone.
    """
    batches: list[list[int]] = []
    longest = 0
    for row in rows:
        longest = max(longest, lengths[row])
        held = batches[-1] if batches else []
        over = most_tokens is not None and (len(held) + 1) * longest > most_tokens
        if not held or len(held) == most_rows or over:
            batches.append([row])
            longest = lengths[row]
        else:
            held.append(row)
    return batches
