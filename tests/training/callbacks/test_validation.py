"""What validation reports, against sample-by-sample references; and that it disturbs nothing."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from mmfusion.data.writer import ShardWriter
from mmfusion.inference import Chat
from mmfusion.metrics.shuffled_media import shuffle_media
from mmfusion.objectives.next_token import NextToken
from mmfusion.training.callbacks.validation import Validation
from mmfusion.training.rebuild import from_recipe
from mmfusion.types import DataError, Media, Message, Sample, Text
from tests.training.tiny import TinyConverter, fit, losses, write_recipe

CHAT = {"class_path": "tests.training.tiny.TinyConverter"}
PLAIN = {"class_path": f"{__name__}.PlainConverter"}


class PlainConverter(TinyConverter):
    """The same records as captions."""

    def __call__(self, record: Any, shard: str, key: str) -> Sample:
        sample = super().__call__(record, shard, key)
        return Sample(sample.messages, "plain", shard=shard, key=key)


class SecondOn(TinyConverter):
    """The first record of the source cannot be used."""

    def __call__(self, record: Any, shard: str, key: str) -> Sample:
        if key == "val00000":
            raise DataError("broken", "made to be broken")
        return super().__call__(record, shard, key)


def trainer_of(callback: Validation) -> L.Trainer:
    return L.Trainer(
        accelerator="cpu",
        logger=False,
        callbacks=[callback],
        enable_progress_bar=False,
        enable_checkpointing=False,
    )


def validate(recipe: Path, callback: Validation) -> tuple[dict[str, float], Any, Any]:
    module, data = from_recipe(str(recipe))
    (figures,) = trainer_of(callback).validate(module, data, verbose=False)
    module.eval()  # Lightning puts back the mode it found
    return dict(figures), module, data


@pytest.fixture(scope="module")
def validated(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, float], Any, Any]:
    folder = tmp_path_factory.mktemp("validation")
    shards = str(folder / "val-*.tar")
    recipe = write_recipe(
        folder,
        data__val_sources={
            "asked": {"shards": shards, "converter": CHAT},
            "captions": {"shards": shards, "converter": PLAIN},
        },
    )
    return validate(recipe, Validation(generate_samples=5, table_samples=0, max_new_tokens=4))


def test_loss_by_source_is_the_mean_of_single_samples(
    validated: tuple[dict[str, float], Any, Any],
) -> None:
    figures, module, data = validated
    chat = Chat(module.model)
    sums, counts = 0.0, 0.0
    for name, source in data.val_sources.items():
        total, count = chat.score([source[i] for i in range(len(source))])
        expected = float(total.sum() / count.sum())
        assert figures[f"val/next_token/{name}"] == pytest.approx(expected, rel=1e-4)
        sums, counts = sums + float(total.sum()), counts + float(count.sum())
    assert figures["val/loss"] == pytest.approx(sums / counts, rel=1e-4)


def test_gap_is_wrong_minus_right_of_the_exchanged_samples(
    validated: tuple[dict[str, float], Any, Any],
) -> None:
    figures, module, data = validated
    right = wrong = tokens = 0.0
    for batch in data.val_dataloader():
        shuffled, chosen = shuffle_media(batch, "image")
        with torch.no_grad():
            before = NextToken()(module.model, module.model(batch), batch)
            after = NextToken()(module.model, module.model(shuffled), shuffled)
        right += float(before.per_sample[chosen].sum())
        wrong += float(after.per_sample[chosen].sum())
        tokens += float(before.per_sample_count[chosen].sum())
    assert tokens > 0
    assert right != wrong
    gap = figures["val/shuffled_gap/image"]
    assert gap == pytest.approx((wrong - right) / tokens, rel=1e-3, abs=1e-5)


def test_a_gap_that_cannot_be_measured_is_told(tmp_path: Path, caplog: Any) -> None:
    source = {"shards": str(tmp_path / "val-*.tar"), "converter": CHAT}
    recipe = write_recipe(tmp_path, data__val_sources={"asked": source}, data__pack_tokens=28)
    figures = validate(recipe, Validation(generate_samples=0, table_samples=0))[0]
    assert "val/shuffled_gap/image" not in figures
    assert "no val/shuffled_gap for image: no validation batch held two samples" in caplog.text


def test_only_conversations_are_answered(validated: tuple[dict[str, float], Any, Any]) -> None:
    figures = validated[0]
    assert "val/exact_match/asked" in figures
    assert "val/exact_match/captions" not in figures


def test_a_bad_first_sample_is_left_out_and_the_source_still_answered(tmp_path: Path) -> None:
    converter = {"class_path": f"{__name__}.SecondOn"}
    source = {"shards": str(tmp_path / "val-*.tar"), "converter": converter}
    recipe = write_recipe(tmp_path, data__val_sources={"asked": source})
    callback = Validation(shuffled_gap=False, generate_samples=2, table_samples=0, max_new_tokens=1)
    assert "val/exact_match/asked" in validate(recipe, callback)[0]


def test_exact_match_counts_the_answers_the_model_gives(
    validated: tuple[dict[str, float], Any, Any], tmp_path: Path
) -> None:
    """A source whose truth is the model's own greedy answer, but for one sample in four."""
    chat = Chat(validated[1].model)
    with ShardWriter(str(tmp_path / "own-%06d.tar"), max_samples=50) as writer:
        for i in range(8):
            image = bytes([9 * i + 1, i])
            question = [Message("user", (Media("image", image, "bin"), Text(" w1")))]
            answer = chat.generate(question, max_new_tokens=4)
            assert answer
            truth = "w30 w31 w32 w33 w34" if i % 4 == 0 else answer
            writer.write(f"k{i}", {"image": image, "txt": truth.encode()})
    own = {"own": {"shards": str(tmp_path / "own-*.tar"), "converter": CHAT}}
    recipe = write_recipe(tmp_path, data__val_sources=own)
    for per_batch in (3, 8):
        callback = Validation(max_new_tokens=4, table_samples=0, prompts_per_batch=per_batch)
        figures = validate(recipe, callback)[0]
        assert figures["val/exact_match/own"] == pytest.approx(75.0)
        assert figures["val/f1/own"] >= 75.0


def test_a_test_gives_the_figures_of_a_validation(tmp_path: Path) -> None:
    source = {"shards": str(tmp_path / "val-*.tar"), "converter": CHAT}
    recipe = write_recipe(tmp_path, data__val_sources={"asked": source})
    figures = []
    for stage in ("validate", "test"):
        module, data = from_recipe(str(recipe))
        callback = Validation(generate_samples=2, table_samples=0, max_new_tokens=2)
        trainer = L.Trainer(accelerator="cpu", logger=False, callbacks=[callback])
        figures += getattr(trainer, stage)(module, data, verbose=False)
    validated, tested = figures
    assert len(validated) >= 6
    assert tested == {key.replace("val/", "test/"): value for key, value in validated.items()}


def test_a_loss_that_is_not_a_number_is_reported_as_such(tmp_path: Path) -> None:
    source = {"shards": str(tmp_path / "val-*.tar"), "converter": CHAT}
    objective = {"class_path": "tests.training.tiny.NotANumber", "init_args": {"from_step": 0}}
    recipe = write_recipe(
        tmp_path, data__val_sources={"asked": source}, model__objectives={"next_token": objective}
    )
    callback = Validation(shuffled_gap=False, generate_samples=0, table_samples=0)
    figures = validate(recipe, callback)[0]
    assert figures["val/loss"] != figures["val/loss"]


def test_losses_are_summed_by_their_weights(tmp_path: Path) -> None:
    source = {"shards": str(tmp_path / "val-*.tar"), "converter": CHAT}
    objective = {"class_path": "mmfusion.objectives.next_token.NextToken"}
    objectives = {"one": objective, "two": objective | {"init_args": {"weight": 0.5}}}
    recipe = write_recipe(
        tmp_path, data__val_sources={"asked": source}, model__objectives=objectives
    )
    callback = Validation(shuffled_gap=False, generate_samples=0, table_samples=0)
    figures = validate(recipe, callback)[0]
    assert figures["val/one"] == figures["val/two"]
    assert figures["val/loss"] == pytest.approx(1.5 * figures["val/one"])


@pytest.mark.slow
def test_validation_leaves_training_as_it_is(tmp_path: Path) -> None:
    val = {"asked": {"shards": str(tmp_path / "val-*.tar"), "converter": CHAT}}
    changes = {"trainer__max_steps": 6, "data__val_sources": val}
    plain = fit(write_recipe(tmp_path, run_dir=str(tmp_path / "plain"), **changes))
    often = fit(
        write_recipe(
            tmp_path,
            run_dir=str(tmp_path / "often"),
            val_every_n_steps=2,
            validation={"generate_samples": 3, "max_new_tokens": 2},
            **changes,
        )
    )
    assert losses(often) == losses(plain)
    assert len(losses(plain)) == 6
    text = (often.path / "metrics.csv").read_text()
    assert "val/shuffled_gap/image" in text
    assert "val/exact_match/asked" in text


@pytest.mark.slow
def test_table_of_samples_goes_to_wandb_with_its_media(tmp_path: Path, assets: Path) -> None:
    from mmfusion.training.callbacks.table import Answered, log_table
    from mmfusion.training.trackers import default_loggers

    files = {
        "image": next((assets / "pictures").glob("*.jpg")),
        "audio": next(iter(sorted((assets / "speech").iterdir()))),
        "video": next((assets / "videos").glob("*.mp4")),
    }
    media = [Media(m, path.read_bytes(), path.suffix[1:]) for m, path in files.items()]
    broken = Media("image", b"not a picture", "jpg")
    gone = (replace(media[2], data=b""),)  # features took its place
    rows = [
        Answered("s", (item,), "ask", "answer", "truth", wanted=gone) for item in [*media, broken]
    ]
    part = replace(media[2], start=0.0, end=0.2)
    rows.append(Answered("s", (), "draw", "", "", made=(media[0], part), wanted=(media[2],)))
    loggers = default_loggers(tmp_path, "tableid", wandb="offline")
    trainer = L.Trainer(accelerator="cpu", logger=loggers, enable_checkpointing=False)
    log_table(trainer, "val/samples", rows, list(files), ["image", "video"])
    loggers[1].finalize("success")
    staged = [path.read_bytes() for path in (tmp_path / "wandb/data/artifacts/staging").iterdir()]
    parsed = [json.loads(data) for data in staged if data.lstrip().startswith(b"{")]
    table, *_ = [found for found in parsed if "columns" in found]
    made = [f"{side} {kind}" for side in ("answer", "truth") for kind in ("image", "video")]
    columns = ["step", "source", *files, "prompt", "answer", *made[:2], "truth", *made[2:]]
    assert table["columns"] == columns
    kinds = [[cell and cell["_type"] for cell in row[2:5]] for row in table["data"]]
    assert kinds == [
        ["image-file", None, None],
        [None, "audio-file", None],
        [None, None, "image-file"],
        [None, None, None],
        [None, None, None],
    ]
    assert all(row[-1] is None for row in table["data"][:-1])
    last = dict(zip(columns, table["data"][-1], strict=True))
    assert [last[name] and last[name]["_type"] for name in made] == [
        "image-file", None, None, "video-file",
    ]  # fmt: skip
    assert sum(data.startswith(b"\x89PNG") for data in staged) == 3
    assert sum(data.startswith(b"RIFF") for data in staged) == 1
    assert media[2].data in staged
