"""Preference pairs of your own: the data set (c, x_0^w, x_0^l) of eq. 5, in the judge's place.

pairs = open_pairs("out/toy-pairs", pipe, "out/latents")        # reads, and encodes what is new
chunk = pairs.collect(run, 40)                                  # 20 optimiser steps of 40 pairs
u_w, u_l = chunk.log_ratios(policy, chunk.order[:10])

u is a finished image's log-ratio at one timestep (loss.noise_log_ratio, Diffusion-DPO's); the mean
loss over timesteps bounds that of the whole image for reverse KL alone (Jensen).
What may be read, what labels mean, where latents are kept: docs/pairs.md.
"""

import collections
import csv
import hashlib
import io
import json
import pathlib
import uuid
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps

from loss import noise_log_ratio
from parts.common import UserError, hold_out, make_folder, progress_bar, read_prompts
from parts.images import read_image
from parts.model import encode_prompts, latent_shape, predict_noise
from parts.weights import first_line

COLUMNS = "prompt (or caption), winner, loser and, if any, label in [0, 1]"
STEPS_A_CHUNK = 20  # optimiser steps; a run is saved after every chunk


class Pair(NamedTuple):
    caption: str
    winner: str  # the key of its latent
    loser: str
    weight: float  # in the loss: |2 label - 1|


def open_pairs(path, pipe, cache_dir, skip_bad=False, seed=0, quiet=False):
    """The PairSet of PATH, its images encoded under cache_dir. Prints what was left out.

    Raises UserError for a wrong file, an empty set, and for missing or damaged images: these are
    named once all others are encoded; skip_bad leaves their pairs out instead.
    """
    folder = latents_folder(cache_dir, pipe)
    pairs, bad_images, left_out = [], set(), collections.Counter()
    with progress_bar(unit=" pairs", desc="reading and encoding pairs", disable=quiet) as bar:
        for caption, images, label in records(path):
            bar.update()
            if label == 0.5:
                left_out["ties (label 0.5 or null)"] += 1
                continue
            latents = [encode_once(*image, pipe, folder, bad_images) for image in images]
            if None in latents:
                left_out["pairs with missing or damaged images"] += 1
            elif latents[0] == latents[1]:
                left_out["pairs of an image with itself"] += 1
            else:
                winner, loser = latents if label > 0.5 else reversed(latents)
                pairs.append(Pair(caption, winner, loser, abs(2 * label - 1)))
    if bad_images:
        names = ", ".join(sorted(bad_images)[:5])
        what = f"images missing, damaged or too large: {len(bad_images)} ({names})"
        if not skip_bad:
            raise UserError(f"{path}: {what}: mend them, or --skip_bad leaves their pairs out")
        print(what)
    for what, count in left_out.items():
        print(f"left out: {count} {what}")
    if not pairs:
        raise UserError(f"{path} holds no pair that can be trained on: it needs {COLUMNS}")
    report_long_captions(pipe, {pair.caption for pair in pairs})
    return PairSet(pairs, pipe, folder, seed)


def report_long_captions(pipe, captions):
    """Says how many captions the text encoder cuts."""
    most = pipe.tokenizer.model_max_length
    tokens = pipe.tokenizer(list(captions), truncation=False, verbose=False).input_ids
    long = sum(len(ids) > most for ids in tokens)
    if long:
        print(f"{long} of {len(captions)} captions are longer than {most} tokens, and cut there")


class PairSet:
    """N pairs, a source of chunks for train.py. Of an image only the latent's name is in memory."""

    def __init__(self, pairs, pipe, folder, seed=0):
        self.pairs, self.pipe, self.folder, self.seed = pairs, pipe, folder, seed
        self.captions = [pair.caption for pair in pairs]
        self.digest = hashlib.sha256(json.dumps(pairs).encode()).hexdigest()

    def __len__(self):
        return len(self.pairs)

    def without(self, captions):
        """The set less the pairs of these captions."""
        kept = [pair for pair in self.pairs if pair.caption not in captions]
        return PairSet(kept, self.pipe, self.folder, self.seed)

    def collect(self, run, pairs_a_step, bar=None):
        """ImagePairs of the next 20 steps from position run.seen on, cut at the epoch's end."""
        epoch, start = divmod(run.seen, len(self))
        index = self.order(epoch)[start : start + STEPS_A_CHUNK * pairs_a_step].tolist()
        t, eps = zip(*[self.draw(epoch, i) for i in index])
        t, eps = torch.stack(t).to(self.pipe.unet.device), torch.stack(eps)
        return ImagePairs([self.pairs[i] for i in index], t, eps, self.pipe, self.folder)

    def order(self, epoch):
        """(N,) a permutation: a function of (seed, epoch) alone."""
        return torch.from_numpy(np.random.default_rng((self.seed, epoch)).permutation(len(self)))

    def draw(self, epoch, i):
        """t () and eps (4, h, w) of pair i: a function of (seed, epoch, i) alone."""
        entropy = np.random.SeedSequence((self.seed, epoch, i))
        seed = int(entropy.generate_state(1, np.uint64)[0])
        generator = torch.Generator().manual_seed(seed)
        t = torch.randint(len(self.pipe.scheduler.alphas_cumprod), (), generator=generator)
        return t, torch.randn(latent_shape(self.pipe), generator=generator)


class ImagePairs:
    """n pairs of finished images; winner and loser share the timestep t and the noise eps.

    t: (n,) int64; eps: (n, 4, h, w), on the CPU; weight: (n,), in the loss; order: (n,); size: n.
    """

    def __init__(self, pairs, t, eps, pipe, folder):
        self.pairs, self.t, self.eps, self.pipe, self.folder = pairs, t, eps, pipe, folder
        self.weight = torch.tensor([pair.weight for pair in pairs], device=t.device)
        self.size, self.order = len(pairs), torch.arange(len(pairs))

    def log_ratios(self, policy, index, reduce="mean"):
        """(u_w, u_l), each (B,), of the pairs `index`: Diffusion-DPO's bound at the pair's t.

        One prediction of either policy on 2B rows, B winners and their B losers; no guidance.
        """
        pairs = [self.pairs[k] for k in index.tolist()]
        keys = [pair.winner for pair in pairs] + [pair.loser for pair in pairs]
        scheduler = self.pipe.scheduler
        alphas_cumprod = scheduler.alphas_cumprod  # (T,), of the device and dtype to compute in
        t, eps = self.t[index].repeat(2), self.eps[index].repeat(2, 1, 1, 1).to(alphas_cumprod)
        latents = np.stack([np.fromfile(self.folder / key, np.float32) for key in keys])
        x_0 = torch.from_numpy(latents).view_as(eps).to(eps)  # (2B, 4, h, w)
        x_t = scheduler.add_noise(x_0, eps, t)  # sqrt(a_t) x_0 + sqrt(1 - a_t) eps
        text = encode_prompts(self.pipe, [pair.caption for pair in pairs]).repeat(2, 1, 1)

        eps_hat = predict_noise(policy.unet, x_t, t, text, None, 0.0)
        with policy.reference():
            eps_ref = predict_noise(policy.unet, x_t, t, text, None, 0.0)
        return noise_log_ratio(eps_hat, eps_ref, eps, len(alphas_cumprod), reduce).chunk(2)


# --------------------------------------------------------------------------------------------------
# Reading


def records(path):
    """Yields to_record of every pair of PATH. Raises UserError saying what is wrong, and where."""
    path = pathlib.Path(path)
    files = [*path.glob("pairs.csv"), *path.glob("pairs.jsonl")]
    if len(files) == 2:
        raise UserError(f"{path} has a pairs.csv and a pairs.jsonl: remove one")
    for file in files or sorted(path.glob("*.parquet")) or [path]:
        for number, row in enumerate(read_rows(file), 1):
            yield to_record(row, f"row {number} of {file}", file.parent)


def read_rows(path):
    """{column: cell} of the rows of a file, a few in memory at a time."""
    try:
        if path.suffix == ".parquet":
            yield from parquet_rows(path)
            return
        with open(path, encoding="utf-8-sig", newline="") as file:
            if path.suffix == ".csv":
                yield from csv.DictReader(file, restval="")
            else:
                yield from (json.loads(line) for line in file if line.strip())
    except Exception as error:  # of the disk, UTF-8, csv, JSON and pyarrow: a dozen types
        what = "a folder with pairs.csv, pairs.jsonl or .parquet files (pip install pyarrow)"
        why = f"no pairs can be read from {path} ({first_line(error)}): give {what}, or such a file"
        raise UserError(why) from error


def parquet_rows(path):
    """As Pick-a-Pic has them: the images inside, label_0 the one of jpg_0."""
    from pyarrow.parquet import ParquetFile

    with ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=16):
            columns = batch.select(["caption", "jpg_0", "jpg_1", "label_0"])
            yield from columns.rename_columns(["caption", "winner", "loser", "label"]).to_pylist()


def to_record(row, where, folder):
    """(caption, [winner, loser], label); an image as (its name, its Path or the file's bytes)."""
    try:
        cells = {column.strip().lower(): cell for column, cell in row.items()}
        caption = " ".join((cells.get("prompt") or cells["caption"]).split())
        caption.encode()  # half a surrogate pair, which JSON can hold, is no text
        images = []
        for cell in (cells["winner"], cells["loser"]):
            is_name = isinstance(cell, str) and cell.strip()
            images.append((cell, folder / cell.strip()) if is_name else (where, cell))
        label = cells.get("label", "")
        label = float({"": 1, None: 0.5}.get(label, label))  # none; null, in Parquet and JSON
        if not caption or not 0 <= label <= 1:
            raise ValueError("no caption, or a label outside [0, 1]")
        return caption, images, label
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
        hint = f"needed are {COLUMNS}, with commas between them; quote a caption that has commas"
        raise UserError(f"{where} is {str(row)[:200]}; {hint}") from error


# --------------------------------------------------------------------------------------------------
# Images -> latents, on disk


def latents_folder(cache_dir, pipe):
    """cache_dir/<hash of the VAE and the latents' size>. Raises UserError if it cannot be made."""
    settings = latent_shape(pipe), pipe.vae.config.scaling_factor, pipe.vae.dtype
    digest = hashlib.sha256(repr(settings).encode())
    for weight in pipe.vae.state_dict().values():
        digest.update(weight.cpu().flatten().view(torch.uint8).numpy())
    folder = pathlib.Path(cache_dir, digest.hexdigest()[:16])
    make_folder(folder, "--cache_dir")
    return folder


def encode_once(name, source, pipe, folder, bad_images):
    """The key of an image's latent: its file in folder, which is made if it is not there.

    source: a Path, or a file's bytes. Of no whole image: None, and its name in bad_images.
    """
    channels, h, w = latent_shape(pipe)
    try:
        if isinstance(source, dict):  # so the hub's Image type writes it
            source = source.get("bytes")
        data = source.read_bytes() if isinstance(source, pathlib.Path) else source
        key = hashlib.sha256(data).hexdigest()
        path = folder / key
        # after a power cut it may be short
        if path.exists() and path.stat().st_size == 4 * channels * h * w:
            return key
        image = to_model(data, h * pipe.vae_scale_factor, w * pipe.vae_scale_factor)
    except (OSError, TypeError, ValueError):  # no bytes, no file, no image
        bad_images.add(name)
        return None
    encode(image, pipe.vae, path)
    return key


def to_model(data, height, width):
    """An image file's bytes -> (3, height, width) in [-1, 1], as Diffusion-DPO cuts them: scaled
    to cover that size, bilinear with antialias, then the middle. Raises UserError for no image."""
    image = Image.fromarray(read_image(io.BytesIO(data)))
    image = ImageOps.cover(image, (width, height), Image.Resampling.BILINEAR)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    pixels = np.array(image.crop((left, top, left + width, top + height)))
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 127.5 - 1


@torch.no_grad()
def encode(image, vae, path):
    """(3, H, W) -> (4, h, w) fp32, scaled, in a file: the mean of the VAE's posterior.

    One image at a time: in a batch its last bits would depend on its neighbours.
    """
    x = image[None].to(vae.device, vae.dtype)
    z = vae.encode(x).latent_dist.mean.float() * vae.config.scaling_factor
    temporary = path.with_suffix(f".{uuid.uuid4().hex}")  # other runs may be at it too
    temporary.write_bytes(z.cpu().numpy().tobytes())
    temporary.replace(path)


# --------------------------------------------------------------------------------------------------
# Held-out captions


def hold_out_captions(data, prompts_file, count):
    """(PairSet to train on, held-out captions): no pair of a held-out caption is trained on.

    prompts_file: --prompts, which names them itself. Raises UserError if no pair is left.
    """
    if prompts_file:
        held_out = read_prompts(prompts_file)[:count]
    else:
        captions, held_out = hold_out(data.captions, count)
        if captions == held_out:  # a single one, on both sides
            return data, held_out
    rest = data.without(held_out)
    if len(rest) == 0:
        raise UserError(f"{prompts_file} names every caption of the pairs: leave some to train on")
    print(f"{len(rest)} pairs to train on, {len(held_out)} prompts held out")
    return rest, held_out
