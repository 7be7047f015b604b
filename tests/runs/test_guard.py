"""Faults around a run: each told in one line, with the way out."""

import errno
import os
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from sift_cli.errors import SiftError
from sift_cli.recipe import load_recipe
from sift_cli.runs import guard
from sift_cli.runs.folder import LOCK_FILE
from sift_cli.runs.guard import explained_faults, guarded, locked, require_space
from sift_cli.training import train
from tests.support.forks import server
from tests.support.interruptions import hold


def test_a_second_run_is_refused_and_a_dead_one_blocks_no_one(tmp_path: Path) -> None:
    context = server()
    ready, done = context.Event(), context.Event()
    other = context.Process(target=hold, args=(tmp_path, ready, done))
    other.start()
    assert ready.wait(60)
    with pytest.raises(SiftError, match=f"process {other.pid} trains into it"), locked(tmp_path):
        pass
    other.kill()
    other.join()
    assert (tmp_path / LOCK_FILE).read_text() == str(other.pid)  # left behind, and no matter
    with locked(tmp_path):
        assert (tmp_path / LOCK_FILE).read_text() == str(os.getpid())
    assert not (tmp_path / LOCK_FILE).exists()


def test_a_lock_file_that_was_taken_away_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = guard.fcntl.flock, iter(range(100))

    def late(descriptor: int, how: int) -> None:
        if next(calls) == 0:  # its owner ends between our opening and our locking
            (tmp_path / LOCK_FILE).unlink()
        real(descriptor, how)

    monkeypatch.setattr(guard.fcntl, "flock", late)
    with locked(tmp_path):
        assert (tmp_path / LOCK_FILE).read_text() == str(os.getpid())


def test_a_folder_that_stays_empty_goes_again(tmp_path: Path) -> None:
    with pytest.raises(KeyError), guarded(tmp_path / "a/run"):
        raise KeyError
    assert not (tmp_path / "a/run").exists()
    (tmp_path / "held").mkdir()
    with guarded(tmp_path / "held"):
        pass
    assert (tmp_path / "held").exists()


def test_a_file_in_the_place_of_the_folder(recipe_file: Path, tmp_path: Path) -> None:
    with pytest.raises(SiftError, match="a folder is needed here"):
        train(load_recipe(recipe_file), recipe_file)
    with pytest.raises(SiftError, match="a folder is needed here"):
        train(load_recipe(recipe_file), recipe_file / "run")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "", "f"), "f: no space is left on the disk; free some space"),
        (OSError(errno.EDQUOT, "", "f"), "f: the disk quota is used up; free some space"),
        (OSError(errno.EROFS, "", "f"), "f: the disk is read-only; make it writable"),
        (PermissionError(errno.EACCES, "", "f"), "f: permission denied; make it writable"),
        (FileNotFoundError(errno.ENOENT, "", "f"), "f: it vanished while it was needed"),
        (SafetensorError("I/O error: No space left (os error 28)"), "run: no space is left"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), "out of memory: CUDA out of memory;"),
        (MemoryError(), "out of memory: on the host; halve train.batch_size"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "out of memory: on the host;"),
    ],
)
def test_faults_are_one_line_with_a_way_out(error: Exception, said: str) -> None:
    with pytest.raises(SiftError) as caught, explained_faults(Path("run")):
        raise error
    assert str(caught.value).startswith(said)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("error", [OSError(errno.EINVAL, ""), RuntimeError("x"), ValueError("x")])
def test_other_errors_stay_what_they_are(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, explained_faults(Path("run")):
        raise error
    assert caught.value is error


def test_space_is_looked_at_before_training(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    require_space(tmp_path, 1)
    monkeypatch.setattr(guard, "shutil", Disk)
    with pytest.raises(SiftError, match=r"1\.0 MB are free on its disk, and the run needs about"):
        train(load_recipe(recipe_file), tmp_path / "run")
    assert not (tmp_path / "run").exists()


class Disk:
    """One that is almost full."""

    free = 1_000_000

    @classmethod
    def disk_usage(cls, path: Path) -> type["Disk"]:
        return cls
