"""Does the divergence matter? The paper's comparison, with training seeds, in one command.

    python study.py                      the toy's whole study: 84 runs, about 7 hours of one core
    python study.py --dry_run            what would be run, for how long, in how much space
    python study.py --settings ratios --div rkl js --seeds 0 1 2      a part of it
    python study.py --model DIR -- --prompts my.txt --judge pickscore    flags of train.py after --
    python study.py --report --output_dir docs/study       tables and figure of a runs.csv, no run

A run is `train.py --eval_interval 3` in a process of its own. A finished run is never run again, a
cut one goes on by --resume: kill the study anywhere and give the same command. --output_dir gets

    runs.csv      figures of every held-out prompt (its number: its place in a run's config.json).
                  div "original" is the model before training. Where f''(1) = 1, as in rkl and fkl,
                  `matched` is `published`: such a run stands in the file once, under that name.
                  digest is of code and flags: rows of others are refused, so run it from a clone
    study.md      tables and verdicts (parts/stats.py); study.png: taste against diversity
    runs/         the runs' folders and logs; to go on elsewhere runs.csv is enough
"""

import csv
import hashlib
import itertools
import os
import queue
import re
import subprocess
import sys
import time
from collections import defaultdict, namedtuple
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock

from divergences import get_divergence
from parts import common, stats
from parts.common import UserError
from parts.flags import build_parser, check_ranges
from parts.run import read_evaluated
from parts.weights import TOY, find_configs, read_config, read_train_json, resolve_model

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
# What is run of the toy where no flag says otherwise.
TOY_PLAN = [
    (("published", "matched", "ratios", "ratios_matched"), ("rkl", "fkl", "js"), range(6)),
    (("published", "ratios"), ALPHAS, range(3)),
    (("pairs",), ("rkl", "alpha0.4", "fkl", "js"), range(3)),
]
# Hours and GB a run. The toy: one core of two that are busy. SD1.5: the rollouts and training of
# 40,000 prompts, and 1,600 pictures for evaluate.py.
TOY_COST = (0.08, 0.002, "")
SD15_COST = (26, 0.9, " of GPUs at 150 TFLOP/s (counted, not measured)")
FLAGS = {
    "model": ("auto", None, "auto, toy, a diffusers folder, a single checkpoint or a hub id"),
    "pairs": (None, None, "of the setting pairs; the toy's are made here"),
    "eval_interval": (3, "[1, inf)", "epochs between figures of the held-out prompts"),
    "jobs": (0, "[0, inf)", "runs side by side; 0: one a GPU, or two of the toy on a CPU"),
    "device": ("auto", None, "auto, cpu, cuda"),
    "dry_run": (False, None, "say what would be run, and stop"),
    "report": (False, None, "tables and figure of what is in runs.csv, no run"),
    "output_dir": ("out/study", None, "of runs.csv, study.md, study.png and the runs"),
}
HERE = Path(__file__).resolve().parent
Row = namedtuple("Row", "setting div seed epoch metric prompt value digest")  # of runs.csv
Spec = namedtuple("Spec", "setting div seed digest flags folder")  # a run; flags of train.py


def main():
    args = parse_args()
    table, specs = Path(args.output_dir, "runs.csv"), plan(args)
    if not args.report:
        check_digests(specs, read_table(table))
        todo = unfinished(specs, table)
        hours, gb, of = TOY_COST if args.own_judge else SD15_COST
        print(f"{len(specs)} runs of {args.model}, {len(specs) - len(todo)} finished. The others:")
        print(f"about {hours * len(todo) / args.jobs:.1f} hours{of}, --jobs {args.jobs}, ", end="")
        print(f"{gb * len(todo):.1f} GB in {args.output_dir}")
        if args.dry_run:
            for spec in todo:
                print("  python", *command(spec, args.device, args)[1:])
            return
        run_all(todo, table, args)
        if not args.own_judge:  # the paper's Tables 2 and 3
            folders = [spec.folder for spec in specs if (spec.folder / "table.md").exists()]
            place = ["--device", args.device, "--output_dir", f"{args.output_dir}/evaluation"]
            subprocess.run([sys.executable, HERE / "evaluate.py", *folders, *place])
    outcomes = read_outcomes(table)
    if not outcomes:
        raise UserError(f"no finished run in {table}")
    missing = defaultdict(list)
    for spec in unfinished(specs, table):
        missing[f"{spec.setting} {spec.div}"].append(spec.seed)
    seeds = ", ".join(f"{row} ({' '.join(seeds)})" for row, seeds in missing.items())
    note = f"Missing, of {len(specs)} runs, are the seeds {seeds}.\n" if missing else ""
    text = stats.report(outcomes, SETTINGS, note)
    common.write_file(f"{args.output_dir}/study.md", text)
    draw(outcomes, f"{args.output_dir}/study.png")
    print(f"{text}\nIn {args.output_dir}: runs.csv, study.md, study.png")
    if missing and not args.report:
        sys.exit(1)


def parse_args():
    words = list(itertools.takewhile(lambda word: word != "--", sys.argv[1:]))
    parser = build_parser(FLAGS, __doc__)
    known = f"of {', '.join(SETTINGS)} (default: the toy's plan above, or published)"
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, help=known)
    parser.add_argument("--div", nargs="+", help=f"of {', '.join(PAPER)} (all seven) and your own")
    parser.add_argument("--seeds", nargs="+", type=int, help="(default: 0 1 2)")
    args = parser.parse_args(words)
    check_ranges(FLAGS, args)
    args.extra = sys.argv[len(words) + 2 :]  # behind --, flags of train.py
    args.folder, _ = resolve_model(args.model)
    args.model = "toy" if args.folder == TOY else args.folder
    own = read_train_json(args.folder)
    args.own_judge = "judge" in own
    args.gpus = torch.cuda.device_count() if common.pick_device(args.device) == "cuda" else 0
    args.jobs = args.jobs or args.gpus or (2 if args.own_judge else 1)
    code = [path.read_text() for path in files_of_a_run()]
    args.digest = short_hash([code, args.model, own, args.eval_interval, args.pairs, args.extra])
    args.pairs = args.pairs or f"{args.output_dir}/pairs"
    return args


def plan(args):
    """The Specs, each once, seed by seed: whatever is finished, rows can be compared."""
    blocks = [(args.settings or ["published"], args.div or PAPER, args.seeds or range(3))]
    if args.model == "toy" and not (args.settings or args.div or args.seeds):
        blocks = TOY_PLAN
    specs = []
    for block in blocks:
        for setting, div, seed in itertools.product(*block):
            home, flags = where_run(setting, div)
            digest = short_hash([args.digest, flags])
            folder = Path(args.output_dir, "runs", digest, f"{home}-{div}-{seed}")
            specs.append(Spec(home, div, str(seed), digest, flags, folder))
    return sorted(dict.fromkeys(specs), key=lambda spec: int(spec.seed))


def where_run(setting, div):
    """(the setting under whose name a run stands in runs.csv, its flags): where f''(1) is 1, a
    matched setting is its unmatched twin."""
    flags, alpha = SETTINGS[setting], re.fullmatch(r"alpha([\d.]+)", div)
    try:
        row = get_divergence("alpha", float(alpha[1])) if alpha else get_divergence(div)
    except ValueError as error:
        raise UserError(f"--div {div}: {error}") from error
    if row.curvature == 1:
        flags = flags.replace("--match_curvature", "").strip()
    home = {text: name for name, text in SETTINGS.items()}.get(flags, setting)
    of_div = f"--div alpha --alpha {alpha[1]}" if alpha else f"--div {div}"
    return home, f"{of_div} {flags}".strip()


def files_of_a_run():
    """Every file that train.py imports of ours: its code, which digest stands for."""
    names = ("train.py", "sample.py", "loss.py", "divergences.py", "toy/world.py")
    parts = set(HERE.glob("parts/*.py")) - {HERE / "parts/stats.py", HERE / "parts/optimum.py"}
    return [*map(HERE.joinpath, names), *sorted(parts)]


def short_hash(value):
    return hashlib.sha256(repr(value).encode()).hexdigest()[:8]


def check_digests(specs, rows):
    """Raises UserError if the table's rows were made by other code, or with other flags."""
    digests = {spec[:2]: spec.digest for spec in specs}
    for row in rows:
        if digests.get(row[:2], row.digest) != row.digest:
            fix = "check out the commit that made it, or take another --output_dir"
            raise UserError(f"runs.csv: {row.setting} {row.div} is of other code or flags: {fix}")


def unfinished(specs, table):
    there = {row[:3] for row in read_table(table)}
    return [spec for spec in specs if spec[:3] not in there]


# ---- The runs ------------------------------------------------------------------------------------


def command(spec, device, args):
    words = [args.pairs if word == "PAIRS" else word for word in spec.flags.split()]
    if "10/D" in words:
        unet = read_config(f"{find_configs(args.folder)}/unet")
        dimensions = unet["in_channels"] * (unet.get("sample_size") or 64) ** 2
        words[words.index("10/D")] = f"{10 / dimensions:.9g}"
    words += ["--model", args.model, "--device", device, "--seed", spec.seed]
    words += ["--eval_interval", str(args.eval_interval), "--output_dir", str(spec.folder)]
    resume = ["--resume"] if (spec.folder / "config.json").exists() else []
    return [sys.executable, str(HERE / "train.py"), *args.extra, *words, *resume]


def run_all(todo, table, args):
    """Runs them, args.jobs side by side; what finished goes into the table, what failed is said."""
    common.make_folder(f"{args.output_dir}/runs")
    if any("PAIRS" in spec.flags for spec in todo) and not os.path.exists(args.pairs):
        if args.model != "toy":
            raise UserError("the setting pairs needs preference pairs: --pairs DIR")
        make = [sys.executable, "-m", "toy.make", "--pairs", os.path.abspath(args.pairs)]
        subprocess.run(make, cwd=HERE, check=True)
    if not args.gpus:  # another number of threads gives other last bits
        os.environ["OMP_NUM_THREADS"] = "1"
    devices, begin = queue.SimpleQueue(), time.time()
    for slot in range(args.jobs):
        devices.put(f"cuda:{slot % args.gpus}" if args.gpus else args.device)

    def run(spec):
        device, folder = devices.get(), spec.folder
        folder.parent.mkdir(exist_ok=True)
        if folder.exists():
            with FileLock(folder / "lock"):  # a study that was killed leaves trainers behind
                pass
        with open(f"{folder}.log", "a") as log:
            code = subprocess.run(command(spec, device, args), stdout=log, stderr=log).returncode
        devices.put(device)
        return spec, code

    with ThreadPool(args.jobs) as pool:
        for count, (spec, code) in enumerate(pool.imap_unordered(run, todo), 1):
            outcome = "finished"
            if code:
                log = Path(f"{spec.folder}.log").read_text()
                outcome = "FAILED: " + log.strip().split("\n")[-1]
            else:
                add_rows(spec, table, args.digest)
            left = (time.time() - begin) / count * (len(todo) - count) / 3600
            print(f"{count}/{len(todo)} {spec.folder.name} {outcome}; {left:.1f} hours left")


# ---- runs.csv and study.png ----------------------------------------------------------------------


def read_table(table):
    """Raises UserError unless every epoch of a run has the original's metrics and prompts."""
    if not table.exists():
        return []
    cells = defaultdict(set)  # {(metric, prompt)} of a run's epoch
    try:
        with open(table, newline="") as file:
            header, *rows = itertools.starmap(Row, csv.reader(file))
        if header != Row._fields:
            raise ValueError(f"its columns are {', '.join(header)}")
        for row in rows:
            float(row.value)
            cells[row[:4]].add((row.metric, row.prompt))
    except (ValueError, TypeError) as error:
        raise UserError(f"{table} is damaged ({error}): copy it again") from error
    for (setting, div, seed, epoch), found in cells.items():
        if found != cells.get((setting, "original", "", "0")):
            what = f"{table} lacks figures of {setting} {div} {seed}, epoch {epoch}"
            raise UserError(f"{what}: copy it again")
    return rows


def add_rows(spec, table, digest):
    """A finished run's figures into the table, and those of the original where it has none."""
    rows = read_table(table)
    there = {row[:3] for row in rows}
    original = spec._replace(div="original", seed="", digest=digest)
    evaluated = read_evaluated(spec.folder)
    for epoch, metrics in evaluated.items():
        run = spec if epoch else original
        if run[:3] in there:
            continue
        for metric, before in evaluated[0].items():
            values = metrics.get(metric, [None] * len(before))  # equal pictures have no PSNR
            for prompt, value in enumerate(np.array(values, dtype=float)):
                rows.append(Row(*run[:3], epoch, metric, prompt, f"{value:.6g}", run.digest))
    common.write_csv(table, Row._fields, sorted(rows, key=place))


def place(row):
    """Where a row stands: settings and divergences in the order of the tables above."""
    rank = PAPER.index(row.div) if row.div in PAPER else len(PAPER)
    return list(SETTINGS).index(row.setting), rank, row.div, row.seed


def read_outcomes(table):
    """{setting: Outcome}; a shared run is in each of its settings, after the original's figures."""
    values = defaultdict(list)  # of all epochs and prompts
    for row in sorted(read_table(table), key=place):
        values[row.setting, row.div, row.seed, row.metric].append(float(row.value))
    settings = defaultdict(dict)
    for setting, (home, div, seed, metric) in itertools.product(SETTINGS, values):
        if div != "original" and where_run(setting, div)[0] == home:
            start = values[home, "original", "", metric]
            path = np.reshape([*start, *values[home, div, seed, metric]], (-1, len(start)))
            settings[setting].setdefault(div, {}).setdefault(seed, {})[metric] = path
    return {setting: stats.Outcome(runs) for setting, runs in settings.items()}


def draw(outcomes, path):
    """A panel a setting: judge against RMSE, a line a run from the original on, a colour a row."""
    from matplotlib.figure import Figure

    figure = Figure((4.2 * len(outcomes), 4), layout="constrained")
    colours = {}
    panels = figure.subplots(1, len(outcomes), squeeze=False)[0]
    for axes, (setting, outcome) in zip(panels, outcomes.items()):
        for div, seeds in outcome.runs.items():
            colour = colours.setdefault(div, f"C{len(colours)}")
            for seed in seeds:
                x, y = (outcome.path(div, seed, metric) for metric in ("rmse", outcome.judge))
                axes.plot(x, y, ".-", color=colour, lw=1)
            axes.lines[-1].set_label(div)  # one a row
        axes.set(title=setting, ylabel=outcome.judge)
        axes.set_xlabel("RMSE between images of a prompt (diversity)")
        axes.locator_params(axis="x", nbins=5)
        axes.legend(loc="upper right")
    common.save_figure(figure, path)


if __name__ == "__main__":
    common.run_cli(main)
