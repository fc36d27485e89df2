from __future__ import annotations

import fcntl
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from mmfusion.data.whole_file import alone, write_whole
from tests.data.held import held


def test_file_appears_only_when_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "a.idx"
    path.write_bytes(b"old")
    with write_whole(str(path)) as file:
        file.write(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["a.idx"]


def test_exception_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.idx"
    path.write_bytes(b"old")
    with pytest.raises(TypeError), write_whole(str(path)) as file:
        file.writelines([b"new", "text"])  # type: ignore[list-item]
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.idx"]


def test_new_file_has_the_permissions_of_any_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with write_whole("a.idx") as file:
        file.write(b"x")
    (tmp_path / "b").touch()
    assert stat.S_IMODE(os.stat("a.idx").st_mode) == stat.S_IMODE(os.stat("b").st_mode)


@pytest.mark.parametrize("kill", [True, False])
def test_a_lock_is_held_by_one_process_and_free_when_it_ends(tmp_path: Path, kill: bool) -> None:
    lock = tmp_path / "new" / ".lock"
    with held(lock, kill):
        message = rf"another process is at work here \(it holds {lock}\); wait for it"
        with pytest.raises(ValueError, match=message), alone(str(lock), "at work here"):
            pass
        assert lock.exists()
    with alone(str(lock), "at work here"):
        pass
    assert not lock.exists()


def test_a_lock_that_was_removed_since_it_was_opened_is_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one that held it ends, and a third process makes the file anew, just before we lock."""
    lock, real = tmp_path / ".lock", fcntl.lockf

    def late(file: Any, how: int) -> None:
        lock.unlink()
        lock.touch()
        real(file, how)

    monkeypatch.setattr(fcntl, "lockf", late)
    with pytest.raises(ValueError, match="another process is at work"), alone(str(lock), "at work"):
        pass
    assert lock.exists()
