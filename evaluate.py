"""How a policy is measured: do people like its images (Table 2), and do the images vary (Table 3)?

    python evaluate.py out/toy-js                a run and its original: both tables, a trade-off
    python evaluate.py out/sd-js out/sd-rkl --judges pickscore hps     more judges can follow later
    python evaluate.py lora.safetensors --model DIR     a LoRA file, of a folder, a hub id or "toy"
    python evaluate.py images --prompts p.txt  image K of prompt P: P_K.png, P/K.png, P.png, from 0

The protocol, as far as the paper states it:
1. Every model paints K images of every held-out prompt, with seeds that all models share.
2. A judge scores an image, an entropy too; other metrics compare each two images of a prompt.
3. The value of a prompt is the mean over its K images, or over its K (K - 1) / 2 comparisons.
4. A cell is the mean over the prompts ± their standard deviation (and the mean's standard error).

--output_dir gets table2.md, table3.md, summary.csv, tradeoff.png, and for each model images/ and
scores/METRIC.csv. Only what is missing or out of date is computed: a killed call goes on, several
may share the folder, one judge a GPU. (A judge's code is not looked at: delete its CSV yourself.)
"""

import csv
import hashlib
import itertools
import json
import os
import re
import time
from collections import namedtuple
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock

from parts import common, diversity, weights
from parts.common import UserError
from parts.flags import build_parser, check_ranges
from parts.images import list_images, read_image, to_pixels
from parts.judges import JUDGES, load_judge
from parts.model import load_pipeline, load_policy, policy_file, say_cut
from sample import generate, seed_of

# metric: title and which is better, GB of weights; what the paper prints: docs/paper.csv
TABLE2 = {
    "clipscore": ("CLIPScore ↑", 3.9),
    "vqascore": ("VQAScore ↑", 22.9),
    "aesthetic": ("Aesthetic ↑", 1.7),
    "imagereward": ("ImageReward ↑", 1.8),
    "pickscore": ("PickScore ↑", 3.9),
    "hps": ("HPS v2 ↑", 2.0),
}
TABLE3 = {
    "clip_i": ("CLIPScore image-image ↓", 3.9),
    "entropy_1d": ("Entropy 1D ↑", 0),
    "entropy_2d": ("Entropy 2D ↑", 0),
    "lpips": ("LPIPS ↑", 0.24),
    "rmse": ("RMSE ↑", 0),
    "psnr": ("PSNR ↓", 0),
    "ssim": ("SSIM ↓", 0),
    "fsim": ("FSIM ↓", 0),
}
# flag: (default, its range, what it is)
FLAGS = {
    "prompts": ("", None, "a file, or hpdv2, which is SD1.5's default (else those held out)"),
    "num_prompts": (0, "[0, inf)", "the first so many of them; 0: all"),
    "images_per_prompt": (0, "[0, 100]", "K; 0: what is there, or 4"),
    "model": ("auto", None, "that LoRA files belong to: auto, toy, a folder, file or hub id"),
    "weights": ("", None, "a folder of the metrics' weights (and HPDv2), not the hub"),
    "num_inference_steps": (0, "[0, 500]", "DDIM steps; 0: the run's, or 20"),
    "guidance_scale": (0.0, "[0, inf)", "1: none; 0: the run's, or 5"),
    "batch_size": (16, "[1, inf)", "images painted at once"),
    "skip_bad": (False, None, "leave out files that are no whole images"),
    "device": ("auto", None, "auto, cpu, cuda, cuda:1"),
    "output_dir": ("out/evaluation", None, "of tables, images and scores"),
}

Summary = namedtuple("Summary", "mean sd se prompts left_out")  # of a metric, over the prompts


@dataclass
class Row:  # a line of the tables
    source: str  # what the user named: a run, a LoRA file, a model or a folder of images
    model: str  # that paints, a folder or a hub id: the source itself, if it is the original
    run: dict  # config.json of a run of train.py
    label: str = None
    folder: str = None  # of its scores
    files: dict = None  # (p, k) -> path of image k of prompt p
    bad_files: int = 0
    stamp: str = None  # tells these images and prompts from others
    scores: dict = None  # metric -> Summary


def main():
    start, args = time.time(), parse_args()
    rows = find_rows(args)  # the originals first, if any
    metrics, prompts = choose_metrics(args, rows), choose_prompts(args, rows)
    for row in rows:
        if not row.model:
            find_images(row, prompts, args)  # before anything is painted
    for row in rows:
        common.make_folder(f"{row.folder}/scores")
        if row.model:
            with FileLock(f"{row.folder}/.lock"):  # another judge's call finds all painted
                paint_missing(row, prompts, choose_sampler(args, rows), args)
        row.stamp = f"# of images {digest(row.files.values(), [*row.files, prompts])}"
    not_run = {}  # metric -> why
    for name in metrics:
        try:
            score(rows, name, prompts, args)
        except UserError as error:  # such as weights that are not here
            if name in args.judges + args.metrics:
                raise
            not_run[name] = str(error)  # its cells will say so
    with FileLock(f"{args.output_dir}/.lock"):  # or tables of fewer columns might come last
        write_tables(rows, args.output_dir, not_run)
    print(f"In {args.output_dir}: tables, summary.csv, images, scores; with a judge tradeoff.png")
    peak = common.peak_gb(args.device) or np.nan
    print(f"{time.time() - start:.0f} s, peak memory {peak:.2f} GB")


def parse_args():
    parser = build_parser(FLAGS, __doc__)
    parser.add_argument("targets", nargs="*", help="runs, LoRA files, models, folders of images")
    for flag, known in (("--judges", JUDGES), ("--metrics", TABLE3)):
        parser.add_argument(flag, nargs="+", default=[], choices=[*known, "none"])
    args = parser.parse_args()
    check_ranges(FLAGS, args)
    if not args.targets:
        raise UserError("nothing to score: give a run, a LoRA file, a model or a folder of images")
    args.device = common.pick_device(args.device)
    return args


def find_rows(args):
    """The lines of the tables: the originals of all models, then what is asked for."""
    asked = [find_row(target, args.model) for target in args.targets]
    originals = [Row(row.model, row.model, row.run) for row in asked if row.model]
    rows = {}
    for row in originals + asked:
        name = os.path.basename(row.source).removesuffix(".safetensors")
        row.label = f"{name} (original)" if row.source == row.model else name
        row.folder = f"{args.output_dir}/{name}"
        if rows.setdefault(name, row).source != row.source:  # the first of that name stays
            raise UserError(f"two things to score are both called {name}: rename one folder")
    return list(rows.values())


def find_row(target, model):
    """What the user named. model: that a LoRA belongs to if its folder does not say."""
    source = real_path(target)
    # owner/name, owner/name@revision; but out/name is a run that is not there
    is_hub_id = re.fullmatch(r"(?!out/)\w[\w.-]*/[\w.-]+(@\S+)?", source)
    if (is_hub_id and not os.path.exists(source)) or os.path.exists(f"{source}/model_index.json"):
        return Row(source, source, {})
    if policy_file(source):
        run = weights.read_config(source) if os.path.exists(f"{source}/config.json") else {}
        return Row(source, real_path(run.get("args", {}).get("model", model)), run)
    if list_images(source)[0]:
        return Row(source, None, {})
    raise UserError(f"nothing to score at {target!r}: give a run with a LoRA, a model or P_K.png")


def real_path(model):
    where, _ = weights.resolve_model(model)
    return os.path.realpath(where) if os.path.isdir(where) else where


def choose_metrics(args, rows):
    """Names. For a model whose train.json names a judge: that, and what needs no weights."""
    own = weights.read_train_json(rows[0].source).get("judge")
    judges = args.judges or ([own] if own else TABLE2)
    metrics = args.metrics or [name for name in TABLE3 if not own or not TABLE3[name][1]]
    return [name for name in (*judges, *metrics) if name != "none"]


def choose_prompts(args, rows):
    """Those of --prompts, or of the rows, which must agree on them."""
    path = args.prompts
    if path == "hpdv2" or (weights.is_sd15_id(rows[0].model) and not path):  # SPO trains on others
        path = weights.find("ymhao/HPDv2", "test.json", args.weights, "dataset")
    own = [own_prompts(row) for row in rows]
    prompts = common.read_prompts(path) if path else max(own, key=len)
    for row, theirs in zip(rows, own):
        if theirs not in ([], prompts) and not (path and row.model):
            raise UserError(f"{row.label} has other prompts than those in use: say --prompts FILE")
    if rows[0].model and not prompts:
        raise UserError("which prompts? Say --prompts FILE, or hpdv2")
    return prompts[: args.num_prompts or None]


def own_prompts(row):
    """Prompts that the policy was not trained on."""
    path = weights.find_prompts(row.model or row.source)
    prompts = common.read_prompts(path, numbered=not row.model) if path else []
    if not row.model:
        return prompts
    count = weights.read_train_json(row.model).get("num_eval_prompts", 32)
    return row.run.get("held_out") or common.hold_out(prompts, count)[1]


def choose_sampler(args, rows):
    """What flags say, or else the (first) run: the same for all rows."""
    sampler = {"num_inference_steps": 20, "guidance_scale": 5.0}
    run = next((row.run["args"] for row in rows if "args" in row.run), sampler)
    return {name: getattr(args, name) or run[name] for name in sampler}


def find_images(row, prompts, args):
    """Sets row.files to the first K images of every prompt. If K is 0, the first folder says it."""
    found, strange = list_images(row.source)
    count = len(prompts) or max(found) + 1
    if len(found) > count and not args.num_prompts:
        raise UserError(f"{row.source} has images of {len(found)} prompts, but there are {count}")
    K = args.images_per_prompt = args.images_per_prompt or max(map(len, found.values()))
    row.files = {}
    bad = [f"{path} is not named P_K.png" for path in strange]
    for p in range(count):
        images = sorted(found.get(p, {}).items())[:K]
        if len(images) < K:
            raise UserError(f"{row.source} has {len(images)} of {K} images {p}_K.png, from 0_K on")
        for k, path in images:
            try:
                read_image(path)
                row.files[p, k] = path
            except UserError as error:
                bad.append(error)
    row.bad_files = len(bad)
    if bad and not args.skip_bad:
        raise UserError(f"{len(bad)} bad files (--skip_bad leaves them out): {bad[0]}")


def paint_missing(row, prompts, sampler, args):
    """Sets row.files, and paints those that are not there: DDIM, eta 0."""
    args.images_per_prompt = args.images_per_prompt or 4
    check_settings(row, prompts, sampler)
    common.make_folder(f"{row.folder}/images")
    numbers = itertools.product(range(len(prompts)), range(args.images_per_prompt))
    row.files = {(p, k): f"{row.folder}/images/{p:05d}_{k}.png" for p, k in numbers}
    missing = [key for key, path in row.files.items() if not os.path.exists(path)]
    if not missing:
        return  # and load nothing
    dtype = torch.float32 if args.device == "cpu" else torch.float16
    pipe = load_pipeline(row.model, args.device, dtype)
    say_cut(pipe, prompts)
    if row.source != row.model:
        load_policy(pipe.unet, row.source)
    title = f"painting {row.label}"
    with common.progress_bar(total=len(missing), unit="images", desc=title) as bar:
        for start in range(0, len(missing), args.batch_size):
            batch = missing[start : start + args.batch_size]
            captions = [prompts[p] for p, _ in batch]
            seeds = [seed_of(*key) for key in batch]
            options = dict(batch_size=len(batch), progress=bar.update)
            images = generate(pipe, captions, seeds, *sampler.values(), **options)
            for key, image in zip(batch, images):
                common.write_png(common.to_pil(image), row.files[key])


def check_settings(row, prompts, sampler):
    """Raises UserError if the images that are there were painted with other settings."""
    unet = sorted(Path(row.model).glob("unet/*.safetensors"))  # none: a hub id
    files = filter(None, [policy_file(row.source), *unet])
    settings = {"weights": digest(files, row.model), **sampler, "prompts": prompts}
    path = Path(row.folder, "settings.json")
    if not path.exists():  # before the first image, so that there is none without it
        common.write_file(path, json.dumps(settings))
    painted = common.read_json(path, "take another --output_dir")
    other = ", ".join(name for name in settings if painted[name] != settings[name])
    if other:
        raise UserError(f"{row.folder} has images of other {other}: take another --output_dir")


def digest(paths, more):
    """Of the bytes of some files, and of what repr says of more."""
    total = hashlib.sha256(repr(more).encode())
    for path in paths:
        with open(path, "rb") as file:  # gigabytes of it, perhaps, and never in memory at once
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()[:16]


def score(rows, name, prompts, args):
    """Writes scores/<name>.csv of every row where it is not there, or belongs to other images."""
    place = args.weights if name not in TABLE3 or TABLE3[name][1] else ""
    metric, least = None, diversity.LEAST.get(name, 1)
    for row in rows:
        path, stamp = Path(row.folder, f"scores/{name}.csv"), f"{row.stamp}, weights {place!r}\n"
        if read_scores(path, stamp):
            continue
        metric = metric or load_metric(name, prompts, args)  # once, and only if it is needed
        lines = []
        with common.progress_bar(iterable=row.files, desc=f"{name} of {row.label}") as bar:
            for p, keys in itertools.groupby(bar, lambda key: key[0]):
                images = {}  # of one prompt: k -> uint8 (H, W, 3)
                for _, k in keys:
                    images[k] = torch.as_tensor(read_image(row.files[p, k]), device=args.device)
                sizes = {image.shape[:2] for image in images.values()}
                if len(sizes) > 1 or min(min(sizes)) < least:
                    what = f"{name} needs images of one size, of {least} pixels at least"
                    raise UserError(f"{row.label}: {what}: not so for prompt {p}")
                columns = measure(name, metric, images, prompts[p] if prompts else "")
                lines += [(p, *line) for line in zip(*columns.values())]
        if not lines:
            raise UserError(f"{name} compares the images of a prompt, and needs two of them")
        table = common.csv_text(["prompt_index", *columns], lines)
        common.write_file(path, f"{stamp}# checksum {digest([], table)}\n{table}")


def read_scores(path, stamp):
    """{column: its values, as text} of a whole score file that begins with that stamp, or {}."""
    text = path.read_text("utf-8", errors="replace") if path.exists() else ""
    _, _, below = text.partition("\n")
    checksum, _, table = below.partition("\n")
    if not text.startswith(stamp) or checksum != f"# checksum {digest([], table)}":
        return {}
    return {name: values for name, *values in zip(*csv.reader(table.splitlines()))}


def load_metric(name, prompts, args):
    """The judge of Table 2 called name, or (prepare, compare) of a metric of Table 3."""
    if name in TABLE3:
        return diversity.load_metric(name, args.device, args.weights)
    if not prompts and getattr(JUDGES[name], "reads_prompt", True):
        raise UserError(f"{name} needs the prompts: --prompts FILE, or prompts.txt beside images")
    return load_judge(name, args.device, args.weights)


def measure(name, metric, images, prompt):
    """{column: values} of a prompt's images {k: uint8 (H, W, 3)}; "images" holds k, or "i j"."""
    if name in TABLE3:
        prepare, compare = metric
        values = {k: prepare(image) for k, image in images.items()}  # what takes long
        if compare:
            twos = itertools.combinations(values.items(), 2)
            values = {f"{i} {j}": float(compare(a, b)) for (i, a), (j, b) in twos}
        return {"images": list(values), name: list(values.values())}
    pixels = to_pixels(images.values())
    text = metric.encode([prompt])[[0] * len(images)]  # a row an image
    columns = {"images": torch.tensor(list(images)), name: metric(pixels, text)}
    if prompt and hasattr(metric, "report"):
        columns |= metric.report(pixels, [prompt] * len(images))
    return {column: values.tolist() for column, values in columns.items()}


def write_tables(rows, output_dir, not_run):
    """table2.md, table3.md, summary.csv and tradeoff.png, of all score files that fit."""
    own, lines = {}, []
    for row in rows:
        row.scores = {}
        for path in sorted(Path(row.folder).glob("scores/*.csv")):
            columns = read_scores(path, row.stamp)
            for name in list(columns)[2:]:  # after prompt_index and images
                row.scores[name] = summarise(columns["prompt_index"], columns[name])
                lines.append([row.label, name, *row.scores[name]])
                if name not in TABLE2 | TABLE3:  # a judge of a fork, or what it reports
                    own[name] = (f"{name} ↑", 0)
    table2 = own | TABLE2
    for number, flag, columns in ((2, "--judges", table2), (3, "--metrics", TABLE3)):
        table = make_table(columns, rows, flag, not_run)
        common.write_file(f"{output_dir}/table{number}.md", table)
        print(f"\n### Table {number}\n\n{table}")
    common.write_csv(f"{output_dir}/summary.csv", ["model", "metric", *Summary._fields], lines)
    draw_tradeoff(f"{output_dir}/tradeoff.png", table2, rows)


def summarise(prompts, values):
    """The Summary of two columns of text: statistics over the prompts' means."""
    prompts, values = np.array(prompts), np.array(values, dtype=float)
    finite = np.isfinite(values)  # not so: FSIM of a black image, PSNR of identical ones
    means = [values[finite & (prompts == p)].mean() for p in np.unique(prompts[finite])]  # step 3
    count = len(means)
    mean = np.mean(means) if means else np.nan
    sd = np.std(means, ddof=1) if count > 1 else np.nan  # step 4
    return Summary(mean, sd, sd / np.sqrt(count), count, np.sum(~finite))


def make_table(columns, rows, flag, not_run):
    """Markdown: a line a row, the best of a column in bold; below it, what was not run and why."""
    labels = [row.label for row in rows]
    paper = read_paper()
    grid = [["model", *labels, *paper["clipscore"]]]  # column by column
    notes = [f"- {row.label}: {row.bad_files} bad files skipped" for row in rows if row.bad_files]
    for name, (title, size) in columns.items():
        found = {row.label: row.scores[name] for row in rows if name in row.scores}
        means = [summary.mean for summary in found.values() if summary.prompts]
        better = max if title.endswith("↑") else min
        best = better(means) if len(means) > 1 else None  # one row is no contest
        cells = dict.fromkeys(labels, "not run")
        for label, (mean, sd, se, _, left_out) in found.items():
            bold = "**" if mean == best else ""
            cells[label] = f"{bold}{mean:#.4g} ± {sd:#.2g}{bold} ({se:#.2g})"
            if left_out:
                notes.append(f"- {name} of {label}: {left_out} values nan or inf, left out")
        if len(found) < len(rows):
            default = f"not asked for: {flag} {name}" + f", {size} GB of weights" * (size > 0)
            notes.append(f"- {name}: {not_run.get(name, default)}")
        theirs = paper.get(name, dict.fromkeys(paper["clipscore"], "-"))
        grid.append([title, *cells.values(), *theirs.values()])
    lines = list(zip(*grid))
    if not any(is_sd15(row.model) for row in rows):
        lines = lines[: 1 + len(rows)]  # the paper's rows tell nothing about other models
    return "\n".join([common.markdown(lines), *notes, ""])


def read_paper():
    """{metric: {"paper: model": cell}}, with the bold that the paper prints."""
    paper = {}
    with open(Path(__file__).with_name("docs") / "paper.csv", newline="") as file:
        for line in csv.DictReader(file):
            cell = f"{line['mean']} ± {line['sd']}"
            cell = f"**{cell}**" if line["best"] else cell
            paper.setdefault(line["metric"], {})[f"paper: {line['model']}"] = cell
    return paper


def is_sd15(model):
    if not os.path.isdir(model or ""):  # a hub id, or None: images of any model
        return model is None or weights.is_sd15_id(model)
    unet = common.read_json(f"{model}/unet/config.json", "give a diffusers folder")
    return (unet.get("sample_size", 64), unet.get("cross_attention_dim")) == (64, 768)


def draw_tradeoff(path, columns, rows):
    """Alignment against diversity: a panel a judge, a point a row, bars of one standard error."""
    from matplotlib.figure import Figure

    complete = set.intersection(*[set(row.scores) for row in rows])
    judges = [name for name in columns if name in complete]
    across = "lpips" if "lpips" in complete else "rmse"
    if across not in complete or not judges:
        return  # nothing to draw
    figure = Figure((4.6 * len(judges), 3.8), layout="constrained")
    for judge, axes in zip(judges, figure.subplots(1, len(judges), squeeze=False)[0]):
        axes.set(xlabel=f"{TABLE3[across][0]} (diversity)", ylabel=columns[judge][0])
        for row in rows:
            x, y = row.scores[across], row.scores[judge]
            axes.errorbar(x.mean, y.mean, y.se, x.se, fmt="o", label=row.label)
    figure.axes[0].legend(loc="lower left")  # alignment costs diversity: that corner is free
    common.save_figure(figure, path)


if __name__ == "__main__":
    common.run_cli(main)
