"""Encoded pictures on their way into shards: kept as they are where that is possible, and seen to be whole."""

from __future__ import annotations

import io
import struct

from PIL import Image

from ghostvis_data.shards import image_extension
from ghostvis_model.images import MAX_PIXELS, load_image

MAX_SIDE = 1536
JPEG_QUALITY = 92
_TAIL = 4096  # bytes at the end of a file in which its last marker is looked for
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # JPEG markers that hold the size


def stored(content: bytes, max_side: int, *, decode: bool) -> bytes:
    """The bytes to store for an encoded picture.

    JPEG, PNG and WebP are stored as they are. A picture with a side above `max_side` pixels is scaled down (Lanczos;
    photographs as JPEG of quality 92, PNG stays lossless), and other formats become PNG.

    Args:
        content: the encoded picture.
        max_side: pixels; 0 stores every size as it is.
        decode: decode every picture to see that it can be. Otherwise only its header and its end are read (a file cut
            short is found, damage in the middle is not), which is a hundred times faster.

    Raises:
        ImageError: it cannot be decoded.
    """
    extension = image_extension(content)
    if extension and not decode:
        size = measure(content)
        if size and (not max_side or max(size) <= max_side) and size[0] * size[1] <= MAX_PIXELS:
            return content
    picture = load_image(content)
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


def measure(content: bytes) -> tuple[int, int] | None:
    """(width, height) in pixels of a JPEG, PNG or WebP that begins and ends as it should; None for any other."""
    extension = image_extension(content)
    try:
        if extension == "png":
            whole = content.rfind(b"IEND", max(0, len(content) - _TAIL)) > 0 and content[12:16] == b"IHDR"
            return struct.unpack(">II", content[16:24]) if whole else None
        if extension == "jpg":
            return _jpeg(content) if content.rfind(b"\xff\xd9", max(0, len(content) - _TAIL)) > 0 else None
        if extension == "webp":
            return _webp(content) if int.from_bytes(content[4:8], "little") + 8 <= len(content) else None
    except (struct.error, IndexError):
        return None  # too short for its own header: not whole
    return None


def _jpeg(content: bytes) -> tuple[int, int] | None:
    """The size in the frame header: segments are 0xFF, a marker, a length of two bytes."""
    place = 2
    while place + 9 < len(content):
        if content[place] != 0xFF:
            return None
        marker = content[place + 1]
        if marker in _FRAMES:
            height, width = struct.unpack(">HH", content[place + 5 : place + 9])
            return (width, height) if width and height else None
        place += 1 if marker == 0xFF else 2 + int.from_bytes(content[place + 2 : place + 4], "big")
    return None


def _webp(content: bytes) -> tuple[int, int] | None:
    kind = content[12:16]
    if kind == b"VP8X":
        return 1 + int.from_bytes(content[24:27], "little"), 1 + int.from_bytes(content[27:30], "little")
    if kind == b"VP8L":
        bits = int.from_bytes(content[21:25], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if kind == b"VP8 ":
        width, height = struct.unpack("<HH", content[26:30])
        return width & 0x3FFF, height & 0x3FFF
    return None
