"""
How a policy is measured: Table 2 (does it give people what they asked for and like?) and Table 3 (does it still vary?).

    python evaluate.py out/toy-js                       a run, and the model it came from: both tables and their trade-off
    python evaluate.py out/sd-js out/sd-rkl --judges pickscore hps      several runs, some judges; more can follow later
    python evaluate.py my_images --prompts prompts.txt  images of any other method: my_images/P_K.png or P/K.png or P.png,
                                                        P the line of the prompt from 0, K the number of the image
    python evaluate.py lora.safetensors --model DIR     any LoRA of ours; a base model is its folder, its hub id or "toy"

Protocol: every prompt, K images of it (--images_per_prompt), seeds shared by all models. A pairwise metric is averaged
over the K (K - 1) / 2 pairs of a prompt, any other over its K images; then mean +- standard deviation over the prompts,
as the paper prints it, and the standard error beside it.

--output_dir gets, for each model, images/, scores.csv (a row an image) and pairs.csv (a row a pair); over all models
table2.md, table3.md, summary.csv and tradeoff.png. What is there is not computed again: call it again after a kill, with more
judges, with more models. A metric that was not run says so in its cell, with the reason and the command.
"""
import argparse
import contextlib
import csv
import hashlib
import io
import itertools
import json
import math
import os
import re
import sys
import time
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image, ImageOps

from toy import world as toy
from parts.diversity import LEAST, LPIPS, entropy_1d, entropy_2d, fsim, fsim_maps, fsim_of_maps, lpips, psnr, rmse, ssim  # noqa: F401
from parts.judges import JUDGES, load_judge
from parts.weights import WeightsMissing, find
from sample import (LORA_FILE, SD15, TOY, Parser, UserError, as_reference, generate, load_pipeline, load_policy,
                    make_folder, pick_device, policy_file, progress_bar, read_prompts, resolve_model, run_cli, to_pil, write_file, write_png)

# ---------------------------------------------------------------------------------------------------------------
# Protocol: K images of every prompt, seeds shared by all models, pairs within a prompt, statistics over prompts

def seed_of(p, k):
    """Seed of image k of prompt p: the same for every model, whatever K is."""
    return 10_000 + 100 * p + k


def hold_out(prompts, n):
    """(training prompts, held-out prompts): n held out evenly through the list, at most half, whatever the seed."""
    prompts = list(dict.fromkeys(prompts))  # a prompt given twice must not be both trained on and held out
    n = min(n, len(prompts) // 2)
    held = {round(i * len(prompts) / n) for i in range(n)}
    return [p for i, p in enumerate(prompts) if i not in held], [prompts[i] for i in sorted(held)]


def paint(pipe, prompts, count, args, reference=False, progress=None):
    """(P, count, 3, H, W) in [0, 1]: `count` images of every prompt by DDIM, eta 0; the seeds are the same for all
    policies. reference: of the original model. args: num_inference_steps and guidance_scale."""
    each = [p for p in prompts for _ in range(count)]
    seeds = [seed_of(p, k) for p in range(len(prompts)) for k in range(count)]
    with as_reference(pipe) if reference else contextlib.nullcontext():
        images = generate(pipe, each, seeds, args.num_inference_steps, args.guidance_scale, progress=progress)
    return images.view(len(prompts), count, *images.shape[1:])


def per_prompt(judge, prompts, images):
    """{figure: (P,)} for images (P, K, 3, H, W), as 8-bit files hold them: means over a prompt's K images or its pairs.
    judge None: diversity alone."""
    P, K = images.shape[:2]
    eight_bit = (images * 255).round().clamp(0, 255).byte()
    flat, each = eight_bit.flatten(0, 1).float() / 255, [p for p in prompts for _ in range(K)]
    figures = {}
    if judge:
        text = judge.encode(prompts).repeat_interleave(K, 0)
        figures[f"{judge.name} (the judge)"] = torch.cat([judge(x, y).float().cpu() for x, y in zip(flat.split(16), text.split(16))])
    if hasattr(judge, "report"):
        figures |= judge.report(flat, each)
    out = {k: v.view(P, K).nanmean(1) for k, v in figures.items() if not v.isnan().all()}  # captions that a checker cannot read
    rows = [[x.permute(1, 2, 0) for x in row] for row in eight_bit]
    if K > 1:
        out["diversity: RMSE between images of a prompt"] = torch.tensor(
            [np.mean([rmse(a, b, 255) for a, b in itertools.combinations(row, 2)]) for row in rows])
    out["diversity: entropy of an image, bits"] = torch.tensor([np.mean([entropy_1d(a) for a in row]) for row in rows])
    return out


def before_after(before, after, count):
    """(Markdown table, {figure: {before, after, change, se}}) of two per_prompt results on the same prompts and seeds.

    +- is the standard error over prompts; that of the change is of the paired difference.
    """
    def stats(v):
        v = v.double()[~v.isnan()]
        return v.mean().item(), v.std().item() / math.sqrt(len(v)) if len(v) > 1 else float("nan")
    n = len(next(iter(before.values())))
    lines = [f"| {n} held-out prompts x {count} images | before | after | change | change / its error |", "|---|---|---|---|---|"]
    figures = {}
    for k in before:
        (b, b_se), (a, a_se), (d, d_se) = stats(before[k]), stats(after[k]), stats(after[k].double() - before[k].double())
        error = lambda se: f" +- {se:.3f}" if se == se else ""  # one prompt has none
        lines.append(f"| {k} | {b:.3f}{error(b_se)} | {a:.3f}{error(a_se)} | {d:+.3f}{error(d_se)} | "
                     + (f"{d / d_se:+.1f} |" if d_se > 0 else "- |"))
        figures[k] = {"before": b, "after": a, "change": d, "se": d_se}
    return "\n".join(lines) + "\n", figures


def peak_gb(device):
    """Peak memory so far: of CUDA's allocator, or of the process on a CPU; None where the system does not say."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e9 if sys.platform == "darwin" else 1e6)


# ---------------------------------------------------------------------------------------------------------------
# The two tables: columns, which way is better, digits, the paper's SD1.5 row (None: the value is not at hand)

TABLE2 = {"clipscore": ("CLIPScore", 1, 3, (.352, .049)), "vqascore": ("VQAScore", 1, 3, (.601, None)),
          "aesthetic": ("Aesthetic", 1, 3, None), "imagereward": ("ImageReward", 1, 3, None),
          "pickscore": ("PickScore", 1, 3, (20.908, None)), "hps": ("HPS v2", 1, 3, (26.933, None))}
TOY_TABLE2 = {"taste": ("taste", 1, 3, None), "prompt following": ("prompt following", 1, 3, None)}
TABLE3 = {"clip_i": ("CLIPScore image-image", -1, 3, (.80, None)), "entropy_1d": ("Entropy 1D", 1, 2, (7.25, .62)),
          "entropy_2d": ("Entropy 2D", 1, 2, (14.06, 1.35)), "lpips": ("LPIPS", 1, 3, (.63, None)),
          "rmse": ("RMSE", 1, 4, (.0202, .0043)), "psnr": ("PSNR", -1, 2, (34.04, 1.84)),
          "ssim": ("SSIM", -1, 3, (.734, None)), "fsim": ("FSIM", -1, 3, (.294, None))}
PER_IMAGE = ("entropy_1d", "entropy_2d")
NEEDS_WEIGHTS = {"clipscore": "3.9 GB", "vqascore": "22.9 GB", "aesthetic": "1.7 GB", "imagereward": "1.8 GB", "pickscore": "3.9 GB",
                 "hps": "2.0 GB", "step_aware": "5.2 GB", "clip_i": "3.9 GB", "lpips": "0.24 GB"}
MODEL_JUDGES, MODEL_METRICS = tuple(TABLE2), tuple(TABLE3)
TOY_METRICS = tuple(m for m in TABLE3 if m not in NEEDS_WEIGHTS)


@dataclass
class Row:
    """A line of the tables: a model, or a folder of images, with all that is known of its images so far."""
    label: str
    folder: str                     # of its scores, in --output_dir
    images: str                     # where its images are, or will be painted
    base: str = None                # the model that paints them; None: they come from elsewhere
    lora: str = None
    run: dict = None                # config.json of a run of ours
    files: dict = field(default_factory=dict)    # (p, k) -> path, readable images only
    sha: dict = field(default_factory=dict)      # (p, k) -> of the file's bytes: a score belongs to one content
    image_scores: dict = field(default_factory=dict)   # (p, k) -> {metric: value}
    pair_scores: dict = field(default_factory=dict)    # (p, i, j) -> {metric: value}
    unseen: dict = field(default_factory=dict)         # file -> {key: its line}: scores of images this call leaves out
    skipped: int = 0

    def keys(self, metric):
        """Where this metric has a value: images, or pairs of images, of one prompt."""
        if metric not in TABLE3 or metric in PER_IMAGE:
            return sorted(self.files)
        ks = {}
        for p, k in sorted(self.files):
            ks.setdefault(p, []).append(k)
        return [(p, i, j) for p, row in ks.items() for i, j in itertools.combinations(row, 2)]

    def values(self, metric):
        return self.pair_scores if metric in TABLE3 and metric not in PER_IMAGE else self.image_scores

    def missing(self, metric):
        return [key for key in self.keys(metric) if metric not in self.values(metric).get(key, {})]


def read_image(path):
    """uint8 (H, W, 3), as cv2.imread and PIL's convert("RGB") agree: upright, gray three times, alpha dropped, palettes looked up,
    of 16 bits the upper 8. (PIL alone would clip 16-bit gray to white.) Raises UserError for what is no whole image."""
    try:
        with Image.open(path) as image:
            image.load()
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):
                return np.repeat((np.asarray(image).astype(np.int64) >> 8).astype(np.uint8)[..., None], 3, 2)
            if image.mode == "P":
                image.info.pop("transparency", None)  # not used, and Pillow would warn about it
            return np.array(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as e:
        raise UserError(f"{path} is not a whole image ({' '.join(str(e).split())[:100]})") from e


IMAGE = re.compile(r"(\d+)(?:[_/](\d+))?\.(?:png|jpe?g|webp)", re.I)   # P_K.png, P/K.png, P.png
OTHERS = re.compile(r"(\.|.*/\.)|.*\.(txt|md|csv|json|jsonl)$", re.I)   # what may lie beside images


def list_images(folder):
    """{(p, k): path} and the paths of files that are named unlike an image of ours."""
    found, odd = {}, []
    for root, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(root, name)
            short = os.path.relpath(path, folder).replace(os.sep, "/")
            m = IMAGE.fullmatch(short)
            if m:
                key = int(m[1]), int(m[2] or 0)
                if key in found:
                    raise UserError(f"{found[key]} and {path} are both image {key[1]} of prompt {key[0]}: remove one")
                found[key] = path
            elif not OTHERS.match(short):
                odd.append(path)
    return found, sorted(odd)


# ---------------------------------------------------------------------------------------------------------------
# What is asked for

def build_parser():
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("targets", nargs="+", metavar="RUN_OR_FOLDER", help="runs, LoRAs, models, folders of images")
    p.add_argument("--judges", nargs="+", metavar="NAME",
                   help=f"of Table 2: {', '.join(MODEL_JUDGES)}, taste, or none (default: all six; for the toy: taste)")
    p.add_argument("--metrics", nargs="+", metavar="NAME",
                   help=f"of Table 3: {', '.join(TABLE3)}, or none (default: all eight; for the toy: those without weights)")
    p.add_argument("--prompts", metavar="FILE", help="a .txt file, one a line, a .json list, or hpdv2: its 400 test prompts (default: the "
                   "held-out prompts of a run, prompts.txt in a folder of images, hpdv2 for SD1.5)")
    p.add_argument("--num_prompts", type=int, help="the first so many of them")
    p.add_argument("--images_per_prompt", type=int, help="K, at least 2 for pairwise metrics (default: 4, or what the folders have)")
    p.add_argument("--model", default="auto", help="what a LoRA file belongs to: auto, toy, a diffusers folder or a hub id")
    p.add_argument("--weights", metavar="DIR", help="a folder with the judges' weights, in place of the hub (judges.py says how)")
    p.add_argument("--num_inference_steps", type=int, help="DDIM steps (default: the run's, or 20)")
    p.add_argument("--guidance_scale", type=float, help="(default: the run's, or 5)")
    p.add_argument("--batch_size", type=int, default=16, help="images painted and judged at once")
    p.add_argument("--skip_bad", action="store_true", help="leave out files that are no whole images, and say how many")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1")
    p.add_argument("--output_dir", default="out/evaluation", help="(default: out/evaluation)")
    return p


def resolve(target, args):
    """One positional argument -> a Row; raises UserError if it is nothing that can be scored."""
    path = target.rstrip("/") or target
    name = os.path.basename(os.path.abspath(path)) if os.path.exists(path) else path.split("/")[-1]
    label = name.removesuffix(".safetensors")
    row = Row(label, None, None)
    if os.path.isdir(path):
        has = lambda f: os.path.exists(os.path.join(path, f))
        if has("config.json") and not has("model_index.json"):
            try:
                with open(os.path.join(path, "config.json")) as f:
                    row.run = json.load(f)
                row.base = row.run["args"]["model"]
            except (OSError, ValueError, KeyError, TypeError) as e:
                raise UserError(f"{path}/config.json is not that of a run of train.py: give a run's folder, or a folder of images") from e
            if not policy_file(path):
                raise UserError(f"run {path!r} has no {LORA_FILE}: train it first, or wait for its first checkpoint")
            row.lora = path
        elif policy_file(path) and not has("model_index.json"):
            row.base, row.lora = args.model, path
        elif has("model_index.json"):
            row.base = path
        elif any(list_images(path)):
            row.images = path
        else:
            raise UserError(f"no images in {path!r}, nor a run, a LoRA or a model: images are named P_K.png, P/K.png or P.png, P the "
                            "line of the prompt from 0, K the number of the image")
    elif os.path.isfile(path) and path.endswith(".safetensors"):
        row.base, row.lora = args.model, path
    elif target in ("toy", "auto") or (path.count("/") == 1 and not os.path.exists(path) and not path.startswith((".", "/", "~", "out/"))):
        row.base = target
    else:
        raise UserError(f"nothing to score at {target!r}: give a run's folder, a LoRA, a model, or a folder of images")
    if row.base:
        row.base = os.path.realpath(resolve_model(row.base)[0]) if os.path.isdir(resolve_model(row.base)[0]) else resolve_model(row.base)[0]
        if not row.lora:
            row.label = os.path.basename(row.base)
    return row


def make_rows(args):
    """The lines of the tables: what was asked for, and before it the original of every aligned model."""
    rows = [resolve(t, args) for t in args.targets]
    originals = {r.base: Row(os.path.basename(r.base), None, None, base=r.base) for r in rows if r.base}
    rows = [*originals.values(), *(r for r in rows if r.lora or not r.base)]
    taken = {}
    for r in rows:
        source = r.lora or r.images or r.base
        if taken.setdefault(r.label, source) != source:  # two folders of one name
            r.label = "-".join(os.path.abspath(source).split(os.sep)[-2:])
            if taken.setdefault(r.label, source) != source:
                raise UserError(f"two things to score are both called {r.label}: rename one folder")
        r.folder = os.path.join(args.output_dir, r.label)
        r.images = r.images or os.path.join(r.folder, "images")
    return list({r.label: r for r in rows}.values())


def choose(args, rows):
    """Fills in what flags leave unsaid: judges, metrics, prompts, K, sampler. Returns (prompts or None, judges, metrics)."""
    is_toy = any(r.base == TOY for r in rows)
    def pick(asked, default, known, flag):
        if asked is None:
            return default
        names = [] if asked == ["none"] else [n for a in asked for n in a.split(",") if n]
        for n in names:
            if n not in known:
                raise UserError(f"{flag}: unknown {n!r}: choose from {', '.join(known)}, or none alone")
        return tuple(dict.fromkeys(names))
    judges = pick(args.judges, ("taste",) if is_toy else MODEL_JUDGES, tuple(JUDGES), "--judges")
    metrics = pick(args.metrics, TOY_METRICS if is_toy else MODEL_METRICS, MODEL_METRICS, "--metrics")
    if not judges and not metrics:
        raise UserError("nothing to compute: --judges and --metrics are both none")
    runs = [r.run for r in rows if r.run]
    for k, fallback in (("num_inference_steps", 20), ("guidance_scale", 5.0)):
        said = {r["args"].get(k, fallback) for r in runs} or {fallback}
        if getattr(args, k) is None:
            if len(said) > 1:
                raise UserError(f"the runs were sampled with different --{k} ({', '.join(map(str, sorted(said)))}): say one")
            setattr(args, k, said.pop())
    if not 1 <= args.num_inference_steps <= 500 or args.batch_size < 1 or not math.isfinite(args.guidance_scale):
        raise UserError("--num_inference_steps must lie in 1..500, --batch_size be at least 1, --guidance_scale finite")
    if args.images_per_prompt is not None and not 1 <= args.images_per_prompt <= 100 or args.num_prompts is not None and args.num_prompts < 1:
        raise UserError("--images_per_prompt must lie in 1..100, --num_prompts be at least 1")
    prompts = choose_prompts(args, rows, runs)
    return prompts[:args.num_prompts] if prompts else None, judges, metrics


def choose_prompts(args, rows, runs):
    if args.prompts and args.prompts != "hpdv2":
        return read_prompts(args.prompts)
    painted = [r for r in rows if r.base]
    if not args.prompts:
        inside = [os.path.join(r.images, "prompts.txt") for r in rows if not r.base]
        held = {tuple(r.get("held_out") or ()) for r in runs if r["args"]["model"] != SD15} - {()}
        if inside and not painted:
            lists = {tuple(read_prompts(f)) for f in inside if os.path.exists(f)}
            if len(lists) > 1:
                raise UserError("the folders' prompts.txt differ: give the one list they share with --prompts FILE")
            return list(lists.pop()) if lists else None
        if len(held) > 1:
            raise UserError("the runs held out different prompts: give --prompts FILE, prompts that none was trained on")
        if held:
            return list(held.pop())
        if all(r.base == TOY for r in painted):
            return hold_out(toy.prompts(), toy.PRESET["num_eval_prompts"])[1]
        if any(r.base != SD15 for r in painted):
            raise UserError("which prompts? Give --prompts FILE (one a line), or --prompts hpdv2 for the paper's 400")
    try:
        return read_prompts(find("ymhao/HPDv2", "test.json", args.weights, repo_type="dataset"))
    except WeightsMissing as e:
        raise UserError(f"the HPDv2 test prompts cannot be had ({e}); or give --prompts FILE") from e


# ---------------------------------------------------------------------------------------------------------------
# Images: paint what is missing, look at what is there

def fingerprint(row, args):
    """What an image depends on besides prompt and seed. Local weights are told by their last bytes, wherever they lie."""
    unet, digest = os.path.join(row.base, "unet"), None
    if os.path.isdir(unet):
        digest = hashlib.sha1()
        for name in sorted(f for f in os.listdir(unet) if f.endswith(".safetensors")):
            with open(os.path.join(unet, name), "rb") as f:
                f.seek(max(os.path.getsize(f.name) - 65536, 0))
                digest.update(f.read())
        digest = digest.hexdigest()
    lora = row.lora and policy_file(row.lora)
    if lora:
        with open(lora, "rb") as f:
            lora = hashlib.sha1(f.read()).hexdigest()
    return {"model": os.path.basename(row.base) if digest else row.base, "unet": digest, "lora": lora,
            "guidance_scale": args.guidance_scale, "num_inference_steps": args.num_inference_steps}


def settings_of(row):
    try:
        with open(os.path.join(row.folder, "settings.json")) as f:
            return json.load(f)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as e:
        raise UserError(f"{row.folder}/settings.json cannot be read: delete the folder {row.folder}") from e


def save_settings(row, settings):
    write_file(os.path.join(row.folder, "settings.json"), (json.dumps(settings, indent=2) + "\n").encode())


def paint_missing(row, prompts, args, device):
    """Every image (p, k) that row.images lacks, each written whole or not at all. Refuses images of other settings."""
    settings, now = settings_of(row), fingerprint(row, args)
    was = settings.get("images", now)
    painted = settings.get("prompts", {})           # p -> the prompt that image was painted from
    other = [f"{k} {was.get(k)}, now {now[k]}" if k not in ("lora", "unet") else f"another {k}" for k in now if was.get(k) != now[k]]
    other += [f"prompt {p} was {painted[str(p)]!r}" for p, c in enumerate(prompts) if painted.get(str(p), c) != c][:1]
    if other:
        raise UserError(f"{row.images} holds images of other settings ({'; '.join(other)}): give another --output_dir, or delete {row.folder}")
    make_folder(row.images)
    missing = [(p, k) for p in range(len(prompts)) for k in range(args.images_per_prompt)
               if not os.path.exists(os.path.join(row.images, f"{p:05d}_{k}.png"))]
    save_settings(row, settings | {"images": now, "prompts": painted | {str(p): c for p, c in enumerate(prompts)}})
    if not missing:
        return
    pipe = load_pipeline(row.base, device, torch.float16 if device.startswith("cuda") else torch.float32)
    if row.lora:
        load_policy(pipe, row.lora)
    with progress_bar(total=len(missing), unit="image", desc=f"painting {row.label}") as bar:
        for i in range(0, len(missing), args.batch_size):
            batch = missing[i:i + args.batch_size]
            images = generate(pipe, [prompts[p] for p, _ in batch], [seed_of(p, k) for p, k in batch], args.num_inference_steps,
                              args.guidance_scale, batch_size=args.batch_size, progress=bar.update)
            for (p, k), image in zip(batch, images):
                write_png(to_pil(image), os.path.join(row.images, f"{p:05d}_{k}.png"))


def check_folder_of_images(row, prompts, args):
    inside = os.path.join(row.images, "prompts.txt")
    if prompts and os.path.exists(inside):
        theirs = read_prompts(inside)
        other = [p for p, (a, b) in enumerate(zip(theirs, prompts)) if a != b]
        if other:
            raise UserError(f"{inside} does not match the prompts in use: prompt {other[0]} is {theirs[other[0]]!r} there, {prompts[other[0]]!r} "
                            "here: evaluate the folder alone, or make its images from the same prompts")
    home, out = (os.path.realpath(x) for x in (row.images, args.output_dir))
    if out == home or out.startswith(home + os.sep):
        raise UserError(f"--output_dir {args.output_dir!r} lies in the folder of images {row.images!r}: choose one outside")


def look(row, prompts, args, pairwise):
    """Fills row.files and row.sha: the first K images of every prompt, all found readable. Raises UserError otherwise."""
    found, bad = list_images(row.images)
    P = len(prompts) if prompts else max(p for p, _ in found) + 1 if found else 0
    beyond = sorted(p for p, _ in found if p >= P)
    if beyond and not row.base and not args.num_prompts:
        raise UserError(f"{row.images} has images of prompt {beyond[-1]}, but there are {P} prompts, 0 to {P - 1}: P counts "
                        "from 0; or give the prompts file they were made from")
    counts = [sum((p, k) in found for k in range(1000)) for p in range(P)] if found else []
    known = {sha for sha in read_scores(row, prompts, only_sha=True)}
    sizes, bad_names = {}, list(bad)
    for key, path in sorted(found.items()):
        if key[0] >= P or (args.images_per_prompt and sum(1 for k in range(key[1]) if (key[0], k) in found) >= args.images_per_prompt):
            continue
        try:
            with open(path, "rb") as f:
                sha = hashlib.sha1(f.read()).hexdigest()[:16]
            if sha not in known:
                read_image(path)
            with Image.open(path) as image:
                sizes[key] = image.size
            row.files[key], row.sha[key] = path, sha
        except (UserError, OSError):
            bad_names.append(path)
    if bad_names and not args.skip_bad:
        raise UserError(f"{row.images}: {len(bad_names)} of {len(found) + len(bad)} files are not whole images P_K.png, such as "
                        f"{bad_names[0]}: mend or remove them, or score the rest with --skip_bad")
    row.skipped = len(bad_names)
    if not row.files:
        raise UserError(f"no images in {row.images!r} that can be read")
    empty = [p for p in range(P) if counts[p] == 0]
    if empty:
        raise UserError(f"{row.images} has no image of {len(empty)} of the {P} prompts, such as prompt {empty[0]}: give the prompts file "
                        "they were made from, or --num_prompts")
    want = args.images_per_prompt or counts[0]
    few = [p for p in range(P) if counts[p] < want or (not args.images_per_prompt and counts[p] != want)]
    if few:
        raise UserError(f"{row.images}: prompt {few[0]} has {counts[few[0]]} images, not {want}: add the missing ones, or say "
                        f"--images_per_prompt {min(counts)}")
    args.images_per_prompt = want  # of the first folder, if nobody said: all models have the same K
    if pairwise and want < 2:
        raise UserError(f"{pairwise[0]} compares images of one prompt and needs two, {row.images} has one each: add images, or "
                        "say --metrics entropy_1d entropy_2d, or --metrics none")
    for m in pairwise:
        small = next((key for key, size in sizes.items() if min(size) < LEAST.get(m, 1)), None)
        if small:
            raise UserError(f"{row.files[small]} is {sizes[small]}: {m} needs {LEAST[m]} pixels each way; leave it out with --metrics")
    if pairwise:
        for p, i, j in row.keys("rmse"):
            if sizes[p, i] != sizes[p, j]:
                raise UserError(f"{row.files[p, i]} is {sizes[p, i]}, {row.files[p, j]} is {sizes[p, j]}: images of one prompt must "
                                "be of one size for pairwise metrics")


# ---------------------------------------------------------------------------------------------------------------
# Scores: a row an image, a row a pair; they belong to the bytes of the files

def read_scores(row, prompts, only_sha=False):
    """Fills row.image_scores and row.pair_scores from the two files, as far as images and prompts are still the same."""
    seen = set()
    for name, index in (("scores.csv", ("prompt_index", "image")), ("pairs.csv", ("prompt_index", "image_1", "image_2"))):
        path = os.path.join(row.folder, name)
        if not os.path.exists(path):
            continue
        try:
            with open(path, newline="", encoding="utf-8") as f:
                for line in csv.DictReader(f):
                    key, sha = tuple(int(line[k]) for k in index), line["sha1"]
                    seen.add(sha)
                    if only_sha:
                        continue
                    if any((key[0], k) not in row.sha for k in key[1:]):
                        row.unseen.setdefault(name, {})[key] = line
                        continue
                    mine = "-".join(row.sha[key[0], k] for k in key[1:])
                    same = sha == mine and (name == "pairs.csv" or not prompts or line["prompt"] in ("", prompts[key[0]]))
                    if same:
                        target = row.image_scores if name == "scores.csv" else row.pair_scores
                        fixed = (*index, "sha1", "prompt", "file")
                        target[key] = {k: float(v) for k, v in line.items() if k not in fixed and v}
        except (OSError, ValueError, KeyError, TypeError, csv.Error) as e:
            raise UserError(f"{path} cannot be read ({e}): delete it, and it is computed again") from e
    return seen


def save_scores(row, prompts):
    def table(name, index, scores, more):
        lines = dict(row.unseen.get(name, {}))
        for key, values in scores.items():
            about = {"file": os.path.basename(row.files[key]), "prompt": prompts[key[0]] if prompts else ""} if more else {}
            lines[key] = (dict(zip(index, key)) | about | {"sha1": "-".join(row.sha[key[0], k] for k in key[1:])}
                          | {c: repr(v) for c, v in values.items()})
        if not lines:
            return
        fixed = [*index, *more, "sha1"]
        found = {c for line in lines.values() for c in line} - set(fixed)
        columns = sorted(found, key=lambda c: ((*TOY_TABLE2, *TABLE2, *TABLE3, c).index(c), c))
        text = io.StringIO()
        out = csv.DictWriter(text, fixed + columns, restval="", lineterminator="\n")
        out.writeheader()
        out.writerows(lines[key] for key in sorted(lines))
        write_file(os.path.join(row.folder, name), text.getvalue().encode())
    table("scores.csv", ("prompt_index", "image"), row.image_scores, ("file", "prompt"))
    table("pairs.csv", ("prompt_index", "image_1", "image_2"), row.pair_scores, ())


class Saver:
    """Writes a row's scores every ten seconds and at the end, however it ends: a kill loses ten seconds of work."""

    def __init__(self, prompts):
        self.prompts, self.last, self.row = prompts, time.time(), None

    def __call__(self, row):
        if self.row is not None and (row is not self.row or time.time() - self.last > 10):
            save_scores(self.row, self.prompts)
            self.last = time.time()
        self.row = row

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.row is not None:
            save_scores(self.row, self.prompts)


def as_batch(images, device):
    """List of uint8 (H, W, 3), one size -> (N, 3, H, W) in [0, 1]."""
    return torch.stack([torch.from_numpy(x) for x in images]).permute(0, 3, 1, 2).to(device).float() / 255


def judge_images(rows, name, prompts, args, device):
    """Scores of one judge for all images that lack them. The judge is loaded once, the text encoded once."""
    todo = [(row, key) for row in rows for key in row.missing(name)]
    if not todo:
        return
    judge = load_judge(name, device, args.weights)
    text = judge.encode(prompts or [""] * (1 + max(key[0] for _, key in todo)))
    with progress_bar(total=len(todo), unit="image", desc=name) as bar, Saver(prompts) as saver:
        for i in range(0, len(todo), args.batch_size):
            batch = todo[i:i + args.batch_size]
            images = [read_image(row.files[key]) for row, key in batch]
            for shape in sorted({x.shape for x in images}):  # mostly one
                here = [n for n, x in enumerate(images) if x.shape == shape]
                x, ps = as_batch([images[n] for n in here], device), [batch[n][1][0] for n in here]
                figures = {name: judge(x, text[ps])}
                if hasattr(judge, "report"):
                    figures |= judge.report(x, [prompts[p] for p in ps]) if prompts else {}
                for n, values in zip(here, zip(*(v.float().tolist() for v in figures.values()))):
                    row, key = batch[n]
                    saver(row)
                    row.image_scores.setdefault(key, {}).update(zip(figures, values))
            bar.update(len(batch))


def metric_parts(name, args, device):
    """(what is computed once an image, what is computed once a pair); the latter None if there is no pair."""
    if name == "lpips":
        net = LPIPS(device, args.weights)
        return net.features, net.distance
    if name == "clip_i":
        judge = load_judge("clipscore", device, args.weights)
        return (lambda x: judge.embed(x.permute(2, 0, 1)[None].float() / 255)[0]), (lambda a, b: (a @ b).item())
    if name in PER_IMAGE:
        return {"entropy_1d": entropy_1d, "entropy_2d": entropy_2d}[name], None
    if name == "fsim":
        return fsim_maps, fsim_of_maps
    return (lambda x: x), {"rmse": rmse, "psnr": psnr, "ssim": ssim}[name]


def measure(rows, metrics, prompts, args, device):
    """Table 3's values for all images and pairs that lack them, one prompt's K images in memory at a time.
    metrics: {name: metric_parts}."""
    todo = []
    for row in rows:
        lack = {m: {key[0] for key in row.missing(m)} for m in metrics}
        todo += [(row, p, [m for m in metrics if p in lack[m]]) for p in sorted(set().union(*lack.values()))]
    if not todo:
        return
    with progress_bar(total=len(todo), unit="prompt", desc="diversity") as bar, Saver(prompts) as saver:
        for row, p, names in todo:
            saver(row)
            images = {k: torch.from_numpy(read_image(row.files[q, k])).to(device) for q, k in sorted(row.files) if q == p}
            for name in names:
                prepare, compare = metrics[name]
                once = {k: prepare(x) for k, x in images.items()}
                if compare is None:
                    for k, v in once.items():
                        row.image_scores.setdefault((p, k), {})[name] = v
                for i, j in itertools.combinations(sorted(once), 2) if compare else ():
                    row.pair_scores.setdefault((p, i, j), {})[name] = compare(once[i], once[j])
            bar.update(1)


# ---------------------------------------------------------------------------------------------------------------
# Tables and figure

def summarise(row, metric):
    """{mean, sd, se, prompts, left_out, example} over prompts; None unless every image or pair has its value.

    Values that are not finite (FSIM of a black image, PSNR of identical ones) are left out and counted.
    """
    keys = row.keys(metric)
    if not keys or row.missing(metric):
        return None
    by_prompt, odd = {}, []
    for key in keys:
        v = row.values(metric)[key][metric]
        by_prompt.setdefault(key[0], [])
        if math.isfinite(v):
            by_prompt[key[0]].append(v)
        elif metric != "prompt following":  # NaN there: the prompt names nothing that could be followed
            odd.append((key, v))
    means = np.array([np.mean(v) for v in by_prompt.values() if v])
    sd = means.std(ddof=1) if len(means) > 1 else math.nan
    return {"mean": means.mean() if len(means) else math.nan, "sd": sd, "se": sd / math.sqrt(max(len(means), 1)),
            "prompts": len(means), "left_out": len(odd), "of": len(keys), "example": odd[0] if odd else None}


def make_table(title, columns, rows, results, reasons, paper):
    """Markdown: a line a model, best in bold, footnotes for what was not run and for what was left out."""
    notes, number = [], {}
    def note(text):
        if text not in number:
            number[text] = len(number) + 1
            notes.append(f"[{number[text]}] {text}")
        return f"[{number[text]}]"
    lines = [f"### {title}\n", "| model | " + " | ".join(f"{c[0]} {'↑' if c[1] > 0 else '↓'}" for c in columns.values()) + " |",
             "|---" * (len(columns) + 1) + "|"]
    best = {}
    for m, (_, sign, digits, _) in columns.items():
        means = [sign * round(r["mean"], digits) for r in (results[row.label, m] for row in rows) if r and r["prompts"]]
        best[m] = max(means) if len(means) > 1 and len(set(means)) > 1 else None
    for row in rows:
        cells = []
        for m, (_, sign, digits, _) in columns.items():
            r = results[row.label, m]
            if r is None:
                cells.append("not run " + note(f"{m}: {reasons.get(m, 'not computed for all images')}"))
                continue
            if not r["prompts"] and not r["left_out"]:
                cells.append("-")  # prompt following, where no prompt names anything
                continue
            mean = f"{r['mean']:.{digits}f} ± {r['sd']:.{digits}f}" if r["prompts"] > 1 else f"{r['mean']:.{digits}f}"
            mean = f"**{mean}**" if sign * round(r["mean"], digits) == best[m] else mean
            cell = mean + (f" ({r['se']:.{digits}f})" if r["prompts"] > 1 else "")
            if r["left_out"]:
                key, v = r["example"]
                files = " and ".join(os.path.basename(row.files[key[0], k]) for k in key[1:])
                cell += " " + note(f"{m} of {row.label}: {r['left_out']} of {r['of']} values are {v}, such as that of {files}: left out of the mean")
            cells.append(cell)
        if row.skipped:
            note(f"{row.label}: {row.skipped} files were no whole images and were skipped")
        original = " (original)" if row.base and not row.lora else ""
        lines.append(f"| {row.label}{original} | " + " | ".join(cells) + " |")
    if paper:
        show = lambda v, d: "-" if v is None else f"{v[0]:.{d}f}" + (f" ± {v[1]:.{d}f}" if v[1] else "")
        lines.append("| SD v1.5 in the paper " + note("the paper's values as far as they are at hand; its images, seeds and pairs are not "
                     "published") + " | " + " | ".join(show(c[3], min(c[2], 4)) for c in columns.values()) + " |")
    return "\n".join(lines) + "\n" + "".join(f"\n{n}" + "  " for n in notes).rstrip() + ("\n" if notes else "")


def draw_tradeoff(path, columns, rows, results):
    """Alignment against diversity: a panel a judge, a point a model, bars of one standard error. Returns False if there
    is nothing to draw."""
    x = next((m for m in ("lpips", "rmse", "entropy_1d") if all(results[r.label, m] for r in rows)), None)
    ys = [m for m in columns if all(results[r.label, m] and results[r.label, m]["prompts"] for r in rows)]
    if x is None or not ys:
        return False
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    n = min(len(ys), 3)
    figure, axes = plt.subplots(-(-len(ys) // n), n, figsize=(4.6 * n, 3.8 * -(-len(ys) // n)), constrained_layout=True, squeeze=False)
    for ax in axes.flat[len(ys):]:
        ax.axis("off")
    for ax, y in zip(axes.flat, ys):
        for i, row in enumerate(rows):
            a, b = results[row.label, x], results[row.label, y]
            ax.errorbar(a["mean"], b["mean"], xerr=a["se"], yerr=b["se"], fmt="s" if row.base and not row.lora else "o", ms=6, capsize=3,
                        color="black" if row.base and not row.lora else f"C{i}",
                        label=row.label + (" (original)" if row.base and not row.lora else ""))
        ax.set_xlabel(f"{TABLE3[x][0]} within a prompt (more is more diverse)" if x not in PER_IMAGE else TABLE3[x][0])
        ax.set_ylabel(columns[y][0])
        ax.margins(.2)
        ax.grid(alpha=.3)
    axes.flat[0].legend(fontsize=8)
    figure.suptitle("Alignment against diversity; bars: standard error over prompts", fontsize=10)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=130)
    plt.close(figure)
    write_file(path, buffer.getvalue())
    return True


def report(rows, args, reasons, prompts):
    """table2.md, table3.md, summary.csv, tradeoff.png; prints the tables."""
    scored = {c for r in rows for s in r.image_scores.values() for c in s} - {*TABLE2, *TABLE3}  # the toy's, and a user's own judge's
    table2 = {c: TOY_TABLE2.get(c, (c, 1, 3, None)) for c in sorted(scored, key=lambda c: ((*TOY_TABLE2, c).index(c), c))} | TABLE2
    results = {(r.label, m): summarise(r, m) for r in rows for m in (*table2, *TABLE3)}
    about = f"{len({p for p, _ in rows[0].files})} prompts x {args.images_per_prompt} images; mean ± standard deviation over prompts (standard error)"
    paper = any(r.base == SD15 or not r.base for r in rows)
    text = [make_table(f"Table 2: alignment. {about}", table2, rows, results, reasons, paper),
            make_table(f"Table 3: diversity. {about}", TABLE3, rows, results, reasons, paper)]
    for name, t in zip(("table2.md", "table3.md"), text):
        write_file(os.path.join(args.output_dir, name), t.encode())
    out = io.StringIO()
    w = csv.writer(out, lineterminator="\n")
    w.writerow(["model", "metric", "mean", "sd", "se", "prompts", "left_out", "not_run"])
    for (label, m), r in results.items():
        w.writerow([label, m, *((repr(float(r[k])) for k in ("mean", "sd", "se")) if r else ("",) * 3),
                    *((r["prompts"], r["left_out"], "") if r else ("", "", reasons.get(m, "not computed for all images")))])
    write_file(os.path.join(args.output_dir, "summary.csv"), out.getvalue().encode())
    drawn = draw_tradeoff(os.path.join(args.output_dir, "tradeoff.png"), table2, rows, results)
    print("\n" + "\n".join(text))
    print(f"In {args.output_dir}: table2.md, table3.md, summary.csv, {'tradeoff.png, ' if drawn else ''}and for each model scores.csv, "
          "pairs.csv" + (", images/" if any(r.base for r in rows) else ""))


def forget_other_weights(row, names, args):
    """Drops scores that were computed with weights from elsewhere."""
    here = os.path.abspath(args.weights) if args.weights else "hub"
    settings = settings_of(row)
    was = settings.get("weights", {})
    for name in names:
        if name in NEEDS_WEIGHTS and was.get(name, here) != here:
            print(f"{row.label}: {name} was computed with weights from {was[name]}, now from {here}: again", file=sys.stderr)
            for scores in row.values(name).values():
                scores.pop(name, None)
    save_settings(row, settings | {"weights": was | {n: here for n in names if n in NEEDS_WEIGHTS}})


def main():
    args, start = build_parser().parse_args(), time.time()
    rows = make_rows(args)
    prompts, judges, metrics = choose(args, rows)
    device = pick_device(args.device)
    pairwise = [m for m in metrics if m not in PER_IMAGE]
    if not prompts and set(judges) - {"aesthetic", "taste"}:
        raise UserError(f"{judges[0]} needs the prompts of the images: --prompts FILE, or a prompts.txt in the folder; or --judges none")
    if any(r.base for r in rows):
        args.images_per_prompt = args.images_per_prompt or 4
        if pairwise and args.images_per_prompt < 2:
            raise UserError(f"{pairwise[0]} compares images of one prompt: --images_per_prompt must be at least 2, or say --metrics "
                            "entropy_1d entropy_2d")
    print(f"{', '.join(r.label for r in rows)}: {len(prompts) if prompts else 'unknown'} prompts; judges: {', '.join(judges) or 'none'}; metrics: "
          f"{', '.join(metrics) or 'none'}; on {device}", flush=True)
    for row in rows:
        if not row.base:
            check_folder_of_images(row, prompts, args)
            look(row, prompts, args, pairwise)  # before anything is painted or loaded
    make_folder(args.output_dir)
    for row in rows:
        make_folder(row.folder)
        if row.base:
            paint_missing(row, prompts, args, device)
            look(row, prompts, args, pairwise)
        read_scores(row, prompts)
        forget_other_weights(row, (*judges, *metrics), args)
    again = "python evaluate.py " + " ".join(args.targets) + "".join(
        f" --{k} {v}" for k in ("prompts", "weights") if (v := getattr(args, k))) + (
        f" --output_dir {args.output_dir}" if args.output_dir != "out/evaluation" else "")
    def left_out(m):
        size = f", {NEEDS_WEIGHTS[m]} of weights" if m in NEEDS_WEIGHTS else ""
        return f"not asked for{size}: `{again} --{'metrics' if m in TABLE3 else 'judges'} {'taste' if m in TOY_TABLE2 else m}`"
    reasons = {m: left_out(m) for m in (*JUDGES, *TOY_TABLE2, *TABLE3)}
    failed = []
    def attempt(name, work):
        try:
            return work()
        except WeightsMissing as e:
            reasons[name] = f"{e}; then `{again} --{'metrics' if name in TABLE3 else 'judges'} {name}`"
            failed.append(name)
    for name in judges:
        attempt(name, lambda: judge_images(rows, name, prompts, args, device))
    parts = {m: attempt(m, lambda: metric_parts(m, args, device)) for m in metrics if any(r.missing(m) for r in rows)}
    measure(rows, {m: v for m, v in parts.items() if v}, prompts, args, device)
    report(rows, args, reasons, prompts)
    peak = peak_gb(device)
    print(f"{time.time() - start:.0f} s" + (f", peak memory {peak:.2f} GB" if peak else ""))
    asked = [m for m in failed if (args.metrics if m in TABLE3 else args.judges)]
    if asked:
        raise UserError(f"asked for, but not run: {', '.join(asked)}; the notes under the tables say why and what to do")


if __name__ == "__main__":
    run_cli(main)
