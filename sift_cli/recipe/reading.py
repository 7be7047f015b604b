"""Recipes read from files: YAML, overrides, and errors that say where. Imports no torch."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from sift_cli.errors import SiftError
from sift_cli.recipe.mistakes import KeyPlace, describe, dotted, idle_keys
from sift_cli.recipe.schema import ROW_OPTIONS, Recipe
from sift_cli.recipe.selection import (
    AXES,
    OPTIONS,
    SelectionSection,
    policy_row,
    row_options,
)
from sift_cli.recipe.training import TrainSection
from sift_cli.selection.policies import POLICIES
from sift_cli.system import shipped

# A file or the name of a shipped recipe; the keys of one; or one that is read already.
RecipeLike = str | os.PathLike[str] | Mapping[str, Any] | Recipe

LARGEST = 1 << 16  # bytes of a recipe
ALIASES = 20  # in one recipe; each can double what is read


class _Loader(yaml.SafeLoader):
    """Plain values only, and few aliases: a short text cannot stand for a huge one."""

    aliases = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            self.aliases += 1
            if self.aliases > ALIASES:
                mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
                raise yaml.composer.ComposerError(None, None, f"more than {ALIASES} aliases", mark)
        return super().compose_node(parent, index)


# Keys of the file that an override makes void: a resolved recipe holds what its policy filled in.
REPLACES = {
    "selection.policy": AXES,
    **{
        f"selection.{axis}": tuple(key for key, one in OPTIONS.items() if one.axis == axis)
        for axis in AXES
    },
    "selection.budget": ("density",),
    "selection.density": ("budget",),
    "train.learning_rate": ("learning_rate_from",),
    "data.task": tuple(key for key in ROW_OPTIONS if key != "columns"),
}


def recipe_of(given: RecipeLike, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe that is given in any form; each override is `a.b=value` and wins over it.

    Raises SiftError as `load_recipe` does, also for what is no recipe.
    """
    if isinstance(given, Recipe):
        return _checked(given.model_dump(), {}, "recipe:", overrides) if overrides else given
    if isinstance(given, Mapping):
        return _checked(_plain(given), {}, "recipe:", overrides)
    if isinstance(given, str | os.PathLike):
        return load_recipe(shipped.find(os.fspath(given)), overrides)
    raise SiftError(
        "recipe: give a file, the name of a shipped recipe, a dict or a Recipe, "
        f"got {type(given).__name__}"
    )


def selection_of(values: Mapping[str, Any]) -> SelectionSection:
    """The section of a recipe with these keys. Raises SiftError as `load_recipe` does."""
    plain = _plain(values)
    try:
        return SelectionSection.model_validate(plain)
    except ValidationError as error:
        idle = idle_keys({"selection": plain})
        problems = [
            describe({**one, "loc": ("selection", *one["loc"])}, {}, "", idle)
            for one in error.errors()
        ]
        raise SiftError("\n".join(what for _, what in problems)) from None


def _plain(value: Any) -> Any:
    """A copy of nested values as YAML would give them: paths become text, tuples lists."""
    if isinstance(value, Mapping):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads and checks a recipe file; each override is `a.b=value` and wins over the file.

    Raises SiftError (exit code 2) with every mistake there is, one located line each.
    """
    if not path.is_file():
        raise SiftError(f"{path}: no such recipe; `sift recipes ls` lists the shipped ones")
    try:
        if path.stat().st_size > LARGEST:
            raise SiftError(f"{path}: larger than {LARGEST:,} bytes, so it is no recipe")
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise SiftError(f"{path}: not a text file ({error.reason} at byte {error.start})") from None
    except OSError as error:
        raise SiftError(f"{path}: cannot be read: {error.strerror}") from None
    return parse_recipe(text, str(path), overrides)


def parse_recipe(text: str, source: str, overrides: Sequence[str] = ()) -> Recipe:
    """Checks the text of a recipe as `load_recipe` does a file; `source` names it in errors."""
    return _parse(text, source, overrides)[0]


def trace_recipe(path: Path, overrides: Sequence[str] = ()) -> tuple[Recipe, dict[str, str]]:
    """The recipe that `load_recipe` gives, and where each value comes from, by section.key.

    An origin is a place in the file, an override, the policy's row, or `default`.
    """
    load_recipe(path, overrides)  # raises for what cannot be read
    recipe, given, places = _parse(path.read_text(encoding="utf-8"), str(path), overrides)
    policy = recipe.selection.policy
    row = POLICIES[policy]
    by_policy = {f"selection.{key}" for key in (*AXES, *row.defaults)}
    by_policy |= {f"train.{key}" for key in row.train}
    origins = {}
    for section, values in recipe.model_dump().items():
        for key in values if isinstance(values, dict) else ():
            name = f"{section}.{key}"
            if given.get(section, {}).get(key) is not None:
                origins[name] = places[section, key].removesuffix(":")
            else:
                origins[name] = f"policy {policy}" if name in by_policy else "default"
    return recipe, origins


def _parse(
    text: str, source: str, overrides: Sequence[str]
) -> tuple[Recipe, dict[str, Any], dict[KeyPlace, str]]:
    """The recipe, the values that were given (no defaults), and the place of each of their keys."""
    problems: list[tuple[str, str]] = []
    reader = _Reader(text, source, problems)
    values, places = reader.read(), reader.places
    recipe = _checked(values, places, f"{source}:1:1", overrides, problems)
    return recipe, values, places


def _checked(
    values: dict[str, Any],
    places: dict[KeyPlace, str],
    nowhere: str,
    overrides: Sequence[str],
    problems: Sequence[tuple[str, str]] = (),
) -> Recipe:
    """The recipe of these values, which the overrides change; `nowhere` is said of what has no
    place. Raises SiftError with `problems`, and all others that there are.
    """
    problems = list(problems)
    for override in overrides:
        _override(values, places, override, problems)
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        idle = idle_keys(values)
        problems += [describe(one, places, nowhere, idle) for one in error.errors()]
    if problems:
        lines = dict.fromkeys(f"{where} {what}" for where, what in problems)
        raise SiftError("\n".join(lines))
    return recipe


class _Reader:
    """Reads a YAML text into plain values, and notes where each key stands and what is wrong."""

    def __init__(self, text: str, source: str, problems: list[tuple[str, str]]) -> None:
        self.text, self.source, self.problems = text, source, problems
        self.places: dict[KeyPlace, str] = {}  # of each key: `source:line:column`
        self._loader: _Loader
        self._unfinished: set[int] = set()  # nodes around the one that is read, by id

    def read(self) -> dict[str, Any]:
        """The values. Raises SiftError where the text is no YAML, or no mapping."""
        try:
            self._loader = _Loader(self.text)
            node = self._loader.get_single_node()
            values = {} if node is None else self._value(node, ())
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            raise self._refusal(mark, error.problem or error.context) from None
        except yaml.reader.ReaderError as error:
            raise self._refusal(_mark(error, self.text), "a character that text has not") from None
        except RecursionError:
            raise self._refusal(self._loader.get_mark(), "nested too deeply") from None
        if not isinstance(values, dict):
            raise SiftError(
                f"{self.source}:1:1 a recipe is a mapping with sections such as model and data"
            )
        return values

    def _value(self, node: yaml.Node, place: KeyPlace) -> Any:
        """What a node stands for. Raises SiftError for an alias to a node around it."""
        self.places.setdefault(place, self._locate(node.start_mark))
        if id(node) in self._unfinished:
            raise self._refusal(node.start_mark, "an alias inside what it stands for")
        self._unfinished.add(id(node))
        try:
            if isinstance(node, yaml.MappingNode):
                return self._mapping(node, place)
            if isinstance(node, yaml.SequenceNode):
                items = enumerate(node.value)
                return [self._value(item, (*place, index)) for index, item in items]
            return self._construct(node)
        finally:
            self._unfinished.discard(id(node))

    def _mapping(self, node: yaml.MappingNode, place: KeyPlace) -> dict[str, Any]:
        """The values of a mapping by key; keys given twice and keys that are no text are noted."""
        own = {id(key_node) for key_node, _ in node.value}
        self._loader.flatten_mapping(node)  # merge keys come first and may be given again
        values: dict[str, Any] = {}
        seen = set()
        for key_node, value_node in node.value:
            key = self._construct(key_node)
            where = self._locate(key_node.start_mark)
            if not isinstance(key, str):
                self.problems.append((where, f"{key!r}: a key must be text"))
                continue
            if key in seen:
                self.problems.append((where, f"{dotted((*place, key))}: given twice"))
            if id(key_node) in own:
                seen.add(key)
            self.places[(*place, key)] = where
            values[key] = self._value(value_node, (*place, key))
        return values

    def _construct(self, node: yaml.Node) -> Any:
        try:
            return self._loader.construct_object(node, deep=True)
        except ValueError as error:  # a date that is none
            raise self._refusal(node.start_mark, error) from None

    def _locate(self, mark: Any) -> str:
        return f"{self.source}:{mark.line + 1}:{mark.column + 1}" if mark else self.source

    def _refusal(self, mark: Any, what: object) -> SiftError:
        return SiftError(f"{self._locate(mark)} not valid YAML: {what}")


def _mark(error: yaml.reader.ReaderError, text: str) -> yaml.Mark:
    """The line and column of a character that YAML does not take: the error gives its index."""
    before = text[: error.position]
    column = error.position - (before.rfind("\n") + 1)
    return yaml.Mark("", error.position, before.count("\n"), column, None, 0)


def _override(
    values: dict[str, Any],
    places: dict[KeyPlace, str],
    override: str,
    problems: list[tuple[str, str]],
) -> None:
    """Sets one dotted key; its place becomes the override itself."""
    dotted, equals, text = override.partition("=")
    keys = dotted.strip().split(".")
    where = f"--set {override}:"
    if not equals or not all(keys):
        problems.append((where, "an override reads section.key=value"))
        return
    try:
        value = yaml.load(text, Loader=_Loader) if text else None
    except (yaml.YAMLError, ValueError, RecursionError):
        problems.append((where, "the value is not valid YAML"))
        return
    section: Any = values
    if dotted.strip() == "selection.policy":
        _reopen_train(values, places, value)
    for depth, key in enumerate(keys[:-1]):
        places.setdefault(tuple(keys[: depth + 1]), where)
        if not isinstance(section.get(key), dict):
            section[key] = {}
        section = section[key]
    void = REPLACES.get(dotted.strip(), ()) if value is not None else ()
    if dotted.strip() == "selection.policy":
        void = (*void, *_filled_in(section))
    for replaced in (keys[-1], *void):
        inside = (*keys[:-1], replaced)
        if not places.get(inside, "").startswith("--set"):  # two overrides can still disagree
            section.pop(replaced, None)
        for place in [p for p in places if p[: len(keys)] == inside]:
            del places[place]
    section[keys[-1]] = value
    places[tuple(keys)] = where


def _reopen_train(values: dict[str, Any], places: dict[KeyPlace, str], policy: object) -> None:
    """Before `policy` takes the place of the file's: takes away what that gave to training.

    These are keys that either row has, where the file has what its own policy, or the default,
    would give as well.
    """
    train = values.get("train")
    if not isinstance(train, dict):
        return
    old, new = policy_row(values.get("selection")).train, policy_row({"policy": policy}).train
    for key in {**old, **new}:
        usual = old.get(key, TrainSection.model_fields[key].default)
        overridden = places.get(("train", key), "").startswith("--set")
        if not overridden and train.get(key) == usual:
            del train[key]
            places.pop(("train", key), None)


def _filled_in(section: Mapping[str, Any]) -> list[str]:
    """The options of a selection whose values its policy, or the default, would give as well."""
    usual = {
        "batches": 1,
        **{key: option.default for key, option in OPTIONS.items()},
        **row_options(section),
    }
    return [key for key, value in usual.items() if section.get(key) in (value, None)]
