"""``mmfusion train-generator``: a small generator from nothing, on media with captions."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import ArgumentError, ArgumentParser
from safetensors import SafetensorError
from torch import Tensor
from tqdm import tqdm

from mmfusion.data.source import Source
from mmfusion.data.whole_file import alone, write_whole
from mmfusion.models.generators.base import DENOISER, TEXT_ENCODER, VAE
from mmfusion.models.generators.trainable import TrainablePipeline
from mmfusion.models.generators.untrained import check_untrained, write_untrained
from mmfusion.paths import expand
from mmfusion.processing.base import MediaProcessor
from mmfusion.training.generator_fits import (
    AutoencoderFit,
    DenoiserFit,
    Effort,
    GeneratorFit,
    moments,
    run_fit,
)
from mmfusion.types import DataError, Media, MediaTensors

STATE = "training.json"
VERSION = 1
"""To be raised where the same recipe makes another generator: what is there is made anew then."""
MAX_BAD = 0.05
"""Most samples that may be unusable, as data.max_bad_fraction has it."""
MOST_LISTED = 20


def train_generator(
    recipe: str, out: str, overwrite: bool = False, overrides: list[str] | None = None
) -> None:
    """Train a small text-to-media generator from nothing, as the quickstart's are.

    Run the same line again after an interruption: what is trained is not trained again.

    Args:
        recipe: YAML file with the arguments of mmfusion.tools.train_generator.SmallGenerator.
        out: folder of the pipeline; appears when it is whole.
        overwrite: replace what another recipe made there.
        overrides: recipe values, as ``--denoiser.steps=100``.
    """
    made = read_recipe(recipe, overrides or ())
    target = Path(expand(out)).resolve()  # what a link names is replaced, not the link
    if not target.name:
        raise ValueError(f"the output folder is {out}; expected a folder that may be replaced.")
    with alone(str(target.with_name(f".{target.name}.lock")), f"training {target}"):
        _train(made, target, overwrite)


def _train(made: SmallGenerator, target: Path, overwrite: bool) -> None:
    """Aside, and then into its place."""
    if target.exists():
        if _state(target).get("origin") == made.origin:
            print(f"{target} is there already.")
            return
        if not (target / STATE).is_file():
            raise ValueError(
                f"{target} is there and holds no {STATE}: no generator was trained there, so it is "
                "not replaced; choose another folder."
            )
        if not overwrite:
            raise ValueError(
                f"{target} is there, and not made by this recipe; choose another folder, or "
                "replace it with --overwrite."
            )
    aside = target.with_name(f".{target.name}.partial")
    made.train(aside)
    if target.exists():
        shutil.rmtree(target)
    os.replace(aside, target)
    print(f"{target} is trained.")


def read_recipe(recipe: str, overrides: Sequence[str] = ()) -> SmallGenerator:
    """The recipe of a small generator."""
    parser = ArgumentParser(exit_on_error=False, allow_abbrev=False)
    parser.add_class_arguments(SmallGenerator)
    parser.add_argument("--config", action="config")
    try:
        parsed = parser.parse_args([f"--config={expand(recipe)}", *overrides])
    except ArgumentError as error:
        raise ValueError(f"{recipe}: {error}") from None
    parsed.pop("config", None)
    generator = SmallGenerator(**vars(parser.instantiate(parsed)))
    generator.recipe = _written([f"--config={recipe}", *overrides])
    return generator


def _written(words: Sequence[str]) -> str:
    """What is said on a command line and in the files that it names."""
    found: list[Any] = []
    for word in words:
        name, _, value = word.partition("=")
        is_file = name == "--config" and value
        found.append(yaml.safe_load(Path(expand(value)).read_text()) if is_file else word)
    return json.dumps(found)


class SmallGenerator:
    """A generator that is to be trained, and on what.

    Args:
        generator: family of the generator; its path is filled in.
        pipeline: class of the pipeline in diffusers, which can load the folder as well.
        components: for each folder of the pipeline its class and configuration.
        source: conversations whose answers hold the media, with captions.
        autoencoder: how long the VAE is trained.
        denoiser: how long the denoiser and the text encoder are.
        words: vocabulary of the text encoder.
        divergence: weight of the divergence of the VAE's latents from a normal distribution.
        condition_noise: standard deviation of noise on the text encodings that the denoiser learns
            from: it then bears conditioning that is near them, but not quite they.
        seed: of weights, order and noise.

    Attributes:
        recipe: all of the above as they were written.
    """

    recipe = ""

    def __init__(
        self,
        generator: Callable[[str], TrainablePipeline],
        pipeline: str,
        components: dict[str, dict[str, Any]],
        source: Source,
        autoencoder: Effort,
        denoiser: Effort,
        words: int = 512,
        divergence: float = 3e-5,
        condition_noise: float = 0.0,
        seed: int = 0,
    ) -> None:
        check_untrained(pipeline, components, words)
        for name, value in (("condition_noise", condition_noise), ("divergence", divergence)):
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} is {value}; expected 0 or more, finite.")
        if not 0 <= seed < 2**32:
            raise ValueError(f"seed is {seed}; expected 0 to 2**32 - 1, as numpy's seeds are.")
        self.divergence, self.condition_noise = divergence, condition_noise
        self.make, self.pipeline, self.components = generator, pipeline, components
        self.source, self.words, self.seed = source, words, seed
        self.autoencoder, self.denoiser = autoencoder, denoiser

    @property
    def origin(self) -> str:
        """Changes with what the recipe says and with its data."""
        named = f"{VERSION} {self.recipe} {self.source.shards.dataset_id}"
        return hashlib.sha256(named.encode()).hexdigest()

    def train(self, folder: Path) -> None:
        """Fill a folder, or go on where it was left."""
        if _state(folder).get("origin") != self.origin:
            shutil.rmtree(folder, ignore_errors=True)
        examples = Examples(self.source)
        if not folder.exists():
            write_untrained(folder, self.pipeline, self.components, examples.captions, self.words)
            _save_state(folder, self.origin, [])
        parts = Parts(self.make, folder, self.origin, self.seed)
        generator = parts.built(VAE)
        tensors = examples.decoded(generator.target_processor())
        if "vae" not in parts.done:
            parts.train(AutoencoderFit(self.autoencoder, generator, self.divergence), tensors)
        generator = parts.built(VAE, DENOISER, TEXT_ENCODER)  # its latents have their scale now
        if generator.components["denoiser"].folder not in parts.done:
            mean, std = moments(generator, tensors)
            items = {"mean": mean, "std": std, "index": torch.arange(len(mean))}
            fit = DenoiserFit(
                self.denoiser, generator, examples.captions, condition_noise=self.condition_noise
            )
            parts.train(fit, items)


class Parts:
    """A pipeline's folder while its components are trained, and which of them are.

    Args:
        make: the family.
        folder: of the pipeline.
        origin: of the recipe.
        seed: of new weights.
    """

    def __init__(
        self, make: Callable[[str], TrainablePipeline], folder: Path, origin: str, seed: int
    ) -> None:
        self.make, self.folder, self.origin, self.seed = make, folder, origin, seed

    @property
    def done(self) -> list[str]:
        """Components that are trained."""
        return list(_state(self.folder)["done"])

    def built(self, *parts: str) -> TrainablePipeline:
        """The generator with some parts: those that are trained from their files, others new."""
        generator = self.make(str(self.folder))
        torch.manual_seed(self.seed)
        kinds = generator.components
        trained = {kinds[name].part for name in kinds if kinds[name].folder in self.done}
        generator.build(trained & set(parts))
        generator.build(set(parts) - trained, pretrained=False)
        return generator.requires_grad_(False)

    def train(self, fit: GeneratorFit, items: Mapping[str, Tensor]) -> None:
        """Run a fit on items, and keep what it trained, in half precision."""
        names = " and ".join(fit.trained)
        try:
            run_fit(fit, items, self.folder / "losses", self.seed)
        except KeyboardInterrupt:
            print(f"\nThe same line again begins {names} anew; done before: {self.done or None}.")
            raise
        fit.finish(items)
        for name, module in fit.trained.items():
            kept = copy.deepcopy(module).half()
            _refuse_not_finite(kept, name)
            try:
                kept.save_pretrained(self.folder / name)
            except SafetensorError as error:  # of a full disk, say
                raise OSError(f"{self.folder / name} cannot be written: {error}") from error
        _save_state(self.folder, self.origin, [*self.done, *fit.trained])


def _refuse_not_finite(module: Any, name: str) -> None:
    """Before a component is kept.

    Raises:
        FloatingPointError: where it holds what is no number, or is none in half precision.
    """
    weights = module.state_dict().items()
    if odd := [key for key, tensor in weights if not tensor.isfinite().all()]:
        raise FloatingPointError(
            f"{len(odd)} trained tensors of {name} are not finite in half precision ({odd[0]}, "
            "...), so it is not kept. Lower its lr."
        )


class Examples:
    """The media of a source's answers, each with a caption. Samples that cannot be used are left
    out, and named.

    Args:
        source: conversations.

    Attributes:
        media: of the samples that can be used.
        bad: ``shard key: reason`` of the others.

    Raises:
        ValueError: where too many are unusable, or none has media.
    """

    def __init__(self, source: Source) -> None:
        self.media: list[Media] = []
        self.bad: list[str] = []
        self._places: list[str] = []
        for index in range(len(source)):
            try:
                sample = source[index]
                if not all(media.words for media in sample.targets):
                    raise DataError("no_caption", "no caption.")
            except DataError as error:
                self.bad.append(f"{' '.join(source.shards.where(index))}: {error}")
                continue
            self.media += sample.targets
            self._places += [f"{sample.shard} {sample.key}"] * len(sample.targets)
        self._check()

    @property
    def captions(self) -> list[str]:
        """Of the media."""
        return [media.words for media in self.media]

    def decoded(self, processor: MediaProcessor) -> MediaTensors:
        """All media together, less those that cannot be decoded.

        Args:
            processor: of the generator's targets.
        """
        found, kept = [], []
        for media, place in zip(tqdm(self.media, "decode"), self._places, strict=True):
            try:
                found.append(processor(media))
                kept.append((media, place))
            except DataError as error:
                self.bad.append(f"{place}: {error}")
        self.media, self._places = [media for media, _ in kept], [place for _, place in kept]
        self._check()
        if self.bad:
            print(f"left out, for they cannot be used:\n{self._listed()}")
        return processor.collate(found)

    def _check(self) -> None:
        count = len(self.bad) + len(self.media)
        if len(self.bad) > MAX_BAD * count:
            raise ValueError(
                f"{len(self.bad)} of {count} samples are unusable, at most {MAX_BAD:.0%} may be:\n"
                + self._listed()
            )
        if not self.media:
            raise ValueError(
                "no sample of the source has media in its answer; nothing to train on."
            )

    def _listed(self) -> str:
        more = len(self.bad) - MOST_LISTED
        return "\n".join(self.bad[:MOST_LISTED] + ([f"and {more} more"] if more > 0 else []))


def _state(folder: Path) -> dict[str, Any]:
    """What was made there by which recipe; empty where nothing was.

    Raises:
        ValueError: for a file that does not say so.
    """
    file = folder / STATE
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_bytes())
        return {"origin": str(found["origin"]), "done": [str(name) for name in found["done"]]}
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{file} is damaged ({error!r}); expected the origin of the generator and what of it "
            f"is done. Remove {folder} to train it anew."
        ) from error


def _save_state(folder: Path, origin: str, done: Sequence[str]) -> None:
    with write_whole(str(folder / STATE)) as file:
        file.write(json.dumps({"origin": origin, "done": list(done)}).encode())
