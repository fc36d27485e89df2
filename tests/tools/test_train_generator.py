"""Small generators from nothing: the shipped recipes, cut down to a few steps on a few media."""

from __future__ import annotations

import csv
import io
import json
import re
import resource
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from diffusers import StableDiffusionPipeline
from PIL import Image

from mmfusion.data.converters.caption import Caption
from mmfusion.data.converters.text_to_media import TextToMedia
from mmfusion.data.source import Source
from mmfusion.data.writer import ShardWriter
from mmfusion.models.generators.base import PARTS, VAE, Sampling
from mmfusion.models.generators.stable_diffusion import StableDiffusion
from mmfusion.models.generators.untrained import write_untrained
from mmfusion.models.generators.wan import Wan
from mmfusion.tools.quickstart.pictures import encode_mp4
from mmfusion.tools.train_generator import Examples, read_recipe, train_generator
from mmfusion.training.generator_fits import (
    AutoencoderFit,
    DenoiserFit,
    Effort,
    moments,
    run_fit,
)
from tests.data.held import held

RECIPES = Path("recipes/quickstart/generators")
FEW = {"steps": 2, "batch": 4, "lr": 1e-3}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The shipped one, tiny, on squares of two colors with captions."""
    folder = tmp_path_factory.mktemp("shards")
    with ShardWriter(str(folder / "train-%06d.tar")) as writer:
        for i in range(12):
            pixels = np.full((32, 32, 3), 255, np.uint8)
            pixels[8:24, 8:24] = [(200, 0, 0), (0, 0, 200)][i % 2]
            file = io.BytesIO()
            Image.fromarray(pixels).save(file, "png")
            text = ["A red square.", "A blue square."][i % 2].encode()
            writer.write(f"{i:02d}", {"png": file.getvalue(), "txt": text})
    tiny = yaml.safe_load((RECIPES / "image.yaml").read_text())
    tiny["components"]["vae"]["block_out_channels"] = [8, 8, 8]
    tiny["components"]["unet"]["block_out_channels"] = [8, 16]
    tiny["source"]["shards"] = f"{folder}/train-*.tar"
    tiny |= {"words": 300, "autoencoder": FEW, "denoiser": FEW}
    return written(folder / "tiny.yaml", tiny)


def written(file: Path, recipe: dict[str, Any]) -> str:
    file.write_text(yaml.safe_dump(recipe))
    return str(file)


def train(out: Path, recipe: str, *overrides: str, overwrite: bool = False) -> None:
    train_generator(recipe, str(out), overwrite, list(overrides))


@pytest.fixture(scope="module")
def trained(recipe: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("generators") / "image"
    train(out, recipe)
    return out


def test_what_is_trained_is_a_generator_and_a_pipeline_of_diffusers(trained: Path) -> None:
    generator = StableDiffusion(str(trained))
    generator.build(PARTS)
    given = generator.encode_text(["a red square", "A RED square"])
    torch.testing.assert_close(given.tokens[0], given.tokens[1])
    (made,) = generator.sample(
        type(given)(given.tokens[:1]), generator.encode_empty(), Sampling(steps=2)
    )
    assert Image.open(io.BytesIO(made.data)).size == (32, 32)
    pipeline = StableDiffusionPipeline.from_pretrained(
        trained,
        safety_checker=None,
        feature_extractor=None,
        image_encoder=None,
        torch_dtype=torch.float32,  # its files are in half precision
    )
    torch.testing.assert_close(
        pipeline.encode_prompt(["a red square"], "cpu", 1, False, None)[0][:, :12],
        given.tokens[:1],
    )


def test_latents_have_unit_variance(trained: Path, recipe: str) -> None:
    generator = StableDiffusion(str(trained))
    generator.build({VAE})
    processor = generator.target_processor()
    mean, std = moments(generator, Examples(read_recipe(recipe).source).decoded(processor))
    drawn = [generator.scaled(mean + std * torch.randn_like(mean)) for _ in range(20)]
    assert float(torch.stack(drawn).var()) == pytest.approx(1, rel=0.02)


def test_a_generator_of_clips_is_trained_alike(tmp_path: Path) -> None:
    with ShardWriter(str(tmp_path / "train-%06d.tar")) as writer:
        for i in range(6):
            frames = [Image.new("RGB", (32, 32), (40 * i, 20 * t, 90)) for t in range(12)]
            text = ["A thing goes up.", "A thing goes down."][i % 2].encode()
            writer.write(f"{i:02d}", {"mp4": encode_mp4(frames, 6), "txt": text})
    tiny = yaml.safe_load((RECIPES / "video.yaml").read_text())
    tiny["components"]["vae"]["base_dim"] = 4
    tiny["components"]["transformer"] |= {"num_layers": 1, "ffn_dim": 32}
    tiny["source"]["shards"] = f"{tmp_path}/train-*.tar"
    tiny |= {"words": 300, "autoencoder": FEW, "denoiser": FEW}
    file = written(tmp_path / "tiny.yaml", tiny)
    train(tmp_path / "video", file)
    generator = Wan(str(tmp_path / "video"), **tiny["generator"]["init_args"])
    generator.build(PARTS)
    processor = generator.target_processor()
    mean, std = moments(generator, Examples(read_recipe(file).source).decoded(processor))
    scaled, axes = generator.scaled(mean), (0, 2, 3, 4)
    spread = generator.scaled(mean + std) - scaled
    torch.testing.assert_close(scaled.mean(axes), torch.zeros(8), atol=1e-3, rtol=0)
    whole = scaled.var(axes) + spread.square().mean(axes)
    torch.testing.assert_close(whole, torch.ones(8), atol=5e-3, rtol=0)  # weights are halved
    given = generator.requires_grad_(False).encode_text(["a thing goes up"])
    (made,) = generator.sample(given, generator.encode_empty(), Sampling(steps=2))
    assert processor(made)["pixels"].shape == (9, 3, 32, 32)


@pytest.mark.parametrize("kind", ["text_to_video_sd.TextToVideoSD", "pixart.PixArt"])
def test_a_family_that_cannot_be_trained_from_nothing_is_refused(
    recipe: str, tmp_path: Path, kind: str
) -> None:
    changed = yaml.safe_load(Path(recipe).read_text())
    changed["generator"] = {"class_path": f"mmfusion.models.generators.{kind}"}
    with pytest.raises(ValueError, match=r"generator.*TrainablePipeline"):
        train(tmp_path / "image", written(tmp_path / "bad.yaml", changed))


def test_losses_are_kept(trained: Path) -> None:
    for name in ("AutoencoderFit", "DenoiserFit"):
        with (trained / "losses" / name / "metrics.csv").open(newline="") as file:
            assert [float(row["loss"]) > 0 for row in csv.DictReader(file)] == [True]


def test_what_is_there_stays_and_another_recipe_does_not_replace_it(
    trained: Path, recipe: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in trained.rglob("*")}
    train(trained, recipe)
    assert "is there already" in capsys.readouterr().out
    for change in ("--seed=1", "--generator.init_args.size=16"):
        with pytest.raises(ValueError, match=r"not made by this recipe.*--overwrite"):
            train(trained, recipe, change)
    assert {path: path.stat().st_mtime_ns for path in trained.rglob("*")} == before


def test_an_option_that_came_later_makes_no_generator_anew(
    recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is not said in a recipe does not tell generators apart, until their version is raised.
    Comments and order do neither.
    """
    origin = read_recipe(recipe).origin
    assert "guidance_rescale" not in read_recipe(recipe).recipe
    other = written(Path(recipe).with_name("other.yaml"), yaml.safe_load(Path(recipe).read_text()))
    assert read_recipe(other).origin == origin
    changes = Path(recipe).with_name("changes.yaml")
    found = {read_recipe(recipe).origin}
    for seed in (1, 2):  # of a second recipe its content tells, not its name
        changes.write_text(f"seed: {seed}")
        found.add(read_recipe(recipe, [f"--config={changes}"]).origin)
    assert len(found) == 3
    monkeypatch.setattr("mmfusion.tools.train_generator.VERSION", 0)
    assert read_recipe(recipe).origin != origin


def test_a_folder_of_something_else_is_never_replaced(recipe: str, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_bytes(b"dear")
    with pytest.raises(ValueError, match=r"holds no training\.json: no generator was"):
        train(tmp_path / "photos", recipe, overwrite=True)
    assert (tmp_path / "photos" / "a.png").read_bytes() == b"dear"


def test_an_interrupted_training_goes_on_behind_what_is_trained(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    out = tmp_path / "image"
    with monkeypatch.context() as patch:
        patch.setattr(DenoiserFit, "loss", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(out, recipe)
    assert not out.exists()
    file = tmp_path / ".image.partial" / "vae" / "diffusion_pytorch_model.safetensors"
    weights = file.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(AutoencoderFit, "loss", interrupted)  # not trained again
        train(out, recipe)
    assert (out / "vae" / file.name).read_bytes() == weights


def test_another_recipe_in_the_same_place_starts_anew(recipe: str, tmp_path: Path) -> None:
    out = tmp_path / "image"
    train(out, recipe)
    weights = (out / "vae" / "diffusion_pytorch_model.safetensors").read_bytes()
    train(out, recipe, "--seed=1", overwrite=True)
    assert (out / "vae" / "diffusion_pytorch_model.safetensors").read_bytes() != weights


@pytest.mark.parametrize("modality", ["image", "audio", "video"])
def test_shipped_recipes_parse_and_name_what_exists(modality: str) -> None:
    recipe = read_recipe(str(RECIPES / f"{modality}.yaml"))
    denoiser = "transformer" if modality == "video" else "unet"
    assert {"vae", denoiser, "text_encoder", "scheduler"} <= set(recipe.components)


@pytest.mark.parametrize("modality", ["image", "audio", "video"])
def test_weights_of_shipped_recipes_take_at_most_10_mb(modality: str, tmp_path: Path) -> None:
    """Before they are trained: as many numbers, in the half precision that they are kept in."""
    recipe = read_recipe(str(RECIPES / f"{modality}.yaml"))
    folder, captions = tmp_path / "pipeline", [f"some words w{i}" for i in range(300)]
    write_untrained(folder, recipe.pipeline, recipe.components, captions, recipe.words)
    generator: Any = recipe.make(str(folder))
    generator.build(PARTS, pretrained=False)
    for name, component in generator.components.items():
        getattr(generator, name).half().save_pretrained(folder / component.folder)
    sizes = [file.stat().st_size for file in folder.rglob("*.safetensors")]
    assert len(sizes) >= 3
    assert 2**20 < sum(sizes) <= 10_000_000
    assert not list(folder.rglob("*.bin"))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--denoiser.steps=0", "steps is 0"),
        ("--denoiser.stepz=3", "stepz"),
        ("--source.shards=/nowhere/*.tar", "nowhere"),
        ("--denoiser.lr=.nan", "lr nan; expected .* a finite number above 0"),
        ("--autoencoder.lr=.inf", "lr inf; expected .* a finite number above 0"),
        ("--condition_noise=.nan", "condition_noise is nan; expected 0 or more, finite"),
        ("--divergence=.inf", "divergence is inf; expected 0 or more, finite"),
        ("--divergence=-1", "divergence is -1.0; expected 0 or more, finite"),
        ("--seed=-1", "seed is -1; expected 0 to"),
        ("--seed=4294967296", "seed is 4294967296; expected 0 to"),
    ],
)
def test_bad_recipes_are_refused(recipe: str, tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises((ValueError, OSError), match=message):
        train(tmp_path / "image", recipe, override)


def test_a_class_that_is_no_model_is_refused(recipe: str, tmp_path: Path) -> None:
    changed = yaml.safe_load(Path(recipe).read_text())
    changed["components"]["vae"]["class"] = "AudioPipelineOutput"
    with pytest.raises(ValueError, match=r"components\.vae has the class 'AudioPipelineOutput'"):
        train(tmp_path / "image", written(tmp_path / "bad.yaml", changed))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("pipeline", "BananaPipeline", "pipeline is 'BananaPipeline'; expected the name of a"),
        ("pipeline", "AutoencoderKL", "pipeline is 'AutoencoderKL'"),
        ("words", 0, "words is 0; expected 259 to"),
        ("words", 258, "words is 258; expected 259 to"),
        (
            "components.unet.attention_head_dims", 2,
            r"components\.unet\.attention_head_dims is no setting of UNet2DConditionModel\. "
            "Did you mean 'attention_head_dim'",
        ),
        ("components.text_encoder.hidden_sizes", 8, r"no setting of CLIPTextModel.*'hidden_size'"),
        ("components.scheduler.banana", 8, r"components\.scheduler\.banana is no setting of DDIM"),
        ("components.text_encoder", None, r"StableDiffusionPipeline needs \['text_encoder'\]"),
        ("components.vae", None, r"StableDiffusionPipeline needs \['vae'\] as well"),
        ("pipeline", "WanPipeline", r"WanPipeline takes no \['unet'\]"),
        ("pipeline", "AudioLDMPipeline", r"AudioLDMPipeline needs \['vocoder'\] as well"),
        ("words", 1 << 30, "words is 1073741824; expected 259 to 1048576"),
    ],
)  # fmt: skip
def test_what_diffusers_would_pass_over_is_refused_when_the_recipe_is_read(
    recipe: str, tmp_path: Path, key: str, value: Any, message: str
) -> None:
    changed = yaml.safe_load(Path(recipe).read_text())
    place, (*above, last) = changed, key.split(".")
    for name in above:
        place = place[name]
    place[last] = value
    if value is None:
        del place[last]
    with pytest.raises(ValueError, match=message):
        read_recipe(written(tmp_path / "bad.yaml", changed))


@pytest.mark.parametrize("name", ["../evil", "/tmp/evil", "", "a.b", "tokenizer"])
def test_components_that_are_no_folders_of_the_pipeline_are_refused(
    recipe: str, tmp_path: Path, name: str
) -> None:
    changed = yaml.safe_load(Path(recipe).read_text())
    changed["components"][name] = {"class": "AutoencoderKL"}
    with pytest.raises(ValueError, match=f"components has {name!r}; expected names of"):
        read_recipe(written(tmp_path / "bad.yaml", changed))


@pytest.mark.parametrize("out", [".", "/"])
def test_folders_without_a_name_of_their_own_are_never_replaced(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"no generator was trained there|that may be replaced"):
        train_generator(recipe, out)


def test_captions_that_the_text_encoder_cuts_are_told(
    recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = read_recipe(recipe)
    longest = made.components["text_encoder"]["max_position_embeddings"]
    captions = ["a", "b " * longest]
    write_untrained(tmp_path / "a", made.pipeline, made.components, captions, made.words)
    assert f"1 of 2 captions are longer than {longest} tokens" in capsys.readouterr().out
    write_untrained(tmp_path / "b", made.pipeline, made.components, captions[:1], made.words)
    assert not capsys.readouterr().out


def source_with(folder: Path, good: int, **bad: dict[str, bytes]) -> Source:
    """Good samples, and others by their keys."""
    file = io.BytesIO()
    Image.new("RGB", (32, 32)).save(file, "png")
    fine = {"png": file.getvalue(), "txt": b"a"}
    with ShardWriter(str(folder / "train-%06d.tar")) as writer:
        for i in range(good):
            writer.write(f"{i:02d}", fine)
        for key, members in bad.items():
            writer.write(key, {**fine, **members})
    prompts = {"image": ["{caption}"]}
    return Source(f"{folder}/train-*.tar", TextToMedia(prompts=prompts))


def test_few_unusable_samples_are_left_out_and_named(
    tmp_path: Path, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = source_with(tmp_path, 38, bare={"txt": b" "}, torn={"png": b"x", "txt": b"torn"})
    examples = Examples(source)
    assert len(examples.captions) == 39
    pixels = examples.decoded(StableDiffusion(str(trained)).target_processor())["pixels"]
    assert len(pixels) == len(examples.captions) == 38
    assert "torn" not in examples.captions
    said = capsys.readouterr().out
    assert re.search(rf"{tmp_path}/train-000000.tar bare: .*(caption|text)", said)
    assert f"{tmp_path}/train-000000.tar torn: the " in said


def test_many_unusable_samples_end_the_training_by_name(tmp_path: Path, trained: Path) -> None:
    message = rf"1 of 19 samples are unusable, at most 5% may be:\n{tmp_path}/\S+/train-000000.tar "
    (tmp_path / "a").mkdir()
    with pytest.raises(ValueError, match=message + "bare: "):
        Examples(source_with(tmp_path / "a", 18, bare={"txt": b""}))
    (tmp_path / "b").mkdir()
    examples = Examples(source_with(tmp_path / "b", 18, torn={"png": b"x"}))
    with pytest.raises(ValueError, match=message + "torn: "):
        examples.decoded(StableDiffusion(str(trained)).target_processor())


def test_samples_without_media_in_the_answer_are_refused(tmp_path: Path) -> None:
    source = source_with(tmp_path, 3)
    with pytest.raises(ValueError, match="no sample of the source has media in its answer"):
        Examples(Source(source.patterns, Caption()))


@pytest.mark.slow
def test_training_lowers_both_losses(trained: Path) -> None:
    generator = StableDiffusion(str(trained))
    torch.manual_seed(0)
    generator.build(PARTS, pretrained=False)
    pixels = torch.full((8, 3, 32, 32), 40, dtype=torch.uint8)
    fit = AutoencoderFit(Effort(60, 8, 1e-2), generator, 1e-6)
    items = {"pixels": pixels.contiguous()}
    before = fit.loss(items).item()
    run_fit(fit, items, trained.parent, 0)
    assert fit.loss(items).item() < 0.6 * before
    mean = torch.randn(8, 4, 8, 8)
    latents = {"mean": mean, "std": torch.zeros_like(mean), "index": torch.arange(8)}
    last = DenoiserFit(Effort(60, 8, 5e-3), generator, [f"a {i}" for i in range(8)])
    losses = []
    for _ in range(2):
        torch.manual_seed(1)
        losses.append(last.loss(latents).item())
        run_fit(last, latents, trained.parent, 0)
    assert losses[1] < 0.9 * losses[0]


def test_the_denoiser_is_told_captions_with_noise_of_the_given_size(trained: Path) -> None:
    generator = StableDiffusion(str(trained))
    generator.build(PARTS)
    mean = torch.randn(8, 4, 8, 8)
    latents = {"mean": mean, "std": torch.zeros_like(mean), "index": torch.arange(8)}

    def away(noise: float) -> float:
        captions = [f"a {i}" for i in range(8)]
        fit = DenoiserFit(Effort(1, 8, 1e-3), generator, captions, 0.0, condition_noise=noise)
        torch.manual_seed(1)
        told: list[torch.Tensor] = []
        with pytest.MonkeyPatch.context() as patch:

            def denoising_loss(_: object, given: Any, keys: list[int]) -> torch.Tensor:
                told.append(given.tokens)
                return given.tokens.sum()

            patch.setattr(generator, "denoising_loss", denoising_loss)
            fit.loss(latents)
        exact = generator.encode_text(captions).tokens
        return float((told[0] - exact).detach().square().mean().sqrt())

    assert away(0.0) == 0.0
    assert away(0.3) == pytest.approx(0.3, rel=0.1)


@pytest.mark.parametrize(
    "content", [b"{", b"[1]", b"null", b"\xff\xfe\x00", b'{"origin": "x"}', b'{"done": []}']
)
def test_a_damaged_state_is_named(
    recipe: str, trained: Path, tmp_path: Path, content: bytes
) -> None:
    for name, asked in (("image", "image"), (".clip.partial", "clip")):
        folder = shutil.copytree(trained, tmp_path / name)
        (folder / "training.json").write_bytes(content)
        with pytest.raises(ValueError, match=rf"{folder}/training\.json is damaged .* Remove"):
            train(tmp_path / asked, recipe, overwrite=True)


def test_a_disk_without_room_for_the_weights_is_named(recipe: str, tmp_path: Path) -> None:
    """Files may grow to 20,000 bytes; what was there is gone on with."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(OSError, match=rf"{tmp_path}/\.image\.partial/vae cannot be written: "):
            train(tmp_path / "image", recipe)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    train(tmp_path / "image", recipe)


def test_two_processes_do_not_train_in_one_folder(recipe: str, tmp_path: Path) -> None:
    with held(tmp_path / ".image.lock"), pytest.raises(ValueError, match="another process is trai"):
        train(tmp_path / "image", recipe)
    train(tmp_path / "image", recipe)
    assert [path.name for path in tmp_path.iterdir()] == ["image"]


@pytest.mark.parametrize("there", [True, False])
def test_a_link_is_followed_to_the_folder_that_it_names(
    recipe: str, trained: Path, tmp_path: Path, there: bool
) -> None:
    real, link = tmp_path / "real", tmp_path / "link"
    if there:
        shutil.copytree(trained, real)
    link.symlink_to(real)
    train(link, recipe, "--seed=1", overwrite=True)
    assert link.is_symlink()
    assert (real / "training.json").read_text() != (trained / "training.json").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "real"]


@pytest.mark.parametrize(
    ("override", "message", "done"),
    [
        ("--autoencoder.lr=1e30", "AutoencoderFit: the gradients of step [1-5] of 6", []),
        ("--denoiser.lr=1e12", "DenoiserFit: the gradients of step [1-5] of 6", ["vae"]),
        # Finite in float32, in which it trains, but not as it is kept.
        ("--denoiser.lr=1e6", "(gradients|trained tensors of .* not finite in half)", ["vae"]),
    ],
)
def test_a_training_that_comes_to_no_numbers_makes_no_generator(
    recipe: str, tmp_path: Path, override: str, message: str, done: list[str]
) -> None:
    part = override.partition(".")[0]
    with pytest.raises(FloatingPointError, match=message):
        train(tmp_path / "image", recipe, override, f"{part}.steps=6")
    assert not (tmp_path / "image").exists()
    state = json.loads((tmp_path / ".image.partial" / "training.json").read_text())
    assert state["done"] == done


def test_less_than_no_noise_is_refused(recipe: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"condition_noise is -1.0; expected 0 or more"):
        train(tmp_path / "image", recipe, "--condition_noise=-1")
