"""Pictures in, pixels out: anything a person may hand over becomes an RGB picture, then uint8 [3, S, S].

    image = load_image("chart.png")               # or bytes, a PIL image, a numpy array, a torch tensor
    pixels = to_pixels(image, 384)                # the model normalises on its own device

The whole picture is kept: no crop, no flip. Letterbox (the default) keeps the proportions and pads with mid-grey,
which an encoder that normalises by mean 0.5 sees as zero; `fit="resize"` stretches instead. Which of the two an encoder
takes is said by its `VisionConfig.fit`.
"""

from __future__ import annotations

import hashlib
import io
import struct
import sys
import warnings
import zlib
from collections.abc import Callable
from functools import cache
from os import PathLike
from typing import TYPE_CHECKING, BinaryIO, NamedTuple, TypeAlias

import numpy as np
from PIL import ExifTags, Image

from ghostvis_model.encoders import Fit
from ghostvis_model.errors import GhostVisError

if TYPE_CHECKING:
    import torch

ImageSource: TypeAlias = (
    "str | PathLike[str] | bytes | bytearray | memoryview | Image.Image | np.ndarray | torch.Tensor"
)

MAX_PIXELS = 89_000_000
"""About 9,400 x 9,400. Just under Pillow's own threshold, so that no picture we accept makes Pillow warn."""

PAD_VALUE = 128
"""Mid-grey around a letterboxed picture: (128 / 255 - 0.5) / 0.5 is 0.004."""

# Files are read as one of these only. Other plugins of Pillow start programs (EPS runs Ghostscript) or guess without
# a signature.
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000", "ICO")

# What Pillow raises for bytes that are broken, cut short or hostile, over all of these formats.
_BROKEN = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    struct.error,
    zlib.error,
    RuntimeError,
    IndexError,
    KeyError,
    TypeError,
    OverflowError,
    MemoryError,
    Image.DecompressionBombWarning,
)

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class ImageError(GhostVisError):
    """A picture that cannot be read; the message names the source, what was found and what was expected."""


class Placement(NamedTuple):
    """Where the picture lies in the square of S x S pixels, in pixels from the top left."""

    left: int
    top: int
    width: int
    height: int


def load_image(source: ImageSource, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Read a picture as a PIL image of mode RGB, upright, opaque, 8 bits per channel.

    Sources: a path; the bytes of a PNG, JPEG, WebP, GIF, BMP, TIFF, PPM, AVIF, JPEG 2000 or ICO file; a PIL image of
    any mode; a numpy array [H, W], [H, W, 1], [H, W, 3] or [H, W, 4]; a torch tensor [H, W] or [C, H, W] with the
    same C. Arrays hold bool, uint8, uint16 or floats in 0..1. EXIF rotation is applied; transparency lies on white;
    16-bit grey is divided by 257; of an animation the first frame is taken. A `data:` URL or a web address is not
    loaded here: the caller decides what may be fetched.

    Raises ImageError, also for more than `max_pixels` pixels, which is checked before anything is decoded. (Pillow's
    own limit, twice `PIL.Image.MAX_IMAGE_PIXELS`, holds on top.)
    """
    name = _name(source)
    torch = sys.modules.get("torch")  # a tensor can only be here if torch has been imported
    if isinstance(source, str) and source.split(":", 1)[0].lower() in ("data", "http", "https") and ":" in source:
        raise _error(
            name, "a URL", "a path, or the bytes of an image file", "fetch or decode it first, then pass the bytes"
        )
    if isinstance(source, str | PathLike):
        return _from_path(source, name, max_pixels)
    if isinstance(source, bytes | bytearray | memoryview):
        return _from_stream(io.BytesIO(source), name, max_pixels)
    if isinstance(source, Image.Image):
        return _from_pil(source, name, max_pixels)
    if isinstance(source, np.ndarray):
        return _from_array(source, name, max_pixels)
    if torch is not None and isinstance(source, torch.Tensor):
        return _from_tensor(source, name, max_pixels)
    raise _error(name, f"a {name}", "a path, bytes, a PIL image, a numpy array or a torch tensor", "pass one of these")


def to_pixels(image: ImageSource, image_size: int, fit: Fit = "letterbox") -> np.ndarray:
    """The whole picture as uint8 [3, S, S], S = `image_size`, scaled by antialiased bicubic.

    "letterbox" keeps the proportions, centres the picture and pads with PAD_VALUE; "resize" stretches it to the square.
    A picture that is S x S comes out pixel for pixel. Anything but an RGB image goes through `load_image` first.
    Raises ImageError for a picture that cannot be read, ValueError for a wrong size or `fit`.
    """
    picture = load_image(image)
    place = placement(*picture.size, image_size, fit)
    if picture.size != (place.width, place.height):
        picture = picture.resize((place.width, place.height), Image.Resampling.BICUBIC)
    pixels = np.full((3, image_size, image_size), PAD_VALUE, dtype=np.uint8)
    rows = slice(place.top, place.top + place.height)
    columns = slice(place.left, place.left + place.width)
    pixels[:, rows, columns] = np.asarray(picture).transpose(2, 0, 1)
    return pixels


def placement(width: int, height: int, image_size: int, fit: Fit = "letterbox") -> Placement:
    """Where `to_pixels` puts a picture of width x height pixels.

    For boxes and points: x' = place.left + x * place.width / width. Raises ValueError for an unknown `fit`.
    """
    if image_size < 1:
        raise ValueError(f"image_size is {image_size}, expected 1 or more pixels.")
    if fit == "resize":
        return Placement(0, 0, image_size, image_size)
    if fit != "letterbox":
        raise ValueError(f'fit is {fit!r}, expected "letterbox" or "resize".')
    longest = max(width, height)
    new_width = max(1, round(width * image_size / longest))
    new_height = max(1, round(height * image_size / longest))
    return Placement((image_size - new_width) // 2, (image_size - new_height) // 2, new_width, new_height)


def distinct(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each picture once: uint8 [I, 3, S, S] -> (uint8 [U, 3, S, S] in order of first sight, int64 [I] which of them).

    Told apart by a hash of their bytes (BLAKE2b, 128 bits).
    """
    first: dict[bytes, int] = {}
    which = np.empty(len(pixels), dtype=np.int64)
    kept: list[int] = []
    for i, picture in enumerate(pixels):
        key = hashlib.blake2b(np.ascontiguousarray(picture).data, digest_size=16).digest()
        if key not in first:
            first[key] = len(kept)
            kept.append(i)
        which[i] = first[key]
    return (pixels if len(kept) == len(pixels) else pixels[kept]), which


# ---- sources


def _from_path(path: str | PathLike[str], name: str, max_pixels: int) -> Image.Image:
    try:
        stream = open(path, "rb")  # noqa: SIM115 (closed below; only the opening may fail in this way)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise _error(
            name, str(error), "an image file that can be read", "check the path and its permissions"
        ) from error
    with stream:
        return _from_stream(stream, name, max_pixels)


def _from_stream(stream: BinaryIO, name: str, max_pixels: int) -> Image.Image:
    def opened() -> Image.Image:
        with warnings.catch_warnings():  # what Pillow only warns of is refused below
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            return Image.open(stream, formats=_formats())

    with _decoded(opened, name) as image:
        return _from_pil(image, name, max_pixels)


def _from_pil(image: Image.Image, name: str, max_pixels: int) -> Image.Image:
    _check_size(image.width, image.height, name, max_pixels)  # before a pixel is decoded
    if type(image) is Image.Image and image.mode == "RGB" and not image.info:
        return image  # in memory, and nothing to rotate or to blend

    def converted() -> Image.Image:
        image.load()
        rgb = _to_rgb(image, name)
        turn = _TURNS.get(_orientation(image))
        return rgb if turn is None else rgb.transpose(turn)

    return _decoded(converted, name)


def _from_array(array: np.ndarray, name: str, max_pixels: int) -> Image.Image:
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))):
        hint = (
            "move the channels last: array.transpose(1, 2, 0)" if array.ndim == 3 else "pass one picture, not a batch"
        )
        raise _error(name, f"shape {list(array.shape)}", "[H, W], [H, W, 1], [H, W, 3] or [H, W, 4]", hint)
    _check_size(array.shape[1], array.shape[0], name, max_pixels)
    return _from_pil(Image.fromarray(np.ascontiguousarray(_eight_bits(array, name))), name, max_pixels)


def _from_tensor(tensor: torch.Tensor, name: str, max_pixels: int) -> Image.Image:
    if tensor.ndim == 3 and tensor.shape[0] not in (1, 3, 4):
        hint = "move the channels first: tensor.permute(2, 0, 1)"
        raise _error(name, f"shape {list(tensor.shape)}", "[H, W] or [C, H, W] with C = 1, 3 or 4", hint)
    tensor = tensor.detach().cpu()
    if tensor.is_floating_point():
        tensor = tensor.float()  # numpy has no bfloat16
    if tensor.ndim == 3:
        tensor = tensor.permute(1, 2, 0)
    return _from_array(tensor.numpy(), name, max_pixels)


# ---- pixels


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    """RGB of a decoded image of any mode, as a new picture without metadata."""
    if image.mode.startswith("I;16"):
        grey = _eight_bits(np.asarray(image).astype(np.uint16), name)
        if "transparency" in image.info:
            grey = np.where(np.asarray(image) == image.info["transparency"], np.uint8(255), grey)
        return Image.fromarray(grey).convert("RGB")
    if image.mode == "I":  # 32-bit integers, in files and in practice the 16-bit range
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise _error(
                name, f"integers from {values.min()} to {values.max()}", "0..65535", "scale the picture to 8 or 16 bits"
            )
        return Image.fromarray(_eight_bits(values.astype(np.uint16), name)).convert("RGB")
    if image.mode == "F":
        return Image.fromarray(_eight_bits(_unit_range(np.asarray(image)), name)).convert("RGB")
    if image.has_transparency_data:
        rgba = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    rgb = image.convert("RGB")  # a copy, also when it was RGB
    rgb.info = {}  # or its EXIF orientation would be applied again by whoever loads this picture next
    return rgb


def _orientation(image: Image.Image) -> object:
    """The EXIF orientation, 1 (upright) without one or where the EXIF block cannot be parsed, as viewers do."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except _BROKEN:
        return 1  # the pixels are whole: a camera's broken notes are no reason to refuse them


def _eight_bits(array: np.ndarray, name: str) -> np.ndarray:
    """uint8 of the same shape: bool and floats from 0..1, uint16 from 0..65535 (65535 / 257 = 255)."""
    if array.dtype == np.uint8:
        return array
    if array.dtype == np.bool_:
        return array.astype(np.uint8) * np.uint8(255)
    if array.dtype == np.uint16:
        return ((array.astype(np.uint32) + 128) // 257).astype(np.uint8)
    if not np.issubdtype(array.dtype, np.floating):
        raise _error(
            name, f"dtype {array.dtype}", "bool, uint8, uint16 or floats", "for values 0..255: array.astype('uint8')"
        )
    low, high = float(array.min()), float(array.max())
    if not (low >= 0.0 and high <= 1.0):  # also false for NaN
        raise _error(
            name, f"floats from {low:g} to {high:g}", "floats in 0..1", "undo the normalisation, or divide by 255"
        )
    return np.rint(array.astype(np.float32) * 255.0).astype(np.uint8)


def _unit_range(values: np.ndarray) -> np.ndarray:
    """PIL's float mode holds 0..255 after `convert("F")` and often 0..1 after `fromarray`: both become 0..1."""
    return values / np.float32(255.0) if 1.0 < values.max() <= 255.0 else values


# ---- errors


def _decoded(work: Callable[[], Image.Image], name: str) -> Image.Image:
    """What `work` returns; what Pillow raises for broken bytes becomes an ImageError that names the source."""
    try:
        return work()
    except ImageError:
        raise
    except Image.DecompressionBombError as error:
        raise _error(
            name, str(error), "a picture of fewer pixels", "scale it down; a small file that says so is an attack"
        ) from error
    except _BROKEN as error:
        reason = str(error).split("\n", 1)[0] or type(error).__name__
        raise _error(
            name, reason, f"a whole {', '.join(_FORMATS)} file", "open it in a viewer; download it again"
        ) from error


def _check_size(width: int, height: int, name: str, max_pixels: int) -> None:
    if width < 1 or height < 1:
        raise _error(name, f"{width} x {height} pixels", "at least one pixel", "check what wrote the picture")
    if width * height > max_pixels:
        found = f"{width} x {height} = {width * height:,} pixels"
        raise _error(
            name, found, f"at most {max_pixels:,}", "scale it down, or raise max_pixels if you trust the source"
        )


def _error(name: str, found: str, expected: str, advice: str) -> ImageError:
    return ImageError(
        f"ghostvis: cannot read the image {name}.\n  found    {found}\n  expected {expected}\n  try      {advice}"
    )


def _name(source: object) -> str:
    """How an error names the source: short, and never the pixels."""
    if isinstance(source, str | PathLike):
        text = str(source)
        return text if len(text) <= 200 else f"{text[:60]}... ({len(text)} characters)"
    if isinstance(source, bytes | bytearray | memoryview):
        return f"({len(source)} bytes beginning {bytes(source[:8])!r})"
    if isinstance(source, Image.Image):
        return f"(PIL image, mode {source.mode}, {source.width} x {source.height})"
    if isinstance(source, np.ndarray):
        return f"(numpy array {list(source.shape)}, {source.dtype})"
    return f"({type(source).__name__})"


@cache
def _formats() -> tuple[str, ...]:
    """Those of _FORMATS that this build of Pillow can read (AVIF and JPEG 2000 are optional in it)."""
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)
