from __future__ import annotations

import hashlib
import multiprocessing
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from suite.cache import cache_folder
from suite.config import ModelConfig, WorkloadConfig
from suite.errors import UsageError
from suite.workloads import corpus, data, models
from suite.workloads.data import NOT_PREDICTED, MaskedLMBatch, PackedText, RandomTokens, Stream

ROOT = Path(__file__).resolve().parent.parent
SHAPE = ModelConfig(layers=2, hidden=32, heads=4, intermediate=48, vocab=400, seq_len=16)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SUITE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tokenizers"


def workload(source: str | Path, **shape: Any) -> WorkloadConfig:
    return WorkloadConfig("test", ModelConfig(**{**vars(SHAPE), **shape}), str(source))


def synthetic(seed: int = 0, seq_len: int = 16) -> Stream:
    return data.open_stream(workload("synthetic", seq_len=seq_len), seed)


def packed(sequences: int, seq_len: int = 5, seed: int = 0) -> Stream:
    """Every token is another one, so that a sequence is known by its first token."""
    ids = np.arange(sequences * seq_len, dtype=np.int32).reshape(sequences, seq_len) + data.N_SPECIAL
    return Stream(PackedText("numbers", ids, seed), int(ids.max()) + 1, seed)


def originals(batch: MaskedLMBatch) -> np.ndarray:
    """The unmasked tokens, put together from what is predicted and what is shown."""
    shown, labels = batch.input_ids.numpy(), batch.labels.numpy()
    return np.where(labels == NOT_PREDICTED, shown, labels)


def write_text(path: Path, words: int = 2000) -> Path:
    path.write_text(" ".join(f"word{i % 97} and {i % 13}" for i in range(words)), encoding="utf-8")
    return path


# --- the batches -----------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(-5, 2**70),
    step=st.integers(0, 50),
    world_size=st.integers(1, 6),
    micro_batch=st.integers(1, 4),
    micro_steps=st.integers(1, 4),
    text=st.booleans(),
)
def test_ranks_and_micro_steps_together_hold_the_global_batch(
    seed: int, step: int, world_size: int, micro_batch: int, micro_steps: int, text: bool
) -> None:
    stream = packed(100, seed=seed) if text else synthetic(seed, seq_len=7)
    whole = stream.global_batch(step, world_size * micro_batch * micro_steps)
    parts = [
        part
        for rank in range(world_size)
        for part in stream.micro_batches(step, rank, world_size, micro_batch, micro_steps)
    ]
    assert len(parts) == world_size * micro_steps
    assert torch.equal(torch.cat([part.input_ids for part in parts]), whole.input_ids)
    assert torch.equal(torch.cat([part.labels for part in parts]), whole.labels)
    predicted = int((whole.labels != NOT_PREDICTED).sum())
    assert {part.weight for part in parts} == {whole.weight} == {1 / max(1, predicted)}


def test_the_losses_of_the_parts_add_up_to_the_global_loss() -> None:
    model = models.build_model(SHAPE, seed=0)
    stream = synthetic()
    whole = stream.global_batch(2, 12).loss(model)
    parts = [part for rank in range(3) for part in stream.micro_batches(2, rank, 3, 2, 2)]
    torch.testing.assert_close(torch.stack([part.loss(model) for part in parts]).sum(), whole)
    # Unequal parts are the point: with equal ones a mean of means would pass as well.
    assert len({int((part.labels != NOT_PREDICTED).sum()) for part in parts}) > 1
    assert whole.dtype == torch.float32


def test_a_batch_is_the_same_every_time_and_another_for_another_seed_or_step() -> None:
    batch = synthetic(seed=1).global_batch(3, 8)
    assert torch.equal(synthetic(seed=1).global_batch(3, 8).input_ids, batch.input_ids)
    assert not torch.equal(synthetic(seed=2).global_batch(3, 8).input_ids, batch.input_ids)
    assert not torch.equal(synthetic(seed=1).global_batch(4, 8).input_ids, batch.input_ids)


def test_the_first_batch_of_seed_0_stays_what_it_is() -> None:
    """Published losses could not be repeated if a new version of anything changed the data."""
    batch = synthetic().global_batch(0, 8)
    digest = hashlib.sha256(batch.input_ids.numpy().tobytes() + batch.labels.numpy().tobytes())
    assert digest.hexdigest()[:16] == "10241820c56890fc"


def test_an_epoch_holds_every_sequence_once_and_each_epoch_has_its_own_order() -> None:
    stream = packed(sequences=60)
    epochs = []
    for epoch in range(2):
        steps = range(epoch * 6, epoch * 6 + 6)
        firsts = [originals(stream.global_batch(step, 10))[:, 0] for step in steps]
        epochs.append(np.concatenate(firsts))
    assert set(epochs[0]) == set(epochs[1]) == {5 * i + data.N_SPECIAL for i in range(60)}
    assert not np.array_equal(epochs[0], epochs[1])
    assert not np.array_equal(epochs[0], np.sort(epochs[0]))


def test_a_batch_may_span_two_epochs() -> None:
    stream = packed(sequences=10)
    whole = np.concatenate([originals(stream.global_batch(s, 4)) for s in range(5)])
    assert sorted(whole[:10, 0]) == sorted(whole[10:, 0])


def test_masking_predicts_15_percent_and_shows_80_10_10() -> None:
    stream = synthetic(seq_len=512)
    batch = stream.global_batch(0, 256)
    shown, labels = batch.input_ids, batch.labels
    predicted = labels != NOT_PREDICTED
    assert predicted.float().mean().item() == pytest.approx(0.15, abs=0.005)
    as_mask = (shown[predicted] == corpus.MASK).float().mean().item()
    as_itself = (shown[predicted] == labels[predicted]).float().mean().item()
    assert as_mask == pytest.approx(0.8, abs=0.01)
    assert as_itself == pytest.approx(0.1, abs=0.01)
    assert (shown[~predicted] >= data.N_SPECIAL).all()
    others = shown[predicted & (shown != corpus.MASK) & (shown != labels)]
    assert others.min() >= data.N_SPECIAL and others.max() < SHAPE.vocab


def test_special_tokens_are_never_predicted() -> None:
    ids = np.full((50, 16), corpus.SEP, dtype=np.int32)
    ids[:, 0] = 9
    batch = Stream(PackedText("separators", ids, 0), 20, 0).global_batch(0, 50)
    assert (batch.labels[:, 0] != NOT_PREDICTED).any()
    assert (batch.labels[:, 1:] == NOT_PREDICTED).all()
    assert (batch.input_ids[:, 1:] == corpus.SEP).all()


def test_a_rank_generates_only_its_own_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[range] = []
    original = RandomTokens.read

    def recording(self: RandomTokens, samples: range) -> np.ndarray:
        read.append(samples)
        return original(self, samples)

    monkeypatch.setattr(RandomTokens, "read", recording)
    synthetic().micro_batches(step=1, rank=2, world_size=4, micro_batch=2, micro_steps=3)
    assert read == [range(24 + 12, 24 + 18)]


def test_a_batch_without_any_predicted_token_still_reaches_every_parameter() -> None:
    model = models.build_model(SHAPE, seed=0)
    tokens = torch.full((2, 16), 9)
    loss = MaskedLMBatch(tokens, torch.full((2, 16), NOT_PREDICTED), 1.0).loss(model)
    loss.backward()
    assert loss.item() == 0
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


def test_the_loss_of_a_bf16_model_is_fp32() -> None:
    model = models.build_model(SHAPE, seed=0).to(torch.bfloat16)
    assert synthetic().global_batch(0, 2).loss(model).dtype == torch.float32


@pytest.mark.parametrize("family", models.FAMILIES)
def test_attention_takes_the_unmasked_path(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    masks: list[Any] = []
    original = torch.nn.functional.scaled_dot_product_attention

    def recording(*args: Any, **kwargs: Any) -> torch.Tensor:
        masks.append(kwargs.get("attn_mask"))
        return original(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", recording)
    model = models.build_model(ModelConfig(**{**vars(SHAPE), "family": family}), seed=0)
    synthetic().global_batch(0, 2).loss(model)
    assert masks == [None, None]


def test_a_batch_moves_to_a_device() -> None:
    moved = synthetic().global_batch(0, 2).to(torch.device("meta"))
    assert {moved.input_ids.device.type, moved.labels.device.type} == {"meta"}


# --- the text and its cache ------------------------------------------------------------------------


def test_the_bundled_text_gives_real_packed_sequences(cache: Path) -> None:
    source = workload("python-docs", vocab=2048, seq_len=64)
    data.prepare(source, samples=256)
    tokens = np.load(next(cache.glob("*.npy")))
    assert len(tokens) > 100_000 and tokens.max() < 2048
    tokenizer = Tokenizer.from_file(str(next(cache.glob("*.json"))))
    end = int(np.argmax(tokens == corpus.SEP))
    assert tokens[0] == corpus.CLS and tokens[end + 1] == corpus.CLS
    from pydoc_data.topics import topics

    assert tokenizer.decode(tokens[1:end].tolist()) == topics[min(topics)]
    assert data.open_stream(source, seed=0).global_batch(0, 4).input_ids.shape == (4, 64)


def test_after_prepare_a_stream_opens_without_any_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = workload(write_text(tmp_path / "text.txt"))
    data.prepare(source)

    def refuse(*_: Any) -> None:
        raise AssertionError("built again")

    monkeypatch.setattr(corpus, "_build", refuse)
    data.open_stream(source, seed=0).global_batch(0, 4)
    with pytest.raises(AssertionError, match="built again"):
        data.open_stream(workload(write_text(tmp_path / "text.txt", words=1999)), seed=0)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"rubbish" * 100),
        lambda path: path.write_bytes(path.read_bytes()[:-7]),
        lambda path: np.save(path, np.array([{"a": 1}], dtype=object), allow_pickle=True),
        lambda path: np.save(path, np.full(500, SHAPE.vocab, dtype=np.int32)),
        lambda path: np.save(path, np.full(500, 9, dtype=np.int64)),
    ],
    ids=["empty", "rubbish", "truncated", "pickled", "out-of-range", "other-type"],
)
def test_a_damaged_cache_file_is_built_again(tmp_path: Path, cache: Path, damage: Any) -> None:
    source = workload(write_text(tmp_path / "text.txt"))
    expected = data.open_stream(source, seed=0).global_batch(0, 8)
    damage(next(cache.glob("*.npy")))
    again = data.open_stream(source, seed=0).global_batch(0, 8)
    assert torch.equal(again.input_ids, expected.input_ids)


def test_many_ranks_on_a_cold_cache_build_it_once(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = workload(write_text(tmp_path / "text.txt"))
    log = tmp_path / "builds"
    original = corpus._build

    def logged(*args: Any) -> None:
        with log.open("a") as file:
            file.write("built\n")
        original(*args)

    monkeypatch.setattr(corpus, "_build", logged)
    ranks = [
        multiprocessing.get_context("fork").Process(target=data.open_stream, args=(source, 0))
        for _ in range(6)
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(timeout=30)
    assert [rank.exitcode for rank in ranks] == [0] * 6
    assert log.read_text() == "built\n"
    assert sorted(path.suffix for path in cache.iterdir()) == [".json", ".lock", ".npy"]


FORKING_PARENT = r"""
    import multiprocessing, os, sys
    from suite.config import ModelConfig, WorkloadConfig
    from suite.workloads import data

    model = ModelConfig(vocab=400, seq_len=16)
    texts = [WorkloadConfig("test", model, path) for path in sys.argv[1:]]
    threads = os.listdir("/proc/self/task")
    data.prepare(texts[0])
    assert os.listdir("/proc/self/task") == threads, "a thread pool was left behind"

    def rank():
        warm = data.open_stream(texts[0], 0).global_batch(0, 8)
        cold = data.open_stream(texts[1], 0).global_batch(0, 8)
        # One system call, so that the lines of several ranks stay whole.
        os.write(1, f"{warm.input_ids.sum()} {cold.input_ids.sum()}\n".encode())

    ranks = [multiprocessing.get_context("fork").Process(target=rank) for _ in range(3)]
    for process in ranks: process.start()
    for process in ranks: process.join()
    sys.exit(max(process.exitcode for process in ranks))
"""


def test_ranks_forked_after_training_a_tokeniser_neither_hang_nor_differ(tmp_path: Path) -> None:
    paths = [write_text(tmp_path / "first.txt"), write_text(tmp_path / "second.txt", words=3000)]
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(FORKING_PARENT), *map(str, paths)],
        cwd=ROOT,
        env={**os.environ, "SUITE_CACHE": str(tmp_path / "elsewhere"), "PYTHONHASHSEED": "5"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0 and done.stderr == ""
    # This process trains once more, in another cache: the result must not depend on the process.
    here = [data.open_stream(workload(path), 0).global_batch(0, 8).input_ids.sum().item() for path in paths]
    assert done.stdout.splitlines() == [f"{here[0]} {here[1]}"] * 3


def test_training_leaves_the_environment_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    data.prepare(workload(write_text(tmp_path / "a.txt")))
    assert "TOKENIZERS_PARALLELISM" not in os.environ
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    data.prepare(workload(write_text(tmp_path / "b.txt", words=1999)))
    assert os.environ["TOKENIZERS_PARALLELISM"] == "true"


def test_a_folder_is_read_recursively_and_only_its_texts(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    (folder / "deeper").mkdir(parents=True)
    write_text(folder / "b.txt")
    write_text(folder / "deeper" / "a.MD", words=500)
    (folder / "picture.png").write_bytes(b"\x89PNG\0\xff")
    tokens = corpus.token_ids(corpus.open_text(str(folder)), 400)
    assert (tokens == corpus.CLS).sum() == (tokens == corpus.SEP).sum() == 2


def test_large_files_are_read_in_pieces_without_losing_text(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus, "_PIECE_CHARS", 100)
    path = tmp_path / "text.txt"
    path.write_text("naïve façade, ça va … " * 50, encoding="utf-8")
    tokens = corpus.token_ids(corpus.open_text(str(path)), 400)
    tokenizer = Tokenizer.from_file(str(next(cache.glob("*.json"))))
    assert tokenizer.decode(tokens[1:-1].tolist()) == path.read_text(encoding="utf-8")


def test_a_text_that_spells_a_special_token_does_not_become_one(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("the [MASK] token and the [PAD] token " * 100)
    tokens = corpus.token_ids(corpus.open_text(str(path)), 400)
    assert (tokens[1:-1] >= data.N_SPECIAL).all()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"text\.txt does not exist"),
        (b"\xff\xfe\x00binary", r"text\.txt is not UTF-8 text"),
        (b"zero\x00bytes", r"text\.txt is not a text file"),
        (b"short", r"text\.txt is too short: 7 tokens, .*seq_len=16"),
        (b"", r"text\.txt is too short: 2 tokens, .*seq_len=16"),
    ],
)
def test_a_path_that_gives_no_sequence_is_refused(
    tmp_path: Path, content: bytes | None, message: str
) -> None:
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError, match=message):
        data.prepare(workload(path))


def test_a_folder_without_texts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"holds no text; looked for \.txt"):
        data.prepare(workload(tmp_path))


def test_a_text_shorter_than_a_global_batch_is_refused_with_both_sizes(tmp_path: Path) -> None:
    source = workload(write_text(tmp_path / "text.txt"))
    message = r"text\.txt is too short: it gives \d+ sequences of 16 tokens, and a global batch needs 9999"
    with pytest.raises(UsageError, match=message):
        data.prepare(source, samples=9999)
    with pytest.raises(UsageError, match=message):
        data.open_stream(source, seed=0).global_batch(0, 9999)


@pytest.mark.parametrize(("source", "vocab"), [("python-docs", 259), ("synthetic", 4)])
def test_a_vocabulary_that_is_too_small_is_refused(source: str, vocab: int) -> None:
    with pytest.raises(UsageError, match=rf"workload\.model\.vocab={vocab} is too small"):
        data.prepare(workload(source, vocab=vocab))


def test_a_cache_folder_that_cannot_be_written_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SUITE_CACHE", str(tmp_path / "file"))
    with pytest.raises(UsageError, match=r"cannot write to the cache folder .*set SUITE_CACHE"):
        data.prepare(workload(write_text(tmp_path / "text.txt")))


def test_the_cache_follows_the_xdg_convention(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SUITE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_folder("tokenizers") == Path("/xdg/sharded-suite/tokenizers")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder("tokenizers") == Path.home() / ".cache" / "sharded-suite" / "tokenizers"


class Rows(list):
    """As much of a Hugging Face dataset as is read."""

    _fingerprint = "f00"

    @property
    def column_names(self) -> list[str]:
        return list(self[0])


def test_a_hugging_face_dataset_is_read_row_by_row(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    documents = Rows([{"text": "some words here " * 20}, {"text": " \n"}, {"text": "and others there " * 20}])

    def load_dataset(*name: str, split: str) -> Rows:
        asked.append((*name, split))
        return documents

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    tokens = corpus.token_ids(corpus.open_text("hf:some/corpus:raw"), 400)
    assert asked == [("some/corpus", "raw", "train")]
    assert (tokens == corpus.SEP).sum() == 2


def test_a_hugging_face_dataset_without_text_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = Rows([{"sentence": "some words", "label": 1}])
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=lambda *_, split: rows))
    with pytest.raises(UsageError, match=r"no column 'text' \(it has sentence, label\)"):
        corpus.open_text("hf:some/corpus")


def test_hugging_face_without_the_package_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UsageError, match=r"hf:some/corpus needs .*pip install datasets"):
        data.prepare(workload("hf:some/corpus"))


def test_hugging_face_offline_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*_: str, split: str) -> None:
        raise ConnectionError("Couldn't reach the Hub\nand a lot more")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(UsageError, match=r"cannot be loaded \(Couldn't reach the Hub\)") as caught:
        data.prepare(workload("hf:some/corpus"))
    assert "\n" not in str(caught.value)
