"""The quickstart's small generators by themselves: what they make of held-out media's own captions,
by the judges of the quickstart, and their denoising losses.

    python -m tests.benchmarks.generators --count 64

Needs the cache that `mmfusion quickstart --any-to-any` has filled.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from dataclasses import replace

import torch

from mmfusion.data.source import Source
from mmfusion.models.generators.base import PARTS, Generator, Sampling
from mmfusion.tools.quickstart.judges import JUDGES, SmallJudge, make_judges, true_media
from mmfusion.training.rebuild import from_recipe
from mmfusion.types import Conditioning, Media

RECIPE = "recipes/quickstart/2_align_output.yaml"
SOURCES = {modality: name for modality, (_, name, _) in JUDGES.items()}
NOISES = 4


def held_out(source: Source, count: int) -> list[Media]:
    """An even choice of the source's media."""
    media = list(true_media(source))
    return media[:: max(1, len(media) // count)][:count]


@torch.no_grad()
def figures(
    generator: Generator, judge: SmallJudge, media: list[Media], sampling: Sampling
) -> Mapping[str, float]:
    """Shares judged right, seconds for one of what is made, and mean denoising losses."""
    processor = generator.target_processor()
    mean, _ = generator.moments(processor.collate([processor(medium) for medium in media]))
    own = generator.encode_text([medium.caption or "" for medium in media])
    empty = generator.encode_empty()
    given = {
        "its caption's": own,
        "another caption's": own.map(lambda rows: rows.roll(1, 0)),
        'that of ""': Conditioning.cat([empty] * len(media)),
    }
    found = {}
    for name, conditioning in given.items():
        losses = [
            generator.denoising_loss(
                generator.scaled(mean), conditioning, range(n * len(media), (n + 1) * len(media))
            )
            for n in range(NOISES)
        ]
        found[f"loss under {name}"] = float(torch.stack(losses).mean())
    begun = time.perf_counter()
    made = generator.sample(own, empty, sampling)
    found["seconds for one"] = (time.perf_counter() - begun) / len(made)
    for name, shown in (("made", made), ("true", media)):
        named = [replace(one, caption=true.caption) for one, true in zip(shown, media, strict=True)]
        pairs = zip(judge.classify(named), named, strict=True)
        right = [seen == judge.labels(medium) for seen, medium in pairs]
        found[f"right, {name}"] = sum(right) / len(right)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=64)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--scale", type=float, default=3.0)
    args = parser.parse_args()
    module, data = from_recipe(RECIPE)
    judges = make_judges()
    for modality, name in SOURCES.items():
        generator = module.model.generator(modality)
        generator.build(PARTS)
        generator.requires_grad_(False).eval()
        media = held_out(data.val_sources[name], args.count)
        sampling = Sampling(args.steps, args.scale, 0)
        print(modality, f"({len(media)} held out)")
        for figure, value in figures(generator, judges[modality], media, sampling).items():
            print(f"  {figure:<32} {value:.3f}", flush=True)


if __name__ == "__main__":
    main()
