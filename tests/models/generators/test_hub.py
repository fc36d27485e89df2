"""A pipeline by its hub id, over HTTP, in processes of their own: huggingface_hub reads its
environment when it is imported.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mmfusion.models.generators.base import TEXT_ENCODER
from mmfusion.models.generators.stable_diffusion import StableDiffusion
from tests.models.generators.hub import COMMIT, serve
from tests.models.generators.tiny import save_stable_diffusion

LINES = """
import json
from mmfusion.models.generators.base import PARTS
from mmfusion.models.generators.stable_diffusion import StableDiffusion
from mmfusion.training.stored_parts import weights_of

made = StableDiffusion("me/tiny")
weights = weights_of("me/tiny", None)
made.build(PARTS)
text = made.encode_text(["a b"]).tokens
print(json.dumps({"text": text.tolist(), "weights": weights, "names": list(made.state_dict())}))
"""


def loaded(**environment: str) -> dict[str, Any]:
    """What a process makes of the hub id."""
    made = subprocess.run(
        [sys.executable, "-c", LINES], capture_output=True, text=True,
        env=os.environ | environment, timeout=300,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    return json.loads(made.stdout.splitlines()[-1])


@pytest.mark.slow
def test_a_pipeline_is_loaded_by_its_hub_id_and_then_without_a_hub(tmp_path: Path) -> None:
    folder = Path(save_stable_diffusion(tmp_path / "sd"))
    for weights in list(folder.rglob("*.safetensors")):
        weights.with_suffix(".bin").write_bytes(b"pickled")
    with serve(folder, "me/tiny") as (endpoint, asked):
        found = loaded(HF_ENDPOINT=endpoint, HF_HOME=f"{tmp_path}/home", HF_HUB_OFFLINE="0")
    own = StableDiffusion(str(folder))
    own.build({TEXT_ENCODER})
    text = own.encode_text(["a b"]).tokens
    assert found["weights"] == {"commit": COMMIT}
    assert found["text"] == text.tolist()
    assert {name.split(".")[0] for name in found["names"]} == {"text_encoder", "vae", "denoiser"}
    configs = [f"{part}/config.json" for part in ("text_encoder", "vae", "unet")]
    assert asked[:5] == ["model_index.json", *configs, "scheduler/scheduler_config.json"]
    assert len(asked) == len(set(asked))
    assert not [name for name in asked if name.endswith(".bin")]
    assert loaded(HF_HOME=f"{tmp_path}/home", HF_HUB_OFFLINE="1") == found
