"""The masked-language batches, the same for every implementation and world size.

A sample (its tokens, its mask, its replacements) is a pure function of the seed and of its index in
the run, so it does not matter which rank reads it. Random numbers come from a counter-based
generator, which reaches any sample without drawing those before it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from suite.config import WorkloadConfig
from suite.errors import UsageError
from suite.workloads import corpus

NOT_PREDICTED = -100
N_SPECIAL = len(corpus.SPECIAL_TOKENS)

# What a random number is for; each purpose has numbers of its own.
_ORDER, _MASKING, _REPLACEMENT, _CONTENT = range(4)

# One draw per token decides everything: 15% of the tokens are predicted, and of those 80% are shown
# as [MASK], 10% as a random token and 10% as they are.
_PREDICTED = np.uint64(0.15 * 2**64)
_SHOWN_AS_MASK = np.uint64(0.15 * 0.8 * 2**64)
_SHOWN_AS_MASK_OR_RANDOM = np.uint64(0.15 * 0.9 * 2**64)


@dataclass(frozen=True, eq=False)
class MaskedLMBatch:
    """A global batch, or the part of it that one rank sees in one micro-step.

    `input_ids` [samples, seq_len] int64; `labels` the same, NOT_PREDICTED where nothing is
    predicted; `weight` is 1 / (predicted tokens of the global batch).
    """

    input_ids: Tensor
    labels: Tensor
    weight: float

    def loss(self, model: nn.Module) -> Tensor:
        """See `MicroBatch.loss`. Without any predicted token it is zero, and still reaches every
        parameter: collectives in backward hooks need each of them on each rank."""
        # No attention mask: packed sequences have no padding, and attention then takes its fast path.
        logits = model(input_ids=self.input_ids).logits
        total = functional.cross_entropy(
            logits.float().flatten(0, 1),
            self.labels.flatten(),
            ignore_index=NOT_PREDICTED,
            reduction="sum",
        )
        return total * self.weight

    def to(self, device: torch.device) -> MaskedLMBatch:
        """On an accelerator by way of pinned memory: the host does not wait for the copy."""
        return replace(self, input_ids=_send(self.input_ids, device), labels=_send(self.labels, device))


def _send(tensor: Tensor, device: torch.device) -> Tensor:
    if device.type in ("cpu", "meta"):
        return tensor.to(device)
    # Torch keeps the pinned copy until the device has read it.
    return tensor.pin_memory().to(device, non_blocking=True)


class Sequences(Protocol):
    """Unmasked samples, by their index in the run (0, 1, 2 … over all steps)."""

    @property
    def seq_len(self) -> int: ...

    def read(self, samples: range) -> NDArray[np.int64]:
        """Token ids, [len(samples), seq_len]."""
        ...

    def maskable(self, samples: range) -> NDArray[np.bool_]:
        """Where a token may be predicted, [len(samples), seq_len]; must not cost much, since each
        rank asks for the whole global batch."""
        ...

    def check_batch(self, size: int) -> None:
        """Raises UsageError when there are too few sequences for a batch of `size` different ones."""
        ...


@dataclass(frozen=True)
class PackedText:
    """A text cut into sequences without regard for its documents, in a new order each epoch.

    `tokens` is [sequences, seq_len] int32.
    """

    name: str
    tokens: NDArray[np.int32]
    seed: int

    @property
    def seq_len(self) -> int:
        return self.tokens.shape[1]

    def read(self, samples: range) -> NDArray[np.int64]:
        count = len(self.tokens)
        places = [_epoch_order(self.seed, sample // count, count)[sample % count] for sample in samples]
        return self.tokens[places].astype(np.int64)

    def maskable(self, samples: range) -> NDArray[np.bool_]:
        return self.read(samples) >= N_SPECIAL

    def check_batch(self, size: int) -> None:
        if size > len(self.tokens):
            raise UsageError(
                f"workload.data={self.name} is too short: it gives {len(self.tokens)} sequences of "
                f"{self.seq_len} tokens, and a global batch needs {size}; "
                "use a longer text, a smaller batch, or data=synthetic"
            )


@dataclass(frozen=True)
class RandomTokens:
    """Endless uniform tokens: no text and no tokeniser, for runs where only speed counts."""

    seq_len: int
    vocab: int
    seed: int

    def read(self, samples: range) -> NDArray[np.int64]:
        return _random_tokens(self.seed, _CONTENT, samples, self.seq_len, self.vocab)

    def maskable(self, samples: range) -> NDArray[np.bool_]:
        return np.ones((len(samples), self.seq_len), dtype=np.bool_)

    def check_batch(self, size: int) -> None:
        pass


@dataclass(frozen=True)
class Stream:
    """The batches of one run; every rank holds one and reads its own samples from it."""

    sequences: Sequences
    vocab: int
    seed: int

    def global_batch(self, step: int, size: int) -> MaskedLMBatch:
        """All `size` samples of a step (counted from 0)."""
        batch = range(step * size, (step + 1) * size)
        return self._part(batch, batch)

    def micro_batches(
        self, step: int, rank: int, world_size: int, micro_batch: int, micro_steps: int
    ) -> list[MaskedLMBatch]:
        """One rank's part of a step: `micro_steps` batches of `micro_batch` samples.

        Ranks take consecutive parts of the global batch, and micro-steps consecutive parts of those.
        """
        per_rank = micro_batch * micro_steps
        size = per_rank * world_size
        batch = range(step * size, (step + 1) * size)
        own = self._part(batch, batch[rank * per_rank : (rank + 1) * per_rank])
        return [
            replace(own, input_ids=input_ids, labels=labels)
            for input_ids, labels in zip(
                own.input_ids.split(micro_batch), own.labels.split(micro_batch), strict=True
            )
        ]

    def _part(self, batch: range, own: range) -> MaskedLMBatch:
        """The samples `own` of the global batch `batch`, weighted by the tokens predicted in all of
        it: no rank has to ask the others how many they hold."""
        self.sequences.check_batch(len(batch))
        draws = _random_words(self.seed, _MASKING, batch, self.sequences.seq_len)
        predicted = (draws < _PREDICTED) & self.sequences.maskable(batch)
        weight = 1.0 / max(1, int(predicted.sum()))
        mine = slice(own.start - batch.start, own.stop - batch.start)
        return self._masked(own, draws[mine], predicted[mine], weight)

    def _masked(
        self, samples: range, draws: NDArray[np.uint64], predicted: NDArray[np.bool_], weight: float
    ) -> MaskedLMBatch:
        tokens = self.sequences.read(samples)
        others = _random_tokens(self.seed, _REPLACEMENT, samples, tokens.shape[1], self.vocab)
        shown = np.where(predicted & (draws < _SHOWN_AS_MASK_OR_RANDOM), others, tokens)
        shown = np.where(predicted & (draws < _SHOWN_AS_MASK), corpus.MASK, shown)
        labels = np.where(predicted, tokens, NOT_PREDICTED)
        return MaskedLMBatch(torch.from_numpy(shown), torch.from_numpy(labels), weight)


def open_stream(workload: WorkloadConfig, seed: int) -> Stream:
    """Every rank calls it; after `prepare` it only maps a file. Raises UsageError for data that is
    missing, not text, or too short for one sequence."""
    return Stream(_sequences(workload, seed), workload.model.vocab, seed)


def prepare(workload: WorkloadConfig, samples: int = 1) -> None:
    """Trains and caches what the ranks will read; the parent calls it before it starts them.

    `samples` is the global batch. Raises `open_stream`'s errors, and UsageError when the text has
    fewer sequences than that: before anything runs.
    """
    _sequences(workload, seed=0).check_batch(samples)


def _sequences(workload: WorkloadConfig, seed: int) -> Sequences:
    model = workload.model
    if workload.data == "synthetic":
        if model.vocab <= N_SPECIAL:
            raise UsageError(
                f"workload.model.vocab={model.vocab} is too small; {N_SPECIAL} tokens are special, "
                f"so it must be at least {N_SPECIAL + 1}"
            )
        return RandomTokens(model.seq_len, model.vocab, seed)
    text = corpus.open_text(workload.data)
    tokens = corpus.token_ids(text, model.vocab)
    count = len(tokens) // model.seq_len
    if count == 0:
        raise UsageError(
            f"workload.data={text.name} is too short: {len(tokens)} tokens, and one sequence needs "
            f"workload.model.seq_len={model.seq_len}; use a longer text"
        )
    rows = tokens[: count * model.seq_len].reshape(count, model.seq_len)
    return PackedText(text.name, rows, seed)


@lru_cache(maxsize=2)
def _epoch_order(seed: int, epoch: int, count: int) -> NDArray[np.int64]:
    """Which sequence comes when in an epoch; two are kept, for the batch that spans them."""
    return np.argsort(_random_words(seed, _ORDER, range(epoch, epoch + 1), count)[0], kind="stable")


def _random_tokens(seed: int, purpose: int, samples: range, width: int, vocab: int) -> NDArray[np.int64]:
    """Uniform ordinary tokens, [len(samples), width]."""
    words = _random_words(seed, purpose, samples, width)
    return (words % np.uint64(vocab - N_SPECIAL)).astype(np.int64) + N_SPECIAL


def _random_words(seed: int, purpose: int, rows: range, width: int) -> NDArray[np.uint64]:
    """64 random bits each, [len(rows), width]; a row depends on (seed, purpose, its index) alone.

    Raw bits, since numpy promises them to stay the same between its versions, unlike its
    distributions. One counter value gives four words, hence rows begin at multiples of that.
    """
    counters = math.ceil(width / 4)
    key = np.array([seed % 2**64, purpose], dtype=np.uint64)
    generator = np.random.Philox(key=key, counter=rows.start * counters)
    words = generator.random_raw(len(rows) * counters * 4)
    return words.reshape(len(rows), counters * 4)[:, :width]
