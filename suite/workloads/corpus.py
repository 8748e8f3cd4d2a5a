"""Text as token ids: where it comes from, how it is tokenised, and the cache that ranks share.

A document is a file, a topic or a dataset row. The tokeniser (byte-level byte-pair encoding) is
trained on the very text, so that nothing has to be downloaded; its result is cached as one flat
array that every rank maps into memory.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tokenizers
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from suite.cache import cache_folder, making
from suite.errors import UsageError
from suite.workloads.models import PAD_TOKEN_ID

SPECIAL_TOKENS = ("[CLS]", "[PAD]", "[SEP]", "[MASK]")
"""Their ids are their places, below those of all other tokens."""
CLS, PAD, SEP, MASK = range(4)
assert PAD == PAD_TOKEN_ID

SMALLEST_VOCAB = len(SPECIAL_TOKENS) + 256
TEXT_SUFFIXES = (".txt", ".text", ".md", ".markdown", ".rst", ".tex", ".adoc", ".org")

_CACHE_FORMAT = 1
_PIECE_CHARS = 1 << 20
"""Files are encoded in pieces of this size, so that a large one never lies in memory whole."""


@dataclass(frozen=True)
class Text:
    """A text source: what the user called it, what identifies its content, and its documents, each
    in pieces."""

    name: str
    fingerprint: str
    documents: Callable[[], Iterator[Iterable[str]]]


def open_text(data: str) -> Text:
    """The source that `workload.data` names; UsageError when there is none by that name."""
    if data == "python-docs":
        return _python_docs()
    if data.startswith("hf:"):
        return _hugging_face(data)
    return _files(data)


def token_ids(text: Text, vocab: int) -> NDArray[np.int32]:
    """All tokens of the text, documents framed by [CLS] and [SEP]: a read-only map of the cached
    array, [tokens] int32, every id below `vocab`.

    Any number of processes may call it at once: one builds what is missing or damaged, the others
    wait for it. Raises UsageError when the vocabulary is too small, the text unreadable or the cache
    folder not writable.
    """
    if vocab < SMALLEST_VOCAB:
        raise UsageError(
            f"workload.model.vocab={vocab} is too small to tokenise {text.name}; it must be at least "
            f"{SMALLEST_VOCAB} ({len(SPECIAL_TOKENS)} special tokens and 256 bytes), or use data=synthetic"
        )
    path = cache_folder("tokenizers") / f"{_cache_key(text, vocab)}.npy"
    cached = _read(path, vocab)
    if cached is None:
        with making(path.with_suffix(".lock")):
            cached = _read(path, vocab)  # another process may have built it meanwhile
            if cached is None:
                _build(text, vocab, path)
                cached = _read(path, vocab)
    assert cached is not None
    return cached


def _cache_key(text: Text, vocab: int) -> str:
    what = [_CACHE_FORMAT, tokenizers.__version__, text.fingerprint, vocab]
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:32]


def _read(path: Path, vocab: int) -> NDArray[np.int32] | None:
    """None when the file is missing or damaged: in both cases it has to be built."""
    try:
        tokens = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    if not isinstance(tokens, np.ndarray) or tokens.dtype != np.int32 or tokens.ndim != 1:
        return None
    # An id out of range would fail much later, as an illegal look-up inside the model.
    if tokens.size and not (tokens.min() >= 0 and tokens.max() < vocab):
        return None
    return tokens


def _build(text: Text, vocab: int, path: Path) -> None:
    with _single_threaded():
        tokenizer = _train(text, vocab)
        tokens = _encode(text, tokenizer)
    # No rank reads the tokeniser: it lies beside the tokens for whoever wants to decode them.
    _write(path.with_suffix(".json"), lambda unfinished: tokenizer.save(str(unfinished)))
    _write(path, lambda unfinished: _save_array(unfinished, tokens))


def _train(text: Text, vocab: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    # A text that happens to say "[MASK]" means those six characters.
    tokenizer.encode_special_tokens = True
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        min_frequency=2,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((piece for document in text.documents() for piece in document), trainer)
    return tokenizer


def _encode(text: Text, tokenizer: Tokenizer) -> NDArray[np.int32]:
    parts: list[NDArray[np.int32]] = [np.empty(0, dtype=np.int32)]
    for document in text.documents():
        parts.append(np.array([CLS], dtype=np.int32))
        parts += [np.array(tokenizer.encode(piece).ids, dtype=np.int32) for piece in document]
        parts.append(np.array([SEP], dtype=np.int32))
    return np.concatenate(parts)


@contextmanager
def _single_threaded() -> Iterator[None]:
    """Keeps `tokenizers` from starting its thread pool: a process with one must not fork ranks."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before


def _write(path: Path, save: Callable[[Path], None]) -> None:
    unfinished = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        save(unfinished)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def _save_array(path: Path, tokens: NDArray[np.int32]) -> None:
    with path.open("wb") as file:  # given a name, numpy would append its own suffix
        np.save(file, tokens, allow_pickle=False)


def _python_docs() -> Text:
    """The language reference that every Python carries; it differs between Python versions."""
    from pydoc_data.topics import topics

    texts = [topics[name] for name in sorted(topics)]
    fingerprint = hashlib.sha256("\0".join(texts).encode()).hexdigest()
    return Text("python-docs", fingerprint, lambda: ([text] for text in texts))


def _files(data: str) -> Text:
    path = Path(data).expanduser()
    try:
        files = _text_files(path)
        digests = [_digest(file) for file in files]
    except OSError as error:
        raise UsageError(f"workload.data={data}: cannot read {error.filename}: {error.strerror}") from error
    fingerprint = hashlib.sha256("".join(digests).encode()).hexdigest()
    return Text(data, fingerprint, lambda: (_pieces(file) for file in files))


def _text_files(path: Path) -> list[Path]:
    if not path.exists():
        raise UsageError(
            f"workload.data={path} does not exist; give a text file or folder, "
            "python-docs, synthetic, or hf:NAME"
        )
    if not path.is_dir():
        return [path]
    files = sorted(
        file for file in path.rglob("*") if file.suffix.lower() in TEXT_SUFFIXES and file.is_file()
    )
    if not files:
        raise UsageError(f"workload.data={path} holds no text; looked for {', '.join(TEXT_SUFFIXES)} files")
    return files


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _pieces(path: Path) -> Iterator[str]:
    try:
        with path.open(encoding="utf-8") as file:
            while piece := file.read(_PIECE_CHARS):
                if "\0" in piece:
                    raise UsageError(f"workload.data: {path} is not a text file (it holds zero bytes)")
                yield piece
    except UnicodeDecodeError as error:
        raise UsageError(f"workload.data: {path} is not UTF-8 text ({error.reason})") from error


def _hugging_face(data: str) -> Text:
    """`hf:NAME` or, for a dataset of several configurations, `hf:NAME:CONFIGURATION`."""
    try:
        datasets = importlib.import_module("datasets")
    except ImportError as error:
        raise UsageError(
            f"workload.data={data} needs the Hugging Face package: pip install datasets"
        ) from error
    try:
        dataset = datasets.load_dataset(*data.removeprefix("hf:").split(":", 1), split="train")
    except Exception as error:  # offline, unknown, gated …: many types, one meaning for the user
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UsageError(
            f"workload.data={data} cannot be loaded ({reason}); "
            "check the name and the network, or use python-docs"
        ) from error
    if "text" not in dataset.column_names:
        columns = ", ".join(dataset.column_names)
        raise UsageError(f"workload.data={data} has no column 'text' (it has {columns})")
    return Text(
        data,
        str(dataset._fingerprint),
        lambda: ([row["text"]] for row in dataset if (row["text"] or "").strip()),
    )
