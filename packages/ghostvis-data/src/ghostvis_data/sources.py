"""Reading a person's own JSONL: every line checked, every bad line named.

One line is one sample:

    {"id": "cat-1", "messages": [
        {"role": "user", "content": [{"type": "image", "image": "photos/cat.jpg"},
                                     {"type": "text", "text": "What is this?"}]},
        {"role": "assistant", "content": "A cat."}]}

`id` may be left out (then it is the file's name and the line number), and `meta` may hold anything. Image paths are
relative to the JSONL. Any number of images, or none. A file of texts has lines `{"text": "..."}` instead.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from ghostvis_data.errors import DataError, explain
from ghostvis_data.rendering import image_references
from ghostvis_data.shards import Kind, Sample, image_extension
from ghostvis_model.chat import SPECIAL_TOKENS, RenderError, render
from ghostvis_model.images import ImageError, load_image

KEYS = ("id", "messages", "text", "meta")
MAX_SIDE = 1536
JPEG_QUALITY = 92


@dataclass(frozen=True)
class BadLine:
    """A line that cannot become a sample, and why."""

    line: int
    """From 1."""
    id: str
    """"" where the line was not read so far."""
    found: str
    expected: str
    likely: str

    def __str__(self) -> str:
        who = f"line {self.line}" + (f", id {self.id}" if self.id else "")
        rows = (f"{who}: {self.found}", f"  expected {self.expected}", f"  likely   {self.likely}")
        return "\n".join(f"  {row}" for row in rows)


@dataclass(frozen=True)
class Line:
    """A line that has the form of a sample; its images have not been read."""

    line: int
    id: str
    messages: list[dict[str, Any]] | None
    text: str | None
    meta: dict[str, Any]

    @property
    def kind(self) -> Kind:
        """The kind of data set it belongs to."""
        return "chat" if self.text is None else "text"


def read_lines(path: Path) -> Iterator[Line | BadLine]:
    """Every line of a JSONL that is not blank, checked as far as that goes without opening images.

    Raises:
        DataError: the file is not there.
    """
    if not path.is_file():
        raise DataError(
            explain(
                f"there is no file {path}.",
                expected="a JSONL file (one JSON object per line), or the word tiny_world",
                likely="a folder was given" if path.is_dir() else "a typing error, or another working folder",
                next_step="ghostvis-data build --help",
            )
        )
    first_use: dict[str, int] = {}
    kind: Kind | None = None
    with open(path, "rb") as file:
        for number, raw in enumerate(file, 1):
            if not raw.strip():
                continue
            line = _read_line(raw, number, path)
            if isinstance(line, Line):
                kind = kind or line.kind
                if line.kind != kind:
                    line = BadLine(
                        number,
                        line.id,
                        f"a {line.kind} line",
                        f"{kind} lines, as above it",
                        "two kinds of data in a file",
                    )
                elif line.id in first_use:
                    line = BadLine(
                        number,
                        line.id,
                        f"the id of line {first_use[line.id]} again",
                        "an id of its own for every line, or none at all",
                        "two files joined, or an image's name used as the id",
                    )
                else:
                    first_use[line.id] = number
            yield line


def load_sample(line: Line, folder: Path, max_side: int = MAX_SIDE) -> Sample | BadLine:
    """The sample of a line, its images read, decoded once to see that they can be, and made ready to store.

    JPEG, PNG and WebP files are stored as they are. A picture with a side above `max_side` pixels is scaled down
    (Lanczos; photographs as JPEG of quality 92, PNG stays lossless), and other formats become PNG.

    Args:
        line: what `read_lines` gave.
        folder: what image paths are relative to.
        max_side: pixels; 0 stores every size as it is.
    """
    references: list[str] = image_references(line.messages or [])
    names = list(dict.fromkeys(references))
    images = []
    for name in names:
        path = folder / name
        if not path.is_file():
            if path.is_dir():
                found, likely = f"the image {name} is a folder", "a name is missing at the end of the path"
            else:
                found, likely = f"the image {name} does not exist", "a moved or renamed file, or one never downloaded"
            return BadLine(line.line, line.id, found, f"a file {path} (paths are relative to the JSONL)", likely)
        try:
            images.append(_stored(path.read_bytes(), max_side))
        except (ImageError, OSError) as error:
            rows = _rows(str(error))
            reason = re.sub(r" <_io\.[^>]*>", "", rows.get("found", str(error)))  # an address in memory
            return BadLine(
                line.line,
                line.id,
                f"the image {name} cannot be read ({reason})",
                rows.get("expected", "a file that can be read"),
                "a broken download, or a page saved as an image",
            )
    messages = line.messages and [_indexed(message, names) for message in line.messages]
    return Sample(line.id, messages, line.text, images, line.meta)


def _read_line(raw: bytes, number: int, path: Path) -> Line | BadLine:
    """The checks that need this line alone."""

    def bad(found: str, expected: str, likely: str, identity: str = "") -> BadLine:
        return BadLine(number, identity, found, expected, likely)

    try:
        record = json.loads(raw)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        likely = "a JSON list over several lines: write one object per line" if raw.strip() in (b"[", b"{") else ""
        return bad(f"not JSON ({error})", "one JSON object per line, in UTF-8", likely or "an edit by hand, a cut line")
    if rb"\ud" in raw.lower() and re.search("[\ud800-\udfff]", json.dumps(record, ensure_ascii=False)):
        return bad("half of a UTF-16 pair (\\ud800 to \\udfff alone)", "text that UTF-8 can hold", "a cut emoji")
    if not isinstance(record, dict):
        return bad(
            f"a JSON {type(record).__name__}", "a JSON object", "a file that is one JSON list: write it as lines"
        )
    identity = record.get("id", f"{path.stem}-{number:06d}")
    if not isinstance(identity, str | int) or isinstance(identity, bool) or identity == "":
        return bad(f"the id {identity!r}", "a string or a number, not empty", "a missing value")
    identity = str(identity)
    unknown = [key for key in record if key not in KEYS]
    if unknown:
        return bad(
            f"the key {unknown[0]!r}",
            f"only {', '.join(KEYS)}",
            'another format: images go into the content as {"type": "image", "image": "path"}',
            identity,
        )
    if ("messages" in record) == ("text" in record):
        both = "both messages and text" if "text" in record else "neither messages nor text"
        return bad(both, 'either "messages" (a conversation) or "text" (a document)', "a missing column", identity)
    meta = record.get("meta", {})
    if not isinstance(meta, dict):
        return bad(f"meta is a {type(meta).__name__}", "an object", "a value without a name", identity)
    if "text" in record:
        if not isinstance(record["text"], str) or not record["text"].strip():
            return bad("no text", "a string that is not empty", "a missing value", identity)
        return Line(number, identity, None, record["text"], meta)
    problem = _conversation_problem(record["messages"])
    return bad(*problem, identity) if problem else Line(number, identity, record["messages"], None, meta)


def _conversation_problem(messages: Any) -> tuple[str, str, str] | None:
    """What keeps `messages` from being rendered for training, as (found, expected, likely)."""
    try:
        render(messages, _Checker(), 1)
    except RenderError as error:
        rows = _rows(str(error))
        return rows["found"], rows["expected"], rows["likely"]
    for reference in image_references(messages):
        if not isinstance(reference, str) or not reference:
            return f"the image {reference!r}", "the path of an image, relative to the JSONL", "a missing value"
    return None


class _Checker:
    """A tokenizer for which every text is one token: enough to ask `render` whether a conversation is well formed."""

    special_tokens = {name: number for number, name in enumerate(SPECIAL_TOKENS)}  # noqa: RUF012

    def special(self, name: str) -> int:
        return self.special_tokens[name]

    def encode(self, text: str) -> list[int]:
        return [len(SPECIAL_TOKENS)] if text else []

    def decode(self, ids: object, keep_special: bool = False) -> str:
        raise NotImplementedError("nothing is ever decoded while checking")


def _rows(message: str) -> dict[str, str]:
    """The rows of an error of ours: found, expected, likely, try."""
    return {line[2:11].strip(): line[11:] for line in message.splitlines()[1:]}


def _indexed(message: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """The message with image paths replaced by indices into `names`."""
    if isinstance(message["content"], str):
        return message
    parts = [p | {"image": names.index(p["image"])} if p["type"] == "image" else p for p in message["content"]]
    return {"role": message["role"], "content": parts}


def _stored(content: bytes, max_side: int) -> bytes:
    """The bytes to store for an encoded image that can be decoded."""
    picture = load_image(content)
    extension = image_extension(content)
    large = max_side and max(picture.size) > max_side
    if extension and not large:
        return content
    if large:
        scale = max_side / max(picture.size)
        size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
        picture = picture.resize(size, Image.Resampling.LANCZOS)
    out = io.BytesIO()
    if extension in ("jpg", "webp"):
        picture.save(out, "JPEG", quality=JPEG_QUALITY)
    else:
        picture.save(out, "PNG", compress_level=4)
    return out.getvalue()
