"""Disks that are full or read-only, permissions and files that go: one line, and the run goes on.

A full and a read-only disk are a tmpfs, which takes a superuser to mount.
"""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import torch

from sift_cli.recipe import load_recipe
from sift_cli.training import train
from tests.support.command import Done, sift
from tests.support.interruptions import at_call, delta, killed_at

NOBODY = 65534
EVERY_STEP = ("--set", "checkpoint.every=1")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a disk of its own of the given size; takes it down at the end."""
    mounted = []

    def mount(size: str) -> Path:
        path = tmp_path / f"disk-{size}"
        path.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"no disk of its own: {done.stderr.strip()}")
        mounted.append(path)
        return path

    yield mount
    for path in mounted:
        subprocess.run(["umount", str(path)], check=True)


def fill(folder: Path) -> None:
    """Leaves no byte free."""
    with (folder / "filler").open("wb", buffering=0) as file:
        for size in (1 << 16, 1 << 12, 1):
            try:
                while True:
                    file.write(b"\0" * size)
            except OSError:
                continue


def one_line(done: Done, said: str, code: int = 2) -> None:
    assert done.returncode == code, done.stderr
    assert said in done.stderr.splitlines()[-1], done.stderr
    assert "should not have" not in done.stderr
    assert done.stdout == ""


def leftovers(out: Path) -> list[str]:
    return [path.name for path in out.rglob("*") if "partial" in path.name or path.name == ".lock"]


@pytest.fixture
def calm(recipe_file: Path, tmp_path: Path) -> bytes:
    """The delta of an undisturbed run."""
    train(load_recipe(recipe_file), tmp_path / "calm")
    return delta(tmp_path / "calm")


def test_a_disk_too_small_is_found_before_training(
    recipe_file: Path, disk: Callable[[str], Path]
) -> None:
    out = disk("512k") / "run"
    one_line(sift("train", recipe_file, "--out", out), "the run needs about")
    assert not out.exists()


def test_a_disk_that_is_full_already(recipe_file: Path, disk: Callable[[str], Path]) -> None:
    folder = disk("64k")
    fill(folder)
    one_line(sift("train", recipe_file, "--out", folder), "no space is left on the disk; free some")
    assert leftovers(folder) == []


@pytest.mark.parametrize("step", [1, 4])
def test_a_disk_that_fills_up_while_training(
    step: int, recipe_file: Path, disk: Callable[[str], Path], calm: bytes
) -> None:
    folder = disk("8m")
    out = folder / "run"
    with at_call(step, lambda: fill(folder)):
        done = sift("train", recipe_file, "--out", out, *EVERY_STEP)
    one_line(done, "no space is left on the disk; free some space")
    assert not (out / "summary.json").exists()
    assert leftovers(out) == []
    saved = [path.name[:13] for path in sorted((out / "checkpoint").iterdir())]
    assert saved == [f"step-{at:08}" for at in range(4) if step - 3 < at < step]
    (folder / "filler").unlink()
    done = sift("train", recipe_file, "--out", out, "--resume", *EVERY_STEP)
    assert done.returncode == 0, done.stderr
    assert delta(out) == calm


def test_a_disk_that_is_full_when_the_delta_is_written(
    recipe_file: Path, disk: Callable[[str], Path], calm: bytes
) -> None:
    from sift_cli.training import loop

    folder = disk("8m")
    out = folder / "run"
    real = loop.finish

    def full(*args: object, **more: object) -> object:
        fill(folder)
        return real(*args, **more)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "finish", full)
        done = sift("train", recipe_file, "--out", out, "--set", "checkpoint.every=4")
    one_line(done, "no space is left on the disk")
    left = {"checkpoint", "gradient.jsonl", "metrics.jsonl", "predictions.jsonl", "recipe.yaml"}
    assert {path.name for path in out.iterdir()} == left
    (folder / "filler").unlink()
    assert sift("train", recipe_file, "--out", out, "--resume").returncode == 0
    assert delta(out) == calm


def test_a_read_only_disk(recipe_file: Path, disk: Callable[[str], Path], calm: bytes) -> None:
    folder = disk("8m")

    def remount(how: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{how}", str(folder)], check=True)

    remount("ro")
    one_line(sift("train", recipe_file, "--out", folder / "run"), "the disk is read-only; make it")
    remount("rw")
    train(load_recipe(recipe_file), folder / "run")
    assert delta(folder / "run") == calm


@contextmanager
def without_permission(folder: Path) -> Iterator[None]:
    """Whoever we are, nothing can be written into `folder`, which all may look into."""
    superuser = os.geteuid() == 0
    folder.chmod(0o755 if superuser else 0o555)
    if superuser:  # whose permissions cannot be taken away
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        if superuser:
            os.seteuid(0)
        folder.chmod(0o755)


def test_permissions_that_are_lacking_or_go(recipe_file: Path, tmp_path: Path, calm: bytes) -> None:
    for parent in [tmp_path, *tmp_path.parents]:
        if parent == Path(tempfile.gettempdir()):
            break
        parent.chmod(0o755)
    closed = tmp_path / "closed"
    closed.mkdir()
    with without_permission(closed):
        done = sift("train", recipe_file, "--out", closed / "run")
    one_line(done, f"{closed / 'run'}: permission denied; make it writable, or choose another")
    out = tmp_path / "run"
    (out / "checkpoint").mkdir(parents=True)
    taken = ExitStack()
    with taken, at_call(4, lambda: taken.enter_context(without_permission(out / "checkpoint"))):
        done = sift("train", recipe_file, "--out", out, *EVERY_STEP)
    one_line(done, "permission denied; make it writable, or choose another --out")
    assert len(list((out / "checkpoint").iterdir())) == 2
    done = sift("train", recipe_file, "--out", out, "--resume", *EVERY_STEP)
    assert done.returncode == 0, done.stderr
    assert delta(out) == calm


def test_data_and_model_that_vanish(
    recipe_file: Path, base: Path, data: Path, tmp_path: Path, calm: bytes
) -> None:
    def vanish() -> None:
        base.rename(tmp_path / "base-gone")
        data.rename(tmp_path / "data-gone")

    out = tmp_path / "run"
    with at_call(3, vanish):  # a run that has begun needs neither
        assert sift("train", recipe_file, "--out", out).returncode == 0
    assert delta(out) == calm
    (tmp_path / "base-gone").rename(base)
    one_line(sift("train", recipe_file, "--out", out, "--overwrite"), f"{data}: no such folder")
    assert delta(out) == calm  # a run that cannot begin costs nothing
    (tmp_path / "data-gone").rename(data)
    killed_at(4, load_recipe(recipe_file, ["checkpoint.every=1"]), tmp_path / "again")
    shutil.rmtree(data)
    done = sift("train", recipe_file, "--out", tmp_path / "again", "--resume")
    one_line(done, f"{data}: no such folder")
    assert len(list((tmp_path / "again/checkpoint").iterdir())) == 2


def test_a_folder_that_vanishes(recipe_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with at_call(3, lambda: shutil.rmtree(out)):
        done = sift("train", recipe_file, "--out", out, *EVERY_STEP)
    one_line(done, "it vanished while it was needed; bring it back")


def test_memory_that_is_not_there(recipe_file: Path, tmp_path: Path, calm: bytes) -> None:
    out = tmp_path / "run"
    with at_call(4, lambda: torch.empty(1 << 50)):
        done = sift("train", recipe_file, "--out", out, *EVERY_STEP)
    one_line(done, "out of memory: on the host; halve train.batch_size and double")
    assert sift("train", recipe_file, "--out", out, "--resume").returncode == 0
    assert delta(out) == calm
