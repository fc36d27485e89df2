import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from mmfusion.training.checkpoint import (
    AtomicCheckpointIO,
    kept_state,
    load_kept,
    read_checkpoint,
    trained_names,
    unused_names,
)


class Parts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        norms = nn.BatchNorm1d(4), nn.BatchNorm1d(4, affine=False)
        self.projector = nn.Sequential(nn.Linear(4, 4), *norms)
        self.encoder.requires_grad_(False)


def test_kept_are_trainable_weights_and_the_statistics_beside_them():
    model = Parts()
    names = trained_names(model)
    assert "projector.0.weight" in names
    assert "projector.1.running_mean" in names
    assert "projector.2.running_mean" in names, "no parameters of its own, but inside what trains"
    assert not [name for name in names if name.startswith("encoder")]


def test_a_view_is_saved_without_the_rest_of_its_storage(tmp_path):
    table = torch.zeros(100_000, 8)
    path = tmp_path / "step-00000001.ckpt"
    kept = kept_state({"rows": table[-2:]}, ["rows"])
    AtomicCheckpointIO().save_checkpoint({"state_dict": kept}, path)
    assert path.stat().st_size < 10_000
    assert read_checkpoint(path)["state_dict"]["rows"].shape == (2, 8)


SAVE_LARGER_THAN_ALLOWED = """
import resource, sys, torch
from mmfusion.training.checkpoint import AtomicCheckpointIO
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    AtomicCheckpointIO().save_checkpoint({"weights": torch.zeros(100_000)}, sys.argv[1])
except OSError as error:
    print(error)
"""


@pytest.mark.slow
def test_a_save_that_fails_names_the_file_and_leaves_the_old_one_and_no_rest(tmp_path):
    path = tmp_path / "c.ckpt"
    AtomicCheckpointIO().save_checkpoint({"a": 1}, path)
    command = [sys.executable, "-c", SAVE_LARGER_THAN_ALLOWED, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == f"[Errno 27] File too large: '{path}'\n"
    assert read_checkpoint(path) == {"a": 1}
    assert os.listdir(tmp_path) == ["c.ckpt"]


def test_a_value_that_could_not_be_read_back_is_refused_by_its_key(tmp_path):
    state = {"seen": [1, {"what": Path("x")}], "fine": torch.Size([2])}
    with pytest.raises(ValueError, match=r"callbacks\.mine\.seen\.what holds a pathlib"):
        AtomicCheckpointIO().save_checkpoint({"callbacks": {"mine": state}}, tmp_path / "c.ckpt")
    assert not list(tmp_path.iterdir())


class Evil:
    def __reduce__(self):
        return print, ("code ran",)


def test_a_checkpoint_cannot_run_code(tmp_path, capsys):
    torch.save({"state_dict": Evil()}, tmp_path / "c.ckpt")
    with pytest.raises(pickle.UnpicklingError):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "c.ckpt", weights_only=False)
    assert "code ran" not in capsys.readouterr().out


def test_a_weight_is_found_although_lora_wraps_it_now():
    earlier, model = Parts(), Parts()
    inject_adapter_in_model(LoraConfig(target_modules=["projector.0"]), model)
    loaded = load_kept(model, {"projector.0.weight": earlier.projector[0].weight}, "there")
    assert loaded == {"projector.0.base_layer.weight": "projector.0.weight"}
    assert torch.equal(model.projector[0].base_layer.weight, earlier.projector[0].weight)


def test_other_shapes_are_refused_with_both_named():
    with pytest.raises(ValueError, match=r"projector.0.weight: \(2, 2\) there, \(4, 4\) here"):
        load_kept(Parts(), {"projector.0.weight": torch.zeros(2, 2)}, "there")


def test_weights_that_match_nothing_are_refused():
    with pytest.raises(ValueError, match="none of the 1 weights of there"):
        load_kept(Parts(), {"other.weight": torch.zeros(2)}, "there")


def test_weights_without_a_place_are_named():
    state = {"other.weight": torch.zeros(2), "projector.0.bias": torch.ones(4)}
    assert unused_names(Parts(), state) == ["other.weight"]
