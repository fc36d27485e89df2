from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from mmfusion.processing import images
from mmfusion.processing.images import (
    center_crop,
    decode_image,
    image_size,
    pad_to_square,
    resize,
)
from mmfusion.types import DataError


def picture(height: int = 37, width: int = 53) -> Image.Image:
    """Smooth colours, no two corners alike."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    channels = [255 * x / width, 255 * y / height, 127 + 120 * np.sin(x / 7 + y / 11)]
    return Image.fromarray(np.stack(channels, -1).astype(np.uint8))


def saved(image: Image.Image, format: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def as_tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def exif(orientation: int) -> Image.Exif:
    data = Image.Exif()
    data[0x0112] = orientation
    return data


@pytest.fixture(params=["simplejpeg", "pil"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "pil":
        monkeypatch.setattr(images, "simplejpeg", None)
    else:
        pytest.importorskip("simplejpeg")
    return request.param


def reason(data: bytes, **options: int) -> str:
    with pytest.raises(DataError) as error:
        decode_image(data, **options)
    return error.value.reason


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 2}])
def test_jpeg_equals_pil(backend: str, options: dict) -> None:
    data = saved(picture(), "JPEG", quality=90, **options)
    decoded = decode_image(data, "jpg")
    assert decoded.dtype == torch.uint8
    assert decoded.shape == (3, 37, 53)
    difference = (decoded.int() - as_tensor(Image.open(io.BytesIO(data))).int()).abs()
    assert difference.max() <= 2


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied_once(backend: str, format: str, orientation: int) -> None:
    options = {} if format in ("PNG", "TIFF") else {"quality": 95}
    data = saved(picture(), format, exif=exif(orientation), **options)
    expected = as_tensor(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    decoded = decode_image(data)
    assert decoded.shape == expected.shape
    assert (decoded.int() - expected.int()).abs().max() <= 2
    assert image_size(data) == tuple(decoded.shape[1:])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_both_decoders_turn_a_picture_the_same_way(
    orientation: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("simplejpeg")
    data = saved(picture(), "JPEG", exif=exif(orientation), quality=95)
    fast = decode_image(data)
    monkeypatch.setattr(images, "simplejpeg", None)
    assert (decode_image(data).int() - fast.int()).abs().max() <= 2


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "P"])
def test_transparency_is_laid_on_white(mode: str) -> None:
    alpha = Image.new("L", (8, 8), 0)
    alpha.paste(255, (0, 0, 4, 8))
    image = Image.new("RGB", (8, 8), (0, 0, 0))
    image.putalpha(alpha)
    if mode in ("P", "PA"):
        data = saved(image.quantize(4, method=Image.Quantize.FASTOCTREE), "PNG")
    else:
        data = saved(image.convert(mode), "PNG")
    decoded = decode_image(data)
    assert decoded[:, :, :4].max() <= 1
    assert decoded[:, :, 4:].min() == 255


def test_half_transparent_black_is_grey() -> None:
    decoded = decode_image(saved(Image.new("RGBA", (4, 4), (0, 0, 0, 128)), "PNG"))
    assert set(decoded.flatten().tolist()) == {127}


def test_cmyk_grey_and_palette_are_colours(backend: str) -> None:
    image = picture(16, 16)
    for mode, tolerance in (("CMYK", 12), ("L", 2)):
        converted = image.convert(mode)
        decoded = decode_image(saved(converted, "JPEG", quality=100))
        assert decoded.shape == (3, 16, 16)
        assert (decoded.int() - as_tensor(converted).int()).abs().max() <= tolerance
    palette = image.quantize(16)
    assert torch.equal(decode_image(saved(palette, "PNG")), as_tensor(palette))
    bilevel = image.convert("1")
    assert torch.equal(decode_image(saved(bilevel, "PNG")), as_tensor(bilevel))


def test_16_bit_grey_keeps_its_range() -> None:
    levels = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    decoded = decode_image(saved(Image.fromarray(levels), "PNG"))
    assert torch.equal(decoded[0], torch.from_numpy((levels >> 8).astype(np.uint8)))
    assert torch.equal(decoded[0], decoded[2])


@pytest.mark.parametrize("format", ["GIF", "WEBP"])
def test_animation_gives_its_first_frame(format: str) -> None:
    frames = [Image.new("RGB", (9, 7), colour) for colour in ((255, 0, 0), (0, 0, 255))]
    options = {"lossless": True} if format == "WEBP" else {}
    data = saved(frames[0], format, save_all=True, append_images=frames[1:], **options)
    decoded = decode_image(data)
    assert decoded.shape == (3, 7, 9)
    assert decoded[:, 3, 3].tolist() == [255, 0, 0]


def test_one_pixel_is_an_image(backend: str) -> None:
    for format in ("PNG", "JPEG", "GIF"):
        assert decode_image(saved(Image.new("RGB", (1, 1), "white"), format)).shape == (3, 1, 1)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_truncated_file_is_corrupt(backend: str, format: str) -> None:
    data = saved(picture(200, 200), format)
    for part in (0, 3, len(data) // 3, len(data) - 40):
        assert reason(data[:part]) == "corrupt_image"


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_damage_gives_a_picture_or_a_data_error(backend: str, format: str) -> None:
    rng = np.random.default_rng(0)
    data = np.frombuffer(saved(picture(), format), np.uint8)
    for _ in range(60):
        broken = data.copy()
        broken[rng.integers(0, len(data), 4)] = rng.integers(0, 256, 4)
        try:
            assert decode_image(broken.tobytes(), max_pixels=10**6).shape[0] == 3
        except DataError as error:
            assert error.reason in ("corrupt_image", "too_many_pixels")  # noqa: PT017


def test_text_and_other_formats_are_corrupt() -> None:
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n"
    for data in (b"", b"<svg/>", postscript):
        assert reason(data) == "corrupt_image"


def bomb(side: int) -> bytes:
    """A PNG whose header promises side x side pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 99))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("side", [8_000, 30_000])
def test_pixel_bomb_is_refused_by_its_header(side: int) -> None:
    assert reason(bomb(side)) == "too_many_pixels"
    with pytest.raises(DataError, match="pixels"):
        image_size(bomb(side))


def test_limit_counts_pixels() -> None:
    data = saved(picture(10, 10), "PNG")
    assert decode_image(data, max_pixels=100).shape == (3, 10, 10)
    assert reason(data, max_pixels=99) == "too_many_pixels"


@pytest.mark.parametrize("size", [(20, 30), (80, 64), 24])
@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
def test_resize_equals_pil_up_to_rounding(size: int | tuple[int, int], mode: str) -> None:
    image = picture(61, 97)
    resized = resize(as_tensor(image), size, mode)
    height, width = (24, int(97 * 24 / 61)) if isinstance(size, int) else size
    filter = Image.Resampling.BICUBIC if mode == "bicubic" else Image.Resampling.BILINEAR
    expected = as_tensor(image.resize((width, height), filter))
    assert resized.dtype == torch.uint8
    assert resized.shape == expected.shape
    assert (resized.int() - expected.int()).abs().max() <= 1


def test_resize_of_frames_is_resize_of_each() -> None:
    frames = torch.stack([as_tensor(picture()), as_tensor(picture()).flip(-1)])
    resized = resize(frames, (16, 16))
    assert torch.equal(resized[1], resize(frames[1], (16, 16)))


def test_resize_refuses_to_blow_up_a_line() -> None:
    line = torch.zeros(3, 1, 30_000, dtype=torch.uint8)
    with pytest.raises(DataError, match="pixels"):
        resize(line, 224)


def test_crop_and_pad_are_centred() -> None:
    image = as_tensor(picture(10, 20))
    assert torch.equal(center_crop(image, 6), image[:, 2:8, 7:13])
    square = pad_to_square(image, (1, 2, 3))
    assert square.shape == (3, 20, 20)
    assert torch.equal(square[:, 5:15], image)
    assert square[:, 0, 0].tolist() == [1, 2, 3]
    with pytest.raises(ValueError, match="resize"):
        center_crop(image, 11)
