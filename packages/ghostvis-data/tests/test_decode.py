import io
import threading

import numpy as np
import pytest
from PIL import Image

from ghostvis_data.decode import decode, plain_jpeg_size
from ghostvis_model.images import ImageError, to_pixels


def picture(width, height, seed=0):
    """A smooth picture with edges and a little noise, as photographs have."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width] / max(width, height)
    planes = [np.sin(9 * x + k) + np.cos(7 * y * (k + 1)) + (x + y > 0.7) for k in range(3)]
    values = 128 + 45 * np.stack(planes, -1) + rng.normal(0, 4, (height, width, 3))
    return Image.fromarray(np.clip(values, 0, 255).astype(np.uint8))


def encoded(image, kind="JPEG", **options):
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def psnr(a, b):
    error = np.mean((a.astype(float) - b.astype(float)) ** 2)
    return 99.0 if error == 0 else 10 * np.log10(255**2 / error)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("size", [(640, 480), (480, 640), (336, 336)])
def test_the_strides_of_the_target_do_not_matter(kind, size):
    content = encoded(picture(*size), kind)
    target = np.zeros((336, 336, 3), np.uint8).transpose(2, 0, 1)
    decode(content, 336, out=target)
    assert np.array_equal(target, decode(content, 336))


@pytest.mark.parametrize("size", [(640, 480), (480, 640), (333, 517), (100, 60), (1200, 40)])
@pytest.mark.parametrize("fit", ["letterbox", "resize"])
def test_a_photograph_is_within_60_db_of_pillow(size, fit):
    content = encoded(picture(*size), quality=92)
    assert plain_jpeg_size(content) == size
    pixels, expected = decode(content, 336, fit), to_pixels(content, 336, fit)
    assert psnr(pixels, expected) >= 60
    assert np.abs(pixels.astype(int) - expected).max() <= 2  # both round between rows and columns


def test_progressive_and_every_subsampling_are_within_60_db_of_pillow():
    for options in ({"progressive": True}, {"subsampling": 0}, {"subsampling": 1}, {"subsampling": 2}):
        content = encoded(picture(400, 300), quality=92, **options)
        assert plain_jpeg_size(content) == (400, 300)
        assert psnr(decode(content, 224), to_pixels(content, 224)) >= 60


def test_a_photograph_of_the_right_size_is_not_resampled():
    content = encoded(picture(64, 64), quality=95)
    assert (decode(content, 64) == to_pixels(content, 64)).all()


def turned(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(picture(90, 60), exif=exif)


ODD = {
    "grey": encoded(picture(90, 60).convert("L")),
    "cmyk": encoded(picture(90, 60).convert("CMYK")),
    "rgba": encoded(picture(90, 60).convert("RGBA"), "PNG"),
    "palette": encoded(picture(90, 60).convert("P"), "PNG"),
    "16 bit": encoded(Image.fromarray(np.arange(6000, dtype=np.uint16).reshape(60, 100) * 10), "PNG"),
    "webp": encoded(picture(90, 60), "WEBP"),
    "one pixel": encoded(picture(1, 1), "PNG"),
    "rgb jpeg": encoded(picture(90, 60), keep_rgb=True),
    **{f"turned {orientation}": turned(orientation) for orientation in (1, 3, 6, 8)},
}


@pytest.mark.parametrize("kind", ODD)
def test_odd_modes_equal_pillow(kind):
    assert (decode(ODD[kind], 48) == to_pixels(ODD[kind], 48)).all()


@pytest.mark.parametrize("keep", [0, 1, 3, 20, 600, -200, -1])
def test_a_truncated_jpeg_gives_what_pillow_gives(keep):
    content = encoded(picture(320, 240))[:keep]
    try:
        expected = to_pixels(content, 48)
    except ImageError:
        with pytest.raises(ImageError):
            decode(content, 48)
    else:
        assert psnr(decode(content, 48), expected) >= 60


def test_a_huge_header_is_refused_before_anything_is_decoded():
    content = bytearray(encoded(picture(320, 240)))
    at = content.index(b"\xff\xc0") + 5
    content[at : at + 4] = b"\xff\xff\xff\xff"
    with pytest.raises(ImageError, match="pixels"):
        decode(bytes(content), 48)


def test_it_writes_where_it_is_told_and_threads_agree():
    content = encoded(picture(320, 240))
    batch = np.zeros((8, 3, 64, 64), np.uint8)
    threads = [threading.Thread(target=decode, args=(content, 64, "letterbox", one)) for one in batch]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (batch == decode(content, 64)).all()
