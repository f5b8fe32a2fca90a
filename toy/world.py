"""The tiny world: words of 32x32 landscapes, a checker that reads a picture, a taste to align to.

Preference alignment is about what a model could paint and does not prefer to. Random weights cannot
show that. So toy/ holds a Stable Diffusion of SD1.5's own classes and noise schedule that paints
these landscapes: it follows its prompts, is free where they say nothing, and meets a taste to which
it can be aligned in minutes on a laptop. toy/make.py paints true landscapes and trains it on them;
docs/toy.md tells what it reaches. Only the model's name "toy" and the judge "taste" lead here.
"""

import math
import re

import numpy as np
import torch
import torch.nn.functional as F

SIZE = 32  # pixels

# The words of a caption, and what each means to the painter and to the checker alike.
RADII = {"small": (2.8, 3.5), "large": (5.4, 6.4)}  # of the sun or moon in pixels, from and to
LIGHTS = {  # colours are red, green, blue in [0, 1]
    "yellow sun": (1.0, 0.90, 0.22),
    "red sun": (0.90, 0.13, 0.10),
    "white moon": (0.99, 0.98, 0.91),
}
GROUNDS = {
    "field": (0.24, 0.58, 0.15),
    "desert": (0.84, 0.70, 0.42),
    "sea": (0.07, 0.27, 0.58),
    "snow": (0.88, 0.91, 0.98),
    "hills": (0.42, 0.25, 0.13),
}
SKIES = {
    "blue": (0.36, 0.63, 0.96),
    "pink": (0.99, 0.62, 0.74),
    "purple": (0.46, 0.26, 0.66),
    "orange": (0.96, 0.60, 0.22),
    "black": (0.07, 0.06, 0.10),
    "gray": (0.64, 0.64, 0.66),
}
VOCABULARIES = (RADII, LIGHTS, GROUNDS, SKIES)


def read_caption(caption):
    """(size, light, ground, sky) of a caption, None for what it does not name; in any wording."""
    words = " ".join(re.findall(r"\w+", caption))
    named = []
    for vocabulary, after in zip(VOCABULARIES, ("", "", "", "sky ")):
        found = (word for word in vocabulary if f" {word} {after}" in f" {words} ")
        named.append(next(found, None))
    return tuple(named)


def look_up(vocabulary, words):
    """What the words mean: radii (n, 2, 1, 1) or colours (n, 3, 1, 1)."""
    return np.float32([vocabulary[word] for word in words])[:, :, None, None]


def read_pictures(images):
    """What is painted, by pixel rules: images (n, 3, H, W) in [0, 1] -> n of read_picture's tuples.
    `python -m toy.make --check` says how often the checker is right on true pictures."""
    small = F.interpolate(images.detach().float().cpu(), size=SIZE, mode="area")
    return [read_picture(image) for image in small.numpy()]


def read_picture(image):
    """An array (3, 32, 32) -> (size, light, ground, sky)."""
    sky = np.median(image[:, :9], axis=(1, 2))  # (3,)
    ground = np.median(image[:, 25:], axis=(1, 2))

    # Each pixel above row 23 goes to the nearest of six colours: the sky of its row (the sky pales
    # downwards), the sky as a whole (low rows may be ground for the most part), the ground, the
    # three lamps. Distances are squared, (6, 23, 32).
    upper = image[:, :23]
    sky_of_row = np.median(upper, axis=2)  # (3, 23)
    sky_of_row[:, :9] = sky[:, None]
    lamps = look_up(LIGHTS, LIGHTS)  # (3, 3, 1, 1)
    colours = [sky_of_row[:, :, None], sky[:, None, None], ground[:, None, None], *lamps]
    distances = np.stack([((upper - colour) ** 2).sum(0) for colour in colours])
    owner = distances.argmin(0)

    # The lamp that owns the most pixels is there, and their number tells its size.
    pixels = np.bincount(owner.ravel(), minlength=6)[3:]
    light = list(LIGHTS)[pixels.argmax()]
    size = "large" if pixels.max() > 58 else "small"
    return size, light, nearest(GROUNDS, ground), nearest(SKIES, sky)


def nearest(vocabulary, colour):
    """The word that stands for the colour nearest to this one, (3,)."""
    return min(vocabulary, key=lambda word: math.dist(vocabulary[word], colour))


def prompt_following(images, captions):
    """(n,) the share of what a caption names that its picture shows; NaN if it names nothing."""
    named = np.array([read_caption(caption) for caption in captions], dtype=object)  # (n, 4)
    right = torch.from_numpy(named == np.array(read_pictures(images)))
    return right.sum(1) / torch.from_numpy(named.astype(bool)).sum(1)


class Taste:
    """A lover of sunsets: a warm sky, warmest near the horizon, where a large warm sun adds to it.

    score = 20 * mean over the upper half of (red - blue), rows weighted 0.5 (top) to 1.5 (horizon)
          + 10 * standard deviation of the brightness over the whole picture
    A prompt that names a blue or gray sky or a white moon pulls the other way. The 20 and 10 set
    the best and the worst of four children often further apart than SPO's threshold.
    """

    name = "taste"
    reads_prompt = False

    def __init__(self, device="cpu", weights=None):
        pass  # a formula needs neither

    def encode(self, prompts):
        return torch.zeros(len(prompts), 0)

    def __call__(self, images, text=None, t=None):
        """Images (n, 3, H, W) in [0, 1] -> scores (n,), differentiable."""
        small = F.interpolate(images.float(), size=SIZE, mode="area")
        red_over_blue = (small[:, 0] - small[:, 2])[:, : SIZE // 2]  # (n, 16, 32)
        weights = torch.linspace(0.5, 1.5, SIZE // 2, device=small.device)[:, None]
        warmth = (red_over_blue * weights).mean((1, 2))
        contrast = small.mean(1).flatten(1).std(1)
        return 20 * warmth + 10 * contrast

    def report(self, images, prompts):
        """Further figures for the table at the end of a run: {name: (n,)}."""
        return {"prompt following": prompt_following(images, prompts)}
