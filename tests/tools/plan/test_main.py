"""The command: tables, and code 1 with what failed."""

from __future__ import annotations

import pytest

from mmfusion.cli import main
from tests.training.tiny import write_recipe


def test_a_recipe_that_is_ready(tmp_path, capsys):
    recipe = write_recipe(tmp_path)
    main(["plan", str(recipe), "--gpus", "2", "--gpu", "L4-24GB", "--mfu", "0.3"])
    shown = capsys.readouterr().out
    for words in (
        "each of 2 GPUs, which have 22.4 (L4-24GB)", "ddp", "deepspeed_3_offload", "fsdp2",
        "at 30% of 2 x 121 TFLOP/s", "for 12 steps", "data.sources.train", "weights of llm",
        "4 packs = 2 ranks x 1 micro-batches of 2", "fits: ddp", "3 checkpoints of",
    ):  # fmt: skip
        assert words in shown
    assert "FAILED" not in shown


def test_what_failed_is_told_with_code_1(tmp_path, capsys):
    recipe = write_recipe(tmp_path)
    for shard in tmp_path.glob("words-*.tar"):
        shard.unlink()
    with pytest.raises(SystemExit) as stop:
        main(["plan", str(recipe), "--gpus=3", "--gpu=1GB@1TFLOPS", "--trainer.strategy=ddp"])
    assert stop.value.code == 1
    out, err = capsys.readouterr()
    failed = [line for line in err.splitlines() if line.startswith("mmfusion plan:")]
    assert [line.split(": ")[1] for line in failed] == [
        "batch failed", "data.sources.words failed", "memory failed",
    ]  # fmt: skip
    assert "Expected: at most -0.1 on 1GB@1TFLOPS" in failed[-1]
    assert "planned with made-up samples" in out


def test_a_gpu_that_is_none_is_an_error(tmp_path, capsys):
    recipe = write_recipe(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(["plan", str(recipe), "--gpu", "H100"])
    assert stop.value.code == 1
    assert "Did you mean H100-80GB?" in capsys.readouterr().err
