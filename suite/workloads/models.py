"""The masked-language models: Hugging Face BERT and RoBERTa, built from their shape alone."""

from __future__ import annotations

import importlib
import warnings
from typing import Any

import torch
from torch import nn

from suite.config import ModelConfig
from suite.errors import unknown

PAD_TOKEN_ID = 1
"""The one token that never occurs in the data (sequences are packed).

It stands where RoBERTa has it, because RoBERTa counts positions from `PAD_TOKEN_ID + 1` and skips
padding; BERT gets the same, so that both families can be given the same token ids.
"""

FAMILIES = ("bert", "roberta")


def build_model(model: ModelConfig, seed: int, activation_checkpointing: bool = False) -> nn.Module:
    """`BertForMaskedLM` or `RobertaForMaskedLM`, fp32, in training mode; on the CPU, or on meta inside
    `with torch.device("meta")`.

    Every rank calls it: equal arguments give equal weights, and the caller's random numbers are left
    as they were. Embedding and decoder are tied. Raises UsageError for an unknown family.
    """
    meta = torch.get_default_device().type == "meta"
    with torch.device("meta" if meta else "cpu"), torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed, which would also reseed the accelerators that fork_rng leaves alone.
        torch.default_generator.manual_seed(seed)
        return _construct(model, activation_checkpointing)


def preload(model: ModelConfig) -> None:
    """Imports what `build_model` needs, seconds that forked ranks then find already paid.

    Raises UsageError for an unknown family.
    """
    if model.family not in FAMILIES:
        raise unknown("workload.model.family", model.family, FAMILIES)
    importlib.import_module(f"transformers.models.{model.family}.modeling_{model.family}")


def meta_model(model: ModelConfig) -> nn.Module:
    """The same model without storage: for shapes and names at sizes that no host could hold."""
    with torch.device("meta"):
        return _construct(model, activation_checkpointing=False)


def n_params(model: ModelConfig) -> int:
    """Exact number of parameters, tied weights once; arithmetic only, so it is free at any size.

    Raises UsageError for an unknown family.
    """
    hidden, vocab = model.hidden, model.vocab
    layer_norm = 2 * hidden
    embeddings = (vocab + _max_positions(model) + _TOKEN_TYPES) * hidden + layer_norm
    head = hidden * hidden + hidden + layer_norm + vocab
    return embeddings + model.layers * block_params(model) + head


def block_params(model: ModelConfig) -> int:
    """Exact number of parameters of one transformer block."""
    hidden = model.hidden
    attention = 4 * (hidden * hidden + hidden)
    feed_forward = 2 * hidden * model.intermediate + model.intermediate + hidden
    layer_norm = 2 * hidden
    return attention + feed_forward + 2 * layer_norm


_TOKEN_TYPES = 2


def _max_positions(model: ModelConfig) -> int:
    if model.family not in FAMILIES:
        raise unknown("workload.model.family", model.family, FAMILIES)
    offset = PAD_TOKEN_ID + 1 if model.family == "roberta" else 0
    return model.seq_len + offset


def _construct(model: ModelConfig, activation_checkpointing: bool) -> nn.Module:
    # Here and not above: importing transformers takes seconds, which arithmetic need not pay.
    from transformers import BertConfig, BertForMaskedLM, RobertaConfig, RobertaForMaskedLM

    shape: dict[str, Any] = {
        "vocab_size": model.vocab,
        "hidden_size": model.hidden,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "intermediate_size": model.intermediate,
        "max_position_embeddings": _max_positions(model),
        "type_vocab_size": _TOKEN_TYPES,
        "pad_token_id": PAD_TOKEN_ID,
        # Dropout draws other random numbers on every rank and world size: with it no implementation
        # could be held against a reference, or against another implementation.
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "attn_implementation": "sdpa",
        "use_cache": False,
    }
    bert = model.family == "bert"
    built = BertForMaskedLM(BertConfig(**shape)) if bert else RobertaForMaskedLM(RobertaConfig(**shape))
    if activation_checkpointing:
        with warnings.catch_warnings():
            # Newer versions want another name for it, which the older supported ones do not have.
            warnings.simplefilter("ignore", FutureWarning)
            built.gradient_checkpointing_enable({"use_reentrant": False})
    return built.train()
