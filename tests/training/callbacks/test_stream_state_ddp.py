"""The stream on two real processes (DDP, gloo): the same steps, every rank's lanes in the state."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import lightning as L
import pytest
import torch
from torch.multiprocessing.spawn import ProcessRaisedException

from mmfusion.data.state import StreamState
from mmfusion.training.callbacks.stream_state import BadDataError, StreamStateCallback
from tests.data.synthetic import keys_of, make_data, write_source
from tests.training.callbacks.test_stream_state import Recorder, fit, listed

pytestmark = pytest.mark.slow


class Writer(Recorder):
    """Each rank writes its samples to a file of its own."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        with open(self.folder / f"{self.global_rank}.jsonl", "a") as file:
            file.write(json.dumps([self.trainer.global_step, keys_of(batch)]) + "\n")
        return loss


class Counts(L.Callback):
    """Each rank writes what it logs of the data's counts."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer, *_) -> None:
        found = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("data/")}
        with open(self.folder / f"counts-{trainer.global_rank}.jsonl", "a") as file:
            file.write(json.dumps([trainer.global_step, found]) + "\n")


def fit_on_two(
    data, folder: Path, max_steps: int, resume=None, save_every: int = 1, log_every: int = 50
) -> dict[int, list]:
    """Train on two spawned processes; samples of each step over both ranks. Saves checkpoints."""
    folder.mkdir(exist_ok=True)
    data.processor = data._state = None
    saver = L.pytorch.callbacks.ModelCheckpoint(
        folder,
        "{step}",
        every_n_train_steps=save_every,
        save_top_k=-1,
        save_on_train_epoch_end=False,
    )
    trainer = L.Trainer(
        max_steps=max_steps,
        max_epochs=-1,
        accelerator="cpu",
        devices=2,
        strategy="ddp_spawn",
        callbacks=[StreamStateCallback(), saver, Counts(folder)],
        log_every_n_steps=log_every,
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Writer(folder), data, ckpt_path=resume, weights_only=True)
    steps: dict[int, list] = {}
    for rank in range(2):
        for line in (folder / f"{rank}.jsonl").read_text().splitlines():
            step, keys = json.loads(line)
            steps.setdefault(step, []).extend(map(tuple, keys))
    return steps


def as_sets(steps: dict[int, list]) -> dict[int, Counter]:
    return {step: Counter(keys) for step, keys in steps.items()}


def stream_state(path: Path) -> StreamState:
    loaded = torch.load(path, weights_only=True)
    return StreamState.from_json(loaded["callbacks"]["mmfusion.stream"])


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("ddp")
    bad = {3: "odd", 11: "corrupt_image"}
    return {"a": write_source(root / "a", 60, bad=bad), "b": write_source(root / "b", 9, seed=1)}


def test_one_two_and_one_processes_again_see_the_uninterrupted_steps(folders, tmp_path):
    data = make_data(folders)
    expected = fit(data, tmp_path / "whole", 9, save_every=1)[0].steps
    first = fit(make_data(folders), tmp_path, 3, save_every=1)[0].steps
    second = fit_on_two(make_data(folders), tmp_path / "two", 6, tmp_path / "step=3.ckpt")
    third = fit(make_data(folders), tmp_path, 9, tmp_path / "two" / "step=6.ckpt")[0].steps
    assert as_sets(first | second | third) == as_sets(expected)
    assert stream_state(tmp_path / "two" / "step=6.ckpt") == stream_state(
        tmp_path / "whole" / "step=6.ckpt"
    )


def test_a_finite_run_ends_on_both_ranks_at_the_same_step(folders, tmp_path):
    expected = fit(make_data(folders, epochs=1), tmp_path / "one", save_every=1)[0].steps
    steps = fit_on_two(make_data(folders, epochs=1, num_workers=1), tmp_path / "two", -1)
    assert as_sets(steps) == as_sets(expected)
    rows = [json.loads(x) for x in (tmp_path / "two" / "quarantine.jsonl").read_text().splitlines()]
    assert sorted(row["index"] for row in rows) == [3, 11]
    counts = stream_state(tmp_path / "two" / f"step={len(steps)}.ckpt").counts
    assert counts["a"].bad == {"odd": 1, "corrupt_image": 1}
    assert counts["a"].seen == 58


@pytest.mark.parametrize(("save_every", "log_every"), [(1, 50), (1000, 1)])
def test_too_many_bad_samples_stop_both_ranks_at_the_same_step_and_all_are_listed(
    tmp_path, save_every, log_every
):
    bad = dict.fromkeys(range(0, 150, 2), "odd")
    folders = {"half": write_source(tmp_path / "half", 150, bad=bad, words=4)}
    with pytest.raises(BadDataError):
        fit(make_data(folders), tmp_path / "one", 100)
    with pytest.raises(ProcessRaisedException, match="BadDataError"):
        fit_on_two(make_data(folders), tmp_path / "two", 100, None, save_every, log_every)
    assert listed(tmp_path / "two") == listed(tmp_path / "one")


def test_both_ranks_log_the_counts_of_one(folders, tmp_path):
    (tmp_path / "one").mkdir()
    fit(make_data(folders), tmp_path, 8, more=[Counts(tmp_path / "one")], log_every_n_steps=1)
    fit_on_two(make_data(folders), tmp_path / "two", 8, save_every=3, log_every=1)
    one, *two = (
        dict(map(json.loads, (tmp_path / name).read_text().splitlines()))  # last of each step
        for name in ("one/counts-0.jsonl", "two/counts-0.jsonl", "two/counts-1.jsonl")
    )
    assert one.keys() >= {1, 2, 3, 4, 5, 6, 7, 8}
    one, *two = ({step: found[step] for step in range(1, 9)} for found in (one, *two))
    assert two == [one, one]
