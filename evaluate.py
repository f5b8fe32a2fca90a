"""How a policy is measured: do people like its images (Table 2), and do the images vary (Table 3)?

    python evaluate.py out/toy-js                a run and its original: both tables, a trade-off
    python evaluate.py out/sd-js out/sd-rkl --judges pickscore hps     more judges can follow later
    python evaluate.py lora.safetensors --model DIR     a LoRA file, of a folder, a hub id or "toy"
    python evaluate.py my_images --prompts prompts.txt  images of any other method: P_K.png,
                                       P/K.png or P.png, image K (from 0) of prompt P (from 0)

The protocol, as far as the paper states it:
1. Every model paints K images of every held-out prompt, with seeds that all models share.
2. A judge scores an image, an entropy too; other metrics compare the K (K - 1) / 2 pairs of images
   of a prompt.
3. The value of a prompt is the mean over its images or pairs.
4. A cell is the mean over the prompts ± their standard deviation (and the mean's standard error).

--output_dir gets table2.md, table3.md, summary.csv, tradeoff.png, and for each model images/ and
scores/METRIC.csv, a row an image or a pair. What is there is not computed again, unless what it
depends on has changed. So a call that was killed goes on, and several may share the folder, one
judge a GPU. (The code of a judge is not looked at: when you change yours, delete its CSV.)
"""

import argparse
import csv
import hashlib
import io
import itertools
import json
import math
import os
import time
from collections import defaultdict
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from parts import diversity
from parts.common import (
    Parser,
    UserError,
    hold_out,
    make_folder,
    peak_gb,
    pick_device,
    progress_bar,
    read_prompts,
    run_cli,
    save_figure,
    to_pil,
    write_file,
    write_png,
)
from parts.images import list_images, read_image
from parts.judges import JUDGES, load_judge
from parts.model import load_pipeline, load_policy, policy_file
from parts.weights import (
    SD15,
    find_hpdv2_prompts,
    find_prompts,
    read_config,
    read_train_json,
    resolve_model,
)
from sample import generate, seed_of

# name: title, which is better, digits, GB of weights, SD v1.5 in the paper (mean ± sd)
TABLE2 = {
    "clipscore": ("CLIPScore", "↑", 3, 3.9, "0.352 ± 0.049"),
    "vqascore": ("VQAScore", "↑", 3, 22.9, "0.601 ± 0.243"),
    "aesthetic": ("Aesthetic", "↑", 3, 1.7, "5.648 ± 0.526"),
    "imagereward": ("ImageReward", "↑", 3, 1.8, "0.173 ± 1.011"),
    "pickscore": ("PickScore", "↑", 3, 3.9, "20.908 ± 1.228"),
    "hps": ("HPS v2", "↑", 3, 2.0, "26.933 ± 1.454"),
}
TABLE3 = {
    "clip_i": ("CLIPScore image-image", "↓", 3, 3.9, "0.7994 ± 0.0842"),
    "entropy_1d": ("Entropy 1D", "↑", 2, 0, "7.2547 ± 0.6230"),
    "entropy_2d": ("Entropy 2D", "↑", 2, 0, "14.0615 ± 1.3478"),
    "lpips": ("LPIPS", "↑", 3, 0.24, "0.6306 ± 0.0707"),
    "rmse": ("RMSE", "↑", 4, 0, "0.0202 ± 0.0043"),
    "psnr": ("PSNR", "↓", 2, 0, "34.0374 ± 1.8413"),
    "ssim": ("SSIM", "↓", 3, 0, "0.7344 ± 0.0858"),
    "fsim": ("FSIM", "↓", 3, 0, "0.2942 ± 0.0307"),
}


@dataclass
class Row:
    """A line of the tables: a model, or a folder of images."""

    label: str
    model: str = None  # a folder or a hub id. None: the images come from elsewhere
    policy: str = None  # a run's folder, or a LoRA file. None: the model as it is
    run: dict = field(default=None, compare=False)  # config.json of a run of train.py
    images: str = None  # the folder of its images
    folder: str = None  # of its scores, in --output_dir
    files: dict = field(default_factory=dict)  # (p, k) -> path of image k of prompt p, sorted
    stamp: str = None  # tells these images and their prompts from others
    summaries: dict = field(default_factory=dict)  # name of a metric -> Summary
    bad_files: int = 0

    @property
    def title(self):
        return self.label if self.policy or not self.model else f"{self.label} (original)"


def main():
    args, start = parse_args(), time.time()
    device = pick_device(args.device)
    rows = find_rows(args)
    judges, metrics = choose_metrics(args, rows)
    prompts = choose_prompts(args, rows)
    for row in rows:
        if not row.model:  # before anything is painted
            find_images(row, prompts, args)
    for row in rows:
        make_folder(f"{row.folder}/scores")
        if row.model:
            paint(row, prompts, choose_sampler(args, rows), args, device)
        row.stamp = f"# images {digest(row.files.values(), (list(row.files), prompts))}"
    not_run = {}  # name -> why
    for name in judges + metrics:
        try:
            score(rows, name, prompts, args.weights, device)
        except UserError as error:  # weights that are not here, or images that it cannot take
            not_run[name] = str(error)
    write_tables(rows, args, not_run)
    print(f"{time.time() - start:.0f} s, peak memory {peak_gb(device) or math.nan:.2f} GB")
    for name in (args.judges or []) + (args.metrics or []):
        if name in not_run:
            raise UserError(f"{name} was asked for, but not run: {not_run[name]}")


# --------------------------------------------------------------------------------------------------
# What is asked for


def parse_args():
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("targets", nargs="+", help="runs, LoRA files, models, folders of images")
    p.add_argument("--judges", nargs="+", choices=[*JUDGES, "none"], help="(default: all six)")
    p.add_argument("--metrics", nargs="+", choices=[*TABLE3, "none"], help="(default: all eight)")
    p.add_argument("--prompts", help="a file, or hpdv2 (default: what was held out of a run)")
    p.add_argument("--num_prompts", type=at_least_1, help="the first so many of them")
    p.add_argument("--images_per_prompt", type=at_least_1, help="K (default: 4, or what is there)")
    p.add_argument("--model", default="auto", help="that LoRA files belong to (default: auto)")
    p.add_argument("--weights", help="a folder of weights, in place of the hub (parts/weights.py)")
    p.add_argument("--num_inference_steps", type=at_least_1, help="(default: the run's, or 20)")
    p.add_argument("--guidance_scale", type=float, help="(default: the run's, or 5)")
    p.add_argument("--batch_size", type=at_least_1, default=16, help="images painted at once")
    p.add_argument("--skip_bad", action="store_true", help="leave out files that are no images")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1")
    p.add_argument("--output_dir", default="out/evaluation", help="(default: out/evaluation)")
    return p.parse_args()


def at_least_1(text):
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


def find_rows(args):
    """The lines of the tables: the originals of all models, then what is asked for."""
    asked = [find_row(target, args.model) for target in args.targets]
    originals = [Row(os.path.basename(r.model), r.model, run=r.run) for r in asked if r.model]
    rows = {}
    for row in originals + asked:
        row.folder = f"{args.output_dir}/{row.label}"
        row.images = row.images or f"{row.folder}/images"
        if rows.setdefault(row.label, row) != row:
            raise UserError(f"two things to score are both called {row.label}: rename one folder")
    return list(rows.values())


def find_row(target, model):
    """What the user named. model: that a LoRA belongs to if its folder does not say."""
    path, run = os.path.abspath(target), None
    label = os.path.basename(path).removesuffix(".safetensors")
    is_hub_id = target.count("/") == 1 and not target.startswith((".", "/", "~", "out/"))
    named = not os.path.exists(path) and (target in ("toy", "auto") or is_hub_id)
    if named or os.path.exists(f"{path}/model_index.json"):
        model = find_model(target)
        return Row(os.path.basename(model), model)
    if os.path.exists(f"{path}/config.json"):
        run = read_config(path)
        if "args" not in run or not policy_file(path):
            raise UserError(f"{target!r} is no run of train.py that holds a LoRA or a UNet")
        model = run["args"]["model"]
    if policy_file(path):
        return Row(label, find_model(model), path, run)
    if os.path.isdir(path) and list_images(path)[0]:
        return Row(label, images=path)
    why = f"nothing to score at {target!r}: give a run's folder, a LoRA, a model, or images"
    raise UserError(f"{why} P_K.png, P/K.png or P.png, P the line of the prompt from 0")


def find_model(model):
    where, _ = resolve_model(model)
    return os.path.realpath(where) if os.path.isdir(where) else where


def choose_metrics(args, rows):
    """(judges, metrics). A model whose train.json names a judge has it, and no need of weights."""
    own = {read_train_json(row.model).get("judge") for row in rows if row.model} - {None}
    free = [name for name in TABLE3 if not TABLE3[name][3]]
    judges = args.judges or own or TABLE2
    metrics = args.metrics or (free if own else TABLE3)
    return [[name for name in names if name != "none"] for names in (judges, metrics)]


def choose_prompts(args, rows):
    if args.prompts:
        hpdv2 = args.prompts == "hpdv2"
        prompts = read_prompts(find_hpdv2_prompts(args.weights) if hpdv2 else args.prompts)
    else:
        lists = {tuple(own_prompts(row, args.weights)) for row in rows} - {()}
        if len(lists) > 1 or rows[0].model and not lists:
            raise UserError("which prompts? Those of runs, models or folders differ: --prompts")
        prompts = list(lists.pop()) if lists else []
    return prompts[: args.num_prompts]


def own_prompts(row, weights):
    """Prompts that the policy was not trained on."""
    if row.model == SD15:  # SPO trains on others, and the paper evaluates on these
        return read_prompts(find_hpdv2_prompts(weights))
    if row.run:
        return row.run.get("held_out", [])
    path = find_prompts(row.model) if row.model else f"{row.images}/prompts.txt"
    prompts = read_prompts(path) if path and os.path.exists(path) else []
    if not row.model:
        return prompts
    return hold_out(prompts, read_train_json(row.model).get("num_eval_prompts", 32))[1]


def choose_sampler(args, rows):
    """The settings of the run, where no flag says others."""
    runs = [row.run["args"] for row in rows if row.run]
    sampler = {"num_inference_steps": 20, "guidance_scale": 5.0}
    for settings in [*runs, vars(args)]:
        sampler |= {name: settings[name] for name in sampler if settings.get(name) is not None}
    return sampler


# --------------------------------------------------------------------------------------------------
# Images


def find_images(row, prompts, args):
    """Sets row.files to the first K images of every prompt, having read them all."""
    check_prompts(row, prompts)
    found, bad = list_images(row.images)
    count = len(prompts) or max(found) + 1
    if max(found) >= count and not args.num_prompts:
        why = f"{row.images} has images of prompt {max(found)}, but there are {count} prompts"
        raise UserError(f"{why}, counted from 0: give the prompts they were made from")
    # where nobody says how many, the first folder does
    args.images_per_prompt = args.images_per_prompt or max(map(len, found.values()))
    for p in range(count):
        images = sorted(found.get(p, {}).items())
        if len(images) < args.images_per_prompt:
            why = f"prompt {p} has {len(images)} images, not {args.images_per_prompt}"
            raise UserError(f"{row.images}: {why}: add some, or say --images_per_prompt")
        for k, path in images[: args.images_per_prompt]:
            try:
                read_image(path)
                row.files[p, k] = path
            except UserError:
                bad.append(path)
    row.bad_files = len(bad)
    if bad and not (args.skip_bad and row.files):
        why = f"{row.images}: {len(bad)} files are not whole images P_K.png, such as {bad[0]}"
        raise UserError(f"{why}: mend them, or --skip_bad")


def check_prompts(row, prompts):
    """Raises UserError if the images were made from other prompts. Returns how many these were."""
    path = f"{row.images}/prompts.txt"
    theirs = read_prompts(path) if os.path.exists(path) else []
    for p, (there, here) in enumerate(zip(theirs, prompts)):
        if there != here:
            why = f"{path} does not match the prompts in use: prompt {p} is {there!r} there"
            raise UserError(f"{why}, {here!r} here: change --prompts, or --output_dir")
    return len(theirs)


def paint(row, prompts, sampler, args, device):
    """Sets row.files, and paints those that are not there, each whole or not at all."""
    args.images_per_prompt = args.images_per_prompt or 4
    check_settings(row, sampler)
    make_folder(row.images)
    if check_prompts(row, prompts) < len(prompts):
        write_file(f"{row.images}/prompts.txt", "\n".join(prompts))
    for p, k in itertools.product(range(len(prompts)), range(args.images_per_prompt)):
        row.files[p, k] = f"{row.images}/{p:05d}_{k}.png"
    missing = [key for key, path in row.files.items() if not os.path.exists(path)]
    if not missing:
        return
    pipe = load_pipeline(row.model, device, torch.float32 if device == "cpu" else torch.float16)
    if row.policy:
        load_policy(pipe.unet, row.policy)
    with progress_bar(total=len(missing), unit="image", desc=f"painting {row.label}") as bar:
        for start in range(0, len(missing), args.batch_size):
            batch = missing[start : start + args.batch_size]
            captions = [prompts[p] for p, _ in batch]
            seeds = [seed_of(p, k) for p, k in batch]
            images = generate(pipe, captions, seeds, *sampler.values(), progress=bar.update)
            for key, image in zip(batch, images):
                write_png(to_pil(image), row.files[key])


def check_settings(row, sampler):
    """What images depend on besides prompt and seed is written down before the first is painted.

    Raises UserError if those that are there were painted with other settings.
    """
    unet = sorted(Path(row.model).glob("unet/*.safetensors"))  # none: a hub id
    policy = [policy_file(row.policy)] if row.policy else []
    settings = {"weights": digest(unet + policy, None if unet else row.model), **sampler}
    path = Path(row.folder, "settings.json")
    if not path.exists():
        write_file(path, json.dumps(settings))
    other = dict(json.loads(path.read_text()).items() - settings.items())
    if other:
        why = f"{row.images} was painted with other settings ({other}, not {settings})"
        raise UserError(f"{why}: give another --output_dir, or delete {row.folder}")


def digest(paths, more=None):
    """Of the bytes of some files, and of what repr says of more."""
    total = hashlib.sha256(repr(more).encode())
    for path in paths:
        with open(path, "rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()[:16]


# --------------------------------------------------------------------------------------------------
# Scores: a file a model and a metric, written when the metric is finished


def score(rows, name, prompts, weights, device):
    """Writes scores/<name>.csv of every row where it is not there, or belongs to other images."""
    needs_weights = name not in TABLE3 or TABLE3[name][3]
    place = f", weights {os.path.abspath(weights) if weights and needs_weights else None}\n"
    todo = [row for row in rows if not read_scores(row, name, place)]
    if not todo:
        return
    metric = load_metric(name, prompts, device, weights)
    for row in todo:
        table, columns = [], {}
        with progress_bar(total=len(row.files), unit="image", desc=f"{name}: {row.label}") as bar:
            for p, keys in itertools.groupby(row.files, itemgetter(0)):
                images = {k: torch.from_numpy(read_image(row.files[p, k])) for _, k in keys}
                check_sizes(name, row.images, p, images)
                columns = measure(name, metric, p, images, prompts, device)
                table += zip(itertools.repeat(p), *columns.values())
                bar.update(len(images))
        if not table:
            raise UserError(f"{name} compares the images of a prompt, and needs two of them")
        write_csv(score_path(row, name), [["prompt_index", *columns], *table], row.stamp + place)


def read_scores(row, name, place=""):
    """[{column: text}] of a score file of these images (and of weights from that place), or []."""
    path = f"{row.folder}/scores/{name}.csv"
    if not os.path.exists(path):
        return []
    with open(path, encoding="utf-8", newline="") as file:
        fits = file.readline().startswith(row.stamp + place)
        return list(csv.DictReader(file)) if fits else []


def write_csv(path, table, first_line=""):
    text = io.StringIO()
    text.write(first_line)
    csv.writer(text, lineterminator="\n").writerows(table)
    write_file(path, text.getvalue())


def load_metric(name, prompts, device, weights):
    """(judge, text) of Table 2's; of Table 3's (prepare, compare): what is computed once an image,
    and once a pair of prepared images."""
    if name not in TABLE3:
        if not prompts and getattr(JUDGES[name], "reads_prompt", True):
            raise UserError(
                f"{name} needs the prompts: --prompts FILE, or a prompts.txt beside them"
            )
        judge = load_judge(name, device, weights)
        return judge, judge.encode(prompts or [""])
    if name == "lpips":
        net = diversity.LPIPS(device, weights)
        return net.features, net.distance
    if name == "clip_i":
        judge = load_judge("clipscore", device, weights)
        return lambda image: judge.embed(to_pixels([image]))[0], torch.dot
    if name == "fsim":
        return diversity.fsim_maps, diversity.fsim_of_maps
    function = getattr(diversity, name)
    return (function, None) if name.startswith("entropy") else (torch.clone, function)


def measure(name, metric, p, images, prompts):
    """{column: values} of the images {k: uint8 (H, W, 3)} of prompt p, or of their pairs."""
    if name not in TABLE3:
        judge, text = metric
        pixels = to_pixels(images.values())
        text_of_p = text[[p if prompts else 0] * len(images)]
        columns = {name: judge(pixels, text_of_p)}
        if prompts and hasattr(judge, "report"):
            columns |= judge.report(pixels, [prompts[p]] * len(images))
        return {"image": images} | {key: values.tolist() for key, values in columns.items()}
    prepare, compare = metric
    ready = {k: prepare(image) for k, image in images.items()}
    if compare is None:
        return {"image": ready, name: ready.values()}
    pairs = list(itertools.combinations(ready, 2))
    values = [float(compare(ready[i], ready[j])) for i, j in pairs]
    return {"image_1": [i for i, _ in pairs], "image_2": [j for _, j in pairs], name: values}


def to_pixels(images):
    """uint8 (H, W, 3) each -> (N, 3, H, W) in [0, 1]."""
    return torch.stack(list(images)).permute(0, 3, 1, 2).float() / 255


# --------------------------------------------------------------------------------------------------
# Tables


class Summary(NamedTuple):
    """One metric of one row, over the prompts."""

    mean: float
    sd: float
    se: float
    prompts: int
    left_out: int  # values that are not finite: FSIM of a black image, PSNR of identical ones


def write_tables(rows, args, not_run):
    """table2.md, table3.md, summary.csv and tradeoff.png, of all score files that fit."""
    table2 = dict(TABLE2)
    for row in rows:
        for path in sorted(Path(row.folder).glob("scores/*.csv")):
            lines = read_scores(row, path.stem)
            for figure in lines[0] if lines else ():
                if figure not in ("prompt_index", "image", "image_1", "image_2"):
                    row.summaries[figure] = summarise(lines, figure)
                    if figure not in TABLE3:  # perhaps a judge of your own
                        table2.setdefault(figure, (figure, "↑", 3, 0, "-"))
    for name, (_, _, _, size, _) in (table2 | TABLE3).items():
        flag = "--metrics" if name in TABLE3 else "--judges"
        not_run.setdefault(name, f"not asked for: {flag} {name}, {size} GB of weights")
    for title, columns in (("Table 2: alignment", table2), ("Table 3: diversity", TABLE3)):
        text = make_table(columns, rows, not_run)
        write_file(f"{args.output_dir}/table{title[6]}.md", text)
        print(f"\n{title}\n\n{text}")
    table = [["model", "metric", *Summary._fields, "not_run"]]
    for row, name in itertools.product(rows, table2 | TABLE3):
        summary = row.summaries.get(name)
        values = [*summary, ""] if summary else ["", "", "", "", "", not_run[name]]
        table.append([row.label, name, *values])
    write_csv(f"{args.output_dir}/summary.csv", table)
    draw_tradeoff(f"{args.output_dir}/tradeoff.png", table2, rows)


def summarise(lines, figure):
    by_prompt, left_out = defaultdict(list), 0
    for line in lines:
        value = float(line[figure])
        if math.isfinite(value):
            by_prompt[line["prompt_index"]].append(value)
        else:
            left_out += 1
    means = [np.mean(values) for values in by_prompt.values()]
    mean = np.mean(means) if means else math.nan
    sd = np.std(means, ddof=1) if len(means) > 1 else math.nan
    return Summary(mean, sd, sd / math.sqrt(len(means) or 1), len(means), left_out)


def make_table(columns, rows, not_run):
    """Markdown: a line a row, the best of a column in bold; below it, what was not run and why."""
    grid = [["model", *[row.title for row in rows], "SD v1.5 in the paper"]]  # column by column
    notes = [f"{row.label}: {row.bad_files} bad files skipped" for row in rows if row.bad_files]
    for name, (title, arrow, digits, _, paper) in columns.items():
        found = [row.summaries[name] for row in rows if name in row.summaries]
        means = {round(summary.mean, digits) for summary in found if summary.prompts}
        best = {"↑": max, "↓": min}[arrow](means, default=None)
        cells = [f"{title} {arrow}"]
        for row in rows:
            if name not in row.summaries:
                cells.append("not run")
                continue
            mean, sd, se, _, left_out = row.summaries[name]
            cell = f"{mean:.{digits}f} ± {sd:.{digits}f}"
            if len(means) > 1 and round(mean, digits) == best:
                cell = f"**{cell}**"
            cells.append(f"{cell} ({se:.{digits}f})")
            if left_out:
                notes.append(f"{name} of {row.label}: {left_out} values nan or inf, left out")
        if len(found) < len(rows):
            notes.append(f"{name}: {not_run[name]}")
        grid.append([*cells, paper])
    lines = [f"| {' | '.join(line)} |" for line in zip(*grid)]
    lines.insert(1, "|---" * len(grid) + "|")
    if all(row.model not in (SD15, None) for row in rows):
        lines.pop()  # the paper's row tells nothing about other models
    return "\n".join([*lines, "", *[f"- {note}" for note in notes], ""])


def draw_tradeoff(path, columns, rows):
    """Alignment against diversity: a panel a judge, a point a row, bars of one standard error."""
    from matplotlib.figure import Figure

    complete = set.intersection(*[set(row.summaries) for row in rows])
    across = [name for name in ("lpips", "rmse", "entropy_1d") if name in complete]
    judges = [name for name in columns if name in complete]
    if not across or not judges:
        return
    figure = Figure(figsize=(4.6 * len(judges), 3.8), layout="constrained")
    for judge, axes in zip(judges, figure.subplots(1, len(judges), squeeze=False)[0]):
        axes.set(xlabel=f"{TABLE3[across[0]][0]} (diversity)", ylabel=columns[judge][0])
        for row in rows:
            x, y = row.summaries[across[0]], row.summaries[judge]
            axes.errorbar(x.mean, y.mean, y.se, x.se, fmt="o", capsize=3, label=row.title)
    figure.axes[0].legend()
    save_figure(figure, path)


if __name__ == "__main__":
    run_cli(main)
