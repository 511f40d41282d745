"""An encoded image as pixels, for JPEG photographs two and a half times as fast as the usual way.

    pixels = decode(content, 384)          # uint8 [3, S, S], as ghostvis_model.images.to_pixels places it

A plain colour JPEG is decoded by libjpeg-turbo (simplejpeg) and scaled by torch's 8-bit antialiased bicubic: 69 dB from
what Pillow makes of it. Without simplejpeg, on the few platforms that it has no wheel for, Pillow does it all, and
`decoder()` says so. Everything else (PNG, WebP, grey, CMYK, a turned photograph, damaged bytes) goes through
`to_pixels`, pixel for pixel. Both work without the interpreter's lock, so threads are enough to use many cores.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from functools import cache

import numpy as np
import torch

from ghostvis_model.images import MAX_PIXELS, PAD_VALUE, Fit, placement, to_pixels

_START_OF_SCAN = 0xDA
_APP1, _APP14 = 0xE1, 0xEE
_FRAMES = frozenset((0xC0, 0xC1, 0xC2))  # baseline, extended and progressive; the rest is arithmetic or lossless coding


def decode(content: bytes, image_size: int, fit: Fit = "letterbox", out: np.ndarray | None = None) -> np.ndarray:
    """The whole picture as uint8 [3, S, S], S = `image_size`, scaled by antialiased bicubic; see `to_pixels`.

    Args:
        content: a file of any format that `ghostvis_model.images.load_image` reads.
        image_size: S, pixels of a side.
        fit: "letterbox" keeps the proportions and pads with mid-grey, "resize" stretches to the square.
        out: where to write, uint8 [3, S, S] of any strides; None makes a new array, a plane for each colour.

    Raises:
        ImageError: the bytes cannot be read, or hold more than `MAX_PIXELS` pixels.
    """
    if out is None:
        out = np.empty((3, image_size, image_size), np.uint8)
    size = plain_jpeg_size(content)
    # Of an upright picture that is stretched, Pillow scales the columns first and torch the rows: 55 dB apart.
    fast = size is not None and size[0] * size[1] <= MAX_PIXELS and (fit == "letterbox" or size[0] >= size[1])
    picture = _turbo(content) if fast else None
    if picture is None:
        out[:] = to_pixels(content, image_size, fit)
        return out
    height, width, _ = picture.shape
    place = placement(width, height, image_size, fit)
    # [1, 3, H, W] with the strides by which torch knows channels last: with others it takes 90 us (a quarter) longer.
    pixels = torch.from_numpy(picture)[None].permute(0, 3, 1, 2)
    if (width, height) != (place.width, place.height):
        pixels = torch.nn.functional.interpolate(
            pixels, size=(place.height, place.width), mode="bicubic", antialias=True, align_corners=False
        )
    right, below = place.left + place.width, place.top + place.height
    for border in (out[:, : place.top], out[:, below:], out[:, :, : place.left], out[:, :, right:]):
        border.fill(PAD_VALUE)
    # Copied by numpy: torch's copy_ starts as many threads as there are cores, for each thread that decodes (7 ms
    # instead of 9 us on two busy cores). Its 8-bit interpolate stays in the calling thread.
    out[:, place.top : below, place.left : right] = pixels[0].numpy()
    return out


def plain_jpeg_size(content: bytes) -> tuple[int, int] | None:
    """(width, height) of a three-component, 8-bit JPEG without EXIF or Adobe notes; None for anything else.

    EXIF may turn the picture and an Adobe note may change its colours: those few go the careful way.
    """
    if content[:2] != b"\xff\xd8":
        return None
    at, size = 2, None
    while at + 4 <= len(content):
        marker = content[at + 1]
        if content[at] != 0xFF or marker == 0xFF:
            return None
        if marker == _START_OF_SCAN:
            return size
        length = int.from_bytes(content[at + 2 : at + 4], "big")
        body = content[at + 4 : at + 18]
        if (marker == _APP1 and body[:4] == b"Exif") or (marker == _APP14 and body[:5] == b"Adobe"):
            return None
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            if marker not in _FRAMES or body[:1] != b"\x08" or body[5:6] != b"\x03":
                return None
            size = int.from_bytes(body[3:5], "big"), int.from_bytes(body[1:3], "big")
            if 0 in size or body[6:7] == b"R":  # no size yet, or components that are named R, G, B
                return None
        at += 2 + length
    return None


def decoder() -> str:
    """What decodes photographs here, for the log."""
    return "simplejpeg" if _decode_jpeg() else "Pillow, a third as fast (pip install simplejpeg)"


@cache
def _decode_jpeg() -> Callable[..., np.ndarray] | None:
    found = importlib.util.find_spec("simplejpeg") is not None
    return importlib.import_module("simplejpeg").decode_jpeg if found else None


def _turbo(content: bytes) -> np.ndarray | None:
    """uint8 [H, W, 3], or None where libjpeg-turbo has the least doubt: Pillow then decides what is wrong with it."""
    decode_jpeg = _decode_jpeg()
    if decode_jpeg is None:
        return None
    try:
        return decode_jpeg(content, "RGB", strict=True)
    except ValueError:
        return None
