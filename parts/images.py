"""Image files, read alike by whatever takes a folder of them."""

import numpy as np
from PIL import Image, ImageOps

from parts.common import UserError


def read_image(path):
    """uint8 (H, W, 3) of a path or an open file. Raises UserError for what is no whole image.

    As cv2.imread and PIL's convert("RGB") agree: upright, gray three times, alpha dropped, palettes
    looked up, of 16 bits the upper 8. (PIL alone would clip 16-bit gray to white.)
    """
    try:
        with Image.open(path) as image:
            image.load()
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):
                gray = (np.asarray(image).astype(np.int64) >> 8).astype(np.uint8)
                return np.repeat(gray[..., None], 3, 2)
            if image.mode == "P":
                image.info.pop("transparency", None)  # not used, and Pillow would warn about it
            return np.array(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        cause = " ".join(str(error).split())[:100]
        raise UserError(f"{path} is not a whole image ({cause})") from error
