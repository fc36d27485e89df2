"""The folder of a pipeline that is yet to be trained: configurations of its components, and a
tokenizer that is made from captions.
"""

from __future__ import annotations

import difflib
import inspect
import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer

from mmfusion.models.generators.diffusers_pipeline import INDEX
from mmfusion.models.generators.griffin_lim import GriffinLim

Components = Mapping[str, Mapping[str, Any]]
PAD, START, END = SPECIAL = ("<pad>", "<start>", "<end>")
LEAST_WORDS = len(SPECIAL) + 256
MOST_WORDS = 1 << 20
NAME = re.compile(r"[a-z][a-z0-9_]*")
"""Of a component: it becomes a folder."""
_KINDS = (diffusers.ModelMixin, diffusers.SchedulerMixin, transformers.PreTrainedModel)


def check_untrained(pipeline: str, components: Components, words: int) -> None:
    """Before anything is written.

    Args:
        pipeline: as :func:`write_untrained`.
        components: likewise.
        words: likewise.

    Raises:
        ValueError: for a name that is no folder of a pipeline, a class that is not theirs, a key
            that a class does not know (theirs would go on with a default), or a vocabulary that
            does not hold what every text is made of.
    """
    whole: Any = getattr(diffusers, pipeline, None)
    if not (isinstance(whole, type) and issubclass(whole, diffusers.DiffusionPipeline)):
        raise ValueError(f"pipeline is {pipeline!r}; expected the name of a pipeline of diffusers.")
    for name, given in components.items():
        if not NAME.fullmatch(name) or name == "tokenizer":
            raise ValueError(
                f"components has {name!r}; expected names of a pipeline's folders, such as unet: "
                "small letters, digits and _. The tokenizer is made from the captions."
            )
        kind, config = _kind(name, given)
        if issubclass(kind, transformers.PreTrainedModel):
            known = dir(kind.config_class()) + list(kind.config_class.attribute_map)
        else:
            known = list(inspect.signature(kind).parameters)
        if unknown := [key for key in config if key not in known]:
            close = difflib.get_close_matches(unknown[0], known, 1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise ValueError(
                f"components.{name}.{unknown[0]} is no setting of {kind.__name__}.{hint}"
            )
    _check_complete(whole, components)
    if not LEAST_WORDS <= words <= MOST_WORDS:
        raise ValueError(
            f"words is {words}; expected {LEAST_WORDS} to {MOST_WORDS}: one for each byte, and "
            f"{', '.join(SPECIAL)}."
        )


def _check_complete(pipeline: Any, components: Components) -> None:
    """With a text encoder, all that the pipeline needs, and nothing that it does not take."""
    takes = dict(inspect.signature(pipeline).parameters)
    needs = {name for name, one in takes.items() if one.default is inspect.Parameter.empty}
    needs = (needs | {"text_encoder"}) - {"tokenizer"} - {*pipeline._optional_components}
    if (missing := needs - {*components}) or (surplus := {*components} - {*takes}):
        raise ValueError(
            f"components are {[*components]}; {pipeline.__name__} "
            + (f"needs {sorted(missing)} as well." if missing else f"takes no {sorted(surplus)}.")
        )


def write_untrained(
    folder: Path, pipeline: str, components: Components, captions: Iterable[str], words: int
) -> None:
    """Write what a generator reads before its weights are there.

    Args:
        folder: is made.
        pipeline: name of its class in diffusers.
        components: for each folder of the pipeline the name of its ``class`` in diffusers or
            transformers (or our GriffinLim), and its configuration.
        captions: that the tokenizer is made from; letter case is dropped.
        words: size of its vocabulary.

    Raises:
        ValueError: as :func:`check_untrained`.
    """
    index: dict[str, Any] = {"_class_name": pipeline, "tokenizer": _library(_TOKENIZER)}
    for name, given in components.items():
        kind, config = _kind(name, given)
        made = folder / name
        if issubclass(kind, transformers.PreTrainedModel):
            vocabulary = {"vocab_size": words, "pad_token_id": 0, "bos_token_id": 1}
            kind.config_class(**{**vocabulary, "eos_token_id": 2, **config}).save_pretrained(made)
        elif kind is GriffinLim:
            kind(**config).save_pretrained(made)  # there is nothing to train
        else:
            instance: Any = kind.from_config(config)
            instance.save_config(made)
        index[name] = _library(kind)
    longest = components["text_encoder"].get("max_position_embeddings")  # T5 takes any length
    captions = list(captions)
    made = tokenizer(captions, words, longest)
    lengths = [len(ids) for ids in made(captions, verbose=False)["input_ids"]]
    if cut := sum(length > (longest or math.inf) for length in lengths):
        print(
            f"{cut} of {len(captions)} captions are longer than {longest} tokens: the text encoder "
            "does not see their ends. Raise components.text_encoder.max_position_embeddings to "
            f"{max(lengths)}, or words, to change that."
        )
    made.save_pretrained(folder / "tokenizer")
    (folder / INDEX).write_text(json.dumps(index, indent=1))


def tokenizer(captions: Iterable[str], words: int, longest: int | None = None) -> Any:
    """Byte-pair encoding within words, lower case, ``<start> ... <end>``.

    Args:
        captions: that it is made from.
        words: size of its vocabulary.
        longest: tokens of a text, where the text encoder has a bound.
    """
    made = Tokenizer(models.BPE())
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    made.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=words,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(captions, trainer)
    made.post_processor = processors.TemplateProcessing(
        single=f"{START} $A {END}", special_tokens=[(START, 1), (END, 2)]
    )
    return _TOKENIZER(
        tokenizer_object=made, pad_token=PAD, bos_token=START, eos_token=END, unk_token=PAD,
        model_max_length=longest,
    )  # fmt: skip


_TOKENIZER = transformers.PreTrainedTokenizerFast


def _kind(name: str, given: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The class of a component, and its configuration."""
    config = dict(given)
    wanted = str(config.pop("class", None))
    own = {"GriffinLim": GriffinLim}.get(wanted)
    kind = own or getattr(diffusers, wanted, None) or getattr(transformers, wanted, None)
    if not (isinstance(kind, type) and issubclass(kind, _KINDS)):
        raise ValueError(
            f"components.{name} has the class {wanted!r}; expected the name of a model or "
            "scheduler of diffusers or transformers."
        )
    return kind, config


def _library(kind: Any) -> list[str]:
    return [kind.__module__.split(".")[0], kind.__name__]
