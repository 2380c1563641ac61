import io

import numpy as np
import pytest
from PIL import Image

from experiments.data.images import decode_image


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.fixture
def picture():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 9, 3), np.uint8))


@pytest.mark.parametrize("kind", ["PNG", "BMP"])
def test_lossless_images_come_out_exactly(picture, kind):
    pixels = decode_image(encoded(picture, kind), "here", size=None, channels=3)
    assert pixels.dtype == np.float32
    np.testing.assert_array_equal(pixels, np.asarray(picture).astype(np.float32) / np.float32(255))


def test_jpeg_comes_out_nearly():
    ramp = Image.fromarray(np.repeat(np.linspace(0, 255, 64).astype(np.uint8)[None], 64, 0))
    pixels = decode_image(encoded(ramp, "JPEG"), "here", size=None, channels=1)
    np.testing.assert_allclose(pixels[..., 0] * 255, np.asarray(ramp), atol=4)


def test_grey_colour_palette_and_transparency(picture):
    grey = decode_image(encoded(picture), "here", size=None, channels=1)
    weights = np.asarray(picture) @ [0.299, 0.587, 0.114] / 255
    np.testing.assert_allclose(grey[..., 0], weights, atol=1 / 255)
    colour = decode_image(encoded(picture.convert("L")), "here", size=None, channels=3)
    np.testing.assert_array_equal(colour, np.repeat(grey, 3, axis=-1))
    clear = picture.copy()
    clear.putalpha(100)
    np.testing.assert_array_equal(
        decode_image(encoded(clear), "here", size=None, channels=3),
        decode_image(encoded(picture), "here", size=None, channels=3),
    )
    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.putpixel((1, 0), 1)
    content = encoded(palette, transparency=b"\x80\xff")
    red_blue = [[[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]]
    np.testing.assert_array_equal(decode_image(content, "here", size=None, channels=3), red_blue)


def test_resizing_keeps_the_aspect_ratio():
    # Left half black, right half white, framed by columns that the square around the centre leaves out.
    stripes = np.zeros((8, 16), np.uint8)
    stripes[:, 8:12], stripes[:, 12:] = 255, 128  # resampling mixes in a little of what lies just outside
    pixels = decode_image(encoded(Image.fromarray(stripes)), "here", size=(4, 4), channels=1)
    assert pixels.shape == (4, 4, 1)
    assert pixels[:, :2].max() < 0.2
    assert pixels[:, 2:].min() > 0.8
    assert decode_image(encoded(Image.new("L", (30, 10))), "here", size=(7, 5), channels=1).shape == (7, 5, 1)


def test_orientation_of_the_camera_is_applied(picture):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to see it upright
    pixels = decode_image(encoded(picture, exif=exif), "here", size=None, channels=3)
    expected = np.rot90(np.asarray(picture), -1)
    np.testing.assert_array_equal(pixels, expected.astype(np.float32) / np.float32(255))


@pytest.mark.parametrize("kind", ["PNG", "BMP", "JPEG"])
def test_broken_images_are_refused(picture, kind):
    content = encoded(picture.resize((64, 64)), kind)
    for broken in (b"", b"not an image", content[:20], content[: len(content) // 2]):
        with pytest.raises(ValueError, match="here: not a readable image, corrupt or truncated"):
            decode_image(broken, "here", size=None, channels=3)


def test_damaged_png_is_refused(picture):
    content = bytearray(encoded(picture))
    content[content.index(b"IDAT") + 8] ^= 0xFF
    with pytest.raises(ValueError, match="here: not a readable image"):
        decode_image(bytes(content), "here", size=None, channels=3)


def test_sixteen_bits_are_refused():
    deep = Image.fromarray(np.full((2, 2), 40000, np.uint16))
    with pytest.raises(ValueError, match="here: has pixels of mode I;16, expected 8 bits a channel"):
        decode_image(encoded(deep), "here", size=None, channels=1)
