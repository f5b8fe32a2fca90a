"""Image files: found by their names, and read as every metric expects them."""

import os
import re

import numpy as np
from PIL import Image, ImageOps

from parts.common import UserError

# P_K.png, P/K.png or P.png: image K (from 0) of prompt P (from 0)
IMAGE_NAME = re.compile(r"(\d+)(?:[_/](\d+))?\.(?:png|jpe?g|webp)", re.IGNORECASE)
# what may lie beside images: hidden files, and notes on them
NO_IMAGE_NAME = re.compile(r"(\.|.*/\.)|.*\.(txt|md|csv|json|jsonl)$", re.IGNORECASE)


def list_images(folder):
    """({(p, k): path}, paths of files whose names say neither image nor note). Raises UserError."""
    found, others = {}, []
    for root, _, names in os.walk(folder):
        for path in sorted(os.path.join(root, name) for name in names):
            name = os.path.relpath(path, folder).replace(os.sep, "/")
            match = IMAGE_NAME.fullmatch(name)
            if not match:
                if not NO_IMAGE_NAME.match(name):
                    others.append(path)
                continue
            key = int(match[1]), int(match[2] or 0)
            if key in found:
                same = f"{found[key]} and {path} are both image {key[1]} of prompt {key[0]}"
                raise UserError(f"{same}: remove one")
            found[key] = path
    return found, others


def read_image(file):
    """A path or an open file -> uint8 (H, W, 3): upright, gray three times, alpha dropped.

    So cv2.imread and PIL's convert("RGB") agree; of 16-bit gray the upper 8 bits, as cv2 (PIL alone
    would clip it to white). Raises UserError for what is no whole image.
    """
    try:
        with Image.open(file) as image:
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):
                gray = (np.asarray(image).astype(np.int64) >> 8).astype(np.uint8)
                return np.repeat(gray[..., None], 3, 2)
            if image.mode == "P":
                image.info.pop("transparency", None)  # unused, and Pillow would warn about it
            return np.array(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        why = " ".join(str(error).split())[:100]
        raise UserError(f"{file} is not a whole image ({why})") from error
