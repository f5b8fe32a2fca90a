"""Preference pairs of your own: the data set (c, x_0^w, x_0^l) of eq. 5, in the judge's place.

pairs = open_pairs("out/toy-pairs", pipe, "out/latents")        # reads, and encodes what is new
chunk = pairs.collect(run, 40, bar=None)                        # 20 optimiser steps of 40 pairs
u_w, u_l = chunk.log_ratios(policy, chunk.order[:10])

u is a finished image's log-ratio at one timestep (loss.noise_log_ratio, Diffusion-DPO's); the mean
loss over timesteps bounds that of the whole image for reverse KL alone (Jensen).
What may be read, what labels mean, where latents are kept: docs/pairs.md.
"""

import collections
import hashlib
import io
import json
import pathlib
import re
import uuid

import numpy as np
import torch
from PIL import Image, ImageOps
from safetensors.torch import save

from loss import noise_log_ratio
from parts import common
from parts.common import UserError, cell_of
from parts.images import read_image
from parts.model import encode_prompts, latent_shape, say_cut
from parts.weights import first_line

# what every wrong file is answered with
NEEDED = (
    "a folder with pairs.csv, pairs.jsonl or .parquet files (pip install pyarrow), or such a file; "
    "its columns prompt (or caption), winner, loser and, if any, label in [0, 1], with commas "
    "between them; quote a caption that has commas"
)
STEPS_A_CHUNK = 20  # optimiser steps; a run is saved after every chunk
# of winner and loser the keys of their latents; weight, in the loss: |2 label - 1|
Pair = collections.namedtuple("Pair", "caption winner loser weight")


def open_pairs(path, pipe, cache_dir, skip_bad=False, seed=0, quiet=False):
    """The PairSet of PATH, its images encoded under cache_dir. Prints what was left out or cut.
    Raises UserError for a wrong file, an empty set, and for missing or damaged images: their pairs
    are named once all others are encoded; skip_bad leaves them out instead."""
    folder = latents_folder(cache_dir, pipe)
    pairs, bad, notes = [], [], collections.Counter()
    bar = common.progress_bar(iterable=records(path), desc="encoding", unit=" pairs", disable=quiet)
    for caption, images, weight, where in bar:
        if weight == 0:
            notes["left out, ties (label 0.5 or null)"] += 1
            continue
        winner, loser = [encode_once(image, pipe, folder) for image in images]
        if not caption or None in (winner, loser):
            bad.append(where)
        elif winner == loser:
            notes["left out, pairs of an image with itself"] += 1
        else:
            pairs.append(Pair(caption, winner, loser, weight))
    if bad:
        rows = ", ".join(bad[:5])
        what = f"pairs with no caption or images missing, damaged or too large: {len(bad)} ({rows})"
        if not skip_bad:
            raise UserError(f"{path}: {what}: mend them, or --skip_bad leaves them out")
        print(f"left out, {what}")
    for what, count in notes.items():
        print(f"{what}: {count}")
    if not pairs:
        raise UserError(f"{path} holds no pair that can be trained on: give {NEEDED}")
    data = PairSet(pairs, pipe, folder, seed)
    say_cut(pipe, data.captions)
    return data


class PairSet:
    """N pairs, a source of chunks for train.py. Of an image only the latent's name is in memory."""

    def __init__(self, pairs, pipe, folder, seed=0):
        self.pairs, self.pipe, self.folder, self.seed = pairs, pipe, folder, seed
        self.captions = [pair.caption for pair in pairs]
        self.digest = hashlib.sha256(json.dumps(pairs).encode()).hexdigest()

    def __len__(self):
        return len(self.pairs)

    def collect(self, run, pairs_a_step, bar):
        """ImagePairs of the next 20 steps from position run.seen on, cut at the epoch's end."""
        epoch, start = divmod(run.seen, len(self))
        order = np.random.default_rng((self.seed, epoch)).permutation(len(self))
        chosen = order[start : start + STEPS_A_CHUNK * pairs_a_step].tolist()
        return ImagePairs(self, epoch, chosen)

    def draw(self, epoch, i):
        """t () and eps (4, h, w) of pair i: a function of (seed, epoch, i) alone."""
        entropy = np.random.SeedSequence((self.seed, epoch, i))
        generator = torch.Generator().manual_seed(entropy.generate_state(1, np.uint64).item())
        t = torch.randint(len(self.pipe.scheduler.alphas_cumprod), (), generator=generator)
        return t, torch.randn(latent_shape(self.pipe), generator=generator)


class ImagePairs:
    """n pairs of finished images; winner and loser share the timestep t (n,) and the noise eps
    (n, 4, h, w), which is on the CPU. weight: (n,), in the loss; order: (n,); advance: n."""

    def __init__(self, data, epoch, chosen):
        self.pairs, self.pipe, self.folder = [data.pairs[i] for i in chosen], data.pipe, data.folder
        t, eps = zip(*[data.draw(epoch, i) for i in chosen])
        self.t, self.eps = torch.stack(t).to(data.pipe.unet.device), torch.stack(eps)
        self.weight = torch.tensor([pair.weight for pair in self.pairs], device=self.t.device)
        self.advance, self.order = len(chosen), torch.arange(len(chosen))

    def log_ratios(self, policy, index, reduce="mean"):
        """(u_w, u_l), each (B,), of the pairs `index`: Diffusion-DPO's bound at the pair's t.
        One prediction of each policy on 2B rows, B winners and their B losers; no guidance."""
        captions, winners, losers, _ = zip(*[self.pairs[k] for k in index.tolist()])
        scheduler = self.pipe.scheduler
        alphas_cumprod = scheduler.alphas_cumprod  # (T,), of the device and dtype to compute in
        t, eps = self.t[index].repeat(2), self.eps[index].repeat(2, 1, 1, 1).to(alphas_cumprod)
        latents = [np.fromfile(self.folder / key, np.float32) for key in winners + losers]
        x_0 = eps.new_tensor(np.stack(latents)).view_as(eps)  # (2B, 4, h, w)
        x_t = scheduler.add_noise(x_0, eps, t)  # sqrt(a_t) x_0 + sqrt(1 - a_t) eps
        text = encode_prompts(self.pipe, captions).repeat(2, 1, 1)
        eps_hat, eps_ref = policy.predict_both(x_t, t, text, None, 0.0)
        return noise_log_ratio(eps_hat, eps_ref, eps, len(alphas_cumprod), reduce).chunk(2)


def records(path):
    """Yields to_record of every pair of PATH, and where it stands, which any UserError says."""
    path = pathlib.Path(path)
    files = [*path.glob("pairs.csv"), *path.glob("pairs.jsonl")]
    if len(files) == 2:
        raise UserError(f"{path} has a pairs.csv and a pairs.jsonl: remove one")
    files = files or parquet_files(path)
    if not files and path.is_dir():
        hint = "of .arrow files to_parquet makes one"
        raise UserError(f"{path} is a folder without pairs ({hint}): give {NEEDED}")
    for file in files or [path]:
        where = file
        try:
            for number, row in enumerate(common.read_rows(file, blank=""), 1):
                where = f"row {number} of {file}"
                yield *to_record(row, file.parent), where
                where = file
        except Exception as error:  # of the disk, UTF-8, csv, JSON and pyarrow: a dozen types
            why = f"{where} cannot be read ({first_line(error)}): give {NEEDED}"
            raise UserError(why) from error


def parquet_files(path):
    """Of a data set's folder, or of data/ in it: where there are splits, train-* alone."""
    # macOS leaves ._* beside files
    files = sorted(path.glob("[!.]*.parquet")) or sorted(path.glob("data/[!.]*.parquet"))
    train = [file for file in files if re.match("train[-_.]", file.name)]
    others = [file for file in files if re.match("(val|dev|test)", file.name)]
    if others and not train:
        raise UserError(f"{path} has no train-*.parquet, but {others[0].name}: name one file")
    if others:
        print(f"{len(train)} files train-*.parquet; left out: {len(files) - len(train)} others")
    return train if others else files


def to_record(row, folder):
    """(caption, [winner, loser], weight); an image as its Path or the file's bytes, the caption ""
    where there is none."""
    # the other one where the first is empty
    caption = cell_of(row, ("prompt", "caption")) or cell_of(row, ("caption", "prompt"))
    caption = " ".join(caption.split()) if isinstance(caption, str) else ""
    caption.encode()  # half a surrogate pair, which JSON can hold, is no text
    images = []
    for names in (("winner", "chosen", "jpg_0"), ("loser", "rejected", "jpg_1")):
        cell = cell_of(row, names)  # jpg_0, jpg_1, label_0: Pick-a-Pic's
        if isinstance(cell, dict):  # so the hub's Image type writes it
            cell = cell.get("bytes")
        if isinstance(cell, str):  # a path, perhaps of Windows
            cell = folder / cell.strip().replace("\\", "/")
        images.append(cell)
    label = cell_of({"label": ""} | row, ("label_0", "label"))
    label = float({"": 1, None: 0.5}.get(label, label))  # none; null, in Parquet and JSON
    if not 0 <= label <= 1:
        raise ValueError("a label outside [0, 1]")
    if label < 0.5:
        images.reverse()
    return caption, images, abs(2 * label - 1)


def latents_folder(cache_dir, pipe):
    """cache_dir/<hash of the VAE and the latents' size>. Raises UserError if it cannot be made."""
    settings = repr((latent_shape(pipe), pipe.vae.config.scaling_factor))
    digest = hashlib.sha256(save(pipe.vae.state_dict(), {"settings": settings}))
    folder = pathlib.Path(cache_dir, digest.hexdigest()[:16])
    common.make_folder(folder, "--cache_dir")
    return folder


@torch.no_grad()
def encode_once(image, pipe, folder):
    """The key of an image's latent, None if it is no whole image: its file in folder, made if it is
    not there, of (4, h, w) fp32, the VAE posterior's mean, scaled. image: a Path, or the bytes."""
    channels, h, w = latent_shape(pipe)
    try:
        data = image.read_bytes() if isinstance(image, pathlib.Path) else image
        path = folder / hashlib.sha256(data).hexdigest()
        # after a power cut it may be short
        if path.exists() and path.stat().st_size == 4 * channels * h * w:
            return path.name
        x = to_model(data, h * pipe.vae_scale_factor, w * pipe.vae_scale_factor)
    except (OSError, TypeError, ValueError):  # no bytes, no file, no image
        return None
    # one image at a time: in a batch its last bits would depend on its neighbours
    vae = pipe.vae
    x = x[None].to(vae.device, vae.dtype)
    z = vae.encode(x).latent_dist.mean.float() * vae.config.scaling_factor
    temporary = path.with_suffix(f".{uuid.uuid4().hex}")  # other runs may be at it too
    temporary.write_bytes(z.cpu().numpy().tobytes())  # tofile would not notice a full disk
    temporary.replace(path)
    return path.name


def to_model(data, height, width):
    """An image file's bytes -> (3, height, width) in [-1, 1], as Diffusion-DPO cuts them: scaled
    to cover that size, bilinear with antialias, then the middle. Raises UserError for no image."""
    image = Image.fromarray(read_image(io.BytesIO(data)))
    image = ImageOps.cover(image, (width, height), Image.Resampling.BILINEAR)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    pixels = np.array(image)[top : top + height, left : left + width]
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 127.5 - 1


def hold_out_captions(data, prompts_file, count):
    """(PairSet to train on, held-out captions): no pair of a held-out caption is trained on.
    prompts_file: --prompts, which names them itself; the first `count` are returned, for the table.
    Raises UserError if no pair is left."""
    if prompts_file:
        held_out = common.read_prompts(prompts_file)
    else:
        captions, held_out = common.hold_out(data.captions, count)
        if captions == held_out:  # a single one, on both sides
            return data, held_out
    kept = [pair for pair in data.pairs if pair.caption not in held_out]
    if not kept:
        raise UserError(f"{prompts_file} names every caption of the pairs: leave some to train on")
    print(f"{len(kept)} pairs to train on, {len(held_out)} prompts held out")
    return PairSet(kept, data.pipe, data.folder, data.seed), held_out[:count]
