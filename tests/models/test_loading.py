"""Loading parts: damaged files are named, a stranger's code is not run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFWriter
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import WhisperForConditionalGeneration

from mmfusion.models.encoders.efficientnet import EfficientNetLite
from mmfusion.models.encoders.hf_vision import HFVision
from mmfusion.models.encoders.whisper import WhisperEncoder
from mmfusion.models.generators.stable_diffusion import StableDiffusion
from mmfusion.models.llms.hf_causal_lm import HFCausalLM
from mmfusion.models.loading import checked_path, damaged_files, reading
from tests.models.encoders.test_whisper import config as whisper_config
from tests.models.tiny import save_clip, save_llm

DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "cut": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "garbage": lambda data: b"\x93garbage" * 50,
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize(
    "file", ["tokenizer.json", "tokenizer_config.json", "config.json", "model.safetensors"]
)
def test_a_damaged_file_of_an_llm_is_named(tmp_path: Path, file: str, damage: str) -> None:
    llm = HFCausalLM(save_llm(tmp_path))
    whole = tmp_path / file
    whole.write_bytes(DAMAGES[damage](whole.read_bytes()))
    with pytest.raises((ValueError, OSError), match=file) as error:
        llm.build(pretrained=bool(llm.tokenizer()))
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_weights_of_an_encoder_are_named(tmp_path: Path, damage: str) -> None:
    for name in ("vision", "whisper", "efficientnet"):
        (tmp_path / name).mkdir()
    save_clip(tmp_path / "vision")
    WhisperForConditionalGeneration(whisper_config()).save_pretrained(tmp_path / "whisper")
    weights = (tmp_path / "vision" / "model.safetensors").read_bytes()
    for encoder in (
        HFVision(str(tmp_path / "vision")),
        WhisperEncoder(str(tmp_path / "whisper"), max_seconds=2.0),
        EfficientNetLite(str(tmp_path / "efficientnet")),
    ):
        file = Path(encoder.path) / "model.safetensors"
        file.write_bytes(DAMAGES[damage](weights))
        with pytest.raises(ValueError, match=rf"{file} \(\d+ bytes\) cannot be read"):
            encoder.build()


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_gguf_file_is_named(tmp_path: Path, damage: str) -> None:
    file = tmp_path / "a.gguf"
    writer = GGUFWriter(file, "llama")
    writer.add_tensor("token_embd.weight", np.ones((64, 64), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert not list(damaged_files(tmp_path, "a.gguf"))
    file.write_bytes(DAMAGES[damage](file.read_bytes()))
    llm = HFCausalLM(str(tmp_path), gguf_file="a.gguf")
    for use in (llm.tokenizer, llm.build):
        with pytest.raises(ValueError, match=rf"{file} \(\d+ bytes\) cannot be read|{file} does"):
            use()


def test_a_tokenizer_of_another_make_names_its_folder(tmp_path: Path) -> None:
    llm = HFCausalLM(save_llm(tmp_path))
    file = tmp_path / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    file.write_text(json.dumps({**tokenizer, "model": {"type": "Runes"}}))
    with pytest.raises(ValueError, match=f"{tmp_path} cannot be loaded: "):
        llm.tokenizer()


def test_an_error_without_a_damaged_file_passes(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no json")
    for error in (OSError("disk"), RuntimeError("memory"), ValueError("unknown model")):
        with pytest.raises(type(error), match=str(error)), reading(tmp_path):
            raise error
    with pytest.raises(ValueError, match="cannot be loaded: SafetensorError: x"), reading("org/a"):
        raise SafetensorError("x")
    assert not list(damaged_files(tmp_path))


def test_missing_weights_of_the_quickstart_name_it(monkeypatch, tmp_path):
    monkeypatch.setenv("MMFUSION_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="`mmfusion quickstart` fetches"):
        checked_path("$MMFUSION_CACHE/weights/none", "config.json")
    with pytest.raises(FileNotFoundError, match=r"such as org/name\.$"):
        checked_path(str(tmp_path / "none"), "config.json")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (HFCausalLM, "trust_remote_code=True"),
        (HFVision, r"brings code of its own .* which is never run"),
        (WhisperEncoder, r"brings code of its own .* which is never run"),
    ],
)
def test_code_of_a_stranger_is_neither_run_nor_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Any, message: str
) -> None:
    marker, asked = tmp_path / "ran", []
    config = {"model_type": "stranger", "auto_map": {"AutoConfig": "evil.EvilConfig"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "evil.py").write_text(
        "from transformers import PretrainedConfig\n"
        f"open({str(marker)!r}, 'w').close()\n"
        "class EvilConfig(PretrainedConfig):\n    model_type = 'stranger'\n"
    )
    monkeypatch.setattr("builtins.input", lambda prompt="": asked.append(prompt) or "y")
    with pytest.raises(ValueError, match=message):
        kind(str(tmp_path)).config  # noqa: B018
    assert not marker.exists()
    assert not asked


def test_weights_of_another_kind_are_named_with_their_folder(tmp_path: Path) -> None:
    folder = Path(save_llm(tmp_path / "llm"))
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors is a file; give its folder"):
        HFCausalLM(str(folder / "model.safetensors"))
    weights = load_file(folder / "model.safetensors")
    save_file({k: v[:-1].contiguous() for k, v in weights.items()}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"llm have other shapes than its config\.json says"):
        HFCausalLM(str(folder)).build()
    (folder / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Path("objects")}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pickled objects, which are never run"):
        HFCausalLM(str(folder)).build()
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(FileNotFoundError, match="llm has no tokenizer"):
        HFCausalLM(str(folder)).tokenizer()


@pytest.mark.slow
@pytest.mark.parametrize("part", [WhisperEncoder, StableDiffusion])
def test_what_cannot_be_had_from_a_hub_is_told_by_its_name(part: type) -> None:
    """In a process of its own: whether there is a hub is read when its library is imported."""
    code = f"from {part.__module__} import {part.__name__} as Part\nPart('some/part')"
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert "OSError: some/part cannot be had: " in done.stderr
