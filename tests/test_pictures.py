"""Pictures are read as they are shown, or refused in a sentence."""

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from sa_diffusers.data.generation import load_image
from sa_diffusers.data.image_datasets import load_labelled_images
from sa_diffusers.data.pictures import read_picture


def top_white():
    values = np.zeros((40, 60, 3), np.uint8)
    values[:20] = 255
    return Image.fromarray(values)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
def test_a_picture_stands_as_its_exif_data_say(tmp_path, orientation, suffix):
    inverse = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_90",
               7: "TRANSVERSE", 8: "ROTATE_270"}.get(orientation)  # fmt: skip
    upright = top_white()
    stored = upright.transpose(Image.Transpose[inverse]) if inverse else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / f"a.{suffix}", exif=exif)
    seen = np.asarray(read_picture(tmp_path / f"a.{suffix}", "x"), np.float32)
    assert seen.shape == (40, 60, 3)
    assert np.abs(seen - np.asarray(upright, np.float32)).mean() < 3
    square = load_image(tmp_path / f"a.{suffix}", 16)[0]
    assert square[:, :6].mean() > 0.9 and square[:, -6:].mean() < -0.9


def test_damaged_exif_data_leave_the_picture_as_it_lies(tmp_path):
    top_white().save(tmp_path / "a.jpg", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert read_picture(tmp_path / "a.jpg", "x").size == (60, 40)


@pytest.mark.parametrize("name", ["a.png", "a.webp", "a.gif"])
def test_what_is_transparent_lies_over_white(tmp_path, name):
    values = np.zeros((32, 32, 4), np.uint8)
    values[..., 1] = 255
    values[8:24, 8:24] = (200, 0, 0, 255)
    picture = Image.fromarray(values)
    picture.save(tmp_path / name, **({"lossless": True, "exact": True} if name == "a.webp" else {}))
    seen = np.asarray(read_picture(tmp_path / name, "x"))
    assert tuple(seen[0, 0]) == (255, 255, 255)
    assert tuple(seen[16, 16]) == (200, 0, 0)
    folder = tmp_path / "classes" / "one"
    folder.mkdir(parents=True)
    picture.save(folder / "a.png")
    assert load_labelled_images(tmp_path / "classes").pixels[0, :, 0, 0].tolist() == [255, 255, 255]


def test_kinds_of_transparency(tmp_path):
    half = Image.new("LA", (4, 4), (0, 128))
    seen = read_picture(half, "x")
    assert (seen.mode, seen.getpixel((0, 0))) == ("L", 127)
    grey = Image.new("L", (4, 4), 7)
    grey.save(tmp_path / "grey.png", transparency=7)
    assert read_picture(tmp_path / "grey.png", "x").getpixel((0, 0)) == 255
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 9, 9, 9])
    palette.save(tmp_path / "palette.png", transparency=bytes([255, 0]))
    assert read_picture(tmp_path / "palette.png", "x").getpixel((0, 0)) == (255, 255, 255)
    colour = Image.new("RGB", (4, 4), (1, 2, 3))
    assert (
        read_picture(colour, "x").tobytes() == read_picture(colour.convert("RGBA"), "x").tobytes() == colour.tobytes()
    )


@pytest.mark.parametrize("suffix", ["gif", "webp", "png", "tif"])
def test_of_an_animation_the_first_frame_is_seen(tmp_path, suffix):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / f"a.{suffix}", save_all=True, append_images=frames[1:])
    red, _, blue = read_picture(tmp_path / f"a.{suffix}", "x").getpixel((3, 3))
    assert red > 240 and blue < 15


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "YCbCr", "I;16", "LA", "RGBA"])
def test_modes_that_files_have(tmp_path, mode):
    ramp = Image.fromarray(np.tile(np.arange(0, 256, 4, dtype=np.uint8), (16, 1)))
    if mode == "I;16":
        picture = Image.fromarray(np.asarray(ramp).astype(np.uint16) * 257)
    else:
        picture = ramp.quantize(64) if mode == "P" else ramp.convert("RGB").convert(mode)
    # Without compression Pillow before 13 cannot read what it writes in this mode.
    picture.save(tmp_path / "a.tif", compression="tiff_lzw" if mode == "YCbCr" else None)
    for source in (tmp_path / "a.tif", picture):
        seen = read_picture(source, "x")
        assert seen.mode in ("L", "RGB")
        if mode != "1":
            assert np.abs(np.asarray(seen.convert("L"), int) - np.asarray(ramp, int)).max() <= 6


def test_bombs_and_strips(tmp_path, monkeypatch):
    Image.new("L", (1, 40_000)).save(tmp_path / "strip.png")
    assert load_image(tmp_path / "strip.png", 512).shape == (1, 3, 512, 512)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ValueError, match="strip.png has too many pixels .*: make it smaller"):
        read_picture(tmp_path / "strip.png", str(tmp_path / "strip.png"))


def test_text_that_swells_is_refused(tmp_path):
    info = PngImagePlugin.PngInfo()
    info.add_text("a", "x" * 80_000_000, zip=True)
    Image.new("L", (4, 4)).save(tmp_path / "a.png", pnginfo=info)
    with pytest.raises(ValueError, match="is not a readable image"):
        read_picture(tmp_path / "a.png", "x")


@pytest.mark.parametrize("content", [b"", b"no image", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\nshowpage\n"])
def test_other_files_are_refused(tmp_path, content):
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(ValueError, match="a.png is not a readable image"):
        read_picture(tmp_path / "a.png", str(tmp_path / "a.png"))
    with pytest.raises(ValueError, match="is not a readable image"):
        read_picture(tmp_path / "none.png", "x")


def encoded(kind):
    file = io.BytesIO()
    top_white().resize((12, 8)).save(file, kind)
    return file.getvalue()


WHOLE = [encoded(kind) for kind in ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "JPEG2000")]


@settings(max_examples=400, deadline=None, derandomize=True, database=None)
@given(
    st.sampled_from(WHOLE),
    st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 255)), max_size=6),
    st.integers(0, 2000),
)
def test_any_bytes_are_a_picture_or_one_sentence(whole, changes, cut):
    content = bytearray(whole[: len(whole) - cut % len(whole)])
    for place, value in changes:
        content[place % len(content)] = value
    try:
        seen = read_picture(io.BytesIO(bytes(content)), "x")
    except ValueError as error:
        assert str(error).startswith("x ") and "\n" not in str(error) and len(str(error)) < 400
    else:
        assert seen.mode in ("L", "RGB")
