"""Which frozen parts of a recipe may be stored, what tells them from others, and how stored ones
take their place: the one line ``data.features``.

A stored encoder is replaced by a :class:`StoredEncoder`, so it is not built. Of a generator, the
text encoder and the VAE are taken off what the model needs, and what they would give comes with the
targets.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from mmfusion.data.datamodule import MultimodalData
from mmfusion.data.features import (
    MANIFEST,
    Features,
    FeaturesError,
    Identity,
    StoredPart,
    differences,
    file_hash,
    stored_source,
)
from mmfusion.models.any_to_any import AnyToAnyModel
from mmfusion.models.encoders.base import Encoder
from mmfusion.models.encoders.stored import StoredEncoder
from mmfusion.models.generators.base import ONLY_DRAWN, TEXT_ENCODER, VAE
from mmfusion.models.generators.stored import text_in
from mmfusion.paths import expand
from mmfusion.processing.processor import settings_of
from mmfusion.processing.stored import StoredProcessor, read_item
from mmfusion.training.module import MultimodalModule
from mmfusion.training.stored_shapes import misfit, shapes_of
from mmfusion.tuning import Frozen, Policy
from mmfusion.types import DataError

SECTIONS = ("sources", "val_sources")
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".json", ".txt", ".model")
"""Files of a folder of weights that say what a part computes."""
NOT_ENCODING = ("unet", "transformer", "scheduler", "safety_checker", "feature_extractor")
"""Folders of a pipeline that neither its text encoders nor its VAE come from."""


def storable_parts(model: AnyToAnyModel) -> list[str]:
    """Parts whose outputs depend on the sample alone, as far as the recipe runs them."""
    found = [f"encoders.{modality}" for modality in model.encoders]
    for modality, needs in model.needs.items():
        found += [f"generators.{modality}.{part}" for part in (TEXT_ENCODER, VAE) if part in needs]
    return found


def split_part(part: str) -> tuple[str, str, str]:
    """Kind, modality and, of a generator's, which: ``generators``, ``image``, ``vae``."""
    kind, modality, of = f"{part}.".split(".")[:3]
    return kind, modality, of


def modules_of(part: str, model: AnyToAnyModel) -> list[str]:
    """Names of a part's modules; a text encoder may be several of the generator's."""
    kind, modality, of = split_part(part)
    named = model.generator(modality).modules_by_name() if of else {}
    own = [name for name, belongs in named.items() if belongs == of]
    return [f"{kind}.{modality}.{name}" for name in own] or [part]


def policy_on(part: str, module: MultimodalModule) -> str | None:
    """The key of ``model.tuning`` by which a part trains, or has adapters; None: it is frozen."""
    names = modules_of(part, module.model)
    for key, policies in module.tuning.items():
        listed = [policies] if isinstance(policies, Policy) else policies
        inside = any(f"{n}.".startswith(f"{key}.") or key.startswith(f"{n}.") for n in names)
        if inside and not all(isinstance(policy, Frozen) for policy in listed):
            return f"model.tuning.{key}"
    return None


def identity_of(part: str, model: AnyToAnyModel, recipe: Mapping[str, Any]) -> Identity:
    """What the outputs of a part are a function of, besides the sample.

    Args:
        part: of :func:`storable_parts`.
        model: of the recipe, not built.
        recipe: as plain values, defaults filled in.
    """
    kind, modality, _ = split_part(part)
    given = recipe["model"][kind][modality]
    arguments = dict(given.get("init_args") or {})
    paths = [name for name, value in arguments.items() if _is_path(name) and value]
    weights = {name: weights_of(arguments.pop(name), arguments.get("revision")) for name in paths}
    if kind == "encoders":
        processor = cast(Encoder, model.encoders[modality]).media_processor()
    else:
        processor = model.generator(modality).target_processor()
        arguments = {name: arguments[name] for name in arguments.keys() - ONLY_DRAWN}
    return {
        "class": given["class_path"],
        "arguments": arguments,
        "weights": weights,
        "media_processor": settings_of(processor),
        "precision": precision_of(recipe),
    }


def converter_of(recipe: Mapping[str, Any], name: str) -> Any:
    """The converter of a source (``sources.pictures``), as plain values."""
    section, source = name.split(".", 1)
    given = recipe["data"][section][source]
    return given.get("init_args", given)["converter"]


def precision_of(recipe: Mapping[str, Any]) -> str:
    """Of the forward pass, which frozen parts run under as well."""
    given = str(recipe["trainer"].get("precision"))
    return "32-true" if given in ("None", "32") else given


def _is_path(name: str) -> bool:
    return name == "path" or name.endswith("_path")


def weights_of(path: str, revision: str | None) -> dict[str, str]:
    """What tells the weights at a recipe's ``path``: hashes of the files, or the commit of a hub
    id.
    """
    where = Path(expand(path))
    if where.is_file():
        return {where.name: file_hash(where)}
    if where.is_dir():
        return {
            str(file.relative_to(where)): file_hash(file)
            for file in _files_in(where)
            if file.suffix in WEIGHTS and file.relative_to(where).parts[0] not in NOT_ENCODING
        }
    from huggingface_hub import try_to_load_from_cache

    for name in ("config.json", "model_index.json"):
        found = try_to_load_from_cache(path, name, revision=revision)
        if isinstance(found, str):
            return {"commit": Path(found).parent.name}
    return {"commit": revision or "main"}


def _files_in(folder: Path, above: tuple[Path, ...] = ()) -> Iterator[Path]:
    """In a fixed order, behind links as well, as weights are read; what lies above is not entered
    again.
    """
    real = folder.resolve()
    for path in () if real in above else sorted(folder.iterdir()):
        if path.is_dir():
            yield from _files_in(path, (*above, real))
        elif path.is_file():
            yield path


def use_features(
    module: MultimodalModule,
    data: MultimodalData,
    recipe: Mapping[str, Any],
    given: Sequence[str],
) -> None:
    """Take what ``data.features`` holds in place of the parts that made it.

    Args:
        module: of the recipe, not built.
        data: of the recipe.
        recipe: as plain values, defaults filled in.
        given: the recipe on the command line of `mmfusion data encode`, for errors.

    Raises:
        FeaturesError: where the features are not complete, of other weights, settings, data or
            converters, of other shapes than the part gives, or of a part that trains.
    """
    assert data.features is not None
    folder = Path(expand(data.features))
    command = shlex.join(
        ["mmfusion", "data", "encode", *given, "--out", data.features, "--overwrite"]
    )
    features = Features.read(folder, command)
    model = module.model
    here = [part for part in storable_parts(model) if part in features.parts]
    for part in here:
        if key := policy_on(part, module):
            raise FeaturesError(
                f"data.features: {folder} holds features of {part}, which {key} trains: they would "
                f"not follow it. Leave data.features out, or store the frozen parts alone by: "
                f"{command}"
            )
        identity = identity_of(part, model, recipe)
        if changed := differences(features.parts[part].identity, identity):
            raise FeaturesError(
                f"data.features: {folder} holds features that another {part} made:\n  "
                + "\n  ".join(changed)
                + f"\nMake them again by: {command}"
            )
        kind, modality, of = split_part(part)
        shapes = shapes_of(cast(Any, getattr(model, kind)[modality]), of)
        if odd := misfit(features.parts[part].specs, shapes):
            raise FeaturesError(
                f"data.features: {folder / MANIFEST} says that {part} gave {odd}. Make the "
                f"features again by: {command}"
            )
    for section in SECTIONS:
        sources = getattr(data, section)
        for source in sources:
            one = f"{section}.{source}"
            sources[source] = stored_source(
                features, folder, one, sources[source], converter_of(recipe, one), command
            )
    try:
        _stand_in(model, folder, {part: features.parts[part] for part in here})
    except (OSError, DataError) as error:
        raise FeaturesError(
            f'data.features: the encoding of "" in {folder} cannot be read: {error}\nMake the '
            f"features again by: {command}"
        ) from error


def _stand_in(model: AnyToAnyModel, folder: Path, stored: Mapping[str, StoredPart]) -> None:
    """Put what reads stored tensors in the place of the parts that would make them."""
    for modality in model.encoders:
        if one := stored.get(f"encoders.{modality}"):
            encoder = cast(Encoder, model.encoders[modality])
            processor = StoredProcessor(encoder.media_processor(), one.specs, one.fingerprint)
            model.encoders[modality] = StoredEncoder(encoder, processor)
    for modality in model.generators:
        generator = model.generator(modality)
        own = {
            part: stored[f"generators.{modality}.{part}"]
            for part in (TEXT_ENCODER, VAE)
            if f"generators.{modality}.{part}" in stored
        }
        if not own:
            continue
        model.stored[modality] = frozenset(own)
        model.needs[modality] -= model.stored[modality]
        model.target_processors[modality] = StoredProcessor(
            generator.target_processor(),
            {name: spec for one in own.values() for name, spec in one.specs.items()},
            "/".join(one.fingerprint for one in own.values()),
            decodes=VAE in model.needs[modality],
        )
        if TEXT_ENCODER in own:
            specs = own[TEXT_ENCODER].specs
            empty = read_item(empty_file(folder, modality).read_bytes(), specs)
            generator.stored_empty = text_in({n: tensor[None] for n, tensor in empty.items()})


def empty_file(folder: Path, modality: str) -> Path:
    """Where the text encoding of "" is."""
    return folder / f"generators.{modality}.empty.safetensors"
