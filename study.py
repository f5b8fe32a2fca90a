"""Does the divergence matter? The paper's comparison, with training seeds, in one command.

    python study.py                      the toy's whole study: 84 runs, about 9 hours of one core
    python study.py --dry_run            what would be run, for how long, in how much space
    python study.py --settings ratios --div rkl js --seeds 0 1 2      a part of it
    python study.py --model DIR -- --prompts my.txt --judge pickscore    flags of train.py after --
    python study.py --report --output_dir docs/study       tables and figure of a runs.csv, no run

A run is `train.py --eval_interval 3` in a process of its own. A finished run is never run again, a
cut one goes on by --resume: kill the study anywhere and give the same command. --output_dir gets

    runs.csv      figures of every prompt held out (a number: its place in the run's config.json).
                  div "original" is the model before training. Where f''(1) = 1, in all rows but js,
                  `matched` is `published`: such a run stands in the file once, under that name
    study.md      tables and verdicts (parts/stats.py); study.png: taste against diversity
    runs/         the runs' folders and logs; to go on elsewhere runs.csv is enough

digest stands for the code and the flags of a run. Other code is refused: run a study from a clone
of its own, so that your other work does not change it.
"""

import csv
import functools
import hashlib
import itertools
import os
import queue
import re
import subprocess
import sys
import threading
import time
from collections import defaultdict, namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock

from divergences import get_divergence
from parts import common, stats
from parts.common import UserError
from parts.flags import build_parser, check_range
from parts.run import read_evaluated
from parts.weights import TOY, find_model, read_config, read_train_json, resolve_model

# What differs between settings: flags of train.py. D: the number of a latent's dimensions, so that
# for reverse KL `ratios` is `published` without its clamp.
SETTINGS = {
    "published": "",  # SPO's: log X a mean over the latent, X clamped to [0.9, 1.1], beta 10
    "matched": "--match_curvature",
    "ratios": "--log_ratio sum --clip none --beta 10/D",  # the paper's X
    "ratios_matched": "--log_ratio sum --clip none --beta 10/D --match_curvature",
    "pairs": "--pairs PAIRS --match_curvature",  # no clamp either
}
ALPHAS = ("alpha0.2", "alpha0.4", "alpha0.6", "alpha0.8")
PAPER = ("rkl", *ALPHAS, "fkl", "js")
# What is run where no flag says otherwise, of the toy and of any other model.
TOY_PLAN = [
    (("published", "matched", "ratios", "ratios_matched"), ("rkl", "fkl", "js"), range(6)),
    (("published", "ratios"), ALPHAS, range(3)),
    (("pairs",), ("rkl", "alpha0.4", "fkl", "js"), range(3)),
]
PAPER_PLAN = [(("published",), PAPER, range(3))]
# Hours and GB a run. The toy: one core of two that are busy. SD1.5, counted and not measured: the
# rollouts and training of 40,000 prompts at 150 TFLOP/s, and 1,600 pictures for evaluate.py.
TOY_COST, SD15_COST = (0.1, 0.002), (26, 0.9)
FLAGS = {
    "model": ("auto", None, "auto, toy, a diffusers folder or a hub id"),
    "pairs": (None, None, "of the setting pairs; the toy's are made here"),
    "eval_interval": (3, "[1, inf)", "epochs between figures of the held-out prompts"),
    "jobs": (0, "[0, inf)", "runs side by side; 0: one a GPU, or two of the toy on a CPU"),
    "device": ("auto", None, "auto, cpu, cuda"),
    "dry_run": (False, None, "say what would be run, and stop"),
    "report": (False, None, "tables and figure of what is in runs.csv, no run"),
    "output_dir": ("out/study", None, "of runs.csv, study.md, study.png and the runs"),
}
HERE = Path(__file__).resolve().parent
HEADER = ("setting", "div", "seed", "epoch", "metric", "prompt", "value", "digest")
Spec = namedtuple("Spec", "setting div seed flags digest")  # of a run; flags of train.py, as text


def main():
    args = parse_args()
    table, specs = Path(args.output_dir, "runs.csv"), plan(args)
    if not args.report:
        check_digests(specs, read_rows(table))
        todo = unfinished(specs, table)
        hours, gb = TOY_COST if args.own_judge else SD15_COST
        hours, gb = hours * len(todo) / args.jobs, gb * len(todo)
        print(f"{len(specs)} runs of {args.model}, {len(specs) - len(todo)} finished. The others:")
        of = "" if args.own_judge else " of GPUs at 150 TFLOP/s (counted, not measured)"
        print(f"about {hours:.1f} hours{of}, --jobs {args.jobs}, {gb:.1f} GB in {args.output_dir}")
        if args.dry_run:
            for spec in todo:
                print("  python", *command(spec, args.device, args)[1:])
            return
        run_all(todo, table, args)
        if not args.own_judge:  # the paper's Tables 2 and 3
            folders = [folder_of(spec, args) for spec in specs if folder_of(spec, args).exists()]
            place = ["--output_dir", f"{args.output_dir}/evaluation"]
            subprocess.run([sys.executable, HERE / "evaluate.py", *folders, *place])
    settings = by_setting(read_rows(table))
    if not settings:
        raise UserError(f"no finished run in {table}")
    missing = defaultdict(list)
    for spec in unfinished(specs, table):
        missing[f"{spec.setting} {spec.div}"].append(spec.seed)
    seeds = ", ".join(f"{row} ({' '.join(seeds)})" for row, seeds in missing.items())
    note = f"Missing, of {len(specs)} runs, are the seeds {seeds}.\n" if missing else ""
    text = stats.report(settings, SETTINGS, note)
    common.write_file(f"{args.output_dir}/study.md", text)
    draw(settings, f"{args.output_dir}/study.png")
    print(f"{text}\nIn {args.output_dir}: runs.csv, study.md, study.png")
    if missing and not args.report:
        sys.exit(1)


def parse_args():
    words = sys.argv[1:]
    end = words.index("--") if "--" in words else len(words)
    parser = build_parser(FLAGS, __doc__)
    known = f"{', '.join(SETTINGS)}; with this flag or the next two: published"
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, help=known)
    parser.add_argument("--div", nargs="+", help=f"of {', '.join(PAPER)} and your own; all seven")
    parser.add_argument("--seeds", nargs="+", type=int, help="0 1 2")
    args = parser.parse_args(words[:end])
    for name, (_, allowed, _) in FLAGS.items():
        check_range(name, getattr(args, name), allowed)
    args.extra = words[end + 1 :]  # flags of train.py
    where, _ = resolve_model(args.model)
    args.model = "toy" if where == TOY else where
    args.own_judge = "judge" in read_train_json(where)
    args.gpus = torch.cuda.device_count() if common.pick_device(args.device) == "cuda" else 0
    args.jobs = args.jobs or args.gpus or (2 if args.own_judge else 1)
    code = [path.read_text() for path in files_of_a_run()]
    same_for_all = [code, args.model, read_train_json(where), args.eval_interval, args.extra]
    args.digest = short_hash(same_for_all)
    return args


def plan(args):
    """The Specs, each once, seed by seed: whatever is finished, rows can be compared."""
    blocks = TOY_PLAN if args.model == "toy" else PAPER_PLAN
    if args.settings or args.div or args.seeds:
        blocks = [(args.settings or ["published"], args.div or PAPER, args.seeds or range(3))]
    specs = {}
    for settings, divs, seeds in blocks:
        for setting, div, seed in itertools.product(settings, divs, seeds):
            home, flags = where_run(setting, div)
            spec = Spec(home, div, str(seed), flags, short_hash([args.digest, flags]))
            specs[spec[:3]] = spec
    return sorted(specs.values(), key=lambda spec: int(spec.seed))


@functools.cache
def where_run(setting, div):
    """(setting, flags) of a run: where f''(1) is 1, a matched setting is its unmatched twin."""
    flags, alpha = SETTINGS[setting], re.fullmatch(r"alpha([\d.]+)", div)
    try:
        row = get_divergence("alpha", float(alpha[1])) if alpha else get_divergence(div)
    except ValueError as error:
        raise UserError(f"--div {div}: {error}") from error
    if row.curvature == 1:
        flags = flags.replace("--match_curvature", "").strip()
    same = [other for other in SETTINGS if SETTINGS[other] == flags]
    of_div = f"--div alpha --alpha {alpha[1]}" if alpha else f"--div {div}"
    return (same or [setting])[0], f"{of_div} {flags}".strip()


def files_of_a_run():
    """Every file of ours that train.py imports: its code, which digest stands for."""
    names = ("train", "sample", "loss", "divergences", "toy/world")
    parts = set(HERE.glob("parts/*.py")) - {HERE / "parts/stats.py"}
    return [*(HERE / f"{name}.py" for name in names), *sorted(parts)]


def short_hash(value):
    return hashlib.sha256(repr(value).encode()).hexdigest()[:8]


def check_digests(specs, rows):
    """Raises UserError if the table's rows were made by other code, or with other flags."""
    digests = {(spec.setting, spec.div): spec.digest for spec in specs}
    for setting, div, digest in {(row[0], row[1], row[-1]) for row in rows}:
        if digests.get((setting, div), digest) != digest:
            fix = "check out the commit that made it, or take another --output_dir"
            raise UserError(f"runs.csv: {setting} {div} is of other code or flags: {fix}")


def unfinished(specs, table):
    there = {tuple(row[:3]) for row in read_rows(table)}
    return [spec for spec in specs if spec[:3] not in there]


# ---- The runs ------------------------------------------------------------------------------------


def folder_of(spec, args):
    """In a folder of its digest, so that no run of other code is gone on with."""
    return Path(args.output_dir, "runs", spec.digest, f"{spec.setting}-{spec.div}-{spec.seed}")


def command(spec, device, args):
    words = spec.flags.split()
    if "10/D" in words:
        unet = read_config(f"{find_model(args.model)[0]}/unet")
        dimensions = unet["in_channels"] * (unet.get("sample_size") or 64) ** 2
        words[words.index("10/D")] = f"{10 / dimensions:.9g}"
    if "PAIRS" in words:
        words[words.index("PAIRS")] = args.pairs or f"{args.output_dir}/pairs"
    folder = folder_of(spec, args)
    words += ["--model", args.model, "--device", device, "--seed", spec.seed]
    words += ["--eval_interval", str(args.eval_interval), "--output_dir", str(folder)]
    resume = ["--resume"] if (folder / "config.json").exists() else []
    return [sys.executable, str(HERE / "train.py"), *args.extra, *words, *resume]


def run_all(todo, table, args):
    """Runs them, args.jobs side by side; what finished goes into the table, what failed is said."""
    common.make_folder(f"{args.output_dir}/runs")
    pairs = os.path.abspath(f"{args.output_dir}/pairs")
    if any("PAIRS" in spec.flags for spec in todo) and not (args.pairs or os.path.exists(pairs)):
        if args.model != "toy":
            raise UserError("the setting pairs needs preference pairs: --pairs DIR")
        subprocess.run([sys.executable, "-m", "toy.make", "--pairs", pairs], cwd=HERE, check=True)
    devices, writing, begin, ended = queue.SimpleQueue(), threading.Lock(), time.time(), []
    for slot in range(args.jobs):
        devices.put(f"cuda:{slot % args.gpus}" if args.gpus else args.device)

    def run(spec):
        device, folder = devices.get(), folder_of(spec, args)
        folder.parent.mkdir(exist_ok=True)
        log = Path(f"{folder}.log")
        if folder.exists():
            with FileLock(folder / "lock"):  # a study that was killed leaves trainers behind
                pass
        # another number of threads gives other last bits
        environment = os.environ | ({} if args.gpus else {"OMP_NUM_THREADS": "1"})
        try:
            with open(log, "a") as file:
                options = dict(stdout=file, stderr=file, env=environment)
                code = subprocess.run(command(spec, device, args), **options).returncode
        finally:
            devices.put(device)
        with writing:
            ended.append(spec)
            outcome = "finished"
            if code:
                outcome = "FAILED: " + log.read_text().strip().split("\n")[-1]
            else:
                add_rows(spec, folder, table, args.digest)
            left = (time.time() - begin) / len(ended) * (len(todo) - len(ended)) / 3600
            print(f"{len(ended)}/{len(todo)} {folder.name} {outcome}; {left:.1f} hours left")

    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(run, todo))


# ---- runs.csv and study.png ----------------------------------------------------------------------


def read_rows(table):
    if not table.exists():
        return []
    with open(table, newline="") as file:
        return list(csv.reader(file))[1:]


def add_rows(spec, folder, table, digest):
    """A finished run's figures into the table, and those of the original where it has none."""
    rows = read_rows(table)
    there = {tuple(row[:3]) for row in rows}
    for epoch, metrics in read_evaluated(folder).items():
        key, stamp = (spec.setting, "original", ""), digest
        if epoch:
            key, stamp = spec[:3], spec.digest
        for metric, values in metrics.items():
            for prompt, value in enumerate(values if key not in there else []):
                value = "nan" if value is None else f"{value:.6g}"
                rows.append([*key, str(epoch), metric, str(prompt), value, stamp])
    common.write_csv(table, HEADER, sorted(rows, key=place))


def place(row):
    """Where a row stands: settings and divergences in the order of the tables above."""
    setting, div, seed = row[:3]
    rank = PAPER.index(div) if div in PAPER else len(PAPER)
    return list(SETTINGS).index(setting), rank, div, seed


def by_setting(rows):
    """{setting: {div: {seed: {metric: {epoch: (P,) array}}}}}, from epoch 0 on, the original's; a
    shared run in each of its settings."""
    values = defaultdict(list)
    for setting, div, seed, epoch, metric, _, value, _ in sorted(rows, key=place):
        values[setting, div, seed, metric, int(epoch)].append(float(value))
    settings = {setting: defaultdict(lambda: defaultdict(dict)) for setting in SETTINGS}
    for setting, (home, div, seed, metric, epoch) in itertools.product(SETTINGS, values):
        if div != "original" and where_run(setting, div)[0] == home:
            start = np.array(values[home, "original", "", metric, 0])
            path = settings[setting][div][seed].setdefault(metric, {0: start})
            path[epoch] = np.array(values[home, div, seed, metric, epoch])
    return {setting: dict(runs) for setting, runs in settings.items() if runs}


def draw(settings, path):
    """A panel a setting: judge against RMSE, a line a run from the original on, a colour a row."""
    from matplotlib.figure import Figure

    figure, colours = Figure((4.2 * len(settings), 4), layout="constrained"), {}
    panels = figure.subplots(1, len(settings), squeeze=False)[0]
    for axes, (setting, runs) in zip(panels, settings.items()):
        for name, seeds in runs.items():
            colour = colours.setdefault(name, f"C{len(colours)}")
            for i, metrics in enumerate(seeds.values()):
                judge = next(iter(metrics))
                x, y = ([np.nanmean(v) for v in metrics[m].values()] for m in ("rmse", judge))
                axes.plot(x, y, ".-", color=colour, lw=1, label=None if i else name)
        axes.set(title=setting, xlabel="RMSE between images of a prompt (diversity)", ylabel=judge)
        axes.legend()
    common.save_figure(figure, path)


if __name__ == "__main__":
    common.run_cli(main)
