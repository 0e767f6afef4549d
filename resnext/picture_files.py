"""Image files: which files of a folder are images, and their pixels as a viewer shows them."""

import contextlib
import functools
import io
import os
import sys
import warnings
from pathlib import Path

import numpy as np

from harness.endings import UserError, printable

# Pillow's own warning names no file; `_warn_if_large` does. A filter for a while would not be safe among threads.
warnings.filterwarnings("ignore", message="Image size .* exceeds limit")
LARGEST = 4096  # Largest height and width of an image in pixels: all images are kept in memory.
# Formats that Pillow recognises but cannot decode by itself.
ONLY_NAMED = {"BUFR", "GRIB", "HDF5", "MPEG", "WMF"}
# Formats whose 16-bit grey pixels are unsigned, with white at the maximum.
SIXTEEN_BITS = {"IM", "JPEG2000", "PNG", "PPM", "TIFF"}
# Formats whose fourth byte is often left 0 without meaning that anything is transparent.
UNUSED_ALPHA = {"BMP", "DIB", "DDS", "ICO", "CUR", "TGA", "TIFF"}
BITS_PER_SAMPLE, PHOTOMETRIC, PLANAR, COLOUR_MAP, SAMPLE_FORMAT = 258, 262, 284, 320, 339  # TIFF tags.


def list_classes(folder):
    """The images below `folder`/<class>/, at any depth, following links.

    Returns {class: sorted Paths} and a list of the Paths that are left out: hidden ones, those without the suffix of an
    image, and those in no class. UserError if there is no class, or a class without an image.
    """
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}; --data_dir needs train/<class>/* and test/<class>/*")
    classes, left_out = {}, []
    place = Path(os.path.realpath(folder))
    for path, is_folder in _children(folder):
        if not is_folder or path.name.startswith("."):
            left_out.append(path)
            continue
        files = list(_files(path, (place, *place.parents)))
        classes[path.name] = sorted(file for file in files if is_picture(file))
        left_out += [file for file in files if not is_picture(file)]
        if not classes[path.name]:
            raise UserError(f"{path} is a class folder without images; add some, or remove it")
    if not classes:
        raise UserError(f"{folder} has no class folders with images; it needs <class>/*.png or similar")
    return classes, left_out


def _files(folder, above):
    """Yield the Path of every file below `folder`, and of every hidden folder, which is not entered.

    above: the real Paths of the folders that contain `folder`.
    """
    place = Path(os.path.realpath(folder))
    if place in above:  # A link to a folder that contains it: everything there has been seen.
        return
    for path, is_folder in _children(folder):
        if is_folder and not path.name.startswith("."):
            yield from _files(path, (*above, place))
        else:
            yield path


def _children(folder):
    """[(Path, whether it is a folder)] of the entries of `folder`, by name."""
    try:
        with os.scandir(folder) as entries:
            found = [(Path(entry), entry.is_dir() if not entry.is_symlink() else Path(entry).is_dir())
                     for entry in entries]  # fmt: skip
    except OSError as error:
        raise UserError(
            f"cannot read the folder {folder}: {error.strerror}; correct its permissions or remove it"
        ) from None
    return sorted(found)


def is_picture(path):
    return path.suffix.lower() in _suffixes() and not path.name.startswith(".")


@functools.cache
def _suffixes():
    from PIL import Image

    formats = Image.registered_extensions()
    return {suffix for suffix, name in formats.items() if name in {*Image.OPEN, "MPO"} - ONLY_NAMED}


def read_picture(path, size):
    """The image in `path` as a viewer shows it, resized to uint8 [size, size, 3]. UserError if that is impossible."""
    from PIL import Image

    try:
        if not path.is_file():  # Opening a pipe would wait forever.
            raise UserError("it is not a file")
        with Image.open(path) as image:
            _warn_if_large(path, image.size)
            image = as_shown(image)
            if image.size != (size, size):
                image = image.resize((size, size), Image.BILINEAR)
            return np.array(image)
    except MemoryError:
        raise
    except Exception as error:  # Pillow may raise any exception on a damaged file.
        reason = str(error) if isinstance(error, UserError) else type(error).__name__
        raise UserError(f"cannot decode the image {path} ({reason}); replace or remove it") from None


def _warn_if_large(path, size):
    """Pillow's warning of a decompression bomb, with the file's name."""
    from PIL import Image

    if Image.MAX_IMAGE_PIXELS and size[0] * size[1] > Image.MAX_IMAGE_PIXELS:
        told = f"warning: {path} has {size[0]}x{size[1]} pixels; decoding it takes much memory, so make it smaller"
        print(printable(told), file=sys.stderr, flush=True)


def as_shown(image):
    """The newly opened Pillow image `image` as RGB: rotated according to its EXIF data, colours converted from its
    profile to sRGB, 16-bit pixels scaled to 8 bits by the range of the format, transparent parts on white. UserError if
    the range is uncertain."""
    from PIL import Image, ImageChops, ImageOps

    if image.format == "TIFF":
        _check_tiff(image)
    if image.format == "PCX" and image.mode == "L":
        _check_pcx(image)
    image_format = image.format  # Conversion drops it.
    coding = str(image.tile[0].args) if image.tile else ""
    image.load()
    with contextlib.suppress(Exception):  # Damaged EXIF data do not keep a viewer from showing the pixels.
        ImageOps.exif_transpose(image, in_place=True)
    if image_format == "XBM":
        image = ImageChops.invert(image)  # Its ones are black.
    key, profile = image.info.get("transparency"), image.info.get("icc_profile")
    if image.mode[0] in "IF":
        seen = None if key is None else Image.fromarray(np.asarray(image) != key)
        image = _in_srgb(Image.fromarray(_eight_bits(image)), profile)
        return Image.composite(image, Image.new("RGB", image.size, "white"), seen) if seen else image
    if not image.has_transparency_data:
        return _in_srgb(image, profile)
    if key is not None and "16" in coding:
        raise UserError("a 16-bit transparent colour")
    if isinstance(key, int) and image.mode == "L":
        image.info["transparency"] = key * {"L;2": 85, "L;4": 17}.get(coding, 1)  # Scaled as the pixels have been.
    if image.mode == "La":
        image = image.convert("LA")
    colours = image.convert("L" if image.mode in ("L", "LA") else "RGB")
    image = image.convert("RGBA")
    if not image.getextrema()[3][1]:  # On white, nothing would be left of it.
        if image_format not in UNUSED_ALPHA:
            raise UserError("every pixel is transparent")
        return _in_srgb(colours, profile)
    if profile:
        alpha, image = image.getchannel("A"), _in_srgb(colours, profile)
        image.putalpha(alpha)
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def _in_srgb(image, profile):
    """`image`, which is not transparent, as RGB, with its colours converted from `profile`, the bytes of an ICC profile
    or None, to sRGB, as viewers do."""
    from PIL import ImageCms

    if profile:
        pixels = image if image.mode in ("L", "CMYK") else image.convert("RGB")
        # Not by a profile that is damaged, or for another kind of pixels.
        with contextlib.suppress(ImageCms.PyCMSError, OSError, ValueError):
            srgb = ImageCms.createProfile("sRGB")
            return ImageCms.profileToProfile(pixels, io.BytesIO(profile), srgb, outputMode="RGB")
    return image.convert("RGB")


def _check_tiff(image):
    """UserError for TIFF features that Pillow silently decodes to wrong pixels."""
    tags = image.tag_v2
    if tags.get(PLANAR) == 2 and max(tags.get(BITS_PER_SAMPLE, (8,))) > 8 and image.tile[0][0] == "raw":
        raise UserError("16-bit colours in separate planes; save it with PlanarConfiguration 1")
    if image.mode == "P" and 0 < max(tags.get(COLOUR_MAP, (0,))) < 256:
        raise UserError("an 8-bit palette, where TIFF has 16 bits; save it as RGB")
    if image.mode == "L" and 2 in tags.get(SAMPLE_FORMAT, ()):
        raise UserError("signed grey values have no certain white level; save it with 8 or 16 bits")


def _check_pcx(image):
    """UserError if no palette ends the file, as where it was cut off, and the header does not say that there is none:
    Pillow takes the numbers of colours for shades of grey."""
    image.fp.seek(68)
    needs_none = image.fp.read(1) == b"\2"
    image.fp.seek(-769, os.SEEK_END)
    if not needs_none and image.fp.read(1) != b"\x0c":
        raise UserError("its palette is missing")


def _eight_bits(image):
    """A grey image with more than 8 bits per pixel, as uint8 [H, W], scaled so that the white of its range is 255."""
    certain = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
    if not certain or image.format not in SIXTEEN_BITS:
        raise UserError(
            f"pixels of mode {image.mode} in {image.format} have no certain white level; save it with 8 or 16 bits"
        )
    white, inverted = 65535, False
    if image.format == "TIFF":
        white = 2 ** image.tag_v2.get(BITS_PER_SAMPLE, (16,))[0] - 1
        inverted = image.tag_v2.get(PHOTOMETRIC) == 0
    grey = np.rint(np.asarray(image).astype(np.float64) * (255 / white)).astype(np.uint8)
    return 255 - grey if inverted else grey
