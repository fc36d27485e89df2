"""Recipes are planned without weights; sizes and FLOPs are those of the real thing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, _FlopCounterMode

from mmfusion import tuning
from mmfusion.tools.plan.memory import ddp
from mmfusion.tools.plan.micro_batches import micro_batches
from mmfusion.tools.plan.recipe import Planned, plan_recipe
from mmfusion.tools.plan.sizes import sizes
from mmfusion.tools.plan.tracing import BACKWARD, FORWARD, RECOMPUTE
from mmfusion.training.command import RecipeCommand
from tests.tools.plan.llava import LLM, PROJECTOR, write_llava
from tests.training.tiny import DropoutProjector, write_recipe

CHECKPOINTED = "--model.llm.init_args.gradient_checkpointing=true"


def planned(path: str | Path, *options: str, world: int = 1) -> Planned:
    return plan_recipe(["--config", str(path), *options], world, on_gpu=False)


def test_llava_has_its_published_sizes(tmp_path):
    command = RecipeCommand("", ["--config", write_llava(tmp_path)])
    with torch.device("meta"):
        command.model.model.build(pretrained=False)
        tuning.apply(command.model.model, command.model.tuning)
    found = sizes(command.model)
    assert found.number == PROJECTOR == 20_979_712
    assert found.trained == 4 * PROJECTOR
    clip = sum(p.numel() for p in command.model.model.encoders.parameters())
    assert clip == 303_507_456  # as CLIPVisionModel counts it
    buffers = found.frozen - 2 * (LLM + clip)
    assert 0 <= buffers < 10_000  # frequencies of the positions, and places
    # All of the LLM but its output head may be divided.
    assert found.frozen_divided == 2 * (LLM - 32000 * 4096)
    assert found.trained_divided == 0
    assert found.frozen_outside == 2 * clip + buffers
    assert found.layer == 2 * (4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096)


def test_flops_of_a_frozen_llm_follow_the_formula(tmp_path):
    """Two layers of LLaVA's LLM. Forward: 2 FLOPs a weight and token, and attention; backward: as
    much again for the inputs, and nothing for the weights of what is frozen.
    """
    path = write_llava(tmp_path, num_hidden_layers=2)
    found = planned(path)
    assert not found.given.real  # there are no shards: pictures and words are made up
    assert "cannot be read" in found.notes[0]
    (batch,) = found.given.batches
    lengths = batch.cu_seqlens.diff().tolist()
    tokens, pictures = sum(lengths), batch.media["image"].num_tokens
    assert pictures.tolist() == [576] * len(lengths) == [576] * 3
    layers = 2 * (4 * 4096**2 + 3 * 4096 * 11008)
    attention = 2 * sum(
        2 * 2 * length**2 * 4096 for length in lengths
    )  # all pairs, as torch counts
    llm = found.seen.flops[FORWARD, "llm"]
    assert llm == pytest.approx(2 * tokens * layers + attention, rel=1e-5)  # and positions
    # The loss makes its gradients at once: the head's product, and that for the hidden states.
    labels = int((batch.labels >= 0).sum())
    head = 2 * labels * 32000 * 4096
    assert found.seen.flops[FORWARD, "objectives"] == pytest.approx(2 * head, rel=0.02)  # a probe
    first, second = 2 * 576 * 3 * 1024 * 4096, 2 * 576 * 3 * 4096**2
    assert found.seen.flops[FORWARD, "input_projectors.image"] == first + second
    # Attention: 5 products for 2. The projector: weights of both layers, inputs of the second.
    backward = 2 * tokens * layers + 2.5 * attention + first + 2 * second
    assert found.seen.work(BACKWARD) == pytest.approx(backward, rel=1e-5)
    assert found.frozen_parts == {"encoders.image", "llm"}


def test_flops_are_those_of_the_run_itself(tmp_path):
    """The rehearsal against torch's counter around the same micro-batch of real weights."""
    path = write_recipe(tmp_path)
    options = ["--data.packs_per_step=2"]
    found = planned(path, *options)
    command = RecipeCommand("", ["--config", str(path), *options])
    module = command.model
    module.configure_model()
    module.train()
    batches = micro_batches(command.datamodule, module.model.processor(), 1).batches
    counter = FlopCounterMode(display=False)
    with _FlopCounterMode(counter):  # without its hooks on modules, which the loss's chunks refuse
        for batch in batches:
            output = module.model(batch)
            loss = module.objectives["next_token"](module.model, output, batch).total
            (loss + output.idle).backward()
    seen = found.seen.work(FORWARD, BACKWARD) * len(batches)
    assert seen == pytest.approx(counter.get_total_flops(), rel=1e-9)
    assert seen > 0


def test_memory_of_what_trains(tmp_path):
    found = planned(write_recipe(tmp_path))
    assert found.seen.gradients == found.sizes.trained == 4 * found.sizes.number
    # AdamW: two fp32 numbers for each, and a count of steps for each tensor.
    counts = found.seen.optimizer - 8 * found.sizes.number
    assert 0 < counts <= 4 * 100


def test_sgd_keeps_nothing(tmp_path):
    path = write_recipe(tmp_path)
    found = planned(path, "--model.optimizer=torch.optim.SGD", "--model.optimizer.lr=0.1")
    assert found.seen.optimizer == 0


def test_gradient_checkpointing_trades_activations_for_work(tmp_path):
    path = write_recipe(tmp_path)
    plain, again = planned(path), planned(path, CHECKPOINTED)
    assert again.seen.activations < plain.seen.activations
    assert plain.seen.work(RECOMPUTE) == 0
    assert 0 < again.seen.work(RECOMPUTE) <= again.seen.work(FORWARD)
    assert again.seen.work(BACKWARD) == plain.seen.work(BACKWARD)


def test_ranks_that_share_packs_keep_a_part_each_and_compute_as_much(tmp_path):
    path = write_recipe(tmp_path, data__packs_per_step=1, data__pack_tokens=256)
    alone, shared = planned(path), planned(path, "--sequence_parallel=2", world=2)
    part = shared.seen.by_part["llm"] / alone.seen.by_part["llm"]
    assert 0.4 < part < 0.6
    assert shared.seen.work(FORWARD) == pytest.approx(alone.seen.work(FORWARD), rel=0.05)
    assert shared.seen.work(BACKWARD) == pytest.approx(alone.seen.work(BACKWARD), rel=0.05)


def test_packs_are_made_up_for_those_that_are_given_their_own(tmp_path):
    """Four packs of a step on four ranks, two of which share: two in a micro-batch."""
    path = write_recipe(tmp_path, data__packs_per_micro_batch=4)
    for shard in tmp_path.glob("*.tar"):
        shard.unlink()
    assert planned(path, world=4).given.packs == 1
    assert planned(path, "--sequence_parallel=2", world=4).given.packs == 2


def test_accumulated_gradients_stay(tmp_path):
    path = write_recipe(tmp_path)
    one = planned(path, "--data.packs_per_step=2")
    two = planned(path, "--data.packs_per_step=4")
    assert two.seen.peak >= one.seen.peak
    assert two.seen.peak >= two.seen.activations + two.seen.gradients - 1000


def test_the_run_may_be_counted_in_epochs(tmp_path):
    path = write_recipe(tmp_path, data__sources__train__weight=1)
    every = planned(path, "--data.epochs=1", "--trainer.max_steps=1000").steps
    assert every is not None
    # 180 samples, about 15 tokens each with their turns, in packs of 64: 4 packs a step.
    assert 5 < every < 40
    assert planned(path, "--data.epochs=1", "--trainer.max_steps=3").steps == 3


class Curious(DropoutProjector):
    """Looks at a value on its way."""

    def forward(self, features_NFD, mask_NF):
        scale = 1.0 if float(features_NFD.repeat(1, 1, 1000).sum()) > 0 else 2.0
        return scale * super().forward(features_NFD, mask_NF)


def test_a_part_that_needs_values_is_named(tmp_path):
    projector = {"class_path": "tests.tools.plan.test_recipe.Curious"}
    path = write_recipe(tmp_path, model__input_projectors={"image": projector})
    with pytest.raises(ValueError, match=r"input_projectors.image cannot run without values"):
        planned(path)


def test_what_the_audit_refuses_is_refused(tmp_path):
    frozen = {"llm": {"class_path": "mmfusion.tuning.Frozen"}}
    with pytest.raises(tuning.TuningError, match="nothing trains"):
        planned(write_recipe(tmp_path, model__tuning=frozen))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_llava_fits_a_gpu_of_24_gb_under_ddp(tmp_path):
    """13.5 GB of LLM, 0.6 GB of CLIP, 21.0 M that train."""
    found = plan_recipe(["--config", write_llava(tmp_path), CHECKPOINTED], 8)
    memory = ddp(found.sizes, found.seen, 8)
    assert memory.frozen == pytest.approx(14.08e9, rel=1e-3)
    assert memory.optimizer == pytest.approx(8 * PROJECTOR, rel=1e-5)
    assert memory.gradients == 4 * PROJECTOR
    assert memory.total < 24e9
