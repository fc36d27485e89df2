"""What holds of every family of generators, on tiny random pipelines that go through disk and the
real loading code.
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import PixArtSigmaPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mmfusion.models.generators.base import DENOISER, PARTS, TEXT_ENCODER, VAE, Sampling
from mmfusion.models.generators.noise import generators_of
from mmfusion.models.generators.stable_audio import StableAudio
from mmfusion.models.generators.stable_diffusion_3 import StableDiffusion3
from mmfusion.models.generators.stored import MASK, TOKENS, with_moments, with_text
from mmfusion.models.output_projectors.query_decoder import QueryDecoder
from mmfusion.objectives.condition_alignment import ConditionAlignment
from mmfusion.objectives.denoising import Denoising
from mmfusion.processing.stored import item_file, read_header, read_item
from mmfusion.training.stored_shapes import misfit, shapes_of
from mmfusion.tuning import Full, LoRA, Policy, widen
from mmfusion.types import Conditioning, MediaTensors, TargetBatch
from tests.models.generators.families import (
    Family,
    PixArtFamily,
    StableDiffusion3Family,
    StableDiffusionFamily,
    StableDiffusionXLFamily,
    TextToVideoSDFamily,
    WanFamily,
)
from tests.models.generators.sound_families import (
    AudioLDM2Family,
    AudioLDMFamily,
    StableAudioFamily,
)

FAMILIES: dict[str, Family] = {
    "sd": StableDiffusionFamily(),
    "sdxl": StableDiffusionXLFamily(),
    "sd3": StableDiffusion3Family(),
    "sd3-without-t5": StableDiffusion3Family(t5=False),
    "pixart-alpha": PixArtFamily(sample_size=128),
    "pixart-sigma": PixArtFamily(PixArtSigmaPipeline),
    "text-to-video-sd": TextToVideoSDFamily(),
    "wan": WanFamily(),
    "audioldm": AudioLDMFamily(),
    "audioldm2": AudioLDM2Family(),
    "stable-audio": StableAudioFamily(),
}
VARIANTS = {"sd3-without-t5", "pixart-sigma"}
"""Of a family that is tested in another form as well; only with the slow tests."""
KEYS = [5, 123456789]


@dataclass
class Case:
    """A family, its folder and its generator, built and frozen."""

    family: Family
    path: str
    generator: Any

    def targets(self) -> dict[str, Tensor]:
        processor = self.generator.target_processor()
        return processor.collate([processor(self.family.media(i)) for i in range(2)])

    def latents(self) -> Tensor:
        return self.generator.encode_media(self.targets(), generators_of(KEYS, 1))

    def conditioning(self) -> Conditioning:
        """Of two items, as an output projector makes it: without a mask."""
        spec, draw = self.generator.spec, torch.Generator().manual_seed(0)
        tokens = torch.randn(2, spec.tokens, spec.dim, generator=draw)
        pooled = torch.randn(2, spec.pooled_dim, generator=draw) if spec.pooled_dim else None
        return Conditioning(tokens, pooled)


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(name, marks=[pytest.mark.slow] if name in VARIANTS else [])
        for name in FAMILIES
    ],
)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    family = FAMILIES[request.param]
    path = family.save(tmp_path_factory.mktemp(request.param) / "pipeline")
    generator = family.make(path)
    generator.build(PARTS)
    return Case(family, path, generator.requires_grad_(False).eval())


def item(given: Conditioning, m: int) -> Conditioning:
    """One of a batch."""
    parts = (given.tokens, given.pooled, given.mask)
    return Conditioning(*(None if part is None else part[m : m + 1] for part in parts))


def test_it_tells_before_it_is_built_what_can_be_paired_sampled_and_tuned(case: Case) -> None:
    fresh = case.family.make(case.path)
    fresh.check_paired(fresh.spec)
    fresh.check(Sampling(steps=3))
    named = fresh.modules_by_name()
    assert set(named.values()) <= PARTS
    built = {name for name, _ in case.generator.named_children()}
    assert built == set(named)


def test_the_text_encoding_is_that_of_the_pipeline(case: Case) -> None:
    captions = ["a b", "c d e"]
    spec, found = case.generator.spec, case.generator.encode_text(captions)
    assert found.tokens.shape == (2, spec.tokens, spec.dim)
    assert (0 if found.pooled is None else found.pooled.shape[1]) == spec.pooled_dim
    ours, none = case.family.encoded(case.path, captions)
    assert (found.mask is None) == (ours.mask is None)
    for ours_or_none, given in ((ours, found), (none, case.generator.encode_text(["", ""]))):
        for name in ("tokens", "pooled", "mask"):
            torch.testing.assert_close(getattr(given, name), getattr(ours_or_none, name))


def test_latents_are_those_of_one_target_after_the_other(case: Case) -> None:
    targets, found = case.targets(), case.latents()
    for m, key in enumerate(KEYS):
        (draw,) = generators_of([key], 1)
        one = {name: values[m : m + 1] for name, values in targets.items()}
        expected = case.family.latents(case.generator, one, draw)
        torch.testing.assert_close(found[m : m + 1], expected, rtol=1e-4, atol=1e-5)


def test_the_denoising_loss_is_that_of_the_documentation(case: Case) -> None:
    conditioning, latents = case.generator.encode_text(["a", "b c"]), case.latents()
    found = case.generator.denoising_loss(latents, conditioning, KEYS)
    for m, key in enumerate(KEYS):
        (draw,) = generators_of([key], 0)
        x, given = latents[m : m + 1], item(conditioning, m)
        expected = case.family.loss(case.generator, x, given, draw)
        torch.testing.assert_close(found[m], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("distance", ["mse", "cosine"])
def test_the_alignment_loss_is_a_mean_over_valid_tokens(case: Case, distance: Any) -> None:
    ours, wanted = case.conditioning(), case.generator.encode_text(["a", "b c"])
    found = ConditionAlignment(case.generator.modality, distance).distances(ours, wanted)

    def apart(a: Tensor, b: Tensor) -> Tensor:
        cosine = (a @ b) / (a.norm() * b.norm()).clamp(min=1e-8)
        return 1 - cosine if distance == "cosine" else sum((a - b) ** 2) / len(a)

    for m in range(2):
        valid = range(len(wanted.tokens[m])) if wanted.mask is None else wanted.mask[m].nonzero()
        each = [apart(ours.tokens[m, int(c)], wanted.tokens[m, int(c)]) for c in valid]
        expected = sum(each) / len(each)
        if wanted.pooled is not None:
            expected = expected + apart(ours.pooled[m], wanted.pooled[m])
        torch.testing.assert_close(found[m], expected)


def test_gradients_reach_the_conditioning_and_nothing_frozen(case: Case) -> None:
    given = case.conditioning()
    leaves = [part.requires_grad_() for part in (given.tokens, given.pooled) if part is not None]
    case.generator.denoising_loss(case.latents(), given, KEYS).sum().backward()
    for leaf in leaves:
        assert leaf.grad.flatten(1).abs().sum(1).gt(0).all()
    assert all(p.grad is None for p in case.generator.parameters())


def test_noise_follows_from_the_key_alone(case: Case) -> None:
    given, latents = case.conditioning(), case.latents()
    both = case.generator.denoising_loss(latents, given, KEYS)
    alone = case.generator.denoising_loss(latents[1:], item(given, 1), KEYS[1:])
    torch.testing.assert_close(both[1:], alone)
    other = case.generator.denoising_loss(latents, given, [KEYS[0], 7])
    torch.testing.assert_close(other[0], both[0])
    assert other[1] != both[1]


@pytest.mark.parametrize("loss", ["alignment", "denoising"])
def test_training_steps_through_a_projector_lower_the_loss(case: Case, loss: str) -> None:
    torch.manual_seed(0)
    generator, latents = case.generator, case.latents()
    wanted = generator.encode_text(["a", "b c"])
    projector = QueryDecoder(
        16, generator.spec, dim=16, encoder_layers=1, decoder_layers=1, heads=2, ffn_dim=24
    )
    states = torch.randn(2, 3, 16)
    optimizer = torch.optim.Adam(projector.parameters(), 3e-3)
    losses = []
    for _ in range(4):
        found = projector({-1: states}, torch.zeros_like(states))
        each = (
            ConditionAlignment(generator.modality).distances(found, wanted)
            if loss == "alignment"
            else generator.denoising_loss(latents, found, KEYS)
        )
        losses.append(each.mean())
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[1] < losses[0]


def test_adapters_on_the_denoiser_train(case: Case) -> None:
    generator = case.family.make(case.path)
    generator.build({DENOISER})
    generator.requires_grad_(False).eval()
    adapters = LoRA(1e-3, r=2).attach("denoiser", generator.denoiser)
    generator.denoising_loss(case.latents(), case.conditioning(), KEYS).sum().backward()
    grads = {name: p.grad for name, p in adapters.items() if "lora_B" in name}
    assert all(grad is not None for grad in grads.values())
    assert any(grad.abs().sum() > 0 for grad in grads.values())


@pytest.mark.slow
@pytest.mark.parametrize("kind", [Full, LoRA])
def test_a_denoiser_in_half_precision_trains_and_is_sampled(case: Case, kind: type[Policy]) -> None:
    """What trains is kept in fp32; the other weights and the VAE are not."""
    half = case.family.make(case.path, dtype="bfloat16")
    half.build(PARTS)
    half.requires_grad_(False).eval()
    frozen = half.denoising_loss(case.latents(), case.conditioning(), KEYS)
    trained = kind(1e-3).attach("denoiser", half.denoiser)
    for parameter in trained.values():
        parameter.requires_grad_()
    widen(trained.values())
    loss = half.denoising_loss(case.latents(), case.conditioning(), KEYS)
    torch.testing.assert_close(loss, frozen, rtol=0.05, atol=0.02)
    loss.sum().backward()
    assert {p.grad.dtype for p in trained.values() if p.grad is not None} == {torch.float32}
    made = half.sample(case.conditioning(), half.encode_text([""]), Sampling(steps=2))
    assert tuple(case.family.decoded(made[1]).shape) == case.family.made_shape


def test_sampling_runs_from_our_conditioning(case: Case) -> None:
    generator, given, calls = case.generator, case.conditioning(), []
    empty = generator.encode_text([""])
    sampling = Sampling(steps=3, guidance_scale=4.0, seed=7)
    handle = generator.denoiser.register_forward_hook(lambda *_: calls.append(1))
    made = generator.sample(given, empty, sampling)
    assert len(calls) == 3 * case.family.passes  # for both items at once
    calls.clear()
    generator.sample(given, empty, Sampling(steps=2, guidance_scale=1.0))
    assert len(calls) == 2
    handle.remove()
    assert [media.modality for media in made] == [generator.modality] * 2
    shown = [case.family.decoded(media) for media in made]
    assert [tuple(one.shape) for one in shown] == [case.family.made_shape] * 2
    again = generator.sample(given, empty, sampling)
    assert [media.data for media in again] == [media.data for media in made]
    (second,) = generator.sample(
        item(given, 1), empty, Sampling(steps=3, guidance_scale=4.0, seed=8)
    )
    assert (case.family.decoded(second) - shown[1]).abs().mean() < 0.5
    (third,) = generator.sample(
        item(given, 0), empty, Sampling(steps=3, guidance_scale=4.0, seed=8)
    )
    other = case.family.decoded(third)
    assert (other - shown[0]).abs().mean() > 2  # of the same conditioning, by another seed
    assert (other - shown[1]).abs().mean() > 0.1  # by the same seed, of another conditioning


def test_what_is_needed_before_building(case: Case) -> None:
    fresh = case.family.make(case.path)
    assert not list(fresh.parameters())
    assert fresh.spec == case.generator.spec
    fresh.noise_schedule()
    processor = fresh.target_processor()
    target, idle = processor(case.family.media(0)), processor.idle()
    assert {k: (v.shape, v.dtype) for k, v in target.items()} == {
        k: (v.shape, v.dtype) for k, v in idle.items()
    }


def test_half_precision_gives_nearly_the_same(case: Case) -> None:
    half = case.family.make(case.path, dtype="bfloat16")
    half.build(PARTS)
    half.requires_grad_(False).eval()
    text, empty = half.encode_text(["a", "b c"]), half.encode_text([""])
    assert text.tokens.dtype == torch.bfloat16
    given = case.conditioning()
    latents = half.encode_media(case.targets(), generators_of(KEYS, 1))
    found = half.denoising_loss(latents, given, KEYS)
    assert found.dtype == torch.float32
    expected = case.generator.denoising_loss(case.latents(), given, KEYS)
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.02)
    made = half.sample(given, empty, Sampling(steps=2, guidance_scale=4.0))
    assert tuple(case.family.decoded(made[0]).shape) == case.family.made_shape


def test_sizes_can_be_had_without_values(case: Case) -> None:
    fresh = case.family.make(case.path)
    with torch.device("meta"):
        fresh.build(PARTS, pretrained=False)
    ours, theirs = dict(fresh.named_parameters()), dict(case.generator.named_parameters())
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}
    assert all(parameter.is_meta for parameter in ours.values())


def test_shapes_of_what_may_be_stored_are_known_before_building(case: Case) -> None:
    fresh, given = case.family.make(case.path), case.generator.encode_text(["a"])
    text = shapes_of(fresh, TEXT_ENCODER)
    found = {name: ("F32", tuple(t.shape[1:])) for name, t in with_text(given).items()}
    found |= {MASK: ("BOOL", found[MASK][1])} if MASK in found else {}
    assert misfit(found, text) is None
    assert misfit(found | {TOKENS: ("F32", (1, 1))}, text) is not None
    moments = with_moments(case.generator.moments(case.targets()))
    assert shapes_of(fresh, VAE) == {name: tuple(t.shape[1:]) for name, t in moments.items()}
    assert not list(fresh.parameters())


def test_what_was_stored_gives_the_losses_of_live_parts(case: Case) -> None:
    """Item by item through files, masks and pooled vectors too; nothing but the denoiser is built.
    Also where some are replaced by the encoding of "".
    """
    captions = ["a", "b c"]

    def target(tensors: MediaTensors) -> TargetBatch:
        slots, keys = torch.zeros(2, 3, dtype=torch.int64), torch.tensor([2, 5])
        return TargetBatch(tensors, slots, torch.arange(2), keys, captions)

    def losses(generator: Any, batch: TargetBatch) -> Tensor:
        given, texts = case.conditioning(), generator.encode_captions(batch)
        latents = generator.encode_media(batch.tensors, generators_of(KEYS, 1))
        dropping = Denoising(generator.modality, drop_condition=0.5)
        dropped = dropping._dropped(given, generator, batch)
        return torch.stack([
            ConditionAlignment(generator.modality).distances(given, texts),
            generator.denoising_loss(latents, texts, KEYS),
            generator.denoising_loss(latents, dropped, KEYS),
        ])  # fmt: skip

    live, targets = case.generator, case.targets()
    items = []
    for m, caption in enumerate(captions):
        one = {name: values[m : m + 1] for name, values in targets.items()}
        made = with_moments(live.moments(one)) | with_text(live.encode_text([caption]))
        file = item_file({name: tensor[0] for name, tensor in made.items()}, {})
        items.append(read_item(file, read_header(file)[0]))
    fresh = case.family.make(case.path)
    fresh.build({DENOISER})
    fresh.requires_grad_(False).eval()
    fresh.stored_empty = live.encode_empty()
    stored = target({name: torch.stack([item[name] for item in items]) for name in items[0]})
    built = {name for name in fresh.components if isinstance(getattr(fresh, name), nn.Module)}
    found, expected = losses(fresh, stored), losses(live, target(targets))
    assert {fresh.components[name].part for name in built} == {DENOISER}
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_dropped_conditioning_is_as_good_as_the_encoding_of_no_words(case: Case) -> None:
    """Also where ours has fewer tokens than it, or it has a mask."""
    generator, given, latents = case.generator, case.conditioning(), case.latents()
    if not isinstance(generator, (StableDiffusion3, StableAudio)):
        given.tokens = given.tokens[:, :5]
    empty = generator.encode_text(["", ""])
    target = TargetBatch({}, torch.zeros(2, 3), torch.arange(2), torch.tensor([2, 5]), ["", ""])
    objective = Denoising(generator.modality, drop_condition=0.5)
    found = generator.denoising_loss(latents, objective._dropped(given, generator, target), KEYS)
    ours, none = (generator.denoising_loss(latents, one, KEYS) for one in (given, empty))
    torch.testing.assert_close(found, torch.stack([ours[0], none[1]]), rtol=1e-4, atol=1e-6)


def test_only_the_parts_that_are_needed_are_loaded(case: Case) -> None:
    for part in (TEXT_ENCODER, VAE, DENOISER):
        fresh = case.family.make(case.path)
        fresh.build({part})
        for name, component in fresh.components.items():
            loaded = isinstance(getattr(fresh, name), nn.Module)
            assert loaded == (component.part == part and name in fresh.configs)
        assert isinstance(getattr(fresh, part), nn.Module)


def test_without_pretrained_weights_the_parts_are_random(case: Case) -> None:
    fresh = case.family.make(case.path)
    fresh.build(PARTS, pretrained=False)
    ours, theirs = fresh.state_dict(), case.generator.state_dict()
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}
    assert any(not torch.equal(ours[key], theirs[key]) for key in ours)


def test_a_missing_weight_is_refused_by_name(case: Case, tmp_path: Path) -> None:
    generator = case.family.make(case.path)
    for name in set(generator.components) & set(generator.configs):
        component = generator.components[name]
        folder = Path(shutil.copytree(case.path, tmp_path / name)) / component.folder
        (file,) = folder.glob("*.safetensors")
        weights = load_file(file)
        lost = max(weights)
        del weights[lost]
        save_file(weights, file, {"format": "pt"})
        with pytest.raises(ValueError, match=re.escape(".".join(lost.split(".")[-2:]))):
            case.family.make(str(tmp_path / name)).build({component.part})


def change(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def without_weights(case: Case, folder: Path) -> Path:
    """A copy that nothing could be loaded from."""
    return Path(shutil.copytree(case.path, folder, ignore=shutil.ignore_patterns("*.safetensors")))


def test_widths_that_differ_are_refused_before_anything_loads(case: Case, tmp_path: Path) -> None:
    for number, (folder, values, message) in enumerate(case.family.misfits):
        path = without_weights(case, tmp_path / str(number))
        if not (path / folder).is_dir():
            continue
        change(path / folder / "config.json", **values)
        with pytest.raises(ValueError, match=f"the denoiser of .* takes .*{message}"):
            case.family.make(str(path))


def test_other_pipelines_and_schedulers_are_refused(case: Case, tmp_path: Path) -> None:
    path = without_weights(case, tmp_path / "pipeline")
    scheduler = path / "scheduler" / "scheduler_config.json"
    given = scheduler.read_text()
    change(scheduler, _class_name="EDMEulerScheduler", use_flow_sigmas=False)
    with pytest.raises(ValueError, match="the scheduler is EDMEulerScheduler"):
        case.family.make(str(path))
    change(scheduler, _class_name="DDIMScheduler", prediction_type="x")
    with pytest.raises(ValueError, match="prediction_type is 'x'"):
        case.family.make(str(path))
    scheduler.write_text(given)
    (path / "vae" / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no vae/config\.json"):
        case.family.make(str(path))
    change(path / "model_index.json", vae=["diffusers", "AutoencoderTiny"])
    with pytest.raises(ValueError, match=r"vae of .* is AutoencoderTiny, in a .*Pipeline"):
        case.family.make(str(path))
    change(path / "model_index.json", vae=[None, None])
    with pytest.raises(ValueError, match=r"vae of .* is None"):
        case.family.make(str(path))
    with pytest.raises(FileNotFoundError, match="no folder"):
        case.family.make(f"{path}/absent")
