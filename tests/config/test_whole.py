"""What is written whole is there as a whole, or what was there before is."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from mlmx.config import whole


def test_a_file_is_what_was_given(tmp_path: Path):
    for contents in ("naïve 日本語\n", b"\x00\xff", ""):
        whole.write(tmp_path / "a", contents)
        assert (tmp_path / "a").read_bytes() == (contents if isinstance(contents, bytes) else contents.encode())
    text = json.dumps({"half a pair": "\ud83d"}, ensure_ascii=False)
    whole.write(tmp_path / "a", text)
    assert json.loads((tmp_path / "a").read_bytes()) == {"half a pair": "\ud83d"}
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    done: list[str] = []
    fsync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda file: (done.append("fsync"), fsync(file))[1])
    monkeypatch.setattr(Path, "replace", lambda aside, to: (done.append(to.name), replace(aside, to))[1])
    whole.write(tmp_path / "a", "new")
    assert done == ["fsync", "a"]


def full(_: object) -> None:
    raise OSError(28, "No space left on device")


def test_what_was_there_stays_where_the_new_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    whole.write(tmp_path / "a", "before")
    with whole.folder(tmp_path / "b") as made:
        (made / "x").write_text("before")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as error:
        whole.write(tmp_path / "a", "after")
    assert error.value.filename == str(tmp_path / "a"), "not what was written aside"
    with pytest.raises(OSError, match="No space left"), whole.folder(tmp_path / "b") as made:
        (made / "x").write_text("after")
    with pytest.raises(KeyboardInterrupt), whole.folder(tmp_path / "b") as made:
        raise KeyboardInterrupt
    assert (tmp_path / "a").read_text() == (tmp_path / "b" / "x").read_text() == "before"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_a_folder_takes_the_place_of_all_that_was_there(tmp_path: Path):
    (tmp_path / "made").mkdir()
    for number in range(2):
        with whole.folder(tmp_path / "above" / "b") as made:
            (made / "deep").mkdir()
            (made / "deep" / f"{number}").touch()
            assert number == 0 or (tmp_path / "above" / "b" / "deep" / "0").exists(), "until it is whole"
    assert [path.name for path in (tmp_path / "above").rglob("*")] == ["b", "deep", "1"]
    assert (tmp_path / "above" / "b").stat().st_mode == (tmp_path / "made").stat().st_mode


def test_a_folder_that_cannot_take_its_place_gives_it_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "b" / "x").mkdir(parents=True)
    rename = Path.rename
    monkeypatch.setattr(Path, "rename", lambda path, to: full(path) if path.name == "new" else rename(path, to))
    with pytest.raises(OSError, match="No space left"), whole.folder(tmp_path / "b"):
        pass
    assert [path.name for path in tmp_path.rglob("*")] == ["b", "x"]
