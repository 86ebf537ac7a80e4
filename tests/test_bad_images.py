"""Pictures as people really have them: which are read, that they are read like the original code does, and the rest."""

from __future__ import annotations

import io
import json
import os
import struct
import subprocess
import tracemalloc
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features

from defaker_opt.errors import ImageError
from defaker_opt.runtime.images import full_size_mask, load_image
from tests.conftest import COMMAND, defaker_opt

Write = Callable[[Path], None]


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(7).integers(0, 256, shape, dtype=np.uint8)


def photo(width: int = 30, height: int = 20) -> Image.Image:
    return Image.fromarray(noise(height, width, 3))


def png(width: int, height: int, bits: int, colour_type: int, rows: bytes) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def png_of_16_bits(path: Path, colour_type: int, channels: int) -> None:
    rows = b"".join(b"\0" + noise(30 * channels * 2).tobytes() for _ in range(20))
    path.write_bytes(png(30, 20, 16, colour_type, rows))


def encoded(image: Image.Image, kind: str) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format=kind)
    return stream.getvalue()


def palette_with_alpha(path: Path) -> None:
    image = Image.fromarray(noise(20, 30)).convert("P")
    image.save(path, transparency=bytes(range(256)))


def rotated_by_exif(path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    photo().save(path, exif=exif, quality=90)


def animation(path: Path) -> None:
    frames = [Image.fromarray(noise(20, 30, 3)[:, :, ::step]) for step in (1, -1)]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=50, loop=0)


ACCEPTED: dict[str, Write] = {
    "rgb.png": lambda path: photo().save(path),
    "rgb.jpg": lambda path: photo().save(path),
    "rgb.webp": lambda path: photo().save(path),
    "rgb.tif": lambda path: photo().save(path),
    "rgb.bmp": lambda path: photo().save(path),
    "no_extension": lambda path: path.write_bytes(encoded(photo(), "PNG")) and None,
    "jpeg_named.png": lambda path: path.write_bytes(encoded(photo(), "JPEG")) and None,
    "one_pixel.png": lambda path: photo(1, 1).save(path),
    "narrow.png": lambda path: photo(1, 4000).save(path),
    "wide.png": lambda path: photo(4000, 1).save(path),
    "cmyk.jpg": lambda path: Image.fromarray(noise(20, 30, 4), mode="CMYK").save(path),
    "rgb16.png": lambda path: png_of_16_bits(path, 2, 3),
    "rgba16.png": lambda path: png_of_16_bits(path, 6, 4),
    "bilevel.png": lambda path: Image.fromarray(noise(20, 30)).convert("1").save(path),
    "grey.png": lambda path: Image.fromarray(noise(20, 30)).save(path),
    "palette_alpha.png": palette_with_alpha,
    "la.png": lambda path: Image.fromarray(noise(20, 30, 2)).save(path),
    "rgba.png": lambda path: Image.fromarray(noise(20, 30, 4)).save(path),
    "animated.gif": animation,
    "animated.webp": animation,
    "animated.png": animation,
    "rotated.jpg": rotated_by_exif,
}


def as_the_original_reads(path: Path) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))


@pytest.mark.parametrize("name", ACCEPTED)
def test_accepted_pictures_are_read_like_the_original_reads_them(name: str, tmp_path: Path) -> None:
    ACCEPTED[name](tmp_path / name)
    np.testing.assert_array_equal(np.asarray(load_image(tmp_path / name)), as_the_original_reads(tmp_path / name))


def test_the_orientation_tag_is_not_applied(tmp_path: Path) -> None:
    rotated_by_exif(tmp_path / "rotated.jpg")
    with Image.open(tmp_path / "rotated.jpg") as image:
        assert image.getexif()[0x0112] == 6
    assert load_image(tmp_path / "rotated.jpg").size == (30, 20)


@pytest.mark.parametrize("name", ["animated.gif", "animated.webp", "animated.png"])
def test_of_an_animation_the_first_frame_counts(name: str, tmp_path: Path) -> None:
    animation(tmp_path / name)
    with Image.open(tmp_path / name) as image:
        assert image.n_frames == 2
        first = np.asarray(image.convert("RGB"))
        image.seek(1)
        assert (np.asarray(image.convert("RGB")) != first).any()
    np.testing.assert_array_equal(np.asarray(load_image(tmp_path / name)), first)


def test_sixteen_bit_colour_keeps_its_high_bytes(tmp_path: Path) -> None:
    png_of_16_bits(tmp_path / "rgb16.png", 2, 3)
    expected = noise(30 * 3 * 2)[::2].reshape(30, 3)
    np.testing.assert_array_equal(np.asarray(load_image(tmp_path / "rgb16.png"))[0], expected)


@pytest.fixture(scope="module")
def judged(int8_build: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, object]]]:
    folder = tmp_path_factory.mktemp("accepted")
    for name, write in ACCEPTED.items():
        write(folder / name)
    images = [folder / name for name in ACCEPTED]
    outputs = ("--mask-dir", folder / "masks", "--overlay-dir", folder / "overlays")
    done = defaker_opt("run", int8_build, *images, "--gate", 0, "--json", *outputs)
    assert done.returncode == 0, done.stderr
    return folder, [json.loads(line) for line in done.stdout.splitlines()]


def test_every_accepted_picture_gets_a_row_in_order(judged: tuple[Path, list[dict[str, object]]]) -> None:
    folder, rows = judged
    assert [row["image"] for row in rows] == [str(folder / name) for name in ACCEPTED]


@pytest.mark.parametrize("index", range(len(ACCEPTED)), ids=list(ACCEPTED))
def test_masks_come_back_at_the_stored_size(judged: tuple[Path, list[dict[str, object]]], index: int) -> None:
    _, rows = judged
    row = rows[index]
    with Image.open(str(row["image"])) as image, Image.open(str(row["mask"])) as mask:
        assert mask.size == image.size
        pixels = np.asarray(mask)
    assert set(np.unique(pixels)) <= {0, 255}
    assert row["mask_area"] == pytest.approx((pixels == 255).mean())


def test_no_two_pictures_share_a_mask(judged: tuple[Path, list[dict[str, object]]]) -> None:
    folder, rows = judged
    assert len({row["mask"] for row in rows}) == len(rows)
    assert len(list((folder / "masks").iterdir())) == len(list((folder / "overlays").iterdir())) == len(rows)


def jpeg_of_header(width: int, height: int) -> bytes:
    data = bytearray(encoded(photo(), "JPEG"))
    start = data.index(b"\xff\xc0")
    data[start + 5 : start + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def icon_with_a_large_png_inside(path: Path) -> None:
    inside = encoded(Image.new("1", (12_000, 12_000)), "PNG")
    entry = struct.pack("<BBBBHHII", 16, 16, 0, 0, 1, 32, len(inside), 22)
    path.write_bytes(struct.pack("<HHH", 0, 1, 1) + entry + inside)


# name → how to write it, what the message must say is wrong (any of), and the next step (any of)
REFUSED: dict[str, tuple[Write, tuple[str, ...], tuple[str, ...]]] = {
    "truncated.jpg": (lambda p: p.write_bytes(encoded(photo(), "JPEG")[:700]) and None, ("truncated",), ("complete",)),
    "truncated.png": (lambda p: p.write_bytes(encoded(photo(), "PNG")[:-600]) and None, ("truncated",), ("complete",)),
    "truncated.webp": (lambda p: p.write_bytes(encoded(photo(), "WEBP")[:200]) and None, ("decoded",), ("complete",)),
    "header_only.png": (lambda p: p.write_bytes(encoded(photo(), "PNG")[:8]) and None, ("not a picture",), ("JPEG",)),
    "empty.jpg": (lambda p: p.touch(), ("empty",), ("JPEG",)),
    "text.jpg": (lambda p: p.write_text("not a picture\n" * 20) and None, ("not a picture",), ("JPEG",)),
    "zeros.png": (lambda p: p.write_bytes(bytes(5000)) and None, ("not a picture",), ("JPEG",)),
    "huge.png": (lambda p: Image.new("1", (20_000, 20_000)).save(p), ("pixels",), ("scale it down",)),
    "huge.jpg": (lambda p: p.write_bytes(jpeg_of_header(20_000, 20_000)) and None, ("pixels",), ("scale it down",)),
    "large.png": (lambda p: Image.new("1", (12_000, 12_000)).save(p), ("144,000,000 pixels",), ("scale it down",)),
    "icon.ico": (icon_with_a_large_png_inside, ("pixels",), ("scale it down",)),
    "grey16.png": (lambda p: png_of_16_bits(p, 0, 1), ("more than 8 bits",), ("convert it to 8 bits",)),
    "grey16.tif": (lambda p: Image.new("I;16", (30, 20)).save(p), ("more than 8 bits",), ("convert it to 8 bits",)),
    "float.tif": (lambda p: Image.new("F", (30, 20)).save(p), ("more than 8 bits",), ("convert it to 8 bits",)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_pictures_are_named_with_the_reason_and_the_next_step(name: str, tmp_path: Path) -> None:
    write, wrong, step = REFUSED[name]
    write(tmp_path / name)
    with pytest.raises(ImageError) as caught:
        load_image(tmp_path / name)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / name}: ")
    assert "\n" not in message
    assert any(words in message for words in wrong), message
    assert any(words in message for words in step), message


def test_a_bomb_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    path = tmp_path / "huge.png"
    path.write_bytes(png(20_000, 20_000, 8, 2, b"\0" * 1000))
    with pytest.raises(ImageError, match="pixels"):
        load_image(path)


@pytest.mark.parametrize(("name", "reason"), [("missing.png", "no such file"), ("folder.png", "director|folder")])
def test_what_is_no_file_is_not_called_incomplete(name: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(ImageError, match=f"(?i){reason}") as caught:
        load_image(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)
    assert "is the file complete" not in str(caught.value)


@pytest.mark.skipif(not features.check("avif"), reason="this pillow reads no AVIF")
def test_a_damaged_avif_is_an_image_error(tmp_path: Path) -> None:
    whole, refused = encoded(photo(), "AVIF"), 0
    path = tmp_path / "damaged.avif"
    for place in range(60, 300):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 255]) + whole[place + 1 :])
        try:
            load_image(path)
        except ImageError as error:
            assert str(error).startswith(f"{path}: ")
            refused += 1
    assert refused


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"])
def test_no_damage_gets_past_the_image_error(kind: str, tmp_path: Path) -> None:
    whole, random = encoded(photo(), kind), np.random.default_rng(1)
    path = tmp_path / "damaged"
    for attempt in range(60):
        data = bytearray(whole[: random.integers(len(whole))] if attempt % 2 else whole)
        for place in random.integers(0, max(1, min(len(data), 300)), 3):
            data[place : place + 1] = bytes([random.integers(256)])
        path.write_bytes(data)
        try:
            load_image(path)
        except ImageError as error:
            assert "\n" not in str(error)


def test_a_long_thin_picture_takes_no_more_memory_than_a_square_one() -> None:
    logits = np.zeros((96, 96), np.float32)
    peaks = []
    for width, height in ((600, 500), (1, 300_000), (300_000, 1)):
        tracemalloc.start()
        full_size_mask(logits, 384, width, height)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert max(peaks) < 50e6, f"{peaks} bytes for masks of 300,000 pixels"


@pytest.fixture(scope="module")
def with_a_bad_one(int8_build: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("mixed")
    photo().save(folder / "first.png")
    (folder / "bad.png").write_text("not a picture")
    photo().save(folder / "last.png")
    return int8_build, folder


def test_one_bad_picture_does_not_stop_the_rest(with_a_bad_one: tuple[Path, Path]) -> None:
    build, folder = with_a_bad_one
    images = [folder / f"{name}.png" for name in ("first", "bad", "missing", "last")]
    done = defaker_opt("run", build, *images, "--json", "--gate", 0, "--mask-dir", folder / "masks")
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert [row["image"] for row in rows] == list(map(str, images))
    assert ["error" in row for row in rows] == [False, True, True, False]
    assert ["verdict" in row for row in rows] == [True, False, False, True]
    assert rows[0]["fake_probability"] == rows[3]["fake_probability"]
    assert sorted(path.name for path in (folder / "masks").iterdir()) == ["first_mask.png", "last_mask.png"]


def test_without_json_the_bad_one_is_one_line_on_standard_error(with_a_bad_one: tuple[Path, Path]) -> None:
    build, folder = with_a_bad_one
    done = defaker_opt("run", build, *(folder / f"{name}.png" for name in ("first", "bad", "last")))
    assert done.returncode == 2
    assert [line for line in done.stderr.splitlines() if "error" in line] == [
        f"error: {folder / 'bad.png'}: not a picture of a known format, or empty; JPEG, PNG, WebP, TIFF … are"
    ]
    assert len(done.stdout.splitlines()) == 2


def test_pictures_of_like_names_keep_masks_of_their_own(int8_build: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    images = [tmp_path / "a.png", tmp_path / "other" / "a.png", tmp_path / "a-2.png"]
    for size, path in zip((20, 30, 40), images):
        photo(size, size).save(path)
    done = defaker_opt("run", int8_build, *images, "--json", "--gate", 0, "--mask-dir", tmp_path / "masks")
    assert done.returncode == 0, done.stderr
    for image, line in zip(images, done.stdout.splitlines()):
        with Image.open(image) as picture, Image.open(json.loads(line)["mask"]) as mask:
            assert mask.size == picture.size


def test_no_result_overwrites_a_picture_that_is_to_be_judged(int8_build: Path, tmp_path: Path) -> None:
    images = [tmp_path / "a.png", tmp_path / "a_mask.png"]
    for path in images:
        photo().save(path)
    before = images[1].read_bytes()
    defaker_opt("run", int8_build, *images, "--gate", 0, "--mask-dir", tmp_path)
    assert images[1].read_bytes() == before


def test_a_name_too_long_for_its_mask_is_a_one_line_error(int8_build: Path, tmp_path: Path) -> None:
    image = tmp_path / ("x" * 250 + ".png")
    photo().save(image)
    done = defaker_opt("run", int8_build, image, "--gate", 0, "--mask-dir", tmp_path / "masks")
    assert "Traceback" not in done.stderr
    assert done.returncode == (0 if any((tmp_path / "masks").iterdir()) else 2)


def test_a_name_that_is_not_unicode_is_no_obstacle(int8_build: Path, tmp_path: Path) -> None:
    image = tmp_path / os.fsdecode(b"photo-\xff.png")
    try:
        photo().save(image)
    except OSError:
        pytest.skip("this file system takes only names that are Unicode")
    done = defaker_opt("run", int8_build, image, env={**os.environ, "PYTHONIOENCODING": "utf-8:strict"})
    assert "Traceback" not in done.stderr
    assert done.returncode == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize("form", ["--json", "--threads=0"])
def test_results_that_cannot_be_printed_are_a_one_line_error(form: str, int8_build: Path, tmp_path: Path) -> None:
    photo().save(tmp_path / "a.png")
    with open("/dev/full", "w") as full:
        command = ["run", str(int8_build), str(tmp_path / "a.png"), form]
        done = subprocess.run(
            [*COMMAND, *command], stdout=full, stderr=subprocess.PIPE, text=True, timeout=60, check=False
        )
    assert "Traceback" not in done.stderr
    assert done.returncode == 2
    assert "space" in done.stderr
