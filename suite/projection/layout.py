"""Which parameters a masked-language model has, by size alone: what methods gather and reduce."""

from __future__ import annotations

from dataclasses import dataclass

from suite.config import ModelConfig
from suite.workloads.models import n_params


@dataclass(frozen=True)
class Layout:
    """Elements of each parameter of the root (embeddings and head) and of one block, in the order in
    which the model names them; all blocks are equal."""

    root: tuple[int, ...]
    block: tuple[int, ...]
    layers: int

    @property
    def total(self) -> int:
        return sum(self.root) + self.layers * sum(self.block)


def layout_of(model: ModelConfig) -> Layout:
    """Of BERT and RoBERTa with tied embeddings."""
    h, i = model.hidden, model.intermediate
    block = (h * h, h) * 4 + (h, h) + (h * i, i, i * h, h) + (h, h)
    head = (h * h, h, h, h, model.vocab)
    embeddings = (model.vocab * h, 2 * h, h, h)
    positions = n_params(model) - sum(embeddings) - sum(head) - model.layers * sum(block)
    return Layout((*embeddings, positions, *head), block, model.layers)
