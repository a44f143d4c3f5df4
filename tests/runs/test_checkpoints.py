"""A checkpoint is whole or not there, and what is damaged is known before it is used."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mlmx.runs import checkpoints


def fill(folder: Path) -> None:
    (folder / "weights").write_bytes(b"weights " * 100)
    (folder / "state.json").write_text('{"interim": false}')


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoints" / "checkpoint-7"
    checkpoints.write(folder, fill)
    return folder


def test_what_was_written_is_whole(saved):
    checkpoints.verify(saved)
    assert sorted(path.name for path in saved.iterdir()) == ["manifest.json", "state.json", "weights"]
    assert [path.name for path in saved.parent.iterdir()] == ["checkpoint-7"]


def flip(folder: Path) -> None:
    contents = bytearray((folder / "weights").read_bytes())
    contents[5] ^= 1
    (folder / "weights").write_bytes(contents)


DAMAGES = {
    "a flipped bit": (flip, "weights is not what was written"),
    "cut short": (lambda folder: (folder / "weights").write_bytes(b"weights"), "weights is not what was written"),
    "a missing file": (lambda folder: (folder / "state.json").unlink(), "state.json is missing"),
    "no manifest": (lambda folder: (folder / "manifest.json").unlink(), "it has no manifest"),
    "half a manifest": (lambda folder: (folder / "manifest.json").write_text('{"fil'), "manifest.json cannot be read"),
    "another manifest": (lambda folder: (folder / "manifest.json").write_text("[3]"), "manifest.json cannot be read"),
    "a deep manifest": (
        lambda folder: (folder / "manifest.json").write_text("[" * 5000),
        "manifest.json cannot be read",
    ),
    "an empty folder": (lambda folder: [path.unlink() for path in folder.iterdir()], "it has no manifest"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_known(damage, saved):
    do, said = DAMAGES[damage]
    do(saved)
    with pytest.raises(checkpoints.DamagedError, match=said):
        checkpoints.verify(saved)


@pytest.mark.parametrize("damage", DAMAGES)
def test_the_newest_whole_one_is_found_and_damaged_ones_are_moved_aside(damage, saved, said):
    newer = saved.with_name("checkpoint-12")
    checkpoints.write(newer, fill)
    DAMAGES[damage][0](newer)
    assert checkpoints.newest_whole(saved.parent) == saved
    assert sorted(path.name for path in saved.parent.iterdir()) == ["checkpoint-7", "damaged-checkpoint-12"]
    assert "checkpoint checkpoint-12 is damaged" in said.text
    checkpoints.write(newer, fill)
    DAMAGES[damage][0](newer)
    assert checkpoints.newest_whole(saved.parent) == saved
    assert saved.with_name("damaged-checkpoint-12-2").is_dir()


def test_newest_is_by_step_not_by_name(saved):
    checkpoints.write(saved.with_name("checkpoint-10"), fill)
    assert checkpoints.newest_whole(saved.parent) == saved.with_name("checkpoint-10")


@pytest.mark.parametrize("contents", ["", "{", "[]", "null", "[" * 5000, '{"interim": 0}'])
def test_a_state_that_cannot_be_read_is_of_a_checkpoint_that_was_asked_for(contents, saved):
    (saved / "state.json").write_text(contents)
    assert not checkpoints.is_interim(saved)


def test_no_checkpoint_is_none(tmp_path):
    assert checkpoints.newest_whole(tmp_path / "checkpoints") is None


def test_a_failed_write_leaves_what_was_there(saved):
    def broken(folder: Path) -> None:
        (folder / "weights").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        checkpoints.write(saved, broken)
    checkpoints.verify(saved)
    assert [path.name for path in saved.parent.iterdir()] == ["checkpoint-7"]


def test_a_checkpoint_of_the_same_step_is_replaced(saved):
    checkpoints.write(saved, lambda folder: (folder / "weights").write_bytes(b"others"))
    checkpoints.verify(saved)
    assert (saved / "weights").read_bytes() == b"others"
    assert [path.name for path in saved.parent.iterdir()] == ["checkpoint-7"]


def test_leftovers_of_a_killed_process_are_cleared(saved):
    (saved.parent / ".checkpoint-9.tmp").mkdir()
    (saved.parent / ".checkpoint-9.tmp" / "weights").write_bytes(b"half")
    assert checkpoints.newest_whole(saved.parent) == saved
    assert [path.name for path in saved.parent.iterdir()] == ["checkpoint-7"]


def steps(folder: Path) -> list[int]:
    return [checkpoints.step_of(path) for path in checkpoints.all_of(folder)]


def test_rotation_keeps_the_newest_and_the_best(tmp_path):
    for step in range(1, 6):
        checkpoints.write(tmp_path / f"checkpoint-{step}", fill)
    checkpoints.rotate(tmp_path, None)
    assert steps(tmp_path) == [5, 4, 3, 2, 1]
    checkpoints.rotate(tmp_path, 2, tmp_path / "checkpoint-1")
    assert steps(tmp_path) == [5, 4, 1]


def test_an_interim_checkpoint_goes_when_there_is_a_newer_one(tmp_path):
    for step, interim in ((1, False), (2, True), (3, False), (4, True)):
        state = json.dumps({"interim": interim})
        checkpoints.write(
            tmp_path / f"checkpoint-{step}", lambda to, state=state: (to / "state.json").write_text(state)
        )
    checkpoints.rotate(tmp_path, None)
    assert steps(tmp_path) == [4, 3, 1]


def test_a_state_comes_back_as_it_was(tmp_path):
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([parameter], lr=0.1)
    parameter.grad = torch.arange(3.0)
    optimizer.step()
    state = {
        "optimizer": optimizer.state_dict(),
        "random": np.random.get_state(),
        5: (1, [2.5, None, True], float("inf")),
    }
    tensors: dict[str, torch.Tensor] = {}
    kept = json.dumps(checkpoints.flattened(state, tensors))
    save_file(tensors, tmp_path / "tensors.safetensors")
    back = checkpoints.restored(json.loads(kept), load_file(tmp_path / "tensors.safetensors"))
    assert back[5] == state[5]
    assert back["optimizer"]["param_groups"] == state["optimizer"]["param_groups"]
    for name, value in state["optimizer"]["state"][0].items():
        assert torch.equal(back["optimizer"]["state"][0][name], value)
    assert (back["random"][1] == state["random"][1]).all()
    assert back["random"][2:] == state["random"][2:]


def test_a_state_that_would_need_a_pickle_is_refused():
    with pytest.raises(TypeError, match=r"scheduler\.fn: a function cannot be kept in a checkpoint"):
        checkpoints.flattened({"scheduler": {"fn": lambda: 0}}, {})
