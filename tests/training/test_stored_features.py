"""Runs on stored features beside the same runs with live parts: the same packs, the same losses,
and no stored part is built.
"""

from __future__ import annotations

import csv
import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import mmfusion
from mmfusion.cli import main
from mmfusion.data.features import MANIFEST, FeaturesError
from mmfusion.data.index import index_path
from mmfusion.data.shards import Shards
from mmfusion.data.writer import ShardWriter
from mmfusion.models.encoders.hf_vision import HFVision
from mmfusion.models.encoders.stored import StoredEncoder
from mmfusion.models.generators.base import DENOISER, TEXT_ENCODER, VAE
from mmfusion.models.generators.stable_diffusion import StableDiffusion
from mmfusion.processing.stored import FEATURES, item_file
from mmfusion.tools.describe import description
from mmfusion.training import manifest
from mmfusion.training.rebuild import from_recipe
from mmfusion.training.stored_parts import weights_of
from tests.make_debug import make_debug
from tests.recipes.tiny_cache import encoders, fill
from tests.training import pictures
from tests.training.tiny import fit, steps, write_recipe

DEBUG = Path(__file__).parents[2] / "recipes" / "debug.yaml"
CLIP = "mmfusion.models.encoders.hf_vision.HFVision"


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The debug recipe's parts and squares, and one torn square."""
    folder = tmp_path_factory.mktemp("stored_features")
    make_debug(folder / "debug")
    picture = Shards(f"{folder}/debug/train-*.tar").read(0)[0]["png"]
    with ShardWriter(str(folder / "debug" / "train-9%05d.tar")) as writer:
        writer.write("torn", {"png": picture[:45], "txt": b"w1"})
    return folder


@pytest.fixture(autouse=True)
def in_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MMFUSION_CACHE", str(cache))


@pytest.fixture(scope="module")
def features(cache: Path) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MMFUSION_CACHE", str(cache))
        main(["data", "encode", str(DEBUG), "--out", f"{cache}/f", "--media=instead"])
    return cache / "f"


def stage1(cache: Path, name: str, *options: str) -> Path:
    """Eight steps of the debug recipe, packs recorded; three of them an epoch."""
    recorder = {
        "class_path": "tests.training.tiny.Recorder",
        "init_args": {"folder": str(cache / f"{name}-packs")},
    }
    few = ["--trainer.max_steps=8", "--checkpoint.every_n_steps=5", "--val_every_n_steps=8"]
    few += ["--data.max_bad_fraction=1", "--trainer.enable_progress_bar=false"]
    recorded = f"--trainer.callbacks={json.dumps([recorder])}"
    return fit(DEBUG, *few, f"--run_dir={cache / name}", recorded, *options).path


def rows(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def column(run: Path, key: str) -> list[float]:
    return [float(row[key]) for row in rows(run) if row.get(key)]


@pytest.fixture(scope="module")
def live(cache: Path, features: Path) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MMFUSION_CACHE", str(cache))
        return stage1(cache, "live")


@pytest.fixture(scope="module")
def stored(cache: Path, features: Path) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MMFUSION_CACHE", str(cache))
        patch.setattr(HFVision, "build", _must_not_be_built)
        return stage1(cache, "stored", f"--data.features={features}")


def _must_not_be_built(self: Any, *rest: Any) -> None:
    raise AssertionError("a stored part was built")


def test_stage_1_sees_the_same_packs_and_loses_the_same(
    cache: Path, live: Path, stored: Path
) -> None:
    packs = steps(cache / "live-packs")
    assert len(packs) == 8
    assert steps(cache / "stored-packs") == packs
    for key in ("train/loss", "val/loss", "val/next_token/squares"):
        assert column(stored, key) == pytest.approx(column(live, key), abs=1e-6)
    bad = [(run / "quarantine.jsonl").read_text() for run in (live, stored)]
    reasons = [[json.loads(line)["reason"] for line in text.splitlines()] for text in bad]
    assert reasons[0] == reasons[1] == ["corrupt_image"] * len(reasons[0])
    assert reasons[0]


def test_a_run_on_stored_features_goes_on_exactly(
    cache: Path, features: Path, stored: Path
) -> None:
    half = cache / "half"
    shutil.copytree(stored, half)
    made = manifest.read(half / "checkpoints" / "step-00000005.ckpt")
    assert made is not None
    assert made.about["frozen"] == {}  # the LLM trains; data.features tells the encoder by itself
    (half / "checkpoints" / "step-00000008.ckpt").unlink()
    changed = "--allow_recipe_change"  # where the packs are recorded
    stage1(cache, "half", f"--data.features={features}", changed)
    again = [row for row in rows(half) if row.get("trainer/attempt") == "2"]
    found = [row["train/loss"] for row in again if row.get("train/loss")]
    assert found == [row["train/loss"] for row in rows(stored) if row.get("train/loss")][5:]


def test_what_was_trained_on_features_is_used_on_new_media(cache: Path, stored: Path) -> None:
    chat = mmfusion.load(stored, device="cpu")
    assert isinstance(chat.model.encoders["image"], HFVision)
    record = Shards(f"{cache}/debug/val-*.tar").read(0)[0]
    (cache / "square.png").write_bytes(record["png"])
    messages = [{"role": "user", "content": [{"type": "image", "path": f"{cache}/square.png"}]}]
    assert isinstance(str(chat.generate(messages, plain=True, max_new_tokens=2)), str)


def test_a_stored_part_is_described_without_weights(
    features: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HFVision, "build", _must_not_be_built)
    found = description(str(DEBUG), [f"--data.features={features}"])
    parts = {row.name: row for row in found.parts}
    row = parts["encoders.image"]
    assert (row.kind, row.parameters, row.weights) == ("StoredEncoder", 0, 0)
    (media,) = found.media
    assert media.features == (4, 16)  # of a picture from elsewhere
    assert not found.audit


@pytest.mark.slow
def test_features_in_bf16_are_those_of_a_bf16_encoder(cache: Path) -> None:
    """They are stored as they are, so nothing is rounded twice; a batch of another make-up may
    round the last of bf16's 8 bits otherwise.
    """
    bf16 = ["--model.encoders.image.init_args.dtype=bfloat16", "--trainer.precision=bf16-mixed"]
    main(["data", "encode", str(DEBUG), "--out", f"{cache}/bf16", *bf16])
    one = stage1(cache, "live16", *bf16)
    two = stage1(cache, "stored16", *bf16, f"--data.features={cache}/bf16")
    assert column(two, "train/loss") == pytest.approx(column(one, "train/loss"), abs=2e-2)


def refused(capsys: pytest.CaptureFixture[str], *options: str) -> str:
    with pytest.raises(SystemExit):
        main(["fit", "-c", str(DEBUG), "--trainer.max_steps=1", *options])
    return capsys.readouterr().err


@pytest.mark.slow
def test_stale_and_foreign_features_are_refused_before_training(
    cache: Path, features: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    use = [f"--data.features={features}", f"--run_dir={tmp_path / 'run'}"]
    mend = f"mmfusion data encode {DEBUG} --out {features} --overwrite"
    layer = "--model.encoders.image.init_args.feature_layer=-1"
    error = refused(capsys, *use, layer)
    assert "another encoders.image made:\n  arguments.feature_layer: -2 there, -1 here" in error
    assert mend.replace(" --out", f" {layer} --out") in error
    error = refused(capsys, *use, "--trainer.precision", "bf16-mixed")
    assert "precision: '32-true' there, 'bf16-mixed' here" in error
    assert mend.replace(" --out", " --trainer.precision=bf16-mixed --out") in error
    prompt = "--data.sources.squares.init_args.converter.init_args.prompt=w3"
    assert "as another converter gave it" in refused(capsys, *use, prompt)
    other = f"--data.sources.squares.init_args.shards={cache}/debug/val-*.tar"
    assert "are not those that" in refused(capsys, *use, other)
    full = '{"class_path": "mmfusion.tuning.Full", "init_args": {"lr": 0.1}}'
    tuning = f'--model.tuning={{"encoders.image": {full}}}'
    error = refused(capsys, *use, tuning)
    assert "features of encoders.image, which model.tuning.encoders.image trains" in error
    nothing = f"--data.features={tmp_path}"
    error = refused(capsys, nothing, use[1])
    assert f"{tmp_path} has no {MANIFEST}" in error
    assert mend.replace(str(features), str(tmp_path)) in error
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_the_command_that_is_named_makes_what_a_recipe_of_two_files_reads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    layer = {"model": {"encoders": {"image": {"init_args": {"feature_layer": -1}}}}}
    (tmp_path / "more.yaml").write_text(yaml.safe_dump(layer))
    given = [
        "-c", str(tmp_path / "more.yaml"), f"--data.features={tmp_path}/f",
        "--data.sources.squares.init_args.converter.init_args.prompt", "w3 w4",
    ]  # fmt: skip
    error = refused(capsys, *given)
    assert f"encode -c {DEBUG} -c {tmp_path}/more.yaml '--data.sources.squares" in error
    command = shlex.split(error.strip().rpartition("Run: ")[2])
    main(command[1:])
    from_recipe(str(DEBUG), given)


@pytest.mark.slow
def test_a_manifest_of_other_tensors_than_the_part_gives_is_refused(
    features: Path, tmp_path: Path
) -> None:
    """Nothing is made as large as a stranger says."""
    shutil.copytree(features, tmp_path / "f")
    content = json.loads((features / MANIFEST).read_text())
    part = content["parts"]["encoders.image"]
    for specs in (
        {FEATURES: ["F32", [None, 9]]}, {FEATURES: ["F32", [10**12, 16]]}, {},
        {FEATURES: ["BOOL", [None, 16]]}, {**part["specs"], "more": ["F32", [10**12]]},
    ):  # fmt: skip
        part["specs"] = specs
        (tmp_path / "f" / MANIFEST).write_text(json.dumps(content))
        message = r"features.json says that encoders.image gave \{.*\}, expected numbers .*16"
        with pytest.raises(FeaturesError, match=message) as error:
            from_recipe(str(DEBUG), [f"--data.features={tmp_path}/f"])
        assert f"data encode {DEBUG} --out {tmp_path}/f" in str(error.value)


def test_changed_weights_refuse_old_features(
    cache: Path, features: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(cache / "debug" / "clip", tmp_path / "clip")
    use = [f"--data.features={features}", f"--run_dir={tmp_path / 'run'}"]
    moved = f"--model.encoders.image.init_args.path={tmp_path}/clip"
    from_recipe(str(DEBUG), [use[0], moved])  # the same weights in another folder
    (tmp_path / "clip" / "README.md").write_text("says nothing of what is computed")
    from_recipe(str(DEBUG), [use[0], moved])
    weights = load_file(tmp_path / "clip" / "model.safetensors")
    next(iter(weights.values())).view(-1)[0] += 1e-3
    save_file(weights, tmp_path / "clip" / "model.safetensors", {"format": "pt"})
    error = refused(capsys, *use, moved)
    assert "another encoders.image made:\n  weights.path.model.safetensors: " in error


def test_weights_behind_linked_folders_tell_what_was_made(tmp_path: Path) -> None:
    folder = tmp_path / "sd"
    for part in ("text_encoder", "unet"):
        (tmp_path / "shared" / part).mkdir(parents=True)
        (tmp_path / "shared" / part / "model.safetensors").write_bytes(b"one")
    folder.mkdir()
    (folder / "model_index.json").write_text("{}")
    for part in ("text_encoder", "unet"):
        (folder / part).symlink_to(tmp_path / "shared" / part)
    (tmp_path / "blob").write_text("two")
    (folder / "vae").mkdir()
    (folder / "vae" / "config.json").symlink_to(tmp_path / "blob")  # as in a hub's cache
    (folder / "vae" / "loop").symlink_to(tmp_path / "sd")
    (folder / "vae" / "gone.json").symlink_to(tmp_path / "nothing")
    found = weights_of(str(folder), None)
    assert list(found) == ["model_index.json", "text_encoder/model.safetensors", "vae/config.json"]
    (tmp_path / "linked").symlink_to(folder)
    assert weights_of(str(tmp_path / "linked"), None) == found
    (tmp_path / "shared" / "unet" / "model.safetensors").write_bytes(b"other")
    assert weights_of(str(folder), None) == found
    (tmp_path / "shared" / "text_encoder" / "model.safetensors").write_bytes(b"other")
    (tmp_path / "blob").write_text("other")
    changed = weights_of(str(folder), None)
    assert [name for name in found if changed[name] != found[name]] == list(found)[1:]


@pytest.mark.slow
def test_sounds_and_clips_are_stored_as_pictures_are(tmp_path: Path) -> None:
    """By encoders of other libraries, in one recipe; sounds are of different lengths."""
    parts = encoders(tmp_path)
    linear = {"class_path": "mmfusion.models.projectors.linear.Linear"}
    converter = {"class_path": "mmfusion.data.converters.caption.Caption"}
    sources = {"seen": {"shards": f"{tmp_path}/seen-*.tar", "converter": converter}}
    fill({"model": {"encoders": parts}, "data": {"sources": sources}}, samples=9)
    recipe = write_recipe(
        tmp_path,
        model__encoders=parts,
        model__input_projectors=dict.fromkeys(parts, linear),
        data__sources=sources,
        data__pack_tokens=256,
    )
    main(["data", "encode", str(recipe), "--out", f"{tmp_path}/f", "--media=instead"])
    stored = from_recipe(str(recipe), [f"--data.features={tmp_path}/f"])
    found, expected = (tokens_of_one_batch(*made) for made in (stored, from_recipe(str(recipe))))
    assert set(found) == {"image", "video", "audio"}
    for modality, tokens in found.items():
        assert len(tokens) > 1
        torch.testing.assert_close(tokens, expected[modality], rtol=1e-4, atol=1e-5)
    assert not list(stored[0].model.encoders.parameters())


def tokens_of_one_batch(module: Any, data: Any) -> dict[str, torch.Tensor]:
    """What the LLM gets of each medium."""
    data.attach(module.model.processor())
    batch = next(iter(data.train_dataloader()))
    module.configure_model()
    with torch.no_grad():
        output = module.eval().model(batch)
    assert not any(media.idle for media in batch.media.values())
    return output.media_tokens


def test_a_record_with_bad_features_is_left_out_and_counted(
    cache: Path, features: Path, tmp_path: Path
) -> None:
    """As a stranger might have left them; the manifest is made to fit."""
    shutil.copytree(features, tmp_path / "f")
    folder = tmp_path / "f" / "sources" / "squares"
    records = [Shards(str(folder)).read(i) for i in range(65)]
    for path in folder.glob("*.tar"):
        path.unlink()
        Path(index_path(str(path))).unlink()
    bad = {
        0: b"torn", 1: b"", 2: item_file({FEATURES: torch.ones(4, 9)}, {"num_features": "4"}),
        3: item_file({FEATURES: torch.ones(3, 16)}, {"num_features": "4"}),
    }  # fmt: skip
    with ShardWriter(str(folder / "%06d.tar")) as writer:
        for number, (record, _, key) in enumerate(records):
            record["media.0.safetensors"] = bad.get(number, record["media.0.safetensors"])
            if number in bad:
                record["png"] = b""
            writer.write(key, record)
    manifest = json.loads((tmp_path / "f" / MANIFEST).read_text())
    manifest["sources"]["sources.squares"]["dataset_id"] = Shards(str(folder)).dataset_id
    (tmp_path / "f" / MANIFEST).write_text(json.dumps(manifest))
    run = stage1(tmp_path, "run", f"--data.features={tmp_path}/f")
    lines = [json.loads(line) for line in (run / "quarantine.jsonl").open()]
    assert {(line["key"], line["reason"]) for line in lines} == {
        ("train0000", "corrupt_features"),
        ("train0001", "missing_features"),
        ("train0002", "bad_features"),
        ("train0003", "count_mismatch"),
        ("torn", "corrupt_image"),
    }


# ---- stage 2


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pictures.prepare(tmp_path_factory.mktemp("stored_targets"))


LOSSES = ("loss", "next_token", "align", "denoise")


@pytest.mark.slow
def test_stage_2_on_stored_encodings_loses_the_same(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = pictures.recipe(home, trainer__max_steps=5)
    live = fit(recipe, f"--run_dir={home}/live").path
    main(["data", "encode", str(recipe), "--out", f"{home}/f", "--media=instead"])
    built: list[str] = []
    build = StableDiffusion.build

    def remember(self: StableDiffusion, parts: Any, pretrained: bool = True) -> None:
        built.extend(parts if pretrained else ())  # shapes are asked of one without weights
        build(self, parts, pretrained)

    monkeypatch.setattr(StableDiffusion, "build", remember)
    stored = fit(recipe, f"--run_dir={home}/stored", f"--data.features={home}/f").path
    assert set(built) == {DENOISER}
    for name in LOSSES:
        ours, theirs = (column(run, f"train/{name}") for run in (stored, live))
        assert len(ours) == 5
        assert ours == pytest.approx(theirs, abs=2e-6)
    chat = mmfusion.load(stored, device="cpu")
    generator = chat.model.generator("image")
    assert generator.stored_empty is None
    assert generator.text_encoder is not None
    assert generator.vae is not None


@pytest.mark.slow
@pytest.mark.parametrize("part", [TEXT_ENCODER, VAE])
def test_changed_weights_of_a_generator_refuse_what_they_made(
    home: Path, tmp_path: Path, part: str
) -> None:
    """Of the part that made it; the denoiser may be another."""
    recipe = pictures.recipe(home)
    name = f"generators.image.{part}"
    main(["data", "encode", str(recipe), "--out", f"{tmp_path}/f", f"--parts=[{name}]"])
    shutil.copytree(home / "sd", tmp_path / "sd")
    use = [f"--data.features={tmp_path}/f"]
    use += [f"--model.generators.image.init_args.path={tmp_path}/sd"]
    change_weight(tmp_path / "sd" / "unet")
    from_recipe(str(recipe), use)
    (file,) = change_weight(tmp_path / "sd" / part)
    said = rf"another {name} made:\n  weights.path.{part}/{file}: "
    with pytest.raises(FeaturesError, match=said):
        from_recipe(str(recipe), use)


def change_weight(folder: Path) -> list[str]:
    """Of each file of weights a little."""
    files = sorted(folder.glob("*.safetensors"))
    for file in files:
        weights = load_file(file)
        max(weights.values(), key=torch.Tensor.numel).view(-1)[0] += 1e-3
        save_file(weights, file, {"format": "pt"})
    return [file.name for file in files]


@pytest.mark.slow
def test_infonce_reads_the_stored_encodings_of_the_whole_step(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    objectives = {
        "next_token": pictures.NEXT_TOKEN,
        "align": pictures.objective("align", contrastive=0.5),
    }
    recipe = pictures.recipe(
        home, trainer__max_steps=3, model__objectives=objectives,
        model__schedule={"warmup_steps": 0}, val_every_n_steps=3, data__packs_per_micro_batch=1,
        data__val_sources=yaml.safe_load(pictures.recipe(home).read_text())["data"]["sources"],
    )  # fmt: skip
    live = fit(recipe, f"--run_dir={home}/nce-live").path
    main(["data", "encode", str(recipe), "--out", f"{home}/nce"])
    monkeypatch.setattr(StableDiffusion, "encode_text", _must_not_be_built)
    off = ["--validation.generate_samples=0", "--validation.table_samples=0"]
    stored = fit(recipe, f"--run_dir={home}/nce-stored", f"--data.features={home}/nce", *off).path
    for key in ("train/align", "val/align"):
        assert column(stored, key) == pytest.approx(column(live, key), abs=2e-6)


@pytest.mark.slow
def test_text_alone_may_be_stored_and_the_vae_run_live(home: Path) -> None:
    recipe = pictures.recipe(home)
    text, vae = (f"generators.image.{part}" for part in (TEXT_ENCODER, VAE))
    found = {}
    for part, needed in ((text, {VAE, DENOISER}), (vae, {TEXT_ENCODER, DENOISER})):
        out = home / part
        main(["data", "encode", str(recipe), "--out", str(out), f"--parts=[{part}]"])
        module, data = from_recipe(str(recipe), [f"--data.features={out}"])
        assert module.model.needs["image"] == needed
        found[part] = losses_of_one_batch(module, data)
    assert found[text] == pytest.approx(losses_of_one_batch(*from_recipe(str(recipe))), abs=2e-6)
    assert found[text] == pytest.approx(found[vae], abs=2e-6)


@pytest.mark.parametrize("contrastive", [0.0, 0.5])
def test_captions_of_the_step_come_along_only_where_they_are_read(
    home: Path, contrastive: float
) -> None:
    """With stored encodings they would be all of a step's on the device at once."""
    objectives = {"align": pictures.objective("align", contrastive=contrastive)}
    module, data = from_recipe(str(pictures.recipe(home, model__objectives=objectives)))
    data.attach(module.model.processor())
    batch = next(iter(data.train_dataloader()))
    assert batch.targets["image"].captions != [""]
    assert list(batch.step_captions) == (["image"] if contrastive else [])


def losses_of_one_batch(module: Any, data: Any) -> list[float]:
    data.attach(module.model.processor())
    batch = next(iter(data.train_dataloader()))
    module.configure_model()
    module.eval()
    losses = module._losses(module.model(batch), batch)
    assert not batch.targets["image"].idle
    return [float(loss.total.detach()) for loss in losses.values()]


@pytest.mark.slow
def test_a_denoiser_may_train_beside_stored_encodings(home: Path) -> None:
    recipe = pictures.recipe(home)
    lora = json.dumps(pictures.LORA | {"class_path": "mmfusion.tuning.LoRA"})
    full = json.dumps(pictures.FULL)
    denoiser = f'--model.tuning={{"generators.image.denoiser": {lora}}}'
    out = home / "beside"
    main(["data", "encode", str(recipe), "--out", str(out), denoiser])
    from_recipe(str(recipe), [denoiser, f"--data.features={out}"])
    frozen = json.dumps({"class_path": "mmfusion.tuning.Frozen"})
    both = f'{denoiser.removesuffix("}")}, "generators.image.vae": {frozen}}}'
    drawn = "--model.generators.image.init_args.guidance_rescale=0.7"  # not what was encoded
    module, _ = from_recipe(str(recipe), [both, drawn, f"--data.features={out}"])
    module.configure_model()
    assert module.model.generator("image").vae is None
    empty = out / "generators.image.empty.safetensors"
    for content in (b"torn", None):
        empty.write_bytes(content) if content else empty.unlink()
        with pytest.raises(FeaturesError, match=r'the encoding of "" in .* cannot be read'):
            from_recipe(str(recipe), [denoiser, f"--data.features={out}"])
    for part in ("generators", "generators.image", "generators.image.vae"):
        tuning = f'--model.tuning={{"{part}": {full}}}'
        with pytest.raises(ValueError, match=rf"which model.tuning.{part} trains"):
            from_recipe(str(recipe), [tuning, f"--data.features={out}"])


def test_an_idle_item_of_a_stored_encoder_keeps_its_projector_in_the_graph(
    cache: Path, features: Path
) -> None:
    module, data = from_recipe(str(DEBUG), [f"--data.features={features}"])
    data.attach(module.model.processor())
    module.configure_model()
    assert isinstance(module.model.encoders["image"], StoredEncoder)
    from mmfusion.data.collate import collate

    empty = collate([], data.processor)
    output = module.model(empty)
    assert empty.media["image"].idle
    output.hidden_states.sum().backward()
    projector = module.model.input_projectors["image"]
    assert all(p.grad is not None and not p.grad.any() for p in projector.parameters())
