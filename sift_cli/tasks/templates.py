"""Chat templates: which one, what it needs of a vocabulary, and where generation stops."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2

from sift_cli.errors import SiftError
from sift_cli.models.loading import TOKENIZER_CONFIG, load_tokenizer, read_config

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEMPLATE_FILE = "chat_template.jinja"  # where transformers and vLLM look for it
GENERATION_FILE = "generation_config.json"
OWN = "model"  # of data.template: the model's own
IN_FULL = "the one in the recipe"  # what one is called whose text is given
SHIPPED = Path(__file__).parent / "chat"
BUILTIN = tuple(sorted(file.stem for file in SHIPPED.glob("*.jinja")))
LARGEST = 1 << 20  # bytes of a template
MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")  # as transformers looks for them
TAGS = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")  # which Jinja alone does not know
CONTROL = re.compile(r"<[|\uff5c][^<>|\uff5c\s]+[|\uff5c]>")  # what can only be meant as one token
# What transformers' rendering raises: the template's own refusals, and its mistakes.
UNRENDERABLE = (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError, IndexError)


@dataclass(frozen=True)
class Template:
    """A chat template: what the recipe calls it, and its Jinja text."""

    name: str
    text: str

    @property
    def marks_answers(self) -> bool:
        """Whether it says itself which part of it a model generates."""
        return MARKS.search(self.text) is not None

    def mentions(self, word: str) -> bool:
        """Whether it can show what lies under such a name."""
        return re.search(rf"\b{word}\b", self.text) is not None


def choose_template(asked: str, tokenizer: PreTrainedTokenizerBase) -> Template | None:
    """The template of `data.template`; None for `model` where the tokenizer has none.

    Raises SiftError for a name that is none, a file that cannot be read or is no Jinja, and a token
    that the vocabulary lacks.
    """
    name = IN_FULL if is_text(asked) else asked
    if asked == OWN:
        try:
            return Template(OWN, tokenizer.get_chat_template())
        except ValueError:  # it has none, or several and none that is the default
            return None
    if asked in BUILTIN:
        text = (SHIPPED / f"{asked}.jinja").read_text(encoding="utf-8").rstrip("\n")
        if opening(tokenizer) == [tokenizer.bos_token_id]:
            text = "{{- bos_token -}}\n" + text
    else:
        text = template_text(asked)
    _require_tokens(name, text, tokenizer)
    return Template(name, text)


def is_text(asked: str) -> bool:
    """Whether what `data.template` says is the Jinja text itself, and no name of it."""
    return "{" in asked


def require_template(template: Template | None) -> Template:
    """The template; raises SiftError where there is none, naming what can be chosen."""
    if template is None:
        raise SiftError(
            "data.template: the model has no chat template of its own; choose "
            f"{', '.join(BUILTIN)} or FILE.jinja"
        )
    return template


def template_text(asked: str) -> str:
    """The text of a template that is given as a file, or in full.

    Raises SiftError where no file is there, or it holds no Jinja.
    """
    if is_text(asked):
        return _parsed(asked, "line ")
    path = Path(asked).expanduser()
    if not path.is_file():
        known = f"{OWN}, {', '.join(BUILTIN)}, or a file that is there"
        raise SiftError(f"data.template: {asked!r} is none of {known}")
    try:
        if path.stat().st_size > LARGEST:
            raise SiftError(f"data.template: {path}: larger than {LARGEST:,} bytes")
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise SiftError(f"data.template: {path}: not a text file") from None
    except OSError as error:
        raise SiftError(f"data.template: {path}: cannot be read: {error.strerror}") from None
    if not is_text(text):
        raise SiftError(f"data.template: {path}: no Jinja template: it shows nothing of a row")
    return _parsed(text, f"{path}:")


def _parsed(text: str, place: str) -> str:
    """The text, if it is Jinja; the number of a wrong line is put behind `place`."""
    try:
        jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(TAGS.sub("", text))
    except jinja2.TemplateSyntaxError as error:
        at = f"{place}{error.lineno}"
        raise SiftError(f"data.template: {at}: no Jinja template: {error.message}") from None
    return text


def _require_tokens(asked: str, text: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises SiftError where a control token of the template is none of the vocabulary.

    It would be cut into pieces that mean nothing; no vocabulary is made larger for it.
    """
    known = tokenizer.get_vocab()
    plain = re.sub(r"\{#.*?#\}", "", text, flags=re.DOTALL)
    lacking = [one for one in dict.fromkeys(CONTROL.findall(plain)) if one not in known]
    if lacking:
        raise SiftError(
            f"data.template: {asked} needs the token {lacking[0]}, which the model's vocabulary "
            "lacks; choose a template of tokens that it has, such as alpaca"
        )
    for name in ("bos_token", "eos_token"):
        if re.search(rf"\b{name}\b", plain) and getattr(tokenizer, name) is None:
            raise SiftError(f"data.template: {asked} needs a {name}, and the tokenizer has none")


def opening(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that the tokenizer puts before any text, such as the one of its beginning."""
    empty, some = (list(tokenizer(text)["input_ids"]) for text in ("", "a"))
    same = 0
    while same < min(len(empty), len(some)) and empty[same] == some[same]:
        same += 1
    return some[:same]


def stop_tokens(folder: Path, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The tokens at which generation stops: those of generation_config.json, where it names any.

    Else those of the model's configuration, else the tokenizer's end-of-text token. Raises
    SiftError where nothing names one.
    """
    named: Any = _json(folder / GENERATION_FILE).get("eos_token_id")
    if named is None:
        config = read_config(folder)
        named = getattr(config.get_text_config(), "eos_token_id", None)
    if named is None:
        named = tokenizer.eos_token_id
    stops = tuple(named) if isinstance(named, Sequence) else (named,)
    if not stops or not all(isinstance(one, int) for one in stops):
        raise SiftError(
            f"{folder} names no token that ends a text; set eos_token_id in {GENERATION_FILE}"
        )
    return stops


def stops_texts(folder: Path) -> dict[str, str]:
    """generation_config.json with the tokens that end an answer, where it does not name them."""
    settings = _json(folder / GENERATION_FILE)
    if settings.get("eos_token_id") is not None:
        return {}
    stops = stop_tokens(folder, load_tokenizer(folder))
    named = {"eos_token_id": stops[0] if len(stops) == 1 else list(stops)}
    return {GENERATION_FILE: _dumped(settings | named)}


def template_texts(folder: Path, template: Template) -> dict[str, str]:
    """The files that give a tokenizer the template: its own, and an older one that names another.

    Readers differ in which of the two they look into.
    """
    texts = {TEMPLATE_FILE: template.text}
    settings = _json(folder / TOKENIZER_CONFIG)
    if settings.get("chat_template") is not None:
        texts[TOKENIZER_CONFIG] = _dumped(settings | {"chat_template": template.text})
    return texts


def _json(file: Path) -> dict[str, Any]:
    """What a JSON file holds; nothing where there is none."""
    if not file.is_file():
        return {}
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SiftError(f"{file}: damaged: {error}") from None
    if not isinstance(values, dict):
        raise SiftError(f"{file}: damaged: no JSON object")
    return values


def _dumped(values: Mapping[str, Any]) -> str:
    return json.dumps(values, indent=2, ensure_ascii=False) + "\n"


def vocabulary_size(folder: Path) -> int | None:
    """How many tokens the model of a folder has embeddings for, where its configuration says it."""
    config = read_config(folder)
    size: int | None = getattr(config.get_text_config(), "vocab_size", None)
    return size
