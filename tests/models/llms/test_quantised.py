"""An LLM with quantised weights: the numbers, the adapters beside them, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from peft.tuners.lora.bnb import Linear4bit, Linear8bitLt
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GPT2Config

from mmfusion.models import quantised
from mmfusion.models.llms import attention as varlen
from mmfusion.models.llms.hf_causal_lm import HFCausalLM
from mmfusion.training.checkpoint import load_kept
from mmfusion.tuning import Full, LoRA, NewTokens, TuningError, widen
from tests.models.tiny import save_llm

KINDS = ("nf4", "int8")
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941),
    *(0.7229568362236023, 1.0),
)
"""The 16 values of arXiv:2305.14314, appendix E."""


def save(folder: Path, **changes: Any) -> str:
    return save_llm(folder, hidden_size=64, intermediate_size=128, **changes)


def built(path: str, **options: Any) -> HFCausalLM:
    llm = HFCausalLM(path, **options)
    llm.build()
    return llm


def hidden(llm: HFCausalLM) -> torch.Tensor:
    ids, places = torch.arange(3, 15)[None], torch.cat([torch.arange(5), torch.arange(7)])[None]
    return llm(llm.embed(ids), places, torch.tensor([0, 5, 12]))


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(((a - b).norm() / b.norm()).detach())


def nf4(weight: torch.Tensor) -> torch.Tensor:
    """Each block of 64 numbers: the nearest of the 16 values, times the largest of the block."""
    values, rows = torch.tensor(NF4), []
    for block in weight.flatten().split(64):
        scale = block.abs().max()
        rows.append(values[(block[:, None] / scale - values).abs().argmin(1)] * scale)
    return torch.cat(rows).view_as(weight)


def int8(weight: torch.Tensor) -> torch.Tensor:
    """Each row, in float16: 127ths of its largest number."""
    weight = weight.half().float()
    scale = weight.abs().amax(1, keepdim=True)
    return (weight / scale * 127).round() / 127 * scale


@pytest.mark.parametrize(("kind", "rounds", "least", "most"), [
    ("nf4", nf4, 0.05, 0.4),
    ("int8", int8, 0.002, 0.03),
])  # fmt: skip
def test_weights_are_the_papers_and_hidden_states_those_of_them(
    tmp_path: Path, kind: Any, rounds: Any, least: float, most: float
) -> None:
    path = save(tmp_path, initializer_range=0.1)
    plain, llm = built(path), built(path, quantization=kind)
    layers = quantised.layers(llm)
    linear = {name for name, module in plain.named_modules() if isinstance(module, nn.Linear)}
    assert set(layers) == linear - {"model.lm_head"}
    llm.train()  # in evaluation int8 rounds what comes in as well
    ours, whole = hidden(llm), hidden(plain)
    with torch.no_grad():
        for name in layers:
            weight = plain.get_submodule(name).weight
            weight.copy_(rounds(weight))
    assert least < distance(hidden(plain), whole) < most
    # Of nf4 the scales are rounded too.
    assert distance(ours, hidden(plain)) < distance(ours, whole) / 5
    llm.model.dequantize()
    torch.testing.assert_close(hidden(llm), ours, atol=1e-5, rtol=1e-5)
    for name in layers:
        own, slow = (model.get_submodule(name).weight for model in (llm, plain))
        near = torch.isclose(own, slow, rtol=0.02, atol=1e-3)
        assert near.float().mean() > 0.999  # what is halfway may be rounded either way


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_gradients_are_those_of_transformers_and_peft(
    tmp_path: Path, kind: Any, dtype: Any
) -> None:
    path = save(tmp_path, initializer_range=0.1)
    llm = built(path, quantization=kind, dtype=dtype, gradient_checkpointing=True)
    llm.requires_grad_(False)
    adapters = LoRA(lr=1e-2, r=4, alpha=8).attach("llm", llm)
    for parameter in adapters.values():
        parameter.requires_grad_(True)
    widen(adapters.values())
    wanted = Linear4bit if kind == "nf4" else Linear8bitLt
    wraps = [type(module) for name, module in llm.named_modules() if hasattr(module, "lora_A")]
    assert wraps == [wanted] * 14
    assert {parameter.dtype for parameter in adapters.values()} == {torch.float32}

    precision = getattr(torch, dtype)
    config = BitsAndBytesConfig(
        load_in_4bit=kind == "nf4",
        load_in_8bit=kind == "int8",
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=precision,
    )
    theirs = AutoModelForCausalLM.from_pretrained(
        path,
        quantization_config=config,
        dtype=precision,
        # In bfloat16 another order of sums would show.
        attn_implementation="sdpa" if dtype == "float32" else varlen.NAME,
    )
    borders: dict[str, Any] = {}
    if dtype == "float32":
        options = {"gradient_checkpointing_kwargs": {"use_reentrant": False}}
        theirs = prepare_model_for_kbit_training(theirs, **options)
    else:  # it would take norms and embeddings into fp32
        mask = torch.zeros(1, 1, 1, 1, dtype=precision)
        borders = {"cu_seq_lens_q": torch.tensor([0, 24]), "attention_mask": mask}
    reference = get_peft_model(theirs, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    reference.train()
    llm.train()
    own = dict(reference.named_parameters())
    torch.manual_seed(0)
    for name, parameter in adapters.items():
        parameter.data = 0.1 * torch.randn_like(parameter)  # also lora_B, which starts at zero
        own["base_model." + name].data = parameter.data.clone()
    ours = torch.optim.AdamW(adapters.values(), lr=1e-2)
    other = torch.optim.AdamW([own["base_model." + name] for name in adapters], lr=1e-2)
    ids = torch.randint(3, 40, (1, 24))
    places, found = torch.arange(24)[None], []
    for _ in range(4):
        logits = llm.logits(llm(llm.embed(ids), places, torch.tensor([0, 24])))
        loss = F.cross_entropy(logits[0, :-1].float(), ids[0, 1:])
        expected = reference(input_ids=ids, labels=ids, use_cache=False, **borders).loss
        for optimizer, value in ((ours, loss), (other, expected)):
            optimizer.zero_grad()
            value.backward()
        torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
        for name, parameter in adapters.items():
            gradient = own["base_model." + name].grad
            torch.testing.assert_close(parameter.grad, gradient, atol=1e-5, rtol=1e-5)
        ours.step()
        other.step()
        found.append(float(loss))
    assert found[-1] < found[0] - 0.05


def bytes_of(llm: HFCausalLM) -> int:
    """Of the linear layers' weights, with their scales."""
    tensors: dict[int, int] = {}
    for name in (n for n, m in llm.named_modules() if isinstance(m, nn.Linear)):
        if name == "model.lm_head":
            continue
        for tensor in llm.get_submodule(name).state_dict(keep_vars=True).values():
            storage = tensor.untyped_storage()
            tensors[storage.data_ptr()] = storage.nbytes()
    return sum(tensors.values())


def test_weights_take_a_quarter_and_a_half_of_bfloat16(tmp_path: Path) -> None:
    path = save_llm(tmp_path, hidden_size=256, intermediate_size=1024)
    half = bytes_of(built(path, dtype="bfloat16"))
    # 4 bits, 8 for the scale of 64 numbers, 32 for that of 256 scales; tables and names of a layer.
    assert 0.25 < bytes_of(built(path, dtype="bfloat16", quantization="nf4")) / half < 0.275
    assert 0.5 < bytes_of(built(path, dtype="bfloat16", quantization="int8")) / half < 0.51


@pytest.mark.parametrize("kind", [None, *KINDS])
def test_numbers_are_counted_as_such_however_they_are_kept(tmp_path: Path, kind: Any) -> None:
    path = save(tmp_path)
    numbers = sum(p.numel() for p in built(path).parameters())
    random = HFCausalLM(path, quantization=kind)
    random.build(pretrained=False)
    with torch.device("meta"):
        empty = HFCausalLM(path, quantization=kind)
        empty.build(pretrained=False)
    loaded = built(path, quantization=kind)
    for llm in (loaded, random, empty):
        assert sum(map(quantised.count, llm.parameters())) == numbers
        shown = {quantised.precision(p) for p in llm.parameters()}
        assert shown == {"float32", kind or "float32"}
        own = {(p.dtype, p.shape) for p in llm.parameters()}
        assert own == {(p.dtype, p.shape) for p in loaded.parameters()}
    assert hidden(random).isfinite().all()


def test_transposed_weights_are_quantised_too(tmp_path: Path) -> None:
    """GPT-2's layers are transposed, and quantised as linear ones."""
    config = GPT2Config(vocab_size=60, n_embd=64, n_layer=2, n_head=4, n_positions=64)
    path = save_llm(tmp_path, config)
    torch.manual_seed(3)
    made = HFCausalLM(path, quantization="nf4")
    made.build(pretrained=False)
    torch.manual_seed(3)
    plain = HFCausalLM(path)
    plain.build(pretrained=False)
    for llm, whole in ((built(path, quantization="nf4"), built(path)), (made, plain)):
        assert len(quantised.layers(llm)) == 8
        assert distance(hidden(llm.eval()), hidden(whole.eval())) < 0.25


def test_an_evaluation_leaves_weights_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a CPU with AVX-512 BF16, where bitsandbytes would lay them out anew, without gradients
    from there on.
    """
    expected = built(path := save(tmp_path), quantization="nf4")
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    llm = built(path, quantization="nf4")
    with torch.no_grad():
        hidden(llm.eval())
    for name, layer in quantised.layers(llm).items():
        own, other = (one.weight for one in (layer, expected.get_submodule(name)))
        assert torch.equal(own, other)
        assert torch.equal(own.absmax, other.absmax)


@pytest.mark.parametrize("kind", KINDS)
def test_whole_training_of_quantised_weights_is_refused(tmp_path: Path, kind: Any) -> None:
    llm = built(save(tmp_path), quantization=kind)
    with pytest.raises(TuningError, match=rf"Full cannot train 14 layers.*{kind}.*LoRA"):
        Full(lr=1e-3).attach("llm", llm)
    norm = llm.get_submodule("model.model.norm")
    assert set(Full(lr=1e-3).attach("llm.model.model.norm", norm)) == {"weight"}


@pytest.mark.parametrize("tied", [False, True])
def test_new_tokens_train_beside_quantised_weights(tmp_path: Path, tied: bool) -> None:
    path = save(tmp_path, tie_word_embeddings=tied)
    llm = built(path, quantization="nf4", new_tokens=["<image_0>", "<image_1>"])
    llm.requires_grad_(False)
    adapters = LoRA(lr=1e-3, r=2).attach("llm", llm)
    rows = NewTokens(lr=1e-3).attach("llm", llm)
    assert len(adapters) == 28
    assert len(rows) == (1 if tied else 2)
    for parameter in (*adapters.values(), *rows.values()):
        parameter.requires_grad_(True)
    ids = torch.tensor([[3, 4, *llm.new_token_ids]])
    states = llm(llm.embed(ids), torch.arange(4)[None], None)
    llm.logits(states).square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in rows.values())
    named = {n: p.grad for n, p in adapters.items() if "lora_B" in n}
    assert all(gradient.abs().sum() > 0 for gradient in named.values())


@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_are_quantised_on_disk_are_taken_as_they_are(
    tmp_path: Path, kind: Any
) -> None:
    path = save(tmp_path / "whole")
    first = built(path, quantization=kind)
    (stored := tmp_path / "stored").mkdir()
    first.model.save_pretrained(stored)
    for file in Path(path).glob("tokenizer*"):
        (stored / file.name).write_bytes(file.read_bytes())
    again = built(str(stored), quantization=kind)
    torch.testing.assert_close(hidden(again.eval()), hidden(first.eval()), atol=1e-6, rtol=1e-6)
    other = KINDS[kind == "nf4"]
    for given in (None, other):
        with pytest.raises(ValueError, match=rf"are quantised \({kind}\).*{given}. Set it to"):
            built(str(stored), quantization=given)
    config = json.loads((stored / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (stored / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"are quantised \(gptq\).*Take weights that are not"):
        built(str(stored), quantization=kind)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_were_trained_whole_are_not_written_into_quantised_ones(
    tmp_path: Path, kind: Any
) -> None:
    """int8 has the shape of what it stands for: copied there, numbers below 1 would be 0."""
    path = save(tmp_path)
    trained = {"model.model.layers.0.mlp.up_proj.weight": torch.randn(128, 64)}
    with pytest.raises(ValueError, match=r"1 weights of run .* are quantised here.*up_proj"):
        load_kept(built(path, quantization=kind), trained, "run")


def test_without_bitsandbytes_the_recipe_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantised, "is_bitsandbytes_available", lambda: False)
    with pytest.raises(
        ValueError, match=r'needs bitsandbytes.*pip install "mmfusion\[quantized\]"'
    ):
        HFCausalLM(save(tmp_path), quantization="nf4")
