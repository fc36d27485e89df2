"""A golden run of all three stages with tiny parts; and for each of the faults of NExT-GPT's public
code (as read at its state of 2025-05-13) the test that this code does not have it.

Much of what the faults are about is tested where it belongs in more detail; here each is looked for
as it was found there.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import mmfusion
from mmfusion.cli import main
from mmfusion.data.collate import collate
from mmfusion.data.features import MANIFEST
from mmfusion.inference import Chat
from mmfusion.models.any_to_any import AnyToAnyModel
from mmfusion.models.generation import conditioning_of, find_runs, generate
from mmfusion.models.generators.base import DENOISER, TEXT_ENCODER, Sampling
from mmfusion.models.generators.noise import generators_of
from mmfusion.models.generators.similarity import similarities
from mmfusion.models.generators.stable_diffusion import StableDiffusion
from mmfusion.models.llms.hf_causal_lm import HFCausalLM
from mmfusion.models.output_projectors.query_decoder import QueryDecoder
from mmfusion.objectives.condition_alignment import ConditionAlignment
from mmfusion.training.checkpoint import read_checkpoint
from mmfusion.training.rebuild import from_recipe, load_module
from mmfusion.training.resume import find
from mmfusion.types import Conditioning, Media, Message, Sample, SampleRef, Text
from tests.models.generators.tiny import save_stable_diffusion
from tests.models.tiny import llama_config, save_llm
from tests.processing.conftest import CHATML, train
from tests.training.pictures import NEXT_TOKEN, SMALL, objective
from tests.training.three_stages import (
    COLORS,
    DRAW,
    NAME_IT,
    PLAY,
    RATES,
    REDRAW,
    converter,
    picture,
    prepare,
    rows,
    sources,
    stage_1,
    stage_2,
    stage_3,
)
from tests.training.tiny import fit, refused


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(tmp_path_factory.mktemp("three_stages"))


@pytest.fixture(scope="module")
def runs(home: Path) -> dict[int, Path]:
    """The three stages, one after the other."""
    stages = {1: stage_1, 2: stage_2, 3: stage_3}
    return {number: fit(stage(home)).path for number, stage in stages.items()}


def state(run: Path) -> dict[str, Tensor]:
    return read_checkpoint(find(run))["state_dict"]


def curves(run: Path) -> dict[str, list[float]]:
    """Every loss of every step in which it had a term."""
    with (run / "metrics.csv").open(newline="") as file:
        steps = [row for row in csv.DictReader(file) if row.get("train/loss")]
    names = [name for name in steps[0] if name.startswith("train/") and name.count("/") == 1]
    return {name: [float(row[name]) for row in steps if row[name]] for name in names}


@pytest.fixture(scope="module")
def chat(runs: dict[int, Path]) -> Chat:
    return mmfusion.load(runs[3], device="cpu")


# ---- the golden run


def test_every_stage_lowers_its_losses(runs: dict[int, Path]) -> None:
    for stage, names in {
        1: ["next_token"],
        2: ["next_token", "align_image", "align_audio"],
        3: ["next_token", "align_image", "align_audio"],
    }.items():
        found = curves(runs[stage])
        for name in names:
            curve = found[f"train/{name}"]
            assert np.mean(curve[-3:]) < 0.75 * np.mean(curve[:3]), (stage, name)


def test_what_a_stage_trained_is_what_the_next_begins_with_bit_for_bit(
    home: Path, runs: dict[int, Path]
) -> None:
    for stage, recipe in ((1, stage_2), (2, stage_3)):
        module, _ = from_recipe(str(recipe(home)))
        module.configure_model()
        begins, trained = module.state_dict(), state(runs[stage])
        assert trained
        assert all(torch.equal(begins[name], trained[name]) for name in trained)
    # Stage 2 keeps the frozen input projector of stage 1; stage 3 needs no other run.
    one, two, three = (state(runs[stage]) for stage in (1, 2, 3))
    assert all(torch.equal(two[name], one[name]) for name in one)
    assert set(one) < set(two) < set(three)


def test_stage_2_on_stored_features_of_both_generators_loses_the_same(
    home: Path, tmp_path: Path
) -> None:
    """Of many tokens a text and of one vector."""
    recipe = stage_2(home, model__init_from=None)
    main(["data", "encode", str(recipe), "--out", str(tmp_path / "f"), "--media=instead"])
    made = json.loads((tmp_path / "f" / MANIFEST).read_text())["parts"]
    assert {*made} == {
        "encoders.image", "generators.image.text_encoder", "generators.image.vae",
        "generators.audio.text_encoder",
    }  # fmt: skip
    found, live = (
        losses_of_two_batches(*from_recipe(str(recipe), given))
        for given in ([f"--data.features={tmp_path}/f"], [])
    )
    assert set(live) == {"next_token", "align_image", "align_audio", "denoise"}
    assert all(live.values())
    assert found == pytest.approx(live, rel=1e-4)


def losses_of_two_batches(module: Any, data: Any) -> dict[str, float]:
    data.attach(module.model.processor())
    module.configure_model()
    module.eval()
    sums = dict.fromkeys(module.objectives, 0.0)
    for batch in itertools.islice(data.train_dataloader(), 2):
        with torch.no_grad():
            losses = module._losses(module.model(batch), batch)
        sums = {name: sums[name] + float(loss.total) for name, loss in losses.items()}
    return sums


def asked(word: str) -> dict[str, list[Message]]:
    shown = Media("image", picture(word), "png")
    contents = {
        NAME_IT: (shown, Text(f" {NAME_IT}")),
        DRAW: (Text(f" {DRAW} {word}"),),
        REDRAW: (shown, Text(f" {REDRAW}")),
        PLAY: (Text(f" {PLAY} {word}"),),
    }
    return {ask: [Message("user", content)] for ask, content in contents.items()}


def test_it_answers_in_words_with_pictures_or_with_sound_as_it_is_asked(chat: Chat) -> None:
    for word in COLORS:
        named, drawn, redrawn, played = chat.generate(
            [*asked(word).values()], max_new_tokens=5, sampling=Sampling(steps=1)
        )
        assert (named, named.media) == (word, [])
        assert [part.modality for part in drawn.parts] == ["image"]
        assert [part.modality for part in redrawn.parts] == ["image"]
        assert [part.modality for part in played.parts] == ["audio"]


def test_the_chat_command_passes_steps_guidance_and_seed_on_to_what_is_drawn(
    chat: Chat,
    runs: dict[int, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def drawn(steps: int, scale: float, seed: int) -> bytes:
        folder = tmp_path / f"{steps}-{scale}-{seed}"
        monkeypatch.setattr("sys.stdin", io.StringIO(f" {DRAW} w1\n"))
        main([
            "chat", str(runs[3]), "--device=cpu", "--max_new_tokens=5", f"--media_dir={folder}",
            f"--media_steps={steps}", f"--guidance_scale={scale}", f"--seed={seed}",
        ])  # fmt: skip
        (file,) = folder.iterdir()
        assert f"(image {file})" in capsys.readouterr().out
        return file.read_bytes()

    asked = [Message("user", (Text(f"{DRAW} w1"),))]
    given = (2, 3.0, 5)
    answer = chat.generate(asked, max_new_tokens=5, sampling=Sampling(*given))
    assert drawn(*given) == answer.media[0].data
    others = {drawn(*other) for other in ((3, 3.0, 5), (2, 9.0, 5), (2, 0.0, 5), (2, 3.0, 6))}
    assert len(others | {answer.media[0].data}) == 5


def test_what_a_sampler_cannot_do_is_refused_before_the_answer(
    chat: Chat, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of the steps that are taken where nothing is said."""
    configs = chat.model.generator("image").configs
    few = {**configs["scheduler"], "num_train_timesteps": 20}
    monkeypatch.setitem(configs, "scheduler", few)
    with pytest.raises(ValueError, match=r"sampling\.steps is 50, but the .* takes \d+ at most"):
        chat.generate(asked("w1")[NAME_IT], max_new_tokens=5)


def test_a_generator_that_no_objective_needs_is_not_loaded(
    home: Path, runs: dict[int, Path]
) -> None:
    """Of the other one only what its objective runs."""
    objectives = {"next_token": NEXT_TOKEN, "align_image": objective("align")}
    module, _ = from_recipe(str(stage_3(home, model__objectives=objectives)))
    module.configure_model()
    assert not list(module.model.generator("audio").parameters())
    image = module.model.generator("image")
    assert [name for name, _ in image.named_children()] == ["text_encoder"]
    assert set(module.model.output_projectors) == {"image", "audio"}


def test_the_conditioning_is_most_like_the_words_that_were_asked_for(chat: Chat) -> None:
    generator = chat.model.generator("image")
    generator.build({TEXT_ENCODER})
    prompts = chat.batch([chat.processor.prompt(asked(word)[DRAW]) for word in COLORS])
    ids = generate(chat.model, prompts, max_new_tokens=5)
    runs = find_runs(ids, chat.processor.signal_ids)
    found = conditioning_of(chat.model, prompts, ids, runs)["image"]
    assert similarities(found, generator.encode_text([*COLORS])).argmax(1).tolist() == [0, 1, 2]


# ---- the faults


def test_fault_1_stage_3_trains_its_lora(runs: dict[int, Path]) -> None:
    """There, the LLM and the adapters in it are frozen again after the adapters were added."""
    before, after = state(runs[2]), state(runs[3])
    adapters = [name for name in after if "lora_B" in name]
    assert len(adapters) == 14
    assert all(after[name].any() for name in adapters)  # B starts at zero
    for name in before:
        if "projectors" in name:
            assert not torch.equal(before[name], after[name]), name


def test_fault_1_a_stage_that_trains_nothing_is_refused(
    home: Path, runs: dict[int, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    tuning = {"llm": rows(train=False)}
    recipe = stage_3(home, model__tuning=tuning, run_dir=str(tmp_path / "run"))
    assert "nothing trains" in refused(capsys, recipe)


def test_fault_2_stage_2_trains_the_projector_of_every_modality(
    home: Path, runs: dict[int, Path]
) -> None:
    """There, the script of stage 2 freezes those of images and videos."""
    module, _ = from_recipe(str(stage_2(home)))
    module.configure_model()
    before, after = module.state_dict(), state(runs[2])
    for modality in ("image", "audio"):
        names = [name for name in after if f"output_projectors.{modality}." in name]
        assert names
        assert all(not torch.equal(before[name], after[name]) for name in names)


def test_fault_3_rows_of_signal_tokens_are_kept_in_embeddings_and_head(
    runs: dict[int, Path],
) -> None:
    """There, those of the head are reset to their mean, so all signal tokens are as likely."""
    two, three = state(runs[2]), state(runs[3])
    tables = [name for name in two if "trainable_tokens_delta" in name]
    assert len(tables) == 2
    for name in tables:
        assert torch.equal(two[name], three[name])
        for one, other in itertools.combinations(three[name], 2):
            assert not torch.equal(one, other)
    llm = load_module(runs[3]).model.llm
    with torch.no_grad():
        logits = llm.logits(torch.randn(1, llm.hidden_dim))[0, llm.new_token_ids]
    assert len(logits.unique()) == 5


@pytest.mark.parametrize("kind", ["DDPMScheduler", "EulerDiscreteScheduler"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_fault_4_the_target_is_what_the_generator_predicts(
    tmp_path: Path, kind: str, prediction: str
) -> None:
    """There, it is always the noise, also of a model that predicts the velocity; and Euler's
    sampler mixes data and noise, which is no way that the model was trained.
    """
    save_stable_diffusion(tmp_path, prediction)
    file = tmp_path / "scheduler" / "scheduler_config.json"
    config = json.loads(file.read_text()) | {"_class_name": kind}
    file.write_text(json.dumps(config))
    generator = StableDiffusion(str(tmp_path))
    generator.build({DENOISER})
    latents = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    conditioning = Conditioning(torch.randn(3, 12, 32, generator=torch.Generator().manual_seed(1)))
    betas = np.linspace(config["beta_start"], config["beta_end"], config["num_train_timesteps"])
    kept = np.cumprod(1 - betas)
    expected = []
    for index, draws in enumerate(generators_of([7, 8, 9], 0)):
        level = int(torch.randint(0, 100, (1,), generator=draws))
        noise = torch.randn(4, 8, 8, generator=draws)
        a, s = kept[level] ** 0.5, (1 - kept[level]) ** 0.5
        noisy = (a * latents[index] + s * noise)[None].float()
        one = Conditioning(conditioning.tokens[index : index + 1])
        with torch.no_grad():
            predicted = generator.denoise(noisy, torch.tensor([level]), one)[0]
        target = noise if prediction == "epsilon" else a * noise - s * latents[index]
        expected.append(float((predicted - target).square().mean()))
    with torch.no_grad():
        found = generator.denoising_loss(latents, conditioning, [7, 8, 9])
    assert found.tolist() == pytest.approx(expected, rel=1e-4)


def test_fault_5_min_snr_weighs_each_target_by_its_own_level(tmp_path: Path) -> None:
    """There, the mean is taken over all targets before the weights come."""
    generator = StableDiffusion(save_stable_diffusion(tmp_path))
    generator.build({DENOISER})
    keys = [3, 4, 5, 6]
    draws = torch.Generator().manual_seed(0)
    latents = torch.randn(4, 4, 8, 8, generator=draws)
    conditioning = Conditioning(torch.randn(4, 12, 32, generator=draws))
    with torch.no_grad():
        plain = generator.denoising_loss(latents, conditioning, keys)
        weighed = generator.denoising_loss(latents, conditioning, keys, min_snr=0.5)
    kept = generator.noise_schedule().scheduler.alphas_cumprod
    levels = generator.noise_schedule().draw(generators_of(keys, 0))
    snr = kept[levels] / (1 - kept[levels])
    torch.testing.assert_close(weighed, plain * snr.clamp(max=0.5) / snr)
    assert len({round(float(x), 4) for x in weighed / plain}) > 2


def test_fault_5_every_loss_is_logged_by_itself(runs: dict[int, Path]) -> None:
    """There, the caption's loss holds the generator's as well, which was added to it in place."""
    found = curves(runs[2])
    losses = ["next_token", "align_image", "align_audio", "denoise"]
    for total, *parts in zip(
        found["train/loss"], *(found[f"train/{name}"] for name in losses), strict=True
    ):
        assert total == pytest.approx(sum(parts), rel=1e-4)


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_fault_6_any_tokenizer_gives_whole_runs_of_signal_tokens(tmp_path: Path, kind: str) -> None:
    """There, losses and answers count on one filler between signal tokens, as old sentencepiece
    puts it; and a long sample is cut, signal tokens and all, where here it is whole or left out.
    The golden run has a tokenizer of words.
    """
    save_llm(tmp_path / "llm", llama_config(vocab_size=420))
    tokenizer = train(kind, tmp_path)
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(tmp_path / "llm")
    generator = StableDiffusion(save_stable_diffusion(tmp_path / "sd"))
    model = AnyToAnyModel(
        {}, {}, HFCausalLM(str(tmp_path / "llm")), {"image": 4},
        {"image": lambda width, spec: QueryDecoder(width, spec, **SMALL)}, {"image": generator},
        {"image": {TEXT_ENCODER}},
    )  # fmt: skip
    model.build()
    processor = model.eval().processor()
    target = Media("image", picture("w1"), "png", caption="a red apple")

    def talk(words: str) -> Sample:
        answer = (Text("Yes: "), target, Text(" and "), target, Text("."))
        return Sample((Message("user", (Text(words),)), Message("assistant", answer)))

    encoded = processor.encode(talk("A red apple?"), None, SampleRef("s", 0, 0, 0))
    assert [slots.num_tokens for slots in encoded.planned.targets] == [4, 4]
    batch = collate([encoded], processor)
    output = model(batch)
    assert output.conditioning["image"].tokens.shape == (2, 12, 32)
    assert ConditionAlignment("image")(model, output, batch).count == 2

    prompts = Chat(model).batch([processor.prompt(talk("?").messages[:1])])
    first = processor.signal_ids["image"][0]
    vocabulary = model.llm.logits(torch.zeros(1, model.llm.hidden_dim)).shape[-1]
    others = [i for i in range(vocabulary) if i != first]
    ids = generate(model, prompts, max_new_tokens=8, suppress_tokens=others)
    assert ids.tolist() == [processor.signal_ids["image"] * 2]
    assert len(find_runs(ids, processor.signal_ids)) == 2

    long = processor.plan(talk("A red apple and two dogs. " * 30))
    assert len(long) > 100
    for slots in long.targets:
        place = slice(slots.start, slots.start + 4)
        assert long.input_ids[place].tolist() == processor.signal_ids["image"]


def test_fault_7_every_source_keeps_its_own_media(home: Path) -> None:
    """There, all sources share one object of options, and the last one's folders are everyone's.
    Here two records of one name hold other pictures.
    """
    draw = converter("TextToMedia", prompts={"image": [f"{DRAW} {{caption}}"]})
    talks = converter("Conversation")
    recipe = stage_2(home, data__sources=sources(home, pairs=draw, tones=talks, talks=talks))
    module, data = from_recipe(str(recipe))
    processor = module.model.processor()
    data.attach(processor)
    seen: dict[str, set[tuple[int, ...]]] = {}
    for batch in itertools.islice(data.train_dataloader(), 8):
        target = batch.targets["image"]
        for pixels, caption, place in zip(
            target.tensors["pixels"], target.captions, target.segments.tolist(), strict=True
        ):
            source = batch.samples[place].ref.source
            assert tuple(pixels[:, 0, 0].tolist()) == COLORS[caption]
            seen.setdefault(source, set()).add(COLORS[caption])
        heard = batch.targets["audio"]
        seen.setdefault("sound", set()).update(
            {batch.samples[place].ref.source for place in heard.segments.tolist()}
            if not heard.idle
            else ()
        )
    assert seen["pairs"] == seen["talks"] == set(COLORS.values())
    assert seen["sound"] == {"tones", "talks"}


def test_fault_8_every_part_has_its_own_rate(runs: dict[int, Path]) -> None:
    """There, the output projectors train with the rate of the input projectors, whatever is said
    of theirs.
    """
    saved = read_checkpoint(find(runs[3]))["optimizer_states"][0]["param_groups"]
    assert {group["name"]: group["initial_lr"] for group in saved} == {
        "input_projectors/Full": RATES["input_projectors"],
        "output_projectors/Full": RATES["output_projectors"],
        "llm/LoRA": RATES["llm"],
    }


def test_fault_8_what_a_recipe_says_is_read_or_refused(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """There, flags such as has_img_gen_loss are parsed, and nothing looks at them."""
    with pytest.raises(SystemExit):
        fit(stage_2(home), "--model.has_img_gen_loss=true")
    assert "has_img_gen_loss" in capsys.readouterr().err


def test_fault_8_queries_start_apart(home: Path) -> None:
    """There, they start at a standard deviation of 0: as one query."""
    module, _ = from_recipe(str(stage_2(home)))
    module.configure_model()
    queries = module.model.output_projectors["image"].queries
    assert len(queries.detach().unique(dim=0)) == 12


def test_fault_8_a_modality_of_another_name_is_refused(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """There, samples are grouped by whether they hold an 'image', and hold an 'input_image'."""
    wrong = {"next_token": NEXT_TOKEN, "align": objective("align", modality="input_image")}
    said = refused(capsys, stage_2(home, model__objectives=wrong))
    assert "objectives ['align'] are of modalities without a generator" in said
    assert "there are generators for ['audio', 'image']" in said
    with pytest.raises(ValueError, match=r"signal_tokens, output_projectors and generators are"):
        from_recipe(str(stage_2(home, model__signal_tokens={"input_image": 3, "audio": 2})))
