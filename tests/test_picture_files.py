"""Picture files: which are found below a folder, and that their pixels are those that a viewer shows."""

import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms

from harness.endings import UserError
from images import load_images
from picture_files import list_classes, read_picture

GREY = np.array([[0, 4095], [32768, 65535]], np.uint16)
SHOWN = [0, 16, 128, 255]  # GREY's range brought to 255.
HALF = Image.fromarray(np.array([[[200, 0, 0, 255], [200, 0, 0, 128]], [[200, 0, 0, 0]] * 2], np.uint8))
NO_ALPHA = Image.new("RGBA", (2, 2), (200, 0, 0, 0))
ON_WHITE = [(200, 0, 0), (227, 127, 127), (255, 255, 255), (255, 255, 255)]
COLOURS = Image.frombytes("P", (2, 2), bytes([0, 1, 2, 3]))
COLOURS.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255, 9, 9, 9])
MANY_COLOURS = COLOURS.resize((40, 40))  # Pillow itself refuses a file that is shorter than a palette.
MANY_COLOURS.putdata([0, 1, 2, 3] * 400)
TURNED = Image.Exif()
TURNED[0x112] = 6  # To be turned clockwise by a quarter.


def saved(image, **how):
    return lambda path: image.save(path, **how)


def raw(content):
    return lambda path: path.write_bytes(content)


def cut(make, count):
    """What `make` writes, without the last `count` bytes."""
    return lambda path: (make(path), path.write_bytes(path.read_bytes()[:-count]))


def png(bits, kind, pixels, *extra):
    """A PNG of 2x2 pixels with the extra chunks (name, data)."""
    header = (b"IHDR", struct.pack(">IIBBBBB", 2, 2, bits, kind, 0, 0, 0))
    chunks = [header, *extra, (b"IDAT", zlib.compress(pixels)), (b"IEND", b"")]
    check = [struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
             for name, data in chunks]  # fmt: skip
    return b"\x89PNG\r\n\x1a\n" + b"".join(check)


def grey_png(*extra):
    return png(2, 0, bytes([0, 0b00010000, 0, 0b10110000]), *extra)


PICTURES = {
    "16 bits.png": (saved(Image.fromarray(GREY)), SHOWN),
    "16 bits.tif": (saved(Image.fromarray(GREY)), SHOWN),
    "16 bits.pgm": (saved(Image.fromarray(GREY)), SHOWN),
    "16 bits.jp2": (saved(Image.fromarray(GREY)), SHOWN),
    "big endian.tif": (saved(Image.frombytes("I;16B", (2, 2), GREY.astype(">u2").tobytes())), SHOWN),
    "white is zero.tif": (saved(Image.fromarray(GREY), tiffinfo={262: 0}), [255, 239, 127, 0]),
    "12 bits.pgm": (raw(b"P5 2 2 4095\n" + np.array([0, 1000, 2048, 4095], ">u2").tobytes()), [0, 62, 128, 255]),
    "4 bits.pgm": (raw(b"P2 2 2 15\n0 5 10 15\n"), [0, 85, 170, 255]),
    "16 bits and a transparent grey.png": (saved(Image.fromarray(GREY), transparency=4095), [0, 255, 128, 255]),
    "2 bits.png": (raw(grey_png()), [0, 85, 170, 255]),
    "2 bits and a transparent grey.png": (raw(grey_png((b"tRNS", b"\0\2"))), [0, 85, 255, 255]),
    "ones are black.xbm": (
        raw(b"#define i_width 2\n#define i_height 2\nstatic char i_bits[] = {\n0x01, 0x02 };\n"),
        [0, 255, 255, 0],
    ),
    "1 bit.png": (saved(Image.fromarray(np.eye(2, dtype=bool))), [255, 0, 0, 255]),
    "transparent.png": (saved(HALF), ON_WHITE),
    "transparent.webp": (saved(HALF, lossless=True, exact=True), ON_WHITE),
    "transparent.tiff": (saved(HALF), ON_WHITE),
    "transparent grey.png": (saved(HALF.convert("LA")), [60, 157, 255, 255]),
    "alpha unused.tga": (saved(NO_ALPHA), [(200, 0, 0)] * 4),
    "alpha unused.tif": (saved(NO_ALPHA), [(200, 0, 0)] * 4),
    "palette.pcx": (saved(COLOURS), [(255, 0, 0), (0, 255, 0), (0, 0, 255), (9, 9, 9)]),
    "grey.pcx": (saved(Image.new("L", (2, 2), 7)), [7] * 4),
    "palette.PNG": (saved(COLOURS), [(255, 0, 0), (0, 255, 0), (0, 0, 255), (9, 9, 9)]),
    "palette and alphas.png": (
        saved(COLOURS, transparency=bytes([255, 0, 128, 255])),
        [(255, 0, 0), (255, 255, 255), (127, 127, 255), (9, 9, 9)],
    ),
    "palette and a transparent colour.gif": (
        saved(COLOURS, transparency=2),
        [(255, 0, 0), (0, 255, 0), (255, 255, 255), (9, 9, 9)],
    ),
    "cmyk.tif": (saved(HALF.convert("RGB").convert("CMYK")), [(200, 0, 0)] * 4),
    "turned.png": (saved(Image.fromarray(np.array([[1, 2], [3, 4]], np.uint8)), exif=TURNED), [3, 1, 4, 2]),
    "damaged EXIF.jpg": (saved(Image.new("RGB", (2, 2), (9, 9, 9)), exif=b"Exif\0\0rubbish"), [9] * 4),
    "frames.apng": (
        saved(Image.new("L", (2, 2), 7), save_all=True, append_images=[Image.new("L", (2, 2), 200)], format="PNG"),
        [7] * 4,
    ),
}


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_is_what_a_viewer_shows(name, tmp_path):
    make, expected = PICTURES[name]
    make(tmp_path / name)
    expected = [value if isinstance(value, tuple) else (value,) * 3 for value in expected]
    assert read_picture(tmp_path / name, 2).reshape(4, 3).tolist() == [list(value) for value in expected]


def tiff(bits, kind, samples, planes, pixels, *extra):
    """A file of 2 x 2 pixels, uncompressed. extra: (tag, values), of 16 bits each."""
    tags = [(256, [2]), (257, [2]), (258, [bits] * samples), (259, [1]), (262, [kind]), (277, [samples]), *extra]
    count = samples if planes == 2 else 1
    tags += [(284, [planes]), (273, [0] * count), (278, [2]), (279, [len(pixels) // count] * count)]
    tags.sort()
    behind = 8 + 2 + 12 * len(tags) + 4
    lengths = {tag: 2 * len(values) if len(values) > 2 else 0 for tag, values in tags}
    start = behind + sum(lengths.values())
    entries, data = b"", b""
    for tag, values in tags:
        if tag == 273:
            values = [start + number * len(pixels) // count for number in range(count)]
        packed = struct.pack(f"<{len(values)}H", *values)
        where = packed.ljust(4, b"\0") if len(values) < 3 else struct.pack("<I", behind + len(data))
        entries += struct.pack("<HHI", tag, 3, len(values)) + where
        data += packed if len(values) > 2 else b""
    head = b"II*\0" + struct.pack("<IH", 8, len(tags))
    return raw(head + entries + bytes(4) + data + pixels)


UNCERTAIN = {
    "planes.tif": (tiff(16, 2, 3, 2, struct.pack("<12H", *[40000] * 4, *[0] * 8)), "16-bit colours in separate planes"),
    "palette.tif": (tiff(8, 3, 1, 1, bytes(range(4)), (320, [*range(256)] * 3)), "an 8-bit palette, where TIFF has"),
    "signed.tif": (tiff(8, 1, 1, 1, bytes([0, 1, 254, 255]), (339, [2])), "signed grey values have no certain white"),
    "float.tif": (saved(Image.fromarray(GREY.astype(np.float32))), "pixels of mode F in TIFF"),
    "float.pfm": (saved(Image.fromarray(GREY.astype(np.float32))), "pixels of mode F in PPM"),
    "32 bits.tif": (saved(Image.fromarray(GREY.astype(np.int32))), "pixels of mode I in TIFF"),
    "16 bits and a transparent colour.png": (
        raw(png(16, 2, bytes(26), (b"tRNS", bytes([1, 0] * 3)))),
        "a 16-bit transparent colour",
    ),
    "transparent.png": (saved(NO_ALPHA), "every pixel is transparent"),
    "palette cut.pcx": (cut(saved(MANY_COLOURS), 769), "its palette is missing"),
    "palette cut short.pcx": (cut(saved(MANY_COLOURS), 700), "its palette is missing"),
    "pipe.png": (os.mkfifo, "it is not a file"),
    "nowhere.png": (lambda path: path.symlink_to("no/such/file"), "it is not a file"),
    "itself.png": (lambda path: path.symlink_to(path), "it is not a file"),
}


@pytest.mark.parametrize("name", UNCERTAIN)
def test_what_is_not_certain_is_refused_by_name(name, tmp_path):
    make, reason = UNCERTAIN[name]
    make(tmp_path / name)
    with pytest.raises(UserError, match=rf"cannot decode the image .*/{name} \({reason}"):
        read_picture(tmp_path / name, 2)


def paint(*paths, colour=0):
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), (colour,) * 3).save(path)


def test_classes_are_walked_down_and_what_is_left_out_is_counted(tmp_path):
    for split in ("train", "test"):
        paint(tmp_path / split / "cat/0.png", tmp_path / split / "cat/.trash/1.png", colour=10)
        paint(tmp_path / split / "dog/poodle/small/0.pgm", tmp_path / split / "dog/1.BMP", colour=20)
        (tmp_path / split / "dog/again").symlink_to("..")  # A loop.
        (tmp_path / split / "dog/.DS_Store").touch()
        (tmp_path / split / "dog/film.mpeg").touch()  # Pillow knows this format by name alone.
        (tmp_path / split / "notes.txt").touch()
    (tmp_path / "elsewhere").mkdir()
    paint(tmp_path / "elsewhere/2.png", colour=20)
    (tmp_path / "train/dog/linked").symlink_to(tmp_path / "elsewhere")
    data = load_images("folder", tmp_path)
    assert data.classes == ["cat", "dog"]
    assert data.train_labels.tolist() == [0, 1, 1, 1]
    assert data.train_images[:, 0, 0, 0].tolist() == [10, 20, 20, 20]
    assert data.test_labels.tolist() == [0, 1, 1]
    assert len(data.left_out) == 8
    assert str(data).startswith("4 training and 3 test images of 2 classes (cat, dog), resized to 32x32; 8 files left")
    first = ", ".join(f"{tmp_path}/train/{name}" for name in ("cat/.trash", "dog/.DS_Store", "dog/film.mpeg"))
    assert f"({first}, ...)" in str(data)
    facts = data.state_dict()
    assert (facts["files_left_out"], facts["first_left_out"][0]) == (8, "train/cat/.trash")


def test_images_that_repeat_are_counted(tmp_path):
    shade = iter(range(20, 250))
    for split in ("train", "test"):
        for name in "abc":
            paint(tmp_path / split / name / "0.png", colour=next(shade))
    paint(tmp_path / "elsewhere/0.png", colour=next(shade))
    for link in ("one", "two"):  # A folder that two links lead to.
        (tmp_path / "train/a" / link).symlink_to(tmp_path / "elsewhere")
    again = next(shade)
    paint(*(tmp_path / f"test/{name}.png" for name in ("a/1", "a/2", "a/3", "b/1")), colour=again)
    data = load_images("folder", tmp_path)
    assert "; training images that repeat another of their class: 1; test images that repeat" in str(data)
    assert "; test images that are in several classes: 1" in str(data)
    counts = {name: count for name, count in data.oddities.items() if count}
    assert counts == {"test_pictures_in_several_classes": 1, "train_pictures_repeated": 1, "test_pictures_repeated": 2}


def test_a_class_without_a_picture_is_named(tmp_path):
    paint(*(tmp_path / split / name / "0.png" for split in ("train", "test") for name in "ab"))
    for split in ("train", "test"):
        (tmp_path / split / "c/deep").mkdir(parents=True)
        (tmp_path / split / "c/deep/text.md").touch()
        with pytest.raises(UserError, match=rf"{split}/c is a class folder without images"):
            load_images("folder", tmp_path)
        paint(tmp_path / split / "c/0.png")
    (tmp_path / "test/c/0.png").unlink()
    (tmp_path / "test/c").rename(tmp_path / "d")
    with pytest.raises(UserError, match=r"train has the class 'c', but .*test does not"):
        load_images("folder", tmp_path)


# The colours of Display P3 and of sRGB, in XYZ for the white of profiles (D50), as columns.
DISPLAY_P3 = np.array([[0.5151, 0.2919, 0.1572], [0.2412, 0.6922, 0.0666], [-0.0011, 0.0419, 0.7841]])
SRGB = np.array([[0.4361, 0.3851, 0.1431], [0.2225, 0.7169, 0.0606], [0.0139, 0.0971, 0.7141]])


def display_p3():
    """A colour profile: that of sRGB with other colours."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    for name, colour in zip((b"rXYZ", b"gXYZ", b"bXYZ"), DISPLAY_P3.T, strict=True):
        entry = profile.index(name)
        start = int.from_bytes(profile[entry + 4 : entry + 8], "big") + 8
        profile[start : start + 12] = b"".join(round(part * 65536).to_bytes(4, "big", signed=True) for part in colour)
    return bytes(profile)


@pytest.mark.parametrize("suffix", ["png", "tif", "webp"])
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_colours_of_another_profile_become_srgb(mode, suffix, tmp_path):
    pixels = np.array([[[200, 200, 60], [20, 240, 20], [128, 128, 128], [250, 90, 80]]], np.uint8).repeat(4, 0)
    image = Image.fromarray(pixels)
    image = image.convert(mode, **{"palette": Image.Palette.ADAPTIVE} if mode == "P" else {})
    assert (np.array(image.convert("RGB")) == pixels).all()
    exact = {"lossless": True} if suffix == "webp" else {}
    image.save(tmp_path / f"p3.{suffix}", icc_profile=display_p3(), **exact)
    shares = pixels / 255
    light = np.where(shares <= 0.04045, shares / 12.92, ((shares + 0.055) / 1.055) ** 2.4)
    light = np.clip(light @ (np.linalg.inv(SRGB) @ DISPLAY_P3).T, 0, 1)
    expected = 255 * np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    assert abs(expected - pixels).max() > 50
    assert abs(read_picture(tmp_path / f"p3.{suffix}", 4) - expected).max() < 3
    for profile in (b"damaged", None):
        image.save(tmp_path / f"plain.{suffix}", **{"icc_profile": profile} if profile else {}, **exact)
        assert (read_picture(tmp_path / f"plain.{suffix}", 4) == pixels).all()


def linear_grey():
    """The colour profile of grey values that are proportional to light (ICC.1:2001-04)."""
    description = b"desc" + struct.pack(">4xI", 5) + b"grey\0" + bytes(78)
    white = b"XYZ " + struct.pack(">4x3i", 63190, 65536, 54061)
    entries = {b"desc": description, b"wtpt": white, b"cprt": b"text\0\0\0\0none", b"kTRC": b"curv" + bytes(8)}
    table, data = struct.pack(">I", len(entries)), b""
    for name, entry in entries.items():
        entry += bytes(-len(entry) % 4)
        table += name + struct.pack(">II", 132 + 12 * len(entries) + len(data), len(entry))
        data += entry
    names = (0x2400000, b"mntr", b"GRAY", b"XYZ ", b"acsp")
    header = struct.pack(">I4sI4s4s4s12x4s28x3i", 128 + len(table + data), b"none", *names, 63190, 65536, 54061)
    return header.ljust(128, b"\0") + table + data


@pytest.mark.parametrize("mode", ["L", "LA", "I;16"])
def test_grey_of_another_profile_becomes_srgb_whatever_the_mode(mode, tmp_path):
    grey = np.array([[0, 64], [128, 255]], np.uint8)
    image = Image.fromarray(grey.astype(np.uint16) * 257) if mode == "I;16" else Image.fromarray(grey).convert(mode)
    assert image.mode == mode
    image.save(tmp_path / "linear.png", icc_profile=linear_grey())
    light = grey / 255
    expected = 255 * np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    assert abs(read_picture(tmp_path / "linear.png", 2) - expected[..., None]).max() < 2


def test_a_transparent_colour_is_one_of_those_before_the_conversion(tmp_path):
    pixels = np.array([[[200, 200, 60], [20, 240, 20], [128, 128, 128], [250, 90, 80]]], np.uint8).repeat(4, 0)
    Image.fromarray(pixels).save(tmp_path / "opaque.png", icc_profile=display_p3())
    Image.fromarray(pixels).save(tmp_path / "key.png", icc_profile=display_p3(), transparency=(20, 240, 20))
    expected = read_picture(tmp_path / "opaque.png", 4)
    expected[:, 1] = 255
    assert (read_picture(tmp_path / "key.png", 4) == expected).all()


def test_class_names_that_look_the_same_are_told(tmp_path):
    paint(*(tmp_path / f"{split}/a/0.png" for split in ("train", "test")))
    paint(tmp_path / "train/caf\u00e9/0.png", tmp_path / "test/cafe\u0301/0.png")
    with pytest.raises(
        UserError, match=r"test and .*train spell the class 'cafe.' with .*; give both folders one name"
    ):
        load_images("folder", tmp_path)
    for split in ("train", "test"):
        paint(*(tmp_path / split / name / "1.png" for name in ("caf\u00e9", "cafe\u0301")))
    with pytest.raises(UserError, match="train has two folders that spell the class 'cafe.' with"):
        load_images("folder", tmp_path)


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    paint(tmp_path / "a/deep/0.png")
    scan = os.scandir

    def refuse(path):  # Permissions do not stop root.
        if path.name == "deep":
            raise PermissionError(13, "Permission denied")
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match=r"cannot read the folder .*/a/deep: Permission denied"):
        list_classes(tmp_path)


@pytest.mark.parametrize("dark", [(), ("train",), ("test",), ("train", "test")])
def test_pictures_of_fewer_bits_than_their_files_are_told(tmp_path, dark):
    for split in ("train", "test"):
        for name in "ab":
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for number, white in enumerate((65535, 4095 if split in dark else 65534)):
                grey = np.linspace(0, white, 1024).astype(np.uint16).reshape(32, 32)
                Image.fromarray(grey).save(folder / f"{number}.png")
    data = load_images("folder", tmp_path)
    for split, word in (("train", "training"), ("test", "test")):
        told = f"; {word} images without a pixel above 16 of 255: 2" in str(data)
        assert (told, data.state_dict()[f"dark_{split}_pictures"]) == ((True, 2) if split in dark else (False, 0))
    assert ("if 16-bit files hold fewer bits, scale their values up first" in str(data)) == bool(dark)
