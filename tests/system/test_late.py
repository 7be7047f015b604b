"""Parts of packages that wait until they are called."""

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sift_cli.system import late

NAMES = ("late_brought", "late_user")


@pytest.fixture
def user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A module that imports a function of a package at its head; both can be imported."""
    (tmp_path / "late_brought.py").write_text(
        "THREE = 3\ndef times(number, *, by):\n    return number * by\n"
    )
    module = tmp_path / "late_user.py"
    module.write_text("from late_brought import times\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(late, "WAITING", {"late_user": ("late_brought", "times")})
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path])
    for name in NAMES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    late.wait_for_calls()
    late.wait_for_calls()
    yield module
    for name in NAMES:
        sys.modules.pop(name, None)


def test_a_package_is_imported_when_its_function_is_called(user: Path) -> None:
    module = importlib.import_module("late_user")
    assert "late_brought" not in sys.modules
    assert module.times(4, by=5) == 20
    assert sys.modules["late_brought"].THREE == 3
    assert sum(isinstance(one, late.Finder) for one in sys.meta_path) == 1


def test_a_package_that_is_there_is_taken(user: Path) -> None:
    brought = importlib.import_module("late_brought")
    assert importlib.import_module("late_user").times is brought.times


def test_a_module_that_wants_more_gets_the_package(user: Path) -> None:
    user.write_text("from late_brought import times, THREE\n")
    module = importlib.import_module("late_user")
    assert module.times is sys.modules["late_brought"].times
    assert module.THREE == 3


def test_a_module_that_fails_leaves_no_stand_in(user: Path) -> None:
    user.write_text("from late_brought import times\n1 / 0\n")
    with pytest.raises(ZeroDivisionError):
        importlib.import_module("late_user")
    assert "late_brought" not in sys.modules
    user.write_text("from late_nowhere import times\n")
    with pytest.raises(ImportError, match="late_nowhere"):
        importlib.import_module("late_user")


def test_what_waits_is_what_transformers_imports() -> None:
    for name, (package, function) in late.WAITING.items():
        source = Path(importlib.util.find_spec(name).origin).read_text()
        assert f"from {package} import {function}\n" in source, name
