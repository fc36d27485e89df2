from __future__ import annotations

import re

import pytest

from tests.training import jobs
from tests.training.tiny import write_recipe


@pytest.mark.slow
def test_bar_counts_optimizer_steps_also_after_a_resume(tmp_path):
    recipe = write_recipe(
        tmp_path, data__packs_per_micro_batch=1, trainer__enable_progress_bar=True
    )
    log = tmp_path / "log.txt"
    for steps, first in ((4, 0), (8, 4)):
        options = [f"--run_dir={tmp_path / 'run'}", f"--trainer.max_steps={steps}"]
        args = ["fit", "-c", str(recipe), *options, "--allow_recipe_change"]
        assert jobs.run(args, log) == 0, log.read_text()
        text = log.read_text()
        shown = [int(n) for n in re.findall(rf"steps: .*? (\d+)/{steps} ", text)]
        assert sorted(set(shown)) == list(range(first, steps + 1))
        assert f"{tmp_path / 'run'}: finished at step {steps}." in text
        assert "v_num" not in text
        log.unlink()
