"""A function of the user's own, in a file that a recipe names."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sift_cli.errors import SiftError


def function_in(name: str, key: str, allow_code: bool) -> Callable[..., Any]:
    """The function that `FILE.py:FUNCTION` names; `key` is that of the recipe which names it.

    Raises SiftError where code is not allowed, or where there is no such function.
    """
    file, _, function = name.rpartition(":")
    if not allow_code:
        raise SiftError(f"{key}: {name} is code; pass --allow-code to run it")
    path = Path(file).expanduser()
    spec = importlib.util.spec_from_file_location("sift_own_code", path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise SiftError(f"{key}: {file}: no such file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise SiftError(f"{key}: {file}: {type(error).__name__}: {error}") from error
    own = getattr(module, function, None)
    if not callable(own):
        raise SiftError(f"{key}: {file} holds no function {function!r}")
    found: Callable[..., Any] = own
    return found
