"""Gather a corpus of code, prose, manuals and a hundred languages from the files of this machine.

    python rust/bpe/benchmarks/corpus.py c20.txt
    python rust/bpe/benchmarks/corpus.py c200.txt --megabytes 200 --folders /usr/share/doc my_texts

Every kind of text gets its share (`SHARES`), as far as there is so much of it; the others fill the rest. A file
counts once, up to `LARGEST` bytes. The order is that of a hash of the paths. Between two documents of the result is a
zero byte. Also here: odd texts for comparing and long ones for timing.
"""

from __future__ import annotations

import argparse
import base64
import gzip
import hashlib
import html
import random
import re
import sysconfig
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

SHARES = {
    "python": 0.25,
    "manuals": 0.20,
    "prose": 0.15,
    "web pages": 0.12,
    "catalogues": 0.15,
    "c": 0.09,
    "data": 0.04,
}
KINDS = {
    **dict.fromkeys((".py", ".pyi"), "python"),
    **dict.fromkeys((".md", ".rst", ".txt", ""), "prose"),
    **dict.fromkeys((".c", ".h", ".cpp", ".hpp", ".cc", ".rs"), "c"),
    **dict.fromkeys((".js", ".ts", ".css", ".json", ".xml", ".yaml", ".csv"), "data"),
    ".html": "web pages",
    ".mo": "catalogues",  # of gettext: the messages of programs in a hundred languages
}
LARGEST = 100_000
SMALLEST = 200
SEPARATOR = "\0"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="what is written")
    parser.add_argument("--megabytes", type=float, default=20)
    parser.add_argument("--folders", nargs="+", type=Path, default=default_folders(), help="where texts are looked for")
    options = parser.parse_args()
    texts = gather(options.folders, int(options.megabytes * 1e6))
    options.file.write_text(SEPARATOR.join(texts), encoding="utf-8", newline="")
    print(f"{options.file}: {describe(texts)}")


def default_folders() -> list[Path]:
    """Python's library and packages, documentation, manuals, catalogues, headers, and Rust's books where they are."""
    share = Path("/usr/share")
    folders = [*(Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib")), Path("/usr/include")]
    books = sorted((Path.home() / ".rustup/toolchains").glob("*/share/doc"))[:1]
    return [*folders, share / "doc", share / "man", share / "locale", *books]


def gather(folders: list[Path], wanted: int) -> list[str]:
    """Distinct texts, together `wanted` bytes or as many as there are."""
    paths = {path for folder in folders for path in folder.rglob("*") if path.is_file() and not path.is_symlink()}
    waiting: dict[str, list[tuple[bytes, Path]]] = {kind: [] for kind in SHARES}
    for path in paths:
        if kind := kind_of(path):
            waiting[kind].append((hashlib.sha256(str(path).encode()).digest(), path))
    seen: set[bytes] = set()
    sources = {kind: distinct(sorted(keyed), kind, seen) for kind, keyed in waiting.items()}
    taken: list[tuple[bytes, str]] = []
    total = 0
    for last in (False, True):  # every kind its share, then whoever has more
        for kind, source in sources.items():
            quota = wanted - total if last else int(wanted * SHARES[kind])
            while quota > 0 and (found := next(source, None)):
                taken.append(found)
                size = len(found[1].encode())
                quota, total = quota - size, total + size
    if not taken:
        raise SystemExit(f"no texts in {[str(folder) for folder in folders]}; give others with --folders")
    return [text for _, text in sorted(taken)]


def kind_of(path: Path) -> str | None:
    if "man" in path.parts:
        return "manuals"
    suffix = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    return KINDS.get(suffix.lower())


def distinct(keyed: list[tuple[bytes, Path]], kind: str, seen: set[bytes]) -> Iterator[tuple[bytes, str]]:
    for key, path in keyed:
        text = read(path, kind)
        head = hashlib.sha256(text[:2000].encode()).digest()  # another version of a file begins like it
        if len(text) >= SMALLEST and head not in seen:
            seen.add(head)
            yield key, text


def read(path: Path, kind: str) -> str:
    """The text of a file, "" for what is none."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            raw = file.read(4 * LARGEST)
    except (OSError, EOFError):  # not readable for this user, or no archive
        return ""
    if kind == "catalogues":  # strings with zero bytes between them after a header of numbers
        raw = b"\n".join(part for part in raw.split(b"\0") if len(part) > 8)
    elif b"\0" in raw:
        return ""
    text = raw[:LARGEST].decode("utf-8", errors="ignore")
    return html.unescape(re.sub(r"<[^>]*>", "", text)).replace("\0", "") if kind == "web pages" else text


def load(file: Path) -> list[str]:
    """The texts that `main` wrote."""
    return file.read_bytes().decode().split(SEPARATOR)


def describe(texts: list[str]) -> str:
    size = sum(len(text.encode()) for text in texts)
    digest = hashlib.sha256(SEPARATOR.join(texts).encode()).hexdigest()[:12]
    beyond = Counter(text.isascii() for text in texts)[False]
    return f"{size / 1e6:.1f} MB, {len(texts)} texts, {beyond / len(texts):.0%} of them not ASCII, sha256 {digest}"


def odd_texts() -> Iterator[str]:
    """3,000 short strings of what patterns decide on: blanks, line ends, digits, marks, contractions, emoji."""
    seeded = random.Random(7)
    parts = [
        *" \t\n\r\x0b\x1c\x85\xa0\u2028\u3000'sStTlLdDrReEvVmM\u017f1234567890.,!/_-aAzZ\u00e9\u0301\u0130\u01c5\u02b0"
    ]
    parts += [
        "\u4e2d",
        "\U0001f600",
        "\U0001d7d8",
        "\u0e01",
        "\u0e31",
        "'s",
        "'\u017f",
        "\r\n",
        "  ",
        "<|endoftext|>",
        "\u00bd",
        "\u2160",
    ]
    for _ in range(3000):
        yield "".join(seeded.choices(parts, k=seeded.randrange(1, 40)))


def long_cases(length: int) -> Iterator[tuple[str, str]]:
    seeded = random.Random(1234)
    letters = "abcdefghijklmnopqrstuvwxyz"
    yield "a", "a" * length
    yield "ab", "ab" * (length // 2)
    yield "blanks", " " * length
    yield "newlines", "\n" * length
    yield "!", "!" * length
    yield "digits", "7" * length
    yield "one Chinese letter", "\u6211" * length
    yield "random letters", "".join(seeded.choices(letters, k=length))
    yield "base64", base64.b64encode(seeded.randbytes(length)).decode()[:length]
    yield "random Chinese letters", "".join(chr(seeded.randrange(0x4E00, 0x9FA5)) for _ in range(length))
    yield "random bytes", seeded.randbytes(length).decode("utf-8", "replace")


if __name__ == "__main__":
    main()
