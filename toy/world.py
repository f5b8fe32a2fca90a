"""
The tiny world: captioned 32x32 landscapes, a tiny Stable Diffusion that paints them, and a taste to align it to.

    python toy.py --check       how well the checker reads true pictures, and the shipped model paints its captions
    python toy.py               trains the model of toy/ again, from nothing: about 45 minutes on 2 cores
    python toy.py --pairs DIR   writes preference pairs for train.py --pairs: 2,000 captions, two pictures each, the taste's choice

Why it exists: preference alignment is about what a model could paint and does not prefer to. Noise and random
weights cannot show that. Here a model of SD1.5's own classes (UNet2DConditionModel, AutoencoderKL, CLIPTextModel,
SD1.5's noise schedule, so SD1.5's 20 DDIM steps) follows its prompts, leaves open what they leave open, and
meets a taste that it can be aligned to in minutes on a laptop. Nothing else in the project knows that it is tiny.

The shipped weights: the defaults below, in fp32 on two cores (VAE 3,000 steps of 24 pictures, UNet and text encoder
7,000 steps of 64), then 600 more steps of the latter at a third of the learning rate, since a first tokenizer split two
words and cut the longest captions. Stored in fp16, 5.6 MB. `python toy.py --check` prints what they reach.
"""
import itertools

import numpy as np
import torch
import torch.nn.functional as F

SIZE = 32        # pixels
LENGTH = 16      # tokens: the longest caption has 11 words, and start and end

# ---------------------------------------------------------------------------------------------------------------
# Pictures. The words of a caption and the colours (RGB in [0, 1]) that the checker looks for are the same tables.

SKIES = {"blue": (.36, .63, .96), "pink": (.99, .62, .74), "purple": (.46, .26, .66),
         "orange": (.96, .60, .22), "black": (.07, .06, .10), "gray": (.64, .64, .66)}
GROUNDS = {"field": (.24, .58, .15), "desert": (.84, .70, .42), "sea": (.07, .27, .58),
           "snow": (.88, .91, .98), "hills": (.42, .25, .13)}
LIGHTS = {"yellow sun": (1., .90, .22), "red sun": (.90, .13, .10), "white moon": (.99, .98, .91)}
RADII = {"small": (2.8, 3.5), "large": (5.4, 6.4)}  # pixels


def caption(size, light, ground, sky):
    """Words of one picture; None leaves a word out, and with it real freedom to the painter."""
    words = f"a {size} {light}" if size else f"a {light}"
    if ground:
        words += f" over {ground}" if ground in ("hills", "snow") else f" over a {ground}"
    return words + (f" under a {sky} sky" if sky else "")


def read_caption(words):
    """The inverse of caption: (size, light, ground, sky), None for what is not said. Any wording with those words."""
    said = words.replace(",", " ").split()
    first = lambda table, among: next((k for k in table if k in among), None)
    sky = first(SKIES, [said[i - 1] for i, w in enumerate(said) if w == "sky" and i])
    return first(RADII, said), first(LIGHTS, words), first(GROUNDS, said), sky


CAPTIONS = [caption(*c) for c in itertools.product((None, *RADII), LIGHTS, (None, *GROUNDS), (None, *SKIES))]  # 378


def prompts():
    """The 81 prompts to align on: 54 leave the sky open, where a taste may choose; 27 name it, where it may not."""
    rng = np.random.default_rng(0)
    open_sky, named = ([c for c in CAPTIONS if (read_caption(c)[3] is None) == is_open] for is_open in (True, False))
    both = open_sky + [named[i] for i in rng.permutation(len(named))[:27]]
    return [both[i] for i in rng.permutation(len(both))]


def draw(n, rng, captions=None):
    """n true pictures: images (n, 3, 32, 32) fp32 in [0, 1], and n tuples (size, light, ground, sky), of these n captions if given.

    A sky, paler below; a sun or moon with a soft edge and a glow, anywhere above the horizon; a textured ground below
    a wavy line. Every colour varies a little. Soft edges forgive a tiny painter; hard shapes stay blobs.
    """
    y, x = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32) + .5
    u = lambda lo, hi: rng.uniform(lo, hi, (n, 1, 1, 1)).astype(np.float32)
    tint = lambda s: rng.normal(0, s, (n, 3, 1, 1)).astype(np.float32)
    tables = RADII, LIGHTS, GROUNDS, SKIES
    size, light, ground, sky = picks = [rng.integers(len(t), size=n) for t in tables]
    for i, said in enumerate(map(read_caption, captions or ())):
        for pick, table, word in zip(picks, tables, said):
            pick[i] = pick[i] if word is None else list(table).index(word)
    colour = lambda table, i: np.array(list(table.values()), np.float32)[i][:, :, None, None]  # (n, 3, 1, 1)

    top = colour(SKIES, sky) + tint(.025)
    image = top + (y / SIZE) * u(0, .16) * (1 - top) * np.array([1.1, 1, .9], np.float32)[:, None, None]
    horizon = u(.52, .66) * SIZE
    wave = horizon + u(0, 1.2) * np.sin(x * u(.15, .5) + u(0, 6.3)) + u(0, .5) * np.sin(x * u(.4, .7) + u(0, 6.3))

    low, high = (np.array([r[i] for r in RADII.values()], np.float32)[size][:, None, None, None] for i in (0, 1))
    r = low + (high - low) * u(0, 1)
    cx, cy = r + (SIZE - 2 * r) * u(0, 1), r + (horizon - 1.2 * r) * u(0, 1)
    away = np.sqrt((x - cx) ** 2 + (y - cy) ** 2)
    lamp = colour(LIGHTS, light) + tint(.01)
    image = image + u(.15, .35) * np.exp(-np.maximum(away - r, 0) / (.6 * r)) * (lamp - image)  # glow
    image = image + np.clip(r - away + .5, 0, 1) * (lamp - image)                               # disc

    noise = torch.from_numpy(rng.normal(0, 1, (n, 1, 12, 8)).astype(np.float32))
    noise = F.interpolate(noise, size=(SIZE, SIZE), mode="bilinear", align_corners=False).numpy()
    land = (colour(GROUNDS, ground) + tint(.025)) * (1 + .09 * noise) * (1 - .12 * (y - horizon) / (SIZE - horizon))
    image = image + np.clip(y - wave + .5, 0, 1) * (land - image)
    names = [tuple(list(t)[i] for t, i in zip(tables, row)) for row in zip(*picks)]
    return torch.from_numpy(np.clip(image, 0, 1).astype(np.float32)), names


# ---------------------------------------------------------------------------------------------------------------
# The analytic checker, and the taste

def read_picture(images):
    """What is painted, by pixel rules: images (N, 3, H, W) in [0, 1] -> N tuples (size, light, ground, sky).

    Sky and ground: the named colour nearest to the median of the top 9 and the bottom 7 rows. Lamp: every pixel above
    row 23 goes to the nearest of this sky, this ground and the three lamps; the lamp with most pixels is it, and
    their number tells small from large. `python toy.py --check` says how often that is right on true pictures.
    """
    nearest = lambda v, table: list(table)[int(((np.array(list(table.values())) - v) ** 2).sum(1).argmin())]
    out = []
    for image in F.interpolate(images.detach().float().cpu(), size=(SIZE, SIZE), mode="area").numpy():
        sky, ground = np.median(image[:, :9].reshape(3, -1), 1), np.median(image[:, 25:].reshape(3, -1), 1)
        area = image[:, :23]                                                        # (3, 23, 32)
        rows = np.median(area, 2, keepdims=True)                                    # the sky pales towards the horizon
        rows[:, :9] = sky[:, None, None]
        lamps = [np.array(v)[:, None, None] for v in LIGHTS.values()]
        who = np.stack([((area - v) ** 2).sum(0) for v in
                        (rows, sky[:, None, None], ground[:, None, None], *lamps)]).argmin(0)
        counts = [int((who == 3 + i).sum()) for i in range(len(LIGHTS))]
        out.append(("large" if max(counts) > 58 else "small", list(LIGHTS)[int(np.argmax(counts))],
                    nearest(ground, GROUNDS), nearest(sky, SKIES)))
    return out


def prompt_following(images, captions):
    """(N,) the share of what each caption names that the checker finds in its picture; NaN if it names nothing."""
    shares = []
    for seen, said in zip(read_picture(images), map(read_caption, captions)):
        right = [a == b for a, b in zip(seen, said) if b is not None]
        shares.append(sum(right) / len(right) if right else float("nan"))
    return torch.tensor(shares)


class Taste:
    """A lover of sunsets: warm light in the sky, most of all near the horizon, where a big warm sun adds to it.

    score = 20 * (weighted mean of red - blue over the upper half, rows weighted 0.5 at the top to 1.5 at the bottom)
            + 10 * (standard deviation of the brightness of the whole picture)
    Blue and gray skies and white moons score low, so prompts that name them pull the other way. The scale puts the
    best and the worst of four children often more than 0.62 logits apart, SPO's threshold.
    The interface is every judge's (judges.py); this one does not read the prompt.
    """
    name = "taste"

    def encode(self, prompts):
        return torch.zeros(len(prompts), 0)

    def __call__(self, images, text=None, t=None):  # (N, 3, H, W) in [0, 1] -> (N,)
        x = F.interpolate(images.float(), size=(SIZE, SIZE), mode="area")
        weight = torch.linspace(.5, 1.5, SIZE // 2, device=x.device)[:, None]
        warm = ((x[:, 0] - x[:, 2])[:, :SIZE // 2] * weight).mean((1, 2))
        return 20 * warm + 10 * x.mean(1).flatten(1).std(1)

    def report(self, images, prompts):
        """Further figures for the end of a run: {name: (N,)}."""
        return {"prompt following": prompt_following(images, prompts)}


# What the toy needs otherwise than SD1.5, for train.py: --help shows the values in force.
PRESET = dict(num_epochs=12, sample_batch_size=14, train_batch_size=20, gradient_accumulation_steps=2,
              learning_rate=7e-4, num_eval_prompts=40)


PAIRS_PRESET = dict(num_epochs=4, learning_rate=1e-3, beta=1.0)  # and with --pairs; at beta 5 taste rises half as much
FULL_PRESET = dict(learning_rate=1e-4, checkpointing_steps=20)  # and with --full
