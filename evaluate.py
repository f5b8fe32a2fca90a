"""
Diversity of images, in the paper's own units (Table 3). Images are uint8 arrays (H, W, 3).

So far: rmse and entropy_1d, which train.py prints at the end of a run.
"""
import numpy as np


def rmse(a, b, max_p=4095):
    """Root mean squared error of two images as image-similarity-measures 0.3.6 has it, whose numbers the paper prints:
    per channel, of pixels divided by max_p, then the mean over the channels. max_p 4095 is that package's default,
    meant for 12-bit satellite images; 255 gives the textbook value, 16 times larger. Raises ValueError for two sizes."""
    if a.shape != b.shape:
        raise ValueError(f"images of different sizes: {a.shape} and {b.shape}")
    d = (a.astype(np.float64) - b.astype(np.float64)) / max_p
    return float(np.sqrt((d ** 2).mean((0, 1))).mean())


def entropy_1d(image):
    """Shannon entropy, in bits (0 to 8), of the 256-bin histogram of the gray image (ITU-R 601 luma, as PIL's "L")."""
    r, g, b = (image[..., c].astype(np.int64) for c in range(3))
    gray = (19595 * r + 38470 * g + 7471 * b + 32768) >> 16
    p = np.bincount(gray.ravel(), minlength=256) / gray.size
    return float(-(p[p > 0] * np.log2(p[p > 0])).sum())
