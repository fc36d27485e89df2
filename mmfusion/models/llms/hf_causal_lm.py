"""Any causal language model that transformers knows: LLaMA and its kin, Qwen, Mistral, Gemma, GLM,
OPT and others, from the hub, a folder or a GGUF file.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig
from transformers.utils import is_flash_attn_2_available

from mmfusion.models import quantised
from mmfusion.models.llms import attention as varlen
from mmfusion.models.llms.base import LLM
from mmfusion.models.llms.sequence import SequenceShare
from mmfusion.models.loading import checked_path, fetching, reading, refuse_missing
from mmfusion.processing.limits import Limits


class HFCausalLM(LLM):
    """A Hugging Face causal language model.

    Args:
        path: hub id, or a folder with ``config.json`` and weights, or a folder with ``gguf_file``.
        gguf_file: name of a GGUF file inside ``path``; it is dequantised.
        revision: commit, tag or branch of a hub id; pin it to reproduce a run.
        dtype: of the weights; ``auto`` keeps the checkpoint's.
        attention: ``auto`` takes flash_attention_2 where it is installed and there is a GPU, else
            ``varlen_sdpa``; both keep packed samples apart. Or one of these two by name.
        new_tokens: tokens added to the vocabulary (or in it without a row in the weights); their
            rows start at the mean of all rows and train under :class:`mmfusion.tuning.NewTokens`.
        gradient_checkpointing: recompute each layer in the backward pass, for memory.
        quantization: keep the linear layers but the output head in 4 bits (``nf4``, its scales
            quantised as well) or 8 (``int8``), frozen, by bitsandbytes; under LoRA this is QLoRA.
            Products are computed in ``dtype``.
        local_files_only: never ask the hub, take what its cache holds.
        trust_remote_code: run the code of the hub repository. Only for repositories you have read.
    """

    def __init__(
        self,
        path: str,
        gguf_file: str | None = None,
        revision: str | None = None,
        dtype: Literal["float32", "bfloat16", "auto"] = "float32",
        attention: Literal["auto", "varlen_sdpa", "flash_attention_2"] = "auto",
        new_tokens: Sequence[str] = (),
        gradient_checkpointing: bool = False,
        quantization: Literal["nf4", "int8"] | None = None,
        local_files_only: bool = False,
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__()
        self.path = checked_path(path, "config.json" if gguf_file is None else gguf_file)
        self.dtype = dtype
        self.attention = attention
        self.new_tokens = list(new_tokens)
        self.gradient_checkpointing = gradient_checkpointing
        if quantization is not None:
            quantised.require(quantization)
        self.quantization = quantization
        self._source: dict[str, Any] = {
            "gguf_file": gguf_file,
            "revision": revision,
            "local_files_only": local_files_only,
            "trust_remote_code": trust_remote_code,
        }
        if gguf_file is None:
            del self._source["gguf_file"]
        self.model: Any = None

    @cached_property
    def config(self) -> Any:
        """The model's transformers configuration."""
        with reading(self.path, self._source.get("gguf_file")), fetching(self.path):
            return AutoConfig.from_pretrained(self.path, **self._source)

    @property
    def hidden_dim(self) -> int:
        config = self.config.get_text_config()
        # OPT-350M's embeddings and outputs are narrower than its layers.
        return int(getattr(config, "word_embed_proj_dim", config.hidden_size))

    @property
    def num_layers(self) -> int | None:
        return getattr(self.config.get_text_config(), "num_hidden_layers", None)

    @cached_property
    def _tokenizer(self) -> Any:
        folder = Path(self.path)
        if folder.is_dir() and "gguf_file" not in self._source:
            files = ("tokenizer*", "vocab*", "*.model", "*.tiktoken", "spiece*")
            if not any(found for pattern in files for found in folder.glob(pattern)):
                raise FileNotFoundError(
                    f"{self.path} has no tokenizer (tokenizer.json); put that of the weights there."
                )
        with reading(self.path, self._source.get("gguf_file")):
            tokenizer = AutoTokenizer.from_pretrained(self.path, **self._source)
        vocabulary = tokenizer.get_vocab()
        rows = self._rows_of_weights
        if known := [token for token in self.new_tokens if vocabulary.get(token, rows) < rows]:
            raise ValueError(
                f"new_tokens {known} are in the vocabulary of {self.path} already; leave them out."
            )
        tokenizer.add_tokens(self.new_tokens, special_tokens=True)
        return tokenizer

    def tokenizer(self) -> Any:
        return self._tokenizer

    @property
    def new_token_ids(self) -> list[int]:
        """Ids of ``new_tokens``, in their order."""
        return cast(list[int], self._tokenizer.convert_tokens_to_ids(self.new_tokens))

    @cached_property
    def _rows_of_weights(self) -> int:
        """Rows of the embedding table before new tokens."""
        return int(self.config.get_text_config().vocab_size)

    def limits(self) -> Limits:
        config, rows, new = self.config.get_text_config(), self._rows_of_weights, self.new_token_ids
        beyond = {index for index in self._tokenizer.get_vocab().values() if index >= rows}
        # Without rotary positions (or ALiBi) it looks positions up in a table that ends.
        reaches_on = any(getattr(config, name, None) for name in ("rope_parameters", "alibi"))
        positions = max(0, getattr(config, "max_position_embeddings", None) or 0) or None
        stable = _stable_positions(config)
        return Limits(
            tokens=positions if stable is None else stable,
            hard=not reaches_on or stable is not None,
            rows=max([rows, *(index + 1 for index in new)]),
            without_row=frozenset(beyond.difference(new)),
        )

    def build(self, pretrained: bool = True) -> None:
        if self.model is not None:
            return
        flash = self.attention == "flash_attention_2"
        if self.attention == "auto":
            flash = torch.cuda.is_available() and is_flash_attn_2_available()
        implementation = "flash_attention_2" if flash else varlen.NAME
        options = {"dtype": self.dtype, "attn_implementation": implementation}
        self.model = self._load(options) if pretrained else self._random(options)
        if self.quantization is not None:
            if not quantised.layers(self.model):
                quantised.quantise(self.model, self.quantization, self._dtype)
            quantised.settle(self.model, self._dtype)
        _check_shape(self)
        if self.new_tokens:
            self._add_rows()
        if self.gradient_checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        _check(self)

    def _load(self, options: dict[str, Any]) -> Any:
        stored = quantised.stored_kind(self.config, self.quantization, self.path)
        if "gguf_file" in self._source:
            options["quantization_config"] = GgufConfig(dequantize=True)
        elif self.quantization is not None and stored is None:
            options |= quantised.options(self.quantization, self._dtype)
        with reading(self.path, self._source.get("gguf_file")):
            model, info = AutoModelForCausalLM.from_pretrained(
                self.path, output_loading_info=True, **options, **self._source
            )
        refuse_missing(info, self.path, type(model).__name__)
        return model

    @property
    def _dtype(self) -> torch.dtype:
        """Of weights that are not quantised."""
        if self.dtype == "auto":
            return cast(torch.dtype, self.config.dtype or torch.float32)
        return cast(torch.dtype, getattr(torch, self.dtype))

    def _random(self, options: dict[str, Any]) -> Any:
        options["dtype"] = self._dtype
        trust = self._source["trust_remote_code"]
        config = copy.deepcopy(self.config)  # new rows change the model's own
        return AutoModelForCausalLM.from_config(config, trust_remote_code=trust, **options)

    @torch.no_grad()
    def _add_rows(self) -> None:
        """Grow the embeddings to hold the new tokens, each row the mean of the old ones (no random
        draw: every rank gets the same).
        """
        old = self.model.get_input_embeddings().weight.shape[0]
        needed = max(self.new_token_ids) + 1
        if needed > old:
            self.model.resize_token_embeddings(needed, mean_resizing=False)
        known = min(old, min(self.new_token_ids))
        for module in (self.model.get_input_embeddings(), self.model.get_output_embeddings()):
            # Also rows between, of tokens in the vocabulary that the weights have no row for.
            module.weight[[*self.new_token_ids, *range(old, needed)]] = (
                module.weight[:known].float().mean(0).to(module.weight.dtype)
            )

    def embed(self, input_ids: Tensor) -> Tensor:
        table = self.model.get_input_embeddings()
        return table(input_ids.clamp(max=_rows(table) - 1))

    def forward(self, embeds: Tensor, position_ids: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        return self.forward_layers(embeds, position_ids, cu_seqlens)[-1]

    def forward_layers(
        self,
        embeds: Tensor,
        position_ids: Tensor,
        cu_seqlens: Tensor | None,
        layers: Sequence[int] = (-1,),
        share: SequenceShare | None = None,
    ) -> dict[int, Tensor]:
        # use_cache: with a cache HF stops keeping packed samples apart, without a word.
        output = self.model.base_model(
            inputs_embeds=embeds,
            position_ids=position_ids,
            use_cache=False,
            output_hidden_states=any(layer != -1 for layer in layers),
            **self._borders(embeds, cu_seqlens, share),
        )
        found = {}
        for layer in layers:
            if layer == -1:
                found[layer] = output.last_hidden_state
            elif 0 <= layer < len(output.hidden_states):
                found[layer] = output.hidden_states[layer]
            else:
                raise ValueError(
                    f"{self.path} has {len(output.hidden_states) - 1} layers; expected -1 or 0 to "
                    f"{len(output.hidden_states) - 1}, got {layer}."
                )
        return found

    def _borders(
        self, embeds: Tensor, cu_seqlens: Tensor | None, share: SequenceShare | None
    ) -> dict[str, Any]:
        """What tells the attention where samples begin. Rows padded on the right need nothing but
        causality.
        """
        kinds = set(getattr(self.model.config.get_text_config(), "layer_types", None) or ())
        if share is not None and (odd := kinds - {"full_attention", "sliding_attention"}):
            raise ValueError(
                f"sequence_parallel: {self.path} has layers of {sorted(odd)}, which mix tokens "
                "outside attention, or attend in another way; leave sequence_parallel out."
            )
        if self.model.config._attn_implementation == varlen.NAME:
            if cu_seqlens is None:
                cu_seqlens = torch.tensor([0, embeds.shape[1]])
            # Four dimensions: HF takes such a mask as it is and builds none of size T x T.
            given = {
                "cu_seq_lens_q": cu_seqlens.cpu(),
                "attention_mask": embeds.new_zeros(1, 1, 1, 1),
            }
            return given if share is None else {**given, "sequence_share": share}
        if share is not None:
            raise ValueError(
                f"sequence_parallel needs model.llm.init_args.attention: varlen_sdpa, got "
                f"{self.attention} (here {self.model.config._attn_implementation})."
            )
        if cu_seqlens is None:
            return {}
        longest = int(cu_seqlens.diff().max())
        cu_seqlens = cu_seqlens.to(embeds.device, non_blocking=True)
        return {
            "cu_seq_lens_q": cu_seqlens,
            "cu_seq_lens_k": cu_seqlens,
            "max_length_q": longest,
            "max_length_k": longest,
        }

    @property
    def layers(self) -> Sequence[nn.Module]:
        modules = self.model.base_model.modules()
        return list(next(m for m in modules if isinstance(m, nn.ModuleList)))

    def tensor_plan(self, size: int) -> Mapping[str, str]:
        config = self.model.config.get_text_config()
        plan = getattr(config, "base_model_tp_plan", None) or {}
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        if plan and heads % size:
            raise ValueError(
                f"tensor_parallel is {size}, which does not divide the {heads} key/value heads of "
                f"{self.path}."
            )
        parts = (name.partition(".*.") for name in plan)
        return {inner: plan[outer + dots + inner] for outer, dots, inner in parts if dots}

    @property
    def head(self) -> nn.Module:
        return cast(nn.Module, self.model.get_output_embeddings())

    def logits(self, hidden: Tensor) -> Tensor:
        logits = self.head(hidden)
        config = self.config.get_text_config()
        if scale := getattr(config, "logit_scale", None):  # Cohere
            logits = logits * scale
        if scale := getattr(config, "logits_scaling", None):  # Granite
            logits = logits / scale
        if cap := getattr(config, "final_logit_softcapping", None):  # Gemma
            logits = cap * torch.tanh(logits / cap)
        return logits


def _stable_positions(config: Any) -> int | None:
    """Positions within which rotary frequencies do not change with the longest sample of a pack;
    None where they never do.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    settings = [rope, *(value for value in rope.values() if isinstance(value, dict))]
    found = [
        int(one.get("original_max_position_embeddings") or config.max_position_embeddings)
        for one in settings
        if one.get("rope_type") in ("dynamic", "longrope")
    ]
    return min(found, default=None)


def _rows(table: nn.Module) -> int:
    """Rows of an embedding, also where PEFT wraps it, and where its weight is sharded."""
    return cast(nn.Embedding, getattr(table, "base_layer", table)).num_embeddings


def _check_shape(llm: HFCausalLM) -> None:
    """Refuse a family whose decoder cannot be run on embeddings of ``hidden_dim``."""
    name = type(llm.model).__name__
    if llm.model.base_model is llm.model:
        raise ValueError(
            f"{llm.path} is a {name}, which transformers does not let run without its head; take "
            "another family."
        )
    width = llm.model.get_input_embeddings().embedding_dim
    if width != llm.hidden_dim:
        raise ValueError(
            f"{llm.path} ({name}) has embeddings of width {width} and hidden states of width "
            f"{llm.hidden_dim}; expected the same. Take another family."
        )


@torch.no_grad()
def _check(llm: HFCausalLM) -> None:
    """Two tokens tell whether the family does what is assumed of it: an unknown scaling of the
    logits, or packed samples that see each other, would train on a wrong loss without a word.
    """
    weight = llm.model.get_output_embeddings().weight
    flash = llm.model.config._attn_implementation != varlen.NAME
    if weight.is_meta or weight.numel() == 0 or hasattr(weight, "ds_id") or flash:
        return  # no values here (meta device, sharded), or a kernel that needs the GPU
    training = llm.model.training
    llm.model.eval()
    tokens = [index for index in range(3) if index != llm.model.config.pad_token_id][:2]
    ids = torch.tensor([tokens], device=weight.device)  # a pad token's row is zero
    family = llm.model(input_ids=ids[:, 1:], use_cache=False).logits[0, 0]
    borders = torch.tensor([0, 1, 2])
    hidden = llm(llm.embed(ids), torch.zeros_like(ids), borders)[0, 1]
    alone = llm(llm.embed(ids[:, 1:]), torch.zeros_like(ids[:, 1:]), None)[0, 0]
    own = llm.logits(alone)
    llm.model.train(training)
    name = type(llm.model).__name__
    if _distance(own, family) > 0.05:
        raise ValueError(
            f"{name} computes its logits in a way HFCausalLM.logits does not know (relative "
            f"difference {_distance(own, family):.3g}); add its scaling there."
        )
    if _distance(hidden, alone) > 0.05:
        raise ValueError(
            f"{name} lets packed samples see each other (relative difference "
            f"{_distance(hidden, alone):.3g}): its attention ignores the sample borders. Take "
            "another family, or teach mmfusion.models.llms.attention this one."
        )


def _distance(a: Tensor, b: Tensor) -> float:
    """Relative difference of two vectors; far more than rounding in bf16 where a family differs."""
    return float((a.float() - b.float()).norm() / b.float().norm().clamp(min=1e-6))
