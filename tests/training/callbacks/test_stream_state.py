"""The stream's state under a real Lightning Trainer: no batch lost or repeated, whatever Lightning
does with loaders (it fetches one batch ahead, and its own loader state is lost or stale).
"""

from __future__ import annotations

import json
import random
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from mmfusion.data.state import StreamState
from mmfusion.training.callbacks.stream_state import BadDataError, StreamStateCallback
from tests.data.synthetic import keys_of, make_data, make_processor, write_source


class Recorder(L.LightningModule):
    """Learns a number; writes down what it is given in each optimizer step."""

    def __init__(self, estimate_steps: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.model = SimpleNamespace(processor=make_processor)
        self.estimate_steps = estimate_steps
        self.steps: dict[int, list] = {}
        self.validated: list = []

    def setup(self, stage: str) -> None:
        if stage == "fit":
            data = self.trainer.datamodule
            micro = data.micro_batches_per_step(self.trainer.world_size)
            self.trainer.accumulate_grad_batches = micro

    def training_step(self, batch, batch_idx):
        self.steps.setdefault(self.trainer.global_step, []).extend(keys_of(batch))
        return self.weight * batch.step_counts["tokens"] / 100

    def validation_step(self, batch, batch_idx):
        self.validated += keys_of(batch)

    def configure_optimizers(self):
        if self.estimate_steps:
            assert self.trainer.estimated_stepping_batches > 0
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("callback")
    bad = {3: "odd", 11: "corrupt_image"}
    return {"a": write_source(root / "a", 60, bad=bad), "b": write_source(root / "b", 9, seed=1)}


def fit(
    data, folder, max_steps=-1, resume=None, module=None, save_every=None, more=(), **arguments
):
    """Train; returns the module, the trainer and the state callback."""
    data.processor = None
    callback = StreamStateCallback()
    callbacks = [callback, *more]
    if save_every:
        callbacks.append(
            ModelCheckpoint(folder, "{step}", every_n_train_steps=save_every, save_top_k=-1)
        )
    module = module or Recorder()
    trainer = L.Trainer(
        max_steps=max_steps,
        accelerator="cpu",
        callbacks=callbacks,
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=bool(save_every),
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=arguments.pop("num_sanity_val_steps", 2),
        **arguments,
    )
    trainer.fit(module, data, ckpt_path=resume, weights_only=True)
    return module, trainer, callback


def whole(folders, tmp_path, steps, **arguments) -> dict[int, list]:
    return fit(make_data(folders, **arguments), tmp_path / "whole", steps)[0].steps


def test_a_resumed_run_sees_the_steps_of_the_uninterrupted_one(folders, tmp_path):
    expected = whole(folders, tmp_path, 9)
    module, trainer, _ = fit(make_data(folders), tmp_path, 4)
    trainer.save_checkpoint(tmp_path / "4.ckpt")
    resumed, _, _ = fit(make_data(folders), tmp_path, 9, tmp_path / "4.ckpt")
    assert module.steps | resumed.steps == expected
    assert min(resumed.steps) == 4


def test_checkpoints_saved_in_training_hold_completed_steps_only(folders, tmp_path):
    data = make_data(folders, num_workers=2)
    fit(data, tmp_path, 6, save_every=2)
    for step in (2, 4, 6):
        loaded = torch.load(tmp_path / f"step={step}.ckpt", weights_only=True)
        saved = StreamState.from_json(loaded["callbacks"]["mmfusion.stream"])
        assert (saved.step, saved.packs) == (step, 4 * step)
    assert data.state.step == 6


class SaveInsideAStep(L.Callback):
    """Saves in step 2 after (or before) its second micro-batch of four."""

    def __init__(self, path, hook):
        self.path = path
        setattr(self, hook, self.save)

    def save(self, trainer, *args):
        if trainer.global_step == 2 and args[-1] % 4 == 1:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("hook", ["on_train_batch_end", "on_train_batch_start"])
def test_a_step_that_a_checkpoint_cut_is_taken_again_from_its_start(folders, tmp_path, hook):
    whole, trainer, _ = fit(make_data(folders), tmp_path, 6)
    assert trainer.accumulate_grad_batches == 4
    saving = SaveInsideAStep(tmp_path / "cut.ckpt", hook)
    fit(make_data(folders), tmp_path, 3, more=[saving])
    assert torch.load(tmp_path / "cut.ckpt", weights_only=True)["global_step"] == 2
    data = make_data(folders)
    resumed, _, _ = fit(data, tmp_path, 6, tmp_path / "cut.ckpt")
    assert resumed.steps == {step: whole.steps[step] for step in range(2, 6)}
    assert torch.equal(resumed.weight, whole.weight)
    assert data.state.step == 6


def test_resumes_with_other_micro_batches_and_workers_chain_exactly(folders, tmp_path):
    expected = whole(folders, tmp_path, 12)
    dice, got, resume, saved = random.Random(0), {}, None, None
    for end in (2, 3, 6, 8, 12):
        data = make_data(
            folders,
            packs_per_micro_batch=dice.choice([1, 2, 3, 4]),
            num_workers=int(end == 6),
        )
        module, _, _ = fit(data, tmp_path, end, resume, save_every=1)
        if saved is not None:
            assert min(module.steps) == saved.step
        got |= module.steps
        resume, saved = tmp_path / f"step={end}.ckpt", data.state
    assert got == expected


def test_a_state_saved_right_after_a_restore_equals_the_restored_one(folders, tmp_path):
    data = make_data(folders)
    fit(data, tmp_path, 5)[1].save_checkpoint(tmp_path / "0.ckpt")
    expected = data.state
    for i in range(5):
        data = make_data(folders)
        _, trainer, _ = fit(data, tmp_path, 5, tmp_path / f"{i}.ckpt")
        trainer.save_checkpoint(tmp_path / f"{i + 1}.ckpt")
        assert data.state == expected


def test_estimating_the_number_of_steps_does_not_lose_the_position(folders, tmp_path):
    data = make_data(folders, epochs=3)
    module = Recorder(estimate_steps=True)
    fit(data, tmp_path, 4, module=module, save_every=4, max_epochs=1)
    saved, data = tmp_path / "step=4.ckpt", make_data(folders, epochs=3)
    resumed, _, _ = fit(data, tmp_path, 6, saved, Recorder(True), max_epochs=1)
    assert module.steps | resumed.steps == whole(folders, tmp_path, 6, epochs=3)


def test_validation_and_its_sanity_check_do_not_move_training(folders, tmp_path):
    expected = whole(folders, tmp_path, 5)
    data = make_data(folders)
    data.val_sources = data.sources
    module, _, _ = fit(
        data,
        tmp_path,
        5,
        num_sanity_val_steps=-1,
        val_check_interval=8,
        check_val_every_n_epoch=None,
    )
    assert module.steps == expected
    good = {("a", 0, i) for i in range(60) if i not in (3, 11)} | {("b", 0, i) for i in range(9)}
    assert set(module.validated) == good
    assert len(module.validated) == 3 * len(good)


def test_a_cut_epoch_goes_on_from_the_committed_step(folders, tmp_path):
    expected = whole(folders, tmp_path, 6)
    for workers in (0, 1):
        data = make_data(folders, num_workers=workers)
        module, _, _ = fit(data, tmp_path, 6, limit_train_batches=8, max_epochs=-1)
        assert module.steps == expected


def test_a_finite_run_ends_with_its_data_seen_exactly_as_often_as_asked(folders, tmp_path):
    data = make_data(folders, epochs=2)
    module, trainer, _ = fit(data, tmp_path, max_epochs=-1)
    seen = [key for keys in module.steps.values() for key in keys]
    assert len(seen) == len(set(seen)) == 2 * 67
    assert trainer.global_step == data.state.step == len(module.steps)
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    again, _, _ = fit(make_data(folders, epochs=2), tmp_path, -1, tmp_path / "end.ckpt")
    assert again.steps == {}


def test_bad_samples_are_listed_once_also_after_steps_are_taken_again(folders, tmp_path):
    data = make_data(folders, epochs=1)
    fit(data, tmp_path, 2, save_every=2)
    fit(make_data(folders, epochs=1), tmp_path, -1, tmp_path / "step=2.ckpt")
    with (tmp_path / "quarantine.jsonl").open("ab") as file:
        file.write(b'by \xff hand\n{"step": 1, "cut')
    fit(make_data(folders, epochs=1), tmp_path, -1, tmp_path / "step=2.ckpt")
    lines = (tmp_path / "quarantine.jsonl").read_bytes().splitlines()
    lines.remove(b"by \xff hand")
    rows = [json.loads(line) for line in lines]
    assert sorted((row["source"], row["index"], row["reason"]) for row in rows) == [
        ("a", 3, "odd"), ("a", 11, "corrupt_image"),
    ]  # fmt: skip
    assert rows[0]["shard"].endswith(".tar")
    assert {row["key"] for row in rows} == {"00003", "00011"}


def listed(folder) -> list[tuple[str, int, int]]:
    """(source, step, index) of the quarantine file's lines."""
    rows = [json.loads(line) for line in (folder / "quarantine.jsonl").read_text().splitlines()]
    return sorted((row["source"], row["step"], row["index"]) for row in rows)


@pytest.mark.slow
def test_too_many_bad_samples_stop_the_run_and_are_listed(tmp_path):
    bad = dict.fromkeys(range(0, 150, 2), "odd")
    folder = {"half": write_source(tmp_path / "half", 150, bad=bad, words=4)}
    data = make_data(folder)
    with pytest.raises(BadDataError, match=r"of \d+ samples are unusable .*'odd'(.|\n)*made to be"):
        fit(data, tmp_path, 100)
    there = listed(tmp_path)
    assert len(there) == data.state.counts["half"].bad["odd"] >= 40
    assert {index % 2 for *_, index in there} == {0}
    fit(make_data(folder, max_bad_fraction=0.6), tmp_path, 40)


@pytest.mark.slow
def test_a_small_source_of_bad_samples_stops_the_run_though_all_together_are_few(tmp_path):
    bad = dict.fromkeys(range(24), "odd")
    folders = {
        "good": write_source(tmp_path / "good", 600, words=1, images=False),
        "small": write_source(tmp_path / "small", 24, bad=bad),
    }
    data = make_data(folders, epochs=1)
    with pytest.raises(BadDataError, match=r"^small: 2\d of 2\d samples are unusable"):
        fit(data, tmp_path)
    assert {source for source, *_ in listed(tmp_path)} == {"small"}
    assert data.state.counts["good"].seen > 19 * 24  # all together within the limit


def test_a_run_that_could_train_on_nothing_does_not_finish(tmp_path):
    folder = {"few": write_source(tmp_path / "few", 5, bad=dict.fromkeys(range(5), "odd"))}
    with pytest.raises(BadDataError, match="all 5 samples are unusable"):
        fit(make_data(folder, epochs=1), tmp_path)
    assert len(listed(tmp_path)) == 5


@pytest.mark.parametrize("before", [1, 2])
def test_validation_keeps_its_steps_after_a_resume_with_other_micro_batches(
    folders, tmp_path, before
):
    class Validated(Recorder):
        def on_validation_start(self):
            self.validated.append((self.trainer.global_step, len(self.steps)))

    def run(per_micro_batch, max_steps, resume=None):
        data = make_data(folders, packs_per_micro_batch=per_micro_batch)
        data.val_sources = data.sources
        data.val_limit = 1
        every = 2 * data.micro_batches_per_step(1)
        arguments = {"val_check_interval": every, "check_val_every_n_epoch": None}
        module, trainer, _ = fit(
            data, tmp_path, max_steps, resume, Validated(), num_sanity_val_steps=0, **arguments
        )
        return [step for step, *_ in module.validated if isinstance(step, int)], trainer

    steps, trainer = run(before, 3)
    assert steps == [2]
    trainer.save_checkpoint(tmp_path / "3.ckpt")
    assert run(3 - before, 8, tmp_path / "3.ckpt")[0] == [4, 6, 8]


def resume_with(folders, tmp_path, other) -> None:
    if not (tmp_path / "2.ckpt").exists():
        fit(make_data(folders), tmp_path, 2)[1].save_checkpoint(tmp_path / "2.ckpt")
    fit(other, tmp_path, 4, tmp_path / "2.ckpt")


def test_every_difference_of_the_stream_is_named(folders, tmp_path):
    other_b = write_source(tmp_path / "b", 10, seed=1)
    changed = {"seed": 1, "lanes": 8, "window": 2, "pack_tokens": 64, "block": 2}
    for name, value in changed.items():
        with pytest.raises(ValueError, match=rf"\n  {name}: now {value}, saved \d+\n"):
            resume_with(folders, tmp_path, make_data(folders, **{name: value}))
    with pytest.raises(
        ValueError, match=r"source 'b' dataset_id(.|\n)*source 'b' n: now 10, saved 9"
    ):
        resume_with(folders, tmp_path, make_data({"a": folders["a"], "b": other_b}))
    with pytest.raises(ValueError, match=r"source 'c': not in the saved(.|\n)*source 'b': only in"):
        resume_with(folders, tmp_path, make_data({"a": folders["a"], "c": folders["b"]}))
    with pytest.raises(ValueError, match=r"source 'a' weight: now 2.0, saved 1.0"):
        resume_with(folders, tmp_path, make_data(folders, {"a": 2.0}))
    with pytest.raises(ValueError, match="order of sources"):
        resume_with(folders, tmp_path, make_data({"b": folders["b"], "a": folders["a"]}))


def test_a_checkpoint_without_the_state_is_refused(folders, tmp_path):
    fit(make_data(folders), tmp_path, 2)[1].save_checkpoint(tmp_path / "2.ckpt")
    loaded = torch.load(tmp_path / "2.ckpt", weights_only=True)
    del loaded["callbacks"]["mmfusion.stream"]
    loaded["callbacks"]["other"] = {"x": 1}
    torch.save(loaded, tmp_path / "without.ckpt")
    with pytest.raises(ValueError, match="holds no state of the data stream"):
        fit(make_data(folders), tmp_path, 4, tmp_path / "without.ckpt")
    loaded["callbacks"] = {}
    torch.save(loaded, tmp_path / "without.ckpt")
    with pytest.raises((ValueError, RuntimeError), match="data stream"):
        fit(make_data(folders), tmp_path, 4, tmp_path / "without.ckpt")


def test_a_stale_loader_is_caught_at_its_first_batch(folders, tmp_path):
    fit(make_data(folders), tmp_path, 2)[1].save_checkpoint(tmp_path / "2.ckpt")
    data = make_data(folders)
    stale = make_data(folders).train_dataloader()
    data.train_dataloader = lambda: stale
    with pytest.raises(RuntimeError, match=r"belongs to step 0 .*expected step 2"):
        fit(data, tmp_path, 4, tmp_path / "2.ckpt")


def test_wrong_accumulation_is_refused(folders, tmp_path):
    class Fixed(Recorder):
        def setup(self, stage):
            self.trainer.accumulate_grad_batches = 3

    with pytest.raises(ValueError, match="accumulate_grad_batches is 3, expected 4"):
        fit(make_data(folders), tmp_path, 2, module=Fixed())


def test_training_without_the_callback_is_refused(folders, tmp_path):
    trainer = L.Trainer(max_steps=1, accelerator="cpu", logger=False, enable_checkpointing=False)
    data = make_data(folders)
    with pytest.raises(ValueError, match="StreamStateCallback"):
        trainer.fit(Recorder(), data)


def test_counts_are_logged(folders, tmp_path):
    data = make_data(folders, epochs=1)
    _, trainer, _ = fit(data, tmp_path, log_every_n_steps=1)
    logged = trainer.logged_metrics
    assert logged["data/a/samples"] == 58
    assert logged["data/a/bad"] == 2
    assert logged["data/b/tokens"] == data.state.counts["b"].tokens
