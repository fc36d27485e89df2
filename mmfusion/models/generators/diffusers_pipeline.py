"""What all generators from diffusers have in common: the folder of a pipeline, whose components are
read, built and loaded one by one.

``model_index.json`` names the components of a pipeline and their classes; each has a folder with
its configuration, and its weights in safetensors. A family says which of them it uses (its
``components``), checks that they fit on the configurations alone, and runs them; the denoiser is
always the attribute ``denoiser``, where tuning policies find it.

M items, C tokens of the conditioning.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

from mmfusion.models.generators.base import TEXT_ENCODER, Generator, Sampling
from mmfusion.models.generators.noise import NoiseSchedule, noise_schedule
from mmfusion.models.generators.sampler_steps import check_steps
from mmfusion.models.loading import (
    checked_path,
    fetching,
    reading,
    refuse_missing,
    refuse_not_finite,
)
from mmfusion.types import Conditioning, Media

INDEX = "model_index.json"
DType = Literal["float32", "bfloat16", "float16"]
RANGES = {
    ("scheduler", "num_train_timesteps"): (1, 100_000),
    ("vae", "scaling_factor"): (1e-6, 1e6),
}
"""Of configurations that come from strangers: with others the loss would be of nothing, or not
end.
"""


@dataclass(frozen=True)
class Component:
    """A component of a pipeline that has weights.

    Attributes:
        part: which of the generator's ``PARTS`` it belongs to; they may share one.
        folder: its folder, and its argument of the pipeline's class.
        kind: the class that loads it.
        aliases: what else ``model_index.json`` may call that class.
        optional: pipelines may come without it.
    """

    part: str
    folder: str
    kind: Any
    aliases: tuple[str, ...] = ()
    optional: bool = False


class DiffusersPipeline(Generator):
    """A frozen pipeline. A family gives ``components`` and what it does with them.

    Args:
        path: folder of a diffusers pipeline (``model_index.json``), or a hub id.
        dtype: of the weights.
        revision: commit, tag or branch of a hub id.

    Attributes:
        components: what the family uses, by the attribute that holds it once it is built.
        configs: their configurations by the same names, without those that are absent, and that of
            the ``scheduler``.
    """

    components: ClassVar[Mapping[str, Component]]
    text_encoder: Any
    vae: Any
    denoiser: Any

    def __init__(self, path: str, dtype: DType = "float32", revision: str | None = None) -> None:
        super().__init__()
        self.path = checked_path(path, INDEX)
        self.revision, self.dtype = revision, getattr(torch, dtype)
        self.configs = self._configs()
        for name in self.components:
            setattr(self, name, None)
        self._tokenizers: dict[str, Any] = {}
        self.noise_schedule()

    @cached_property
    def index(self) -> dict[str, Any]:
        """The pipeline's ``model_index.json``."""
        return pipeline_config(self.path, "", INDEX, self.revision)

    def _configs(self) -> dict[str, dict[str, Any]]:
        """Read only once it is clear that the pipeline has what the family takes.

        Raises:
            ValueError: for a component that is absent or of another class.
        """
        present = {}
        for name, component in self.components.items():
            entry = self.index.get(component.folder) or (None, None)
            if not isinstance(entry, list | tuple) or len(entry) != 2:
                raise ValueError(
                    f"{self.path}/{INDEX}: {component.folder} is {entry!r}; expected the library "
                    "and the class of the component."
                )
            found = entry[1]
            if found is None and component.optional:
                continue
            if found not in (component.kind.__name__, *component.aliases):
                raise ValueError(
                    f"{component.folder} of {self.path} is {found}, in a "
                    f"{self.index.get('_class_name')}; {type(self).__name__} takes "
                    f"{component.kind.__name__}. Choose the generator of this pipeline."
                )
            present[name] = (component.folder, "config.json")
        present["scheduler"] = ("scheduler", "scheduler_config.json")
        configs = {
            name: pipeline_config(self.path, folder, file, self.revision)
            for name, (folder, file) in present.items()
        }
        for (name, key), (least, most) in RANGES.items():
            value = configs.get(name, {}).get(key, least)
            if not isinstance(value, int | float) or not least <= value <= most:
                raise ValueError(
                    f"{self.path}: {key} of its {name} is {value!r}; expected {least:g} to "
                    f"{most:g}. Is it the folder of a diffusers pipeline, as it was published?"
                )
        return configs

    def check_width(self, takes: int, gives: int, what: str = "conditioning") -> None:
        """Of what text encoders, or for latents the VAE, hand to the denoiser.

        Raises:
            ValueError: where the two differ.
        """
        if takes != gives:
            giver = "VAE" if what == "latents" else "text encoder"
            raise ValueError(
                f"the denoiser of {self.path} takes {what} of width {takes}, its {giver} gives "
                f"{gives}; expected the same."
            )

    def noise_schedule(self) -> NoiseSchedule:
        return noise_schedule(self.configs["scheduler"])

    def modules_by_name(self) -> Mapping[str, str]:
        return {name: one.part for name, one in self.components.items() if name in self.configs}

    def build(self, parts: Collection[str], pretrained: bool = True) -> None:
        for name, component in self.components.items():
            wanted = component.part in parts and name in self.configs
            if wanted and getattr(self, name) is None:
                setattr(self, name, self._load(name, component, pretrained))
        self.train(self.training)

    def _load(self, name: str, component: Component, pretrained: bool) -> Any:
        kind = component.kind
        if not pretrained:
            config = dict(self.configs[name])
            made = (
                kind(kind.config_class(**config))
                if hasattr(kind, "config_class")
                else kind.from_config(config)
            )
            # diffusers' own `to` warns of modules to keep in fp32, also where there are none
            return made if self.dtype == torch.float32 else nn.Module.to(made, self.dtype)
        with reading(Path(self.path) / component.folder):
            model, info = kind.from_pretrained(
                self.path,
                subfolder=component.folder,
                revision=self.revision,
                torch_dtype=self.dtype,
                use_safetensors=True,
                output_loading_info=True,
            )
        refuse_missing(info, f"{self.path}/{component.folder}", kind.__name__)
        refuse_not_finite(model, f"{self.path}/{component.folder}")
        return model

    def scaled(self, latents: Tensor) -> Tensor:
        """``(z - shift_factor) * scaling_factor`` of the VAE's configuration. The oldest pipelines
        do not tell it; then it is AutoencoderKL's default.
        """
        config = self.configs["vae"]
        shift = config.get("shift_factor") or 0.0
        return (latents - shift) * config.get("scaling_factor", 0.18215)

    @property
    def device(self) -> torch.device:
        """Of whatever is built."""
        return next(self.parameters()).device

    def tokenizer(self, folder: str = "tokenizer") -> Any:
        """One of the pipeline's."""
        if folder not in self._tokenizers:
            with reading(Path(self.path) / folder):
                self._tokenizers[folder] = AutoTokenizer.from_pretrained(
                    self.path, subfolder=folder, revision=self.revision, trust_remote_code=False
                )
        return self._tokenizers[folder]

    def tokenize(
        self, captions: Sequence[str], length: int, folder: str = "tokenizer"
    ) -> tuple[Tensor, Tensor]:
        """(M, ``length``) ids and their mask (int64, 1 where valid), cut and padded."""
        found = self.tokenizer(folder)(
            list(captions), padding="max_length", max_length=length, truncation=True,
            return_tensors="pt", return_attention_mask=True,
        )  # fmt: skip
        return found.input_ids.to(self.device), found.attention_mask.to(self.device)

    def denoise(self, noisy: Tensor, timesteps_M: Tensor, conditioning: Conditioning) -> Tensor:
        with one_precision(self.denoiser) as dtype:
            return self.predict(noisy.to(dtype), timesteps_M, _placed(conditioning, dtype))

    @abstractmethod
    def predict(self, noisy: Tensor, timesteps_M: Tensor, given: Conditioning) -> Tensor:
        """As :meth:`denoise`, all in the denoiser's precision."""

    def sampler(self) -> Any:
        """A new scheduler of the pipeline's kind."""
        import diffusers

        config = self.configs["scheduler"]
        return getattr(diffusers, config["_class_name"]).from_config(config)

    def check(self, sampling: Sampling) -> None:
        check_steps(self.sampler(), sampling.steps, self.path)

    @torch.no_grad()
    def sample(
        self, conditioning: Conditioning, empty: Conditioning, sampling: Sampling
    ) -> list[Media]:
        self.check(sampling)
        names = [name for name, one in self.components.items() if one.part != TEXT_ENCODER]
        with one_precision(*(getattr(self, name) for name in names)) as dtype:
            ours, none = (
                _placed(given, self.device, dtype) for given in self.paired(conditioning, empty)
            )
            return self.draw(ours, none, sampling)

    @abstractmethod
    def draw(self, ours: Conditioning, none: Conditioning, sampling: Sampling) -> list[Media]:
        """As :meth:`sample`.

        Args:
            ours: of M items.
            none: of as many, what guidance leads away from; as many tokens.
            sampling: steps, scale and seed.
        """

    def pipeline(self, kind: Any, **arguments: Any) -> Any:
        """The pipeline of diffusers around what is built, for sampling.

        Args:
            kind: its class.
            arguments: whatever else its constructor takes.
        """
        components = {
            component.folder: None if component.part == TEXT_ENCODER else getattr(self, name)
            for name, component in self.components.items()
        }
        made = kind(**components, scheduler=self.sampler(), **arguments)
        made.set_progress_bar_config(disable=True)
        return made

    @staticmethod
    def options(ours: Conditioning, none: Conditioning, sampling: Sampling) -> dict[str, Any]:
        """What every pipeline calls the same: both conditionings, steps, scale, and a generator for
        each item.
        """
        pooled = {
            "pooled_prompt_embeds": ours.pooled,
            "negative_pooled_prompt_embeds": none.pooled,
        }
        return {
            "prompt_embeds": ours.tokens,
            "negative_prompt_embeds": none.tokens,
            **({} if ours.pooled is None else pooled),
            "num_inference_steps": sampling.steps,
            "guidance_scale": sampling.guidance_scale,
            "generator": sampling.noise(len(ours.tokens)),
        }


@contextmanager
def one_precision(*modules: nn.Module) -> Iterator[torch.dtype]:
    """Run modules whose weights differ in precision in the lowest, which it gives: what trains is
    kept in fp32, also beside others in bfloat16.
    """
    weights = [p for module in modules for p in module.parameters() if p.is_floating_point()]
    dtypes = sorted({p.dtype for p in weights}, key=lambda dtype: dtype.itemsize)
    mixed = torch.autocast(weights[0].device.type, dtypes[0]) if dtypes[1:] else nullcontext()
    with mixed:  # not autocast(enabled=False): that would end the trainer's own
        yield dtypes[0]


def _placed(given: Conditioning, *where: Any) -> Conditioning:
    """On a device or in a precision."""
    moved: Conditioning = given.to(*where)
    return replace(moved, mask=None if moved.mask is None else moved.mask.bool())


def pipeline_config(path: str, part: str, file: str, revision: str | None = None) -> dict[str, Any]:
    """The configuration of a pipeline, or of a part of it.

    Raises:
        FileNotFoundError: where the folder does not have it.
    """
    folder = Path(path)
    if folder.is_dir():
        found = folder / part / file
        if not found.is_file():
            raise FileNotFoundError(
                f"{path} has no {part}/{file}; expected the folder of a diffusers pipeline."
            )
    else:
        from huggingface_hub import hf_hub_download

        with fetching(path):
            found = Path(hf_hub_download(path, file, subfolder=part or None, revision=revision))
    with reading(found.parent):
        content = json.loads(found.read_bytes())
    if not isinstance(content, dict):
        raise ValueError(f"{found} holds {str(content)[:40]}; expected a JSON object.")
    return content
