import logging
import zipfile
from pathlib import Path

import pytest
import torch

from mmfusion.training.checkpoint import FOLDER
from mmfusion.training.resume import complete_checkpoint, find, why_incomplete


def save(run, step, **changes):
    path = run / FOLDER / f"step-{step:08d}.ckpt"
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "state_dict": {"w": torch.arange(2000.0)},
        "global_step": step,
        "loops": {},
        "callbacks": {},
        "optimizer_states": [],
        "pytorch-lightning_version": "2.6.6",
        **changes,
    }
    torch.save({key: value for key, value in content.items() if value is not None}, path)
    return path


def test_the_newest_step_wins_whatever_the_file_times(tmp_path):
    newest, older = save(tmp_path, 100), save(tmp_path, 20)
    older.touch()
    assert find(tmp_path) == newest


def torn(path):
    path.write_bytes(path.read_bytes()[:-600])


def flipped(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def empty(path):
    path.write_bytes(b"")


def with_an_object(path):
    torch.save({**torch.load(path), "extra": Path("x")}, path)


def no_dict(path):
    torch.save(5, path)


def compressed_by_its_directory(path):
    content = bytearray(path.read_bytes())
    content[zipfile.ZipFile(path).start_dir + 10] ^= 8  # stored -> deflated
    path.write_bytes(bytes(content))


@pytest.mark.parametrize(
    "damage", [torn, flipped, empty, with_an_object, no_dict, compressed_by_its_directory]
)
def test_a_damaged_checkpoint_is_passed_over_with_the_reason(tmp_path, damage, caplog):
    good, bad = save(tmp_path, 10), save(tmp_path, 20)
    damage(bad)
    with caplog.at_level(logging.WARNING):
        assert find(tmp_path) == good
    assert "not resuming from step-00000020.ckpt" in caplog.text


def test_a_file_of_another_step_or_without_our_keys_is_not_complete(tmp_path):
    assert "holds step 5" in why_incomplete(save(tmp_path, 20, global_step=5))
    assert "has no loops" in why_incomplete(save(tmp_path, 30, loops=None))
    unversioned = {"pytorch-lightning_version": None}
    assert "has no pytorch-lightning_version" in why_incomplete(save(tmp_path, 31, **unversioned))
    assert "has a list as its state_dict" in why_incomplete(save(tmp_path, 32, state_dict=[1]))


def test_no_complete_checkpoint_is_an_error_not_step_0(tmp_path):
    empty(save(tmp_path, 10))
    with pytest.raises(ValueError, match="none of the 1 checkpoints"):
        find(tmp_path, "auto")


def test_modes(tmp_path):
    assert find(tmp_path, "auto") is None
    with pytest.raises(FileNotFoundError, match="--resume must"):
        find(tmp_path, "must")
    path = save(tmp_path, 10)
    assert find(tmp_path, "none") is None
    assert find(tmp_path / "elsewhere", str(path)) == path
    assert find(tmp_path / "elsewhere", str(tmp_path)) == path


def test_a_path_that_is_not_there_names_the_option_that_gave_it(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"model\.init_from"):
        complete_checkpoint(tmp_path / "nowhere", "model.init_from")
    with pytest.raises(FileNotFoundError, match=r"no checkpoint"):
        complete_checkpoint(tmp_path, "model.init_from")
