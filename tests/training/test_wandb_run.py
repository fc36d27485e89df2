"""What a run without an account leaves for W&B: read back from the files of its offline segment."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mmfusion import load
from mmfusion.data.writer import ShardWriter
from mmfusion.training.loggers import ATTEMPT, STEP, read_metrics
from mmfusion.training.run import RunDirectory
from tests.recipes.tiny_cache import encoders
from tests.training.tiny import fit, write_recipe
from tests.training.wandb_process import records

pytestmark = pytest.mark.slow

MODALITIES = ["image", "video", "audio"]
PARTS = {
    "encoders.image": "EfficientNetLite",
    "encoders.video": "EfficientNetLiteVideo",
    "encoders.audio": "WhisperEncoder",
    **{f"input_projectors.{modality}": "Linear" for modality in MODALITIES},
    "llm": "HFCausalLM",
}
LOGGED = {
    "train/loss",
    "train/next_token",
    "train/next_token/asked",
    *(f"train/{what}/input_projectors/Full" for what in ("lr", "grad_norm")),
    *(f"train/{what}/llm/LoRA" for what in ("lr", "grad_norm")),
    *(
        f"throughput/{what}_per_s"
        for what in ("tokens", "supervised_tokens", "samples", *MODALITIES)
    ),
    *(f"throughput/{what}" for what in ("padding_share", "wait_share", "step_s", "rss_peak_gib")),
    *(f"data/asked/{what}" for what in ("samples", "tokens", "bad")),
    "data/bad/corrupt_image",
    "val/loss",
    "val/next_token/asked",
    "val/exact_match/asked",
    "val/f1/asked",
}


FILES = {"image": "pictures/apple.jpg", "video": "videos/apple.mp4", "audio": "speech/apple.ogg"}


def write_conversations(pattern: str, assets: Path) -> None:
    """One sample of each modality, and one that is spoilt."""
    with ShardWriter(pattern) as writer:
        for number, modality in enumerate(MODALITIES):
            path = assets / FILES[modality]
            turns = [
                {"role": "user", "content": f"<{modality}> w1 w{number}"},
                {"role": "assistant", "content": f"w2 w{number}"},
            ]
            text = {"json": json.dumps({"messages": turns}).encode()}
            writer.write(modality, {path.suffix[1:]: path.read_bytes(), **text})
            if modality == "image":
                writer.write("spoilt", {"jpg": path.read_bytes()[:900], **text})


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, assets: Path) -> RunDirectory:
    folder = tmp_path_factory.mktemp("wandb")
    write_conversations(str(folder / "asked-%06d.tar"), assets)
    conversation = {"class_path": "mmfusion.data.converters.conversation.Conversation"}
    source = {"asked": {"shards": str(folder / "asked-*.tar"), "converter": conversation}}
    linear = {"class_path": "mmfusion.models.projectors.linear.Linear"}
    recipe = write_recipe(
        folder,
        wandb="auto",
        seed_everything=1,
        trainer__max_steps=2,
        val_every_n_steps=2,
        model__encoders=encoders(folder),
        model__input_projectors=dict.fromkeys(MODALITIES, linear),
        model__schedule={"warmup_steps": 0},
        data__sources=source,
        data__val_sources=source,
        data__max_bad_fraction=0.5,
        validation={"max_new_tokens": 3},
    )
    with pytest.MonkeyPatch.context() as patch:
        for name in ("DIR", "DATA_DIR", "CACHE_DIR", "CONFIG_DIR"):
            patch.setenv(f"WANDB_{name}", "")  # the logger sets them; here they are put back
        patch.setenv("HOME", str(folder / "home"))  # no key here
        patch.delenv("WANDB_MODE")
        return fit(recipe)


@pytest.fixture(scope="module")
def written(run: RunDirectory) -> list[dict[str, Any]]:
    (segment,) = (run.path / "wandb").glob(f"offline-run-*-{run.id}")
    return records(segment)


def tables(written: list[dict[str, Any]], key: str) -> tuple[dict[str, Any], dict[str, Path]]:
    """A logged table, and the files that it names."""
    name = f"{key}.table.json"
    for record in written:
        contents = record.get("artifact", {}).get("manifest", {}).get("contents", [])
        files = {entry["path"]: Path(entry["local_path"]) for entry in contents}
        if name in files:
            return json.loads(files[name].read_text()), files
    raise AssertionError(f"no table {key}")


def test_the_table_of_what_trains_is_there(written: list[dict[str, Any]]) -> None:
    table, _ = tables(written, "audit")
    assert table["columns"] == ["part", "kind", "parameters", "trainable", "dtype", "lr"]
    rows = {row[0]: row for row in table["data"]}
    assert {part: row[1] for part, row in rows.items()} == PARTS
    trains = {part for part, row in rows.items() if row[3] > 0}
    assert trains == {part for part in PARTS if not part.startswith("encoders")}
    assert all(row[2] >= row[3] for row in rows.values())


def test_the_table_of_answered_samples_is_there_with_its_media(
    run: RunDirectory, written: list[dict[str, Any]], assets: Path
) -> None:
    table, files = tables(written, "val/samples")
    chat = load(run.path)
    assert table["columns"] == ["step", "source", *MODALITIES, "prompt", "answer", "truth"]
    assert len(table["data"]) == 3
    for number, (modality, row) in enumerate(zip(MODALITIES, table["data"], strict=True)):
        cells = dict(zip(table["columns"], row, strict=True))
        assert (cells["step"], cells["source"]) == (2, "asked")
        assert [name for name in MODALITIES if cells[name]] == [modality]
        file = files[cells[modality]["path"]]
        assert file.read_bytes()[:4] == (b"RIFF" if modality == "audio" else b"\x89PNG")
        assert run.path in file.parents
        assert f"<{modality}> w1 w{number}" in cells["prompt"]
        assert cells["truth"] == f"w2 w{number}"
        medium = {"type": modality, "path": str(assets / FILES[modality])}
        asked = [{"role": "user", "content": [medium, f" w1 w{number}"]}]
        assert cells["answer"] == chat.generate(asked, max_new_tokens=3)
    assert any(row[-2] for row in table["data"])


def test_every_metric_is_there_as_in_the_csv(
    run: RunDirectory, written: list[dict[str, Any]]
) -> None:
    history: dict[tuple[float, str], float] = {}
    for item in (record["history"]["item"] for record in written if "history" in record):
        history |= {(item[STEP], key): value for key, value in item.items()}
    assert {key for _, key in history} >= LOGGED
    rows = read_metrics(run.path / "metrics.csv")
    assert {key for row in rows for key in row} >= LOGGED
    for row in rows:
        for key in row.keys() - {STEP, ATTEMPT}:
            assert history[row[STEP], key] == pytest.approx(row[key], rel=1e-6)
