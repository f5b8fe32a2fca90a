"""Does the divergence matter? The paper's comparison, with training seeds, in one command.

    python study.py                      the toy's whole study: 84 runs, about 9 hours of one core
    python study.py --dry_run            what would be run, for how long, in how much space
    python study.py --settings ratios --div rkl js --seeds 0 1 2      a part of it
    python study.py --model DIR -- --prompts my.txt --judge pickscore    flags of train.py after --
    python study.py --report --output_dir docs/study       tables and figure of a runs.csv, no run

A run is `train.py --eval_interval 3` in a process of its own. A finished run is never run again, a
cut one goes on by --resume: kill the study anywhere and give the same command. --output_dir gets

    runs.csv      setting, div, seed, epoch, metric, prompt, value, digest: figures of every prompt
                  held out (a number: its place in the run's config.json). div "original" is the
                  model before training. Where f''(1) = 1, in all rows but js, `matched` is
                  `published`: such a run stands in the file once, under that name
    study.md      tables and verdicts (parts/stats.py); study.png: taste against diversity
    runs/         the runs' folders and logs; only runs.csv is needed to go on elsewhere

digest stands for this code and the flags. Other code is refused: run a study from a clone of its
own, so that your other work does not change it.
"""

import ast
import csv
import hashlib
import os
import subprocess
import sys
import time
from collections import defaultdict, namedtuple
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock, Timeout

from divergences import get_divergence
from parts import stats
from parts.common import UserError, make_folder, pick_device, read_json, run_cli, write_csv
from parts.flags import build_parser, check_range
from parts.run import read_evaluated
from parts.weights import TOY, find, read_train_json, resolve_model

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
TOY_COST, SD15_COST = (0.1, 0.002), (28, 0.9)
FLAGS = {
    "model": ("auto", None, "auto, toy, a diffusers folder or a hub id"),
    "pairs": (None, None, "of the setting pairs; the toy's are made here"),
    "eval_interval": (3, "[1, inf)", "epochs between figures of the held-out prompts"),
    "jobs": (0, "[0, inf)", "runs side by side; 0: one a GPU, or two on a CPU"),
    "device": ("auto", None, "auto, cpu, cuda"),
    "dry_run": (False, None, "say what would be run, and stop"),
    "report": (False, None, "tables and figure of what is in runs.csv, and stop"),
    "output_dir": ("out/study", None, "of runs.csv, study.md, study.png and the runs"),
}
HERE = Path(__file__).resolve().parent
HEADER = ("setting", "div", "seed", "epoch", "metric", "prompt", "value", "digest")
Spec = namedtuple("Spec", "setting div seed flags digest")  # of a run; flags of train.py, as text


def main():
    args = parse_args()
    table = Path(args.output_dir, "runs.csv")
    if not args.report:
        specs = plan(args)
        todo = unfinished(specs, table, args)
        own_judge = "judge" in read_train_json(args.model)
        hours, gb = TOY_COST if own_judge else SD15_COST
        print(f"{len(specs)} runs of {args.model}, {len(specs) - len(todo)} finished; the others:")
        print(
            f"about {hours * len(todo) / args.jobs:.1f} hours, {args.jobs} side by side, ", end=""
        )
        print(f"and {gb * len(todo):.1f} GB in {args.output_dir}", flush=True)
        if args.dry_run:
            for spec in todo:
                print("  " + " ".join(command(spec, args)[1:]))
            return
        failed = run_all(todo, table, args)
        if not own_judge:  # the paper's Tables 2 and 3
            folders = [folder_of(spec, args) for spec in specs if folder_of(spec, args).exists()]
            tables = ["--output_dir", f"{args.output_dir}/evaluation"]
            subprocess.run([sys.executable, HERE / "evaluate.py", *folders, *tables])
    stats.report(by_setting(read_rows(table)), args.output_dir)
    if not args.report and failed:
        raise UserError(f"{len(failed)} runs failed and are in no table: {', '.join(failed)}")


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
    args.device = pick_device(args.device)
    args.gpus = torch.cuda.device_count() if args.device == "cuda" else 0
    args.jobs = args.jobs or args.gpus or 2
    return args


def plan(args):
    """The Specs, each once, seed by seed: whatever is finished, rows can be compared."""
    blocks = TOY_PLAN if args.model == "toy" else PAPER_PLAN
    if args.settings or args.div or args.seeds:
        blocks = [(args.settings or ["published"], args.div or PAPER, args.seeds or range(3))]
    specs, code = {}, digest_of_code()
    for settings, divs, seeds in blocks:
        for setting in settings:
            for div in divs:
                home, flags = where_run(setting, div)
                what = [code, flags, args.model, read_train_json(args.model)]
                digest = short_hash([*what, args.eval_interval, args.extra])
                for seed in seeds:
                    specs[home, div, str(seed)] = Spec(home, div, str(seed), flags, digest)
    return sorted(specs.values(), key=lambda spec: int(spec.seed))


def where_run(setting, div):
    """(setting, flags) under which such a run is made: matched where f''(1) is 1 is unmatched."""
    flags = SETTINGS[setting]
    try:
        name, alpha = ("alpha", float(div[5:])) if div.startswith("alpha") else (div, None)
        curvature = get_divergence(name, alpha).curvature
    except ValueError as error:
        raise UserError(f"--div {div}: {error}") from error
    if curvature == 1:
        flags = flags.replace("--match_curvature", "").strip()
    same = [other for other in SETTINGS if SETTINGS[other] == flags]
    return (same or [setting])[0], flags


def digest_of_code():
    """Of train.py and of every file of ours that it imports, or that those do."""
    files, new = {}, ["train.py"]
    while new:
        file = new.pop()
        text = files[file] = (HERE / file).read_text()
        for node in ast.walk(ast.parse(text)):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            if isinstance(node, ast.ImportFrom):
                names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            for name in names:
                imported = name.replace(".", "/") + ".py"
                if (HERE / imported).exists() and imported not in files:
                    new.append(imported)
    return short_hash(sorted(files.items()))


def short_hash(value):
    return hashlib.sha256(repr(value).encode()).hexdigest()[:8]


def unfinished(specs, table, args):
    """Specs that are not in the table. Raises UserError if what is there was made otherwise."""
    rows = read_rows(table) if table.exists() else []
    there = {tuple(row[:3]): row[-1] for row in rows}
    digests = {(spec.setting, spec.div): spec.digest for spec in specs}
    for (setting, div, _), digest in there.items():
        if digests.get((setting, div), digest) != digest:
            fix = "check out the commit that made it, or take another --output_dir"
            raise UserError(f"{table}: {setting} {div} is of other code or flags: {fix}")
    return [spec for spec in specs if tuple(spec[:3]) not in there]


# ---- The runs ------------------------------------------------------------------------------------


def folder_of(spec, args):
    """With the digest in its name, so that runs of other code are never gone on with."""
    return Path(args.output_dir, "runs", f"{spec.setting}-{spec.div}-{spec.seed}-{spec.digest}")


def command(spec, args):
    folder = folder_of(spec, args)
    div = (
        ["--div", "alpha", "--alpha", spec.div[5:]] if "alpha" in spec.div else ["--div", spec.div]
    )
    flags = spec.flags
    if "10/D" in flags:
        flags = flags.replace("10/D", f"{10 / latent_dimensions(args.model):.9g}")
    pairs = args.pairs or f"{args.output_dir}/pairs"
    flags = [pairs if flag == "PAIRS" else flag for flag in flags.split()]
    own = ["--model", args.model, "--device", args.device, "--seed", spec.seed]
    own += ["--eval_interval", str(args.eval_interval), "--output_dir", str(folder)]
    resume = ["--resume"] if (folder / "config.json").exists() else []
    return [sys.executable, str(HERE / "train.py"), *div, *args.extra, *flags, *own, *resume]


def latent_dimensions(model):
    folder = TOY if model == "toy" else model
    path = f"{folder}/unet/config.json"
    if not os.path.isdir(folder):
        path = find(model, "unet/config.json")
    config = read_json(path, "give a diffusers folder")
    return config["in_channels"] * config["sample_size"] ** 2


def run_all(todo, table, args):
    """Runs them, args.jobs side by side, and adds each to the table. Returns those that failed."""
    make_folder(f"{args.output_dir}/runs")
    make_toy_pairs(todo, args)
    begin, total, failed, running = time.time(), len(todo), [], {}  # running: slot -> spec, process
    finished = 0
    while todo or running:
        for slot in range(args.jobs):
            if slot not in running and todo:
                spec = next((spec for spec in todo if is_free(folder_of(spec, args))), None)
                if spec:
                    todo.remove(spec)
                    running[slot] = spec, start(spec, slot, args)
        time.sleep(0.5)
        for slot, (spec, process) in list(running.items()):
            if process.poll() is None:
                continue
            del running[slot]
            finished += 1
            folder = folder_of(spec, args)
            if process.returncode:
                failed.append(folder.name)
                last = Path(f"{folder}.log").read_text().strip().splitlines()[-1:]
                print(f"{finished}/{total} {folder.name} FAILED: {' '.join(last)}", flush=True)
                continue
            add_rows(spec, folder, table)
            hours = (time.time() - begin) / finished * (total - finished) / 3600
            print(f"{finished}/{total} {folder.name}, about {hours:.1f} hours left", flush=True)
    return failed


def is_free(folder):
    """False while a process trains there, perhaps of a study that was killed."""
    lock = FileLock(folder / "lock")
    try:
        if folder.exists():
            lock.acquire(timeout=0)
            lock.release()
        return True
    except Timeout:
        return False


def start(spec, slot, args):
    # other numbers of threads give other last bits
    where = {"OMP_NUM_THREADS": "1"}
    if args.gpus:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(args.gpus)))
        where = {"CUDA_VISIBLE_DEVICES": visible.split(",")[slot % args.gpus]}
    with open(f"{folder_of(spec, args)}.log", "a") as log:
        options = dict(stdout=log, stderr=log, env=os.environ | where)
        return subprocess.Popen(command(spec, args), **options)


def make_toy_pairs(todo, args):
    place = f"{args.output_dir}/pairs"
    if args.pairs or not any("PAIRS" in spec.flags for spec in todo):
        return
    if args.model != "toy":
        raise UserError("the setting pairs needs preference pairs: --pairs DIR")
    if not os.path.exists(place):
        make = [sys.executable, "-m", "toy.make", "--pairs", os.path.abspath(place)]
        subprocess.run(make, cwd=HERE, check=True)


# ---- runs.csv ------------------------------------------------------------------------------------


def read_rows(table):
    try:
        with open(table, newline="") as file:
            return list(csv.reader(file))[1:]
    except OSError as error:
        raise UserError(f"cannot read {table} ({error.strerror}): run the study first") from error


def add_rows(spec, folder, table):
    """A finished run's figures into the table, and those of the original where it has none."""
    rows = read_rows(table) if table.exists() else []
    there = {tuple(row[:3]) for row in rows}
    for epoch, metrics in read_evaluated(folder).items():
        key = (spec.setting, spec.div, spec.seed) if epoch else (spec.setting, "original", "")
        if key in there:
            continue
        for metric, values in metrics.items():
            for prompt, value in enumerate(values):
                value = "nan" if value is None else f"{value:.6g}"
                rows.append([*key, str(epoch), metric, str(prompt), value, spec.digest])
    write_csv(table, HEADER, sorted(rows, key=lambda row: row[:3]))


def by_setting(rows):
    """{setting: {div: {seed: {metric: {epoch: (P,) array}}}}}, shared runs in both settings.

    div "original" has one seed, "", and epoch 0 alone.
    """
    values = defaultdict(list)
    for setting, div, seed, epoch, metric, _, value, _ in rows:
        values[setting, div, seed, metric, int(epoch)].append(float(value))
    nested = defaultdict(lambda: defaultdict(lambda: defaultdict(lambda: defaultdict(dict))))
    for setting in SETTINGS:
        for (home, div, seed, metric, epoch), of_prompts in values.items():
            if div == "original":
                shared = home == where_run(setting, "rkl")[0]
            else:
                shared = home == where_run(setting, div)[0]
            if shared:
                nested[setting][div][seed][metric][epoch] = np.array(of_prompts)
    return nested


if __name__ == "__main__":
    run_cli(main)
