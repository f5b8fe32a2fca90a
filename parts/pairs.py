"""
Preference pairs of one's own: the data set (c, x_0^w, x_0^l) that eq. 5 of the paper takes its expectation over.

    python -m toy.make --pairs out/toy-pairs                          2,000 pairs of the tiny world, labelled by its taste
    python train.py --div js --pairs out/toy-pairs               the same loss, the same flags, another source of pairs

PATH of --pairs is one of
    a folder with pairs.csv or pairs.jsonl      columns prompt (or caption), winner, loser: image files, relative to it; label, if any
    a .parquet file, or a folder of them        columns caption, jpg_0, jpg_1 (the images' bytes), label_0, as in Pick-a-Pic

label (label_0) in [0, 1] is how sure it is that winner (jpg_0) is the better one: 1 by default; below 1/2 the two change places;
1/2 is a tie, left out and counted, as a row without label_0 is. A pair weighs |2 label - 1| in the loss: to first order the loss of uncertain labels,
p L(w, l) + (1 - p) L(l, w).

Images are cut to the model's size and encoded by the VAE once. A latent is a file named after its image's bytes and the VAE,
so a kill loses one image, a changed image is encoded anew, several runs share them, and none lies in memory. (With torchrun
the first rank of each machine encodes while the others wait, two hours at most: start a set of 100,000 pairs with one.)
"""
import contextlib
import csv
import glob
import hashlib
import io
import json
import os
import socket

import numpy as np
import torch
from PIL import Image

from evaluate import read_image
from sample import UserError, latent_shape, progress_bar

NAMES = "prompt (or caption), winner, loser and, if any, label"


# ---------------------------------------------------------------------------------------------------------------
# Reading: every source becomes (where, caption, (name, read) of winner and of loser, label)

def records(path):
    """Yields the pairs of PATH one by one; read() gives an image's bytes. Raises UserError naming what is wrong, and where."""
    if os.path.isdir(path):
        tables = [os.path.join(path, f) for f in ("pairs.csv", "pairs.jsonl") if os.path.exists(os.path.join(path, f))]
        shards = sorted(glob.glob(os.path.join(glob.escape(path), "*.parquet")))
        if len(tables) == 2:
            raise UserError(f"{path!r} has a pairs.csv and a pairs.jsonl: remove one")
        if shards and not tables:
            return (r for shard in shards for r in from_parquet(shard))
        path = tables[0] if tables else path
    if not os.path.isfile(path) or not path.endswith((".csv", ".jsonl", ".parquet")):
        raise UserError(f"no pairs at {path!r}: give a folder with a pairs.csv or pairs.jsonl ({NAMES}) or with .parquet files, or such a file")
    return from_parquet(path) if path.endswith(".parquet") else from_table(path)


def from_table(path):
    """Pairs of a .csv or .jsonl file; images are files, relative to it."""
    folder, is_csv = os.path.dirname(path), path.endswith(".csv")
    try:
        with open(path, encoding="utf-8-sig", newline="") as f:
            table = csv.DictReader(f) if is_csv else None
            lines = ((table.line_num, item) for item in table) if is_csv else (
                (i, json.loads(line)) for i, line in enumerate(f, 1) if line.strip())
            for i, item in lines:
                where = f"{path}, line {i}"
                if not isinstance(item, dict):
                    raise UserError(f"{where}: not an object with {NAMES}")
                if None in item:
                    raise UserError(f"{where}: more cells than the header has: put captions with commas in quotes")
                item = {k.strip().lower(): v for k, v in item.items()}
                caption, files = item.get("prompt") or item.get("caption"), [item.get("winner"), item.get("loser")]
                if not {"winner", "loser"} <= item.keys() or not {"prompt", "caption"} & item.keys():
                    raise UserError(f"{where}: its columns are {', '.join(item) or 'none'}; needed are {NAMES}"
                                    + (", with commas between them" if is_csv and len(item) == 1 else ""))
                if not all(isinstance(v, str) and v.strip() for v in (caption, *files)):
                    raise UserError(f"{where}: prompt, winner or loser is empty")
                caption.encode()  # half a surrogate pair, which JSON can hold, is no text
                yield where, caption, *((name, _reader(os.path.join(folder, name))) for name in files), item.get("label")
    except UnicodeError as e:
        raise UserError(f"{path} is not text: save it as UTF-8") from e
    except (csv.Error, json.JSONDecodeError, RecursionError) as e:
        raise UserError(f"{path} cannot be read as {'a CSV table' if is_csv else 'JSON lines'} ({e})") from e


def _reader(path):
    def read():
        with open(path, "rb") as f:
            return f.read()
    return read


def from_parquet(path, rows=16):
    """Pairs of a Parquet file with the images inside, a few rows in memory at a time."""
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as e:
        raise UserError(f"{path} is a Parquet file and pyarrow is not here: pip install pyarrow, or give a folder with pairs.csv") from e
    columns = ["caption", "jpg_0", "jpg_1", "label_0"]
    try:
        with ParquetFile(path) as table:
            lacking = [c for c in columns if c not in table.schema_arrow.names]
            if lacking:
                raise UserError(f"{path} has no column {', '.join(lacking)}; it has {', '.join(table.schema_arrow.names)}, needed are {', '.join(columns)}")
            row = 0
            for batch in table.iter_batches(batch_size=rows, columns=columns):
                for item in batch.to_pylist():
                    where, images = f"{path}, row {row}", []
                    for c in columns[1:3]:
                        data = item[c].get("bytes") if isinstance(item[c], dict) else item[c]  # a struct where the hub's Image type wrote it
                        if not isinstance(data, bytes | None):
                            raise UserError(f"{where}: {c} must hold the image's bytes")
                        images.append((f"{c} of row {row} of {os.path.basename(path)}", lambda data=data: data or b""))
                    if not isinstance(item["caption"], str) or not item["caption"].strip():
                        raise UserError(f"{where}: caption is empty")
                    yield where, item["caption"], *images, 0.5 if item["label_0"] is None else item["label_0"]
                    row += 1
    except (ArrowException, OSError) as e:
        raise UserError(f"{path} cannot be read as a Parquet file ({' '.join(str(e).split())[:120]}): copy or download it again") from e


def read_label(label, where):
    """None or "" is 1. Raises UserError outside [0, 1]."""
    try:
        label = 1.0 if label is None or label == "" else float(label)
    except (TypeError, ValueError):
        label = float("nan")
    if not 0 <= label <= 1:
        raise UserError(f"{where}: label must be a number in [0, 1] (1: the winner is right, 0.5: a tie)")
    return label


# ---------------------------------------------------------------------------------------------------------------
# Images -> latents, on disk

def to_model(data, height, width):
    """An image file's bytes -> (3, height, width) in [-1, 1]: scaled to cover that size, then cut in the middle.

    Bilinear with antialias, as Diffusion-DPO's and diffusers' training scripts. Raises UserError if it is no whole image.
    """
    try:
        image = Image.fromarray(read_image(io.BytesIO(data)))
    except UserError as e:
        raise UserError("more pixels than Pillow takes" if isinstance(e.__cause__, Image.DecompressionBombError) else "damaged or no image") from e
    scale = max(height / image.height, width / image.width)
    w, h = max(width, round(image.width * scale)), max(height, round(image.height * scale))
    image = image.resize((w, h), Image.Resampling.BILINEAR)
    left, top = (w - width) // 2, (h - height) // 2
    x = np.asarray(image.crop((left, top, left + width, top + height)))
    return torch.from_numpy(x.copy()).permute(2, 0, 1).float() / 127.5 - 1


class Latents:
    """Encoded images under folder/<VAE and size>/<sha256 of the image file>.npy: (4, h, w) fp32, times scaling_factor.

    The mean of the VAE's posterior, not a sample of it: its width is far below the noise that training adds.
    """

    def __init__(self, folder, pipe):
        vae = hashlib.sha256(repr((latent_shape(pipe), pipe.vae.config.scaling_factor, str(pipe.vae.dtype))).encode())
        for _, p in sorted(pipe.vae.named_parameters()):
            vae.update(p.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        self.folder, self.pipe, self.shape = os.path.join(folder, vae.hexdigest()[:16]), pipe, latent_shape(pipe)
        self.bytes = 4 * int(np.prod(self.shape)) + 128  # .npy's header is 128 bytes

    def path(self, key):
        return os.path.join(self.folder, key[:2], f"{key}.npy")

    def has(self, key):
        """Whole files alone count: after a power cut one may be short."""
        try:
            return os.path.getsize(self.path(key)) == self.bytes
        except OSError:
            return False

    @torch.no_grad()
    def add(self, key, image):
        """(3, H, W) in [-1, 1] -> its file, written under another name and renamed. One image at a time: in a batch its last bits
        would depend on its neighbours, and a run that was killed must end with the same bits."""
        vae, path = self.pipe.vae, self.path(key)
        temporary = f"{path}.{socket.gethostname()}.{os.getpid()}.tmp"  # runs on several machines may share the folder
        z = vae.encode(image[None].to(vae.device, vae.dtype)).latent_dist.mean[0].float() * vae.config.scaling_factor
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with open(temporary, "wb") as f:
                np.save(f, z.cpu().numpy(), allow_pickle=False)
            os.replace(temporary, path)
        except OSError as e:
            with contextlib.suppress(OSError):
                os.remove(temporary)
            raise UserError(f"cannot write {path} ({e.strerror or e}): free some space, or choose another --cache_dir; what is encoded stays") from e

    def get(self, keys):
        """(N, 4, h, w) fp32, on the CPU."""
        try:
            return torch.from_numpy(np.stack([np.load(self.path(k), allow_pickle=False) for k in keys]))
        except (OSError, ValueError) as e:
            raise UserError(f"an encoded image has gone from {self.folder}: --resume encodes it again") from e


# ---------------------------------------------------------------------------------------------------------------
# The set

class PairSet:
    """N pairs: captions, keys of the winners' and losers' latents, weights; digest tells one set from another."""

    def __init__(self, latents, rows, seed=0):
        self.latents, self.seed, self.epoch = latents, seed, 0
        self.captions, self.winners, self.losers, self.weights = (list(x) for x in zip(*rows)) if rows else ([], [], [], [])
        self.digest = hashlib.sha256(json.dumps(rows).encode()).hexdigest()

    def __len__(self):
        return len(self.captions)

    def without(self, captions):
        """The set less the pairs of some captions."""
        out = {*captions}
        return PairSet(self.latents, [r for r in zip(self.captions, self.winners, self.losers, self.weights) if r[0] not in out], self.seed)

    def order(self, epoch):
        """(N,) a permutation: a function of (seed, epoch) alone."""
        return torch.from_numpy(np.random.default_rng((self.seed, epoch)).permutation(len(self)))

    def batch(self, index, T=1000):
        """x_w, x_l, eps (B, 4, h, w) fp32 on the CPU; t (B,) uniform in 0..T-1; captions; weight (B,).

        Winner and loser of a pair share t and eps. Both are a function of (seed, epoch, pair), so batches of any size and any
        number of ranks draw the same.
        """
        index = index.tolist()
        t, eps = [], []
        for i in index:
            g = torch.Generator().manual_seed(int(np.random.SeedSequence((self.seed, self.epoch, i)).generate_state(1, np.uint64)[0]))
            t.append(torch.randint(T, (), generator=g))
            eps.append(torch.randn(self.latents.shape, generator=g))
        x_w, x_l = (self.latents.get([keys[i] for i in index]) for keys in (self.winners, self.losers))
        return x_w, x_l, torch.stack(eps), torch.stack(t), [self.captions[i] for i in index], torch.tensor([self.weights[i] for i in index])


def open_pairs(path, pipe, cache_dir, skip_bad=False, seed=0, quiet=False):
    """Reads PATH, encodes what is not encoded yet, and says what was left out. Returns a PairSet.

    Raises UserError for a wrong table, an empty set, or missing or damaged images: these are named and counted at the end, when all
    others are encoded; skip_bad leaves their pairs out instead.
    """
    latents = Latents(cache_dir, pipe)
    _, h, w = latents.shape
    height, width = h * pipe.vae_scale_factor, w * pipe.vae_scale_factor
    rows, bad, known = [], {}, set()
    total = ties = same = left_out = 0

    def key_of(name, read):
        """The name of an image's latent, which is made if need be; None, and a line in `bad`, if the image is no good."""
        try:
            data = read()
            key = hashlib.sha256(data).hexdigest()
            image = to_model(data, height, width) if key not in known and not latents.has(key) else None
        except (OSError, ValueError) as e:  # of to_model, or of a name that no file can have
            bad[name] = e.strerror.lower() if isinstance(e, OSError) else str(e)
            return None
        if image is not None:
            latents.add(key, image)
        known.add(key)
        return key

    with progress_bar(unit=" pairs", desc="reading and encoding pairs", disable=quiet) as bar:
        for where, caption, winner, loser, label in records(path):
            bar.update()
            total += 1
            label = read_label(label, where)
            if label == 0.5:
                ties += 1
                continue
            keys = [key_of(*winner), key_of(*loser)]
            if None in keys:
                left_out += 1
                continue
            if keys[0] == keys[1]:
                same += 1
                continue
            rows.append((" ".join(caption.split()), *(keys if label > 0.5 else keys[::-1]), abs(2 * label - 1)))
    if bad:
        some = "; ".join(f"{k}: {v}" for k, v in list(bad.items())[:5]) + (f"; and {len(bad) - 5} more" if len(bad) > 5 else "")
        what = f"{len(bad)} {'image is' if len(bad) == 1 else 'images are'} missing or damaged ({some}), {left_out} of {len(rows) + left_out} pairs"
        if not skip_bad:
            raise UserError(f"{path}: {what}: mend them, or --skip_bad leaves these pairs out")
        print(f"left out: {what}")
    if ties:
        print(f"left out: {ties} ties (label 0.5, or none in Parquet)")
    if same:
        print(f"left out: {same} pairs of an image with itself")
    if not total:
        raise UserError(f"{path} is empty: give one with pairs in it ({NAMES})")
    if not rows:
        raise UserError(f"{path} holds no pair that can be trained on: give one with at least one clear preference")
    report_long_captions(pipe, sorted({r[0] for r in rows}))
    return PairSet(latents, rows, seed)


def report_long_captions(pipe, captions):
    """Says how many captions the text encoder cuts."""
    most = pipe.tokenizer.model_max_length
    long = sum(len(ids) > most for i in range(0, len(captions), 1000)
               for ids in pipe.tokenizer(captions[i:i + 1000], truncation=False, verbose=False).input_ids)
    if long:
        print(f"{long} of {len(captions)} captions are longer than {most} tokens and are cut there")
