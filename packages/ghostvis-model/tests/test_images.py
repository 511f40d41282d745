"""What reading pictures promises: every mode comes out right and whole; bad input is an ImageError that names it."""

import io
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ghostvis_model.images import MAX_PIXELS, PAD_VALUE, ImageError, Placement, load_image, placement, to_pixels

GREY = np.array([[0, 51, 102], [153, 204, 255]], dtype=np.uint8)
COLOUR = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3) * 14
AS_RGB = np.repeat(GREY[:, :, None], 3, axis=2)


def pixels_of(source, **options) -> np.ndarray:
    image = load_image(source, **options)
    assert image.mode == "RGB"
    return np.asarray(image)


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


# ---- sources


def test_path_bytes_pil_array_and_tensor_give_the_same_picture(tmp_path):
    import torch

    image = Image.fromarray(COLOUR)
    data = encoded(image)
    path = tmp_path / "a picture.png"
    path.write_bytes(data)
    tensor = torch.from_numpy(COLOUR).permute(2, 0, 1)
    for source in (path, str(path), data, bytearray(data), memoryview(data), image, COLOUR, COLOUR[:, ::1], tensor):
        np.testing.assert_array_equal(pixels_of(source), COLOUR)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000", "ICO"])
def test_every_file_kind_is_read(kind):
    Image.init()
    if kind not in Image.SAVE:
        pytest.skip(f"this Pillow has no {kind}")
    image = Image.new("RGB", (16, 16), (200, 40, 90))
    np.testing.assert_allclose(pixels_of(encoded(image, kind)).astype(int)[8, 8], (200, 40, 90), atol=6)


def test_reading_pictures_does_not_import_torch():
    code = "import sys, ghostvis_model.images; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_callers_image_is_left_as_it_was():
    image = Image.fromarray(GREY)
    image.info["note"] = "mine"
    load_image(image)
    assert (image.mode, image.info) == ("L", {"note": "mine"})


# ---- modes


@pytest.mark.parametrize(
    "mode", ["L", "RGB", "RGBA", "RGBX", "LA", "La", "RGBa", "P", "PA", "YCbCr", "CMYK", "HSV", "F", "I"]
)
def test_an_opaque_grey_picture_of_mode(mode):
    grey = Image.fromarray(GREY)
    if mode in ("I", "F"):  # I holds the 16-bit range, F 0..255
        image = Image.fromarray(GREY.astype(np.int32) * 257) if mode == "I" else grey.convert("F")
    elif mode in ("La", "RGBa"):
        image = grey.convert("LA" if mode == "La" else "RGBA").convert(mode)
    elif mode in ("CMYK", "HSV", "YCbCr", "RGBX"):
        image = grey.convert("RGB").convert(mode)
    elif mode == "PA":
        image = grey.convert("P").convert("PA")
    else:
        image = grey.convert(mode)
    assert image.mode == mode
    np.testing.assert_allclose(pixels_of(image).astype(int), AS_RGB, atol=2)


@pytest.mark.parametrize("mode", ["I;16", "I;16L", "I;16B"])
def test_sixteen_bit_grey_of_mode(mode):
    order = ">u2" if mode == "I;16B" else "<u2"
    image = Image.frombytes(mode, (3, 2), (GREY.astype(order) * 257).astype(order).tobytes())
    assert image.mode == mode
    np.testing.assert_array_equal(pixels_of(image), AS_RGB)


def test_a_sixteen_bit_file_keeps_its_brightness():
    values = np.array([[0, 1000, 32768, 65535]], dtype=np.uint16)
    expected = np.rint(values / 257).astype(np.uint8)
    for kind in ("PNG", "TIFF"):
        np.testing.assert_array_equal(pixels_of(encoded(Image.fromarray(values), kind))[:, :, 0], expected)


def test_a_one_bit_picture():
    image = Image.fromarray(GREY > 100)
    assert image.mode == "1"
    np.testing.assert_array_equal(pixels_of(image)[:, :, 0], (GREY > 100) * np.uint8(255))


def test_a_cmyk_jpeg_keeps_its_colours():
    image = Image.new("RGB", (16, 16), (200, 40, 90)).convert("CMYK")
    np.testing.assert_allclose(pixels_of(encoded(image, "JPEG", quality=95))[8, 8].astype(int), (200, 40, 90), atol=4)


def test_transparency_lies_on_white():
    rgba = np.zeros((1, 3, 4), dtype=np.uint8)
    rgba[0, :, 3] = (0, 128, 255)  # black that is clear, half there, opaque
    expected = [[255] * 3, [127] * 3, [0] * 3]
    for source in (rgba, Image.fromarray(rgba), encoded(Image.fromarray(rgba)), Image.fromarray(rgba).convert("LA")):
        np.testing.assert_array_equal(pixels_of(source)[0], expected)


@pytest.mark.parametrize("kind", ["PNG", "GIF"])
def test_a_transparent_palette_entry_lies_on_white(kind):
    image = Image.new("P", (2, 1))
    image.putpalette([0, 0, 0, 200, 40, 90])
    image.putpixel((1, 0), 1)
    data = encoded(image, kind, transparency=0)
    np.testing.assert_array_equal(pixels_of(data)[0], [[255, 255, 255], [200, 40, 90]])


@pytest.mark.parametrize("values, key", [(GREY, 51), (GREY.astype(np.uint16) * 257, 51 * 257)])
def test_a_transparent_grey_value_lies_on_white(values, key):
    expected = np.where(AS_RGB == 51, 255, AS_RGB)
    np.testing.assert_array_equal(pixels_of(encoded(Image.fromarray(values), transparency=key)), expected)


def test_of_an_animation_the_first_frame_is_taken():
    frames = [Image.new("RGB", (4, 4), colour) for colour in ((255, 0, 0), (0, 255, 0))]
    for kind in ("GIF", "PNG", "WEBP"):
        data = encoded(
            frames[0], kind, save_all=True, append_images=frames[1:], **({"lossless": True} if kind == "WEBP" else {})
        )
        assert pixels_of(data)[0, 0].tolist() == [255, 0, 0]


# ---- EXIF

UPRIGHT = np.arange(6, dtype=np.uint8).reshape(2, 3) * 40
STORED = {  # the picture as a camera stores it for each orientation
    1: UPRIGHT,
    2: UPRIGHT[:, ::-1],
    3: UPRIGHT[::-1, ::-1],
    4: UPRIGHT[::-1],
    5: UPRIGHT.T,
    6: np.rot90(UPRIGHT),
    7: UPRIGHT[::-1, ::-1].T,
    8: np.rot90(UPRIGHT, -1),
}


@pytest.mark.parametrize("orientation", STORED)
def test_exif_rotation_is_applied_once(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(np.ascontiguousarray(STORED[orientation])), exif=exif)
    loaded = load_image(data)
    np.testing.assert_array_equal(np.asarray(loaded)[:, :, 0], UPRIGHT)
    np.testing.assert_array_equal(np.asarray(load_image(loaded)), np.asarray(loaded))
    np.testing.assert_array_equal(pixels_of(Image.open(io.BytesIO(data)))[:, :, 0], UPRIGHT)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, about the tags
def test_a_broken_exif_block_does_not_cost_the_picture(kind):
    for exif in (b"Exif\0\0garbage!!!", b"Exif\0\0II*\0broken", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff"):
        assert load_image(encoded(Image.fromarray(COLOUR), kind, exif=exif)).size == (3, 2)


def test_an_unknown_exif_orientation_turns_nothing():
    exif = Image.Exif()
    exif[0x0112] = 9
    np.testing.assert_array_equal(pixels_of(encoded(Image.fromarray(COLOUR), exif=exif)), COLOUR)


# ---- arrays and tensors


@pytest.mark.parametrize(
    "array",
    [
        GREY,
        GREY[:, :, None],
        AS_RGB,
        GREY.astype(np.uint16) * 257,
        (GREY / 255.0).astype(np.float32),
        GREY / 255.0,
        (GREY / 255.0).astype(np.float16),
        (AS_RGB.astype(np.uint16) * 257),
        np.concatenate([AS_RGB, np.full((2, 3, 1), 255, np.uint8)], axis=2),
        np.asfortranarray(AS_RGB),
        AS_RGB[::-1][::-1],
    ],
    ids=lambda a: f"{a.dtype}{list(a.shape)}",
)
def test_an_array_of_kind(array):
    import torch

    np.testing.assert_array_equal(pixels_of(array), AS_RGB)
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    tensor = tensor.permute(2, 0, 1) if tensor.ndim == 3 else tensor
    np.testing.assert_array_equal(pixels_of(tensor), AS_RGB)


def test_booleans_are_black_and_white():
    assert pixels_of(np.array([[True, False]]))[0, :, 0].tolist() == [255, 0]


def test_a_bfloat16_tensor_that_needs_a_gradient():
    import torch

    tensor = torch.tensor([[0.0, 1.0]], dtype=torch.bfloat16, requires_grad=True)
    assert pixels_of(tensor)[0, :, 0].tolist() == [0, 255]


@pytest.mark.parametrize(
    "array, found",
    [
        (np.zeros((3, 5, 7), np.uint8), "move the channels last"),
        (np.zeros((2, 3, 5, 3), np.uint8), "not a batch"),
        (np.zeros(5, np.uint8), "shape"),
        (np.zeros((0, 5), np.uint8), "at least one pixel"),
        (np.zeros((5, 5), np.int64), "dtype int64"),
        (np.full((5, 5), 255.0), "floats from 255 to 255"),
        (np.array([[0.5, -0.1]]), "floats from -0.1 to 0.5"),
        (np.array([[0.5, np.nan]]), "floats from nan to nan"),
        (np.zeros((5, 5), np.complex64), "dtype complex64"),
        (Image.fromarray(np.array([[70000]], np.int32)), "integers from 70000"),
        (Image.fromarray(np.array([[-1]], np.int32)), "integers from -1"),
        (Image.fromarray(np.array([[900.0]], np.float32)), "floats from 900"),
    ],
)
def test_values_that_could_mean_anything_are_refused(array, found):
    with pytest.raises(ImageError, match=found):
        load_image(array)


def test_a_tensor_with_channels_last_is_refused_with_the_way_out():
    import torch

    with pytest.raises(ImageError, match=r"tensor.permute\(2, 0, 1\)"):
        load_image(torch.zeros(5, 7, 3))


# ---- bad input


@pytest.mark.parametrize(
    "source", ["data:image/png;base64,iVBOR", "https://example.org/cat.png", "HTTP://example.org/cat.png"]
)
def test_an_address_is_not_fetched(source):
    with pytest.raises(ImageError, match="found    a URL"):
        load_image(source)


def test_a_missing_file_and_a_folder_are_named(tmp_path):
    for path in (tmp_path / "no such.png", tmp_path, str(tmp_path / "no such.png"), "a\0b"):
        with pytest.raises(ImageError) as error:
            load_image(path)
        assert str(path) in str(error.value).splitlines()[0]


def test_bytes_that_are_no_image_are_named(tmp_path):
    path = tmp_path / "page.png"
    path.write_bytes(b"<html>not found</html>")
    with pytest.raises(ImageError) as error:
        load_image(path)
    lines = str(error.value).splitlines()
    assert lines[0] == f"ghostvis: cannot read the image {path}."
    assert [line.split()[0] for line in lines[1:]] == ["found", "expected", "try"]
    with pytest.raises(ImageError, match=r"\(22 bytes beginning b'<html>no'\)"):
        load_image(path.read_bytes())
    with pytest.raises(ImageError):
        load_image(b"")


def test_postscript_is_never_run():
    with pytest.raises(ImageError):
        load_image(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n")


@pytest.mark.parametrize("source", [None, 3, [1, 2], object()])
def test_something_else_is_refused_by_its_type(source):
    with pytest.raises(
        ImageError, match=f"found    a \\({type(source).__name__}\\)|found    a .*{type(source).__name__}"
    ):
        load_image(source)


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8))


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, about damaged TIFF tags
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
def test_a_file_that_breaks_off_is_refused(kind):
    data = encoded(NOISE, kind)
    for length in (1, 10, len(data) // 3, len(data) * 2 // 3):
        with pytest.raises(ImageError):
            load_image(data[:length])


ENCODED = [
    encoded(NOISE.resize((9, 7)), kind) for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "ICO")
] + [
    encoded(NOISE.resize((9, 7)).convert("P"), "PNG"),
    encoded(NOISE.resize((9, 7)), "JPEG", exif=b"Exif\0\0II*\0broken"),
]


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, about damaged TIFF tags
@settings(max_examples=100)
@given(st.sampled_from(ENCODED), st.data())
def test_damaged_bytes_are_a_picture_or_an_image_error(data, draw):
    broken = bytearray(data)
    for _ in range(draw.draw(st.integers(1, 4))):
        broken[draw.draw(st.integers(0, len(broken) - 1))] = draw.draw(st.integers(0, 255))
    try:
        image = load_image(bytes(broken), max_pixels=100_000)
    except ImageError:
        return
    assert image.mode == "RGB"


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds next to nothing."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("width, height", [(9_500, 9_500), (60_000, 60_000), (2_000_000_000, 1)])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_decompression_bomb_is_refused_before_it_is_decoded(width, height, monkeypatch):
    from PIL import ImageFile

    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(ImageError, match="pixels"):
        load_image(png_header(width, height))


def test_the_pixel_limit_holds_for_every_source_and_can_be_set():
    assert Image.MAX_IMAGE_PIXELS is not None
    assert MAX_PIXELS < Image.MAX_IMAGE_PIXELS
    for source in (COLOUR, Image.fromarray(COLOUR), encoded(Image.fromarray(COLOUR))):
        load_image(source, max_pixels=6)
        with pytest.raises(ImageError, match="found    3 x 2 = 6 pixels\n  expected at most 5"):
            load_image(source, max_pixels=5)


# ---- to_pixels


@settings(max_examples=60)
@given(
    st.integers(1, 300), st.integers(1, 300), st.sampled_from([1, 7, 16, 32]), st.sampled_from(["letterbox", "resize"])
)
def test_any_size_gives_a_square(width, height, size, fit):
    pixels = to_pixels(Image.new("RGB", (width, height), (255, 0, 10)), size, fit)
    assert (pixels.shape, pixels.dtype) == ((3, size, size), np.uint8)
    place = placement(width, height, size, fit)
    inside = pixels[:, place.top : place.top + place.height, place.left : place.left + place.width]
    np.testing.assert_array_equal(inside, np.broadcast_to(np.array([255, 0, 10])[:, None, None], inside.shape))
    assert max(place.width, place.height) == size
    assert (pixels == PAD_VALUE).all(axis=0).sum() == size * size - place.width * place.height


@pytest.mark.parametrize("fit", ["letterbox", "resize"])
def test_a_picture_of_the_right_size_comes_out_pixel_for_pixel(fit):
    square = np.random.default_rng(1).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    pixels = to_pixels(square, 24, fit)
    np.testing.assert_array_equal(pixels, square.transpose(2, 0, 1))
    assert pixels.flags.c_contiguous


def test_no_corner_is_cropped_and_nothing_is_flipped():
    picture = np.full((40, 80, 3), 255, dtype=np.uint8)
    corners = {(0, 0): (255, 0, 0), (0, 1): (0, 255, 0), (1, 0): (0, 0, 255), (1, 1): (0, 0, 0)}
    for (row, column), colour in corners.items():
        picture[row * 30 : row * 30 + 10, column * 70 : column * 70 + 10] = colour
    for fit in ("letterbox", "resize"):
        pixels, place = to_pixels(picture, 32, fit), placement(80, 40, 32, fit)
        for (row, column), colour in corners.items():
            y, x = place.top + row * (place.height - 1), place.left + column * (place.width - 1)
            assert pixels[:, y, x].tolist() == list(colour)


def test_letterbox_centres_and_pads_with_mid_grey():
    pixels = to_pixels(np.zeros((10, 20), np.uint8), 20)
    assert placement(20, 10, 20) == Placement(0, 5, 20, 10)
    assert (pixels[:, 5:15] == 0).all()
    assert (pixels[:, :5] == PAD_VALUE).all()
    assert (pixels[:, 15:] == PAD_VALUE).all()


def test_shrinking_averages_instead_of_skipping():
    lines = np.zeros((64, 64), np.uint8)
    lines[:, ::2] = 255
    assert abs(to_pixels(lines, 8).astype(int)[:, :, 1:-1] - 128).max() < 16


def test_a_wrong_size_or_fit_is_refused():
    with pytest.raises(ValueError, match="image_size is 0"):
        to_pixels(GREY, 0)
    with pytest.raises(ValueError, match="fit is 'crop'"):
        to_pixels(GREY, 8, "crop")  # ty: ignore[invalid-argument-type]
