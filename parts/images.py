"""Image files: found by their names, and read alike by whatever takes a folder of them."""

import itertools
import re
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from parts.common import UserError

# image K of prompt P: P_K.png, P/K.png, P.png; sample.py names P_seedK.png, GenEval P/samples/K.png
PLACE = r"(\d+)(?:(?:_|/|_seed|/samples/)(\d+))?"
IMAGE_NAME = re.compile(PLACE + r"\.(?:png|jpe?g|webp|bmp|tiff?)", re.IGNORECASE)
# may lie beside images
NOTES = re.compile(r"(?i)\..*|.*\.(txt|md|csv|jsonl?|log|ya?ml)|grid\.png|thumbs\.db|desktop\.ini")


def list_images(folder):
    """({p: {k: path}}, other files), images by prompt and number. Raises UserError for twins."""
    root, found, others = Path(folder), {}, []
    for path in sorted(itertools.chain(*map(root.glob, ("*", "[0-9]*/*", "[0-9]*/samples/*")))):
        match = IMAGE_NAME.fullmatch(path.relative_to(root).as_posix())
        if match:
            p, k = int(match[1]), int(match[2] or 0)
            twin = found.setdefault(p, {}).setdefault(k, path)
            if twin != path:
                raise UserError(f"{twin} and {path} are both image {k} of prompt {p}")
        elif path.is_file() and not NOTES.fullmatch(path.name):
            others.append(path)
    return found, others


def to_pixels(images):
    """uint8 (H, W, 3) tensors of one size -> (N, 3, H, W) in [0, 1]."""
    return torch.stack(list(images)).permute(0, 3, 1, 2).float() / 255


def read_image(file):
    """A path or an open file -> uint8 (H, W, 3): upright, gray three times, alpha dropped, and of
    16-bit gray the upper 8 bits: as cv2.imread has it. Raises UserError for no whole image."""
    try:
        with Image.open(file) as image:
            image.verify()  # the checksums of a PNG, which reading it leaves alone
        with Image.open(file) as image:
            image = ImageOps.exif_transpose(image)
            if image.mode == "F":
                raise ValueError("floating-point pixels, whose range is not known: save 8 bits")
            if image.mode.startswith("I"):
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            image.info.pop("transparency", None)  # unused, and Pillow would warn about it
            return np.array(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{file} is not a whole image ({error})") from error
