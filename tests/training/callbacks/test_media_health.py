"""Health figures of the output side at validation, against sample-by-sample references."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch.nn import functional as F

from mmfusion.cli import main
from mmfusion.data.collate import collate
from mmfusion.data.reader import Budget, Reader
from mmfusion.data.validation import spread
from mmfusion.inference import Chat
from mmfusion.metrics.judges.classifier import ClassifierJudge
from mmfusion.metrics.judges.frechet import FrechetDistance
from mmfusion.models.generators.base import PARTS, TEXT_ENCODER, Sampling
from mmfusion.models.generators.noise import generators_of
from mmfusion.training.callbacks.validation import Validation
from mmfusion.training.loggers import read_metrics
from mmfusion.training.module import MultimodalModule
from mmfusion.training.rebuild import from_recipe
from mmfusion.types import Media, SampleRef
from tests.models.tiny import TinyEncoder
from tests.training.callbacks.test_validation import trainer_of
from tests.training.pictures import FULL, NEW, NEXT_TOKEN, objective, prepare, recipe
from tests.training.tiny import fit, losses

STEPS = Sampling(steps=2, guidance_scale=2.0, seed=3)


class Bright(ClassifierJudge):
    """Tells light from dark pictures; a caption's first word says which was wanted."""

    def __init__(self) -> None:
        super().__init__(["light"])

    def labels(self, wanted: Media) -> Mapping[str, str]:
        first = int((wanted.caption or "").split()[0].removeprefix("w"))
        return {"light": "yes" if first % 2 else "no"}

    def classify(self, media: Sequence[Media]) -> Sequence[Mapping[str, str]]:
        pictures = [np.asarray(Image.open(io.BytesIO(m.data)).convert("L")) for m in media]
        return [{"light": "yes" if picture.mean() > 127 else "no"} for picture in pictures]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(tmp_path_factory.mktemp("health"))


def built(home: Path, **changes: Any) -> tuple[MultimodalModule, Any]:
    """A stage that validates on its own sources, and answers some prompts with a picture: the
    row of the first signal token outdoes that of the commonest first word.
    """
    path = recipe(home, data__pack_tokens=48, **changes)
    module, data = from_recipe(str(path))
    data.val_sources = data.sources
    module.configure_model()
    return module, data


def make_emit(module: MultimodalModule, data: Any) -> None:
    chat = Chat(module.model)
    firsts = []
    for source in data.val_sources.values():
        for index in spread(len(source), 6):
            answer = chat.generate([source[index].messages[0]], max_new_tokens=1)
            firsts += chat.processor.tokenizer.convert_tokens_to_ids(answer.split())
    rows = module.model.llm.model.get_output_embeddings()
    commonest = max(sorted(set(firsts)), key=firsts.count)
    delta = next(p for n, p in rows.named_parameters() if "trainable_tokens_delta" in n)
    with torch.no_grad():
        delta[0] = 1.01 * rows.weight[commonest]


def validated(module: MultimodalModule, data: Any, **options: Any) -> dict[str, float]:
    callback = Validation(**{"shuffled_gap": False, "table_samples": 0, **options})
    (figures,) = trainer_of(callback).validate(module, data, verbose=False)
    module.eval()
    return dict(figures)


@pytest.fixture(scope="module")
def stage(home: Path) -> tuple[MultimodalModule, Any]:
    module, data = built(home)
    module.eval()
    make_emit(module, data)
    return module, data


@pytest.fixture(scope="module")
def figures(stage: tuple[MultimodalModule, Any]) -> dict[str, float]:
    return validated(*stage, generate_samples=12, max_new_tokens=3, prompts_per_batch=5)


def references(module: MultimodalModule, data: Any) -> list[tuple[torch.Tensor, str, list[float]]]:
    """Of each target: conditioning, caption, and its denoising losses under the three."""
    processor, generator = data.processor, module.model.generator("image")
    chat = Chat(module.model)
    reader = Reader(data.val_sources, processor, 0, Budget(48, {}))
    found = []
    for index in range(len(data.val_sources["pairs"])):
        sample = reader.finish(reader.plan(SampleRef("pairs", 0, index)))
        batch = collate([sample], processor)
        target = batch.targets["image"]
        with torch.no_grad():
            ours = chat.model(batch).conditioning["image"]
            keys = target.keys.tolist()
            latents = generator.encode_media(target.tensors, generators_of(keys, 1))
            losses = [
                float(generator.denoising_loss(latents, given, keys))
                for given in (
                    ours,
                    generator.encode_text(target.captions),
                    generator.encode_text([""]),
                )
            ]
        found.append((ours.tokens[0], target.captions[0], losses))
    return found


@pytest.mark.slow
def test_conditioning_figures_are_those_of_single_samples(
    stage: tuple[MultimodalModule, Any], figures: dict[str, float]
) -> None:
    module, data = stage
    found = references(module, data)
    captions = sorted({caption for _, caption, _ in found})
    assert figures["val/captions/image"] == len(captions) > 8
    with torch.no_grad():
        wanted = module.model.generator("image").encode_text(captions).tokens
    near = torch.stack([
        F.cosine_similarity(ours[None], wanted, dim=-1).mean(1) for ours, _, _ in found
    ])  # fmt: skip
    own = [captions.index(caption) for _, caption, _ in found]
    places = [near[i].argsort(descending=True).tolist().index(k) for i, k in enumerate(own)]
    mine = np.mean([float(near[i, k]) for i, k in enumerate(own)])
    assert figures["val/cosine/image"] == pytest.approx(mine, abs=1e-5)
    for k in (1, 5):
        share = np.mean([place < k for place in places])
        assert figures[f"val/retrieval@{k}/image"] == pytest.approx(share)
    means = np.mean([losses for _, _, losses in found], 0)
    for name, mean in zip(("ours", "caption", "empty"), means, strict=True):
        assert figures[f"val/denoising/image/{name}"] == pytest.approx(mean, rel=1e-4)
    ours, caption, empty = means
    if empty > caption:  # by the luck of random weights
        gain = (empty - ours) / (empty - caption)
        assert figures["val/denoising_gain/image"] == pytest.approx(gain, rel=0.05)
    else:
        assert "val/denoising_gain/image" not in figures


@pytest.mark.slow
def test_emission_is_counted_over_the_answers_the_model_gives(
    stage: tuple[MultimodalModule, Any], figures: dict[str, float]
) -> None:
    module, data = stage
    chat = Chat(module.model)
    right = given = wanted = 0
    for name, source in data.val_sources.items():
        for index in spread(len(source), 12):
            sample = source[index]
            answer = chat.generate([sample.messages[0]], max_new_tokens=3, sampling=STEPS)
            media = bool(answer.media)
            given, wanted = given + media, wanted + (name == "pairs")
            right += media and name == "pairs"
    assert 0 < given < 24
    assert figures["val/emission/recall/image"] == pytest.approx(right / wanted)
    assert figures["val/emission/precision/image"] == pytest.approx(right / given)
    assert figures["val/emission/f1/image"] == pytest.approx(2 * right / (given + wanted))
    assert "val/exact_match/words" in figures
    assert "val/exact_match/pairs" not in figures  # a picture is no text to match


@pytest.mark.slow
def test_only_what_the_objectives_need_is_loaded_and_told(home: Path) -> None:
    objectives = {"next_token": NEXT_TOKEN, "align": objective("align")}
    module, data = built(home, model__objectives=objectives)
    found = validated(module, data, generate_samples=0)
    assert {"val/cosine/image", "val/retrieval@5/image"} <= found.keys()
    assert not any("denoising" in key or "emission" in key for key in found)
    assert module.model.generator("image").vae is None
    without = validated(module, data, generate_samples=0, media_health=False)
    assert without == {key: found[key] for key in without}
    assert {key.split("/")[1] for key in without} == {"loss", "next_token", "align"}


@pytest.mark.slow
def test_another_shape_than_the_text_encodings_is_told_and_left_out(home: Path) -> None:
    linear = {"class_path": "mmfusion.models.output_projectors.mlp.Linear"}
    module, data = built(
        home,
        model__output_projectors={"image": linear},
        model__objectives={"next_token": NEXT_TOKEN, "denoise": objective("denoise")},
    )
    module.model.need("image", {TEXT_ENCODER})
    with pytest.warns(UserWarning, match=r"no val/cosine/image .* gives \(3, 32\)"):
        found = validated(module, data, generate_samples=0)
    assert "val/cosine/image" not in found
    assert "val/denoising/image/ours" in found


@pytest.mark.slow
def test_media_are_made_and_judged_the_same_in_any_grouping(
    stage: tuple[MultimodalModule, Any],
) -> None:
    module, data = stage
    options = {"generate_samples": 12, "media_samples": 6, "max_new_tokens": 3, "sampling": STEPS}
    shown = []
    for size in (1, 5):
        judge = Bright()
        found = validated(module, data, judges={"image": judge}, prompts_per_batch=size, **options)
        shown.append({k: v for k, v in found.items() if "judge" in k or "emission" in k})
    assert shown[0] == shown[1]
    assert shown[0].keys() >= {"val/judge/image/right/light", "val/judge/image/right_truth/light"}
    assert module.model.needs["image"] == PARTS


@pytest.fixture(scope="module")
def stored(home: Path) -> tuple[MultimodalModule, Any]:
    """The stage on stored features, which took the place of the media."""
    path = str(recipe(home, data__pack_tokens=48))
    main(["data", "encode", path, "--out", str(home / "features"), "--media=instead"])
    module, data = from_recipe(path, [f"--data.features={home}/features"])
    data.val_sources = data.sources
    module.configure_model()
    return module, data


@pytest.mark.slow
def test_stored_encodings_serve_where_the_parts_are_not_built(
    home: Path, stored: tuple[MultimodalModule, Any]
) -> None:
    live = validated(*built(home), generate_samples=0)
    found = validated(*stored, generate_samples=0)
    generator = stored[0].model.generator("image")
    assert generator.text_encoder is None
    assert generator.vae is None
    assert {"val/cosine/image", "val/retrieval@5/image", "val/denoising/image/caption"} <= {*found}
    assert found == pytest.approx(live, rel=1e-4, abs=1e-5)


@pytest.mark.slow
def test_without_the_true_media_nothing_is_judged(stored: tuple[MultimodalModule, Any]) -> None:
    """Where features were stored instead of them."""
    module, data = stored
    make_emit(module.eval(), data)
    options = {"generate_samples": 12, "media_samples": 6, "max_new_tokens": 3, "sampling": STEPS}
    found = validated(module, data, judges={"image": Bright()}, **options)
    assert found["val/emission/recall/image"] > 0
    assert not any("judge" in key for key in found)


def test_what_cannot_be_meant_is_refused(home: Path) -> None:
    with pytest.raises(ValueError, match=r"judge media of \['image'\], but none are made"):
        Validation(judges={"image": Bright()})
    with pytest.raises(ValueError, match=r"sampling\.seed is \(1, 2\); expected one number"):
        Validation(sampling=Sampling(seed=(1, 2)))
    encoder = TinyEncoder("image")
    with pytest.raises(ValueError, match=r"judges\.audio: FrechetDistance judges .* image,"):
        Validation(media_samples=1, judges={"audio": FrechetDistance(encoder)})
    with pytest.raises(ValueError, match=r"media_samples is -1"):
        Validation(media_samples=-1)
    module, data = built(home)
    with pytest.raises(ValueError, match=r"judge \['audio'\]; the model makes \['image'\]"):
        validated(module, data, media_samples=1, judges={"audio": Bright()})


@pytest.mark.slow
def test_validation_leaves_training_as_it_is_and_shows_what_was_made(home: Path) -> None:
    sources = yaml.safe_load(recipe(home).read_text())["data"]["sources"]
    eager = {**NEW, "init_args": {"lr": 0.3}}  # soon answers with pictures
    changes = {
        "trainer__max_steps": 8,
        "data__val_sources": sources,
        "model__tuning": {"output_projectors": FULL, "llm": eager},
    }
    plain = fit(recipe(home, run_dir=str(home / "plain"), **changes))
    judge = {"class_path": f"{__name__}.Bright"}
    often = fit(
        recipe(
            home,
            run_dir=str(home / "often"),
            val_every_n_steps=4,
            validation={
                "generate_samples": 6,
                "media_samples": 4,
                "table_samples": 6,
                "max_new_tokens": 3,
                "sampling": {"steps": 2},
                "judges": {"image": judge},
            },
            **changes,
        )
    )
    assert losses(often) == losses(plain)
    assert len(losses(plain)) == 8
    rows = read_metrics(often.path / "metrics.csv")
    logged = [row for row in rows if "val/loss" in row]
    assert len(logged) == 2
    for row in logged:
        assert {"val/cosine/image", "val/denoising/image/ours", "val/emission/f1/image"} <= {*row}
    pages = sorted((often.path / "samples").iterdir())
    assert [page.name for page in pages] == ["val-00000004", "val-00000008"]
    shown = [json.loads(line) for line in (pages[1] / "samples.jsonl").open()]
    assert {row["source"] for row in shown} == {"pairs", "words"}
    assert all(len(row["wanted"]) == (row["source"] == "pairs") for row in shown)
    made = [item["file"] for row in shown for item in row["made"]]
    assert made, "the trained model answers with pictures"
    assert all(Image.open(pages[1] / file).size == (16, 16) for file in made)
    assert "val/judge/image/right/light" in logged[1]
