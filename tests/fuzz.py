"""Random damage to every file that the programs read: one line that names it, or a valid result.

python tests/fuzz.py --trials 2000 --seed 0                some 30 minutes of one core
python tests/fuzz.py --seed 0 --first 1234 --trials 1      trial 1234 again

A trial copies a small world (model, run, LoRA, prompts, pairs, images, scores), damages one file of
it and runs, in a forked process, a program that reads the file. Right is exit code 2 with one line
that names the file or its folder; or exit code 0 with a valid result (no NaN, no black picture),
which is the undamaged one where the file has checksums. Exit code 1 if any trial failed.
"""

import argparse
import collections
import csv
import functools
import itertools
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import traceback
from pathlib import Path

import numpy as np
import pyarrow
import torch
from child import run_cli  # imports torch, diffusers and transformers for all forks
from conftest import PROMPTS, paint_nothing
from PIL import Image
from pyarrow import parquet
from safetensors.torch import load_file

import evaluate
import landscape
import sample
import study
import train
from parts import stats
from parts.common import write_csv
from toy import make

SCRIPTS = {
    f"{module.__name__}.py": module for module in (evaluate, landscape, sample, study, train)
}
SMALL = "--num_inference_steps 2 --device cpu --output_dir"
LOOK = f"sample.py sun --seeds 0 {SMALL}"
PAINT = f"{LOOK} out --model micro"
TRAIN = "train.py --judge taste --sample_batch_size 3 --num_children 2 --first_step 0 --rank 2"
TRAIN += " --threshold 0 --train_batch_size 2 --gradient_accumulation_steps 2 --images_per_prompt 2"
TRAIN_PAIRS = f"train.py --judge taste --rank 2 --images_per_prompt 2 --model micro {SMALL} out"
TRAIN_PAIRS += " --max_train_steps 1 --num_eval_prompts 2 --pairs"
SCORE = f"evaluate.py --judges taste --metrics rmse entropy_1d --images_per_prompt 2 {SMALL}"
CASES = [  # kind, files, the program that reads them
    ("model: weights", "micro/*/*.safetensors", PAINT),
    ("model: configs", "micro/model_index.json micro/[uvst]*/*config.json", PAINT),
    ("model: tokenizer", "micro/tokenizer/*", PAINT),
    (
        "model: train.json",
        "micro/train.json",
        f"{TRAIN} --max_train_steps 1 --model micro {SMALL} out",
    ),
    ("model: prompts.txt", "micro/prompts.txt", f"{SCORE} scored1 micro"),
    ("LoRA", "loras1/*", f"{PAINT} --lora FILE"),
    ("prompts", "prompts1/*", f"{PAINT} --prompts FILE"),
    ("pairs: csv", "of_csv/*.csv of_csv/images/*", f"{TRAIN_PAIRS} of_csv"),
    ("pairs: jsonl", "of_jsonl/*.jsonl", f"{TRAIN_PAIRS} of_jsonl"),
    ("pairs: parquet", "of_parquet/*", f"{TRAIN_PAIRS} of_parquet"),
    (
        "run, resumed",
        "run1/*.*",
        "train.py --resume --num_epochs 3 --max_train_steps 9 --output_dir run1",
    ),
    ("run, scored", "run1/*.json run1/pytorch*", f"{SCORE} out run1"),
    ("run, painted", "run1/*.json run1/pytorch*", f"{LOOK} out --lora run1"),
    ("run, drawn", "run1/*.json*", "landscape.py --div js --output_dir out --runs run1"),
    ("images", "theirs/*", f"{SCORE} out theirs"),
    ("scores", "scored1/theirs/scores/*", f"{SCORE} scored1 theirs"),
    ("scores of a run", "scored1/run1/*.json scored1/run1/*/*", f"{SCORE} scored1 run1"),
    ("runs.csv", "study1/runs.csv", "study.py --report --output_dir study1 --settings published"),
]
CHECKSUMS = (".png", ".pt")
# of a progress bar; of our own remarks
NO_FAULT = re.compile(r"\d\d:\d\d[<,]|scheduler corrected|config attributes|no valid pair")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("trials", 2000), ("seed", 0), ("first", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--kind", default="", help="only of kinds with this word")
    args = parser.parse_args()
    cases = [case for case in CASES if args.kind in case[0]]
    counts, failures = collections.defaultdict(collections.Counter), []
    with tempfile.TemporaryDirectory() as home:
        world, whole = Path(home, "world"), Path(home, "whole")  # its scores know where it is
        build(world)
        world.rename(whole)
        for number in range(args.first, args.first + args.trials):
            rng = np.random.default_rng((args.seed, number))
            kind, patterns, command = cases[rng.integers(len(cases))]
            files = [file for pattern in patterns.split() for file in sorted(whole.glob(pattern))]
            file = files[rng.integers(len(files))].relative_to(whole)
            command = command.replace("FILE", str(file))
            expected = undamaged(whole, world, command)
            shutil.copytree(whole, world)
            damage, data = (
                DAMAGES[rng.integers(len(DAMAGES))],
                bytearray((world / file).read_bytes()),
            )
            damage(data, rng)
            (world / file).write_bytes(data)
            outcome = judge(file, *trial(world, command.split()), expected)
            shutil.rmtree(world)
            counts[kind][outcome.split(":")[0]] += 1
            if outcome.startswith("FAILED") or args.trials == 1:
                failures.append(f"trial {number}, {file}, {damage.__name__}: {outcome}")
                print(failures[-1], flush=True)
            if (number + 1) % 100 == 0:
                print(f"{number + 1} of {args.first + args.trials}", flush=True)
    columns = ("refused", "same", "other", "FAILED")
    print(f"\n{'kind':20}", *(f"{column:>8}" for column in columns))
    for kind, _, _ in cases:
        print(f"{kind:20}", *(f"{counts[kind][column]:8}" for column in columns))
    sys.exit(1 if failures else 0)


def build(world):
    """The undamaged world, made in forks: a process that has computed cannot be forked."""
    world.mkdir()
    assert fork(world, lambda: write_files(world)) == 0, printed(world)
    for command in (
        f"{TRAIN} --model micro --num_epochs 2 --eval_interval 1 {SMALL} run1",
        f"{SCORE} scored1 run1",
        f"{SCORE} scored1 theirs",
    ):
        code, lines, _ = trial(world, command.split())
        assert code == 0, lines
    (world / "loras1").mkdir()
    shutil.copy(world / "run1/kohya.safetensors", world / "loras1/kohya.safetensors")
    shutil.copy(world / "run1/pytorch_lora_weights.safetensors", world / "loras1/ours.safetensors")


def write_files(world):
    torch.manual_seed(1)
    pipe = make.make_pipeline(unet_channels=(16, 16), vae_channels=8, hidden=16, sample_size=12)
    pipe.save_pretrained(world / "micro")
    for folder in ("prompts1", "theirs", "study1", "of_jsonl", "of_parquet"):
        (world / folder).mkdir()
    defaults = {"learning_rate": 1e-3, "num_eval_prompts": 3, "pairs": {"beta": 1.0}}
    (world / "micro/train.json").write_text(json.dumps(defaults, indent=2))
    (world / "micro/prompts.txt").write_text("\n".join(PROMPTS[:9]))
    make.write_pairs(str(world / "of_csv"), 6, 0)
    with open(world / "of_csv/pairs.csv", newline="") as file:
        pairs = list(csv.DictReader(file))
    rows, images = [], []
    for row in pairs:
        two = {name: f"../of_csv/{row[name]}" for name in ("winner", "loser")}
        rows.append({"caption": row["prompt"], **two, "label": 1})
        winner, loser = ((world / "of_csv" / row[name]).read_bytes() for name in two)
        images.append({"caption": row["prompt"], "jpg_0": winner, "jpg_1": loser, "label_0": 1.0})
    (world / "of_jsonl/pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    parquet.write_table(pyarrow.Table.from_pylist(images), world / "of_parquet/train.parquet")
    for i, row in enumerate(pairs):
        name = f"theirs/{i // 2}_{i % 2}." + ("jpg" if i % 2 else "png")
        Image.open(world / "of_csv" / row["winner"]).save(world / name)
    (world / "theirs/prompts.txt").write_text("\n".join(PROMPTS[:3]) + "\n")
    rows = [{"id": i, "prompt": prompt} for i, prompt in enumerate(PROMPTS[:4])]
    lines = [f"{row['id']},{row['prompt']}\n" for row in rows]
    texts = {"txt": "\n".join(PROMPTS[:4]), "csv": "id,prompt\n" + "".join(lines)}
    texts |= {"tsv": texts["csv"].replace(",", "\t"), "json": json.dumps(rows, indent=1)}
    texts["jsonl"] = "".join(json.dumps(row) + "\n" for row in rows)
    for kind, text in texts.items():
        (world / f"prompts1/p.{kind}").write_text(text)
    parquet.write_table(pyarrow.Table.from_pylist(rows), world / "prompts1/p.parquet")
    write_study(world / "study1/runs.csv")


def write_study(path):
    rows, rng = [], np.random.default_rng(0)
    runs = [("original", "")] + [(div, str(seed)) for div in ("rkl", "js") for seed in range(2)]
    metrics = ("taste", "prompt following", *stats.DIVERSITY)
    for div, seed in runs:
        epochs = (3, 6) if seed else (0,)
        for epoch, metric, prompt in itertools.product(epochs, metrics, range(2)):
            value = f"{epoch + rng.normal():.6g}"
            rows.append(["published", div, seed, epoch, metric, prompt, value, "0123abcd"])
    write_csv(path, study.Row._fields, rows)


def fork(folder, act):
    """The exit code of act() in a forked process that prints to FOLDER.out and .err; -14 after five
    minutes."""
    pid = os.fork()
    if pid == 0:
        signal.alarm(300)
        os.chdir(folder)
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"{folder}.{name}", os.O_CREAT | os.O_TRUNC | os.O_WRONLY), number)
        torch.set_num_threads(1)
        code = 1
        try:
            act()
            code = 0
        except SystemExit as stop:
            code = stop.code
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def printed(folder):
    return Path(f"{folder}.err").read_text(errors="replace")


def program(words):
    """In the fork: one command. What is drawn of nothing that was read is not drawn."""
    paint_nothing()
    for name in ("draw_figure2", "draw_theorem4", "draw_optimum", "smoothness", "check_theorem4"):
        setattr(landscape, name, lambda *args: "")
    sys.argv = words
    run_cli(SCRIPTS[words[0]].main)


def trial(world, words):
    """(exit code, lines on stderr, {path: what the program wrote})."""
    code = fork(world, lambda: program(words))
    output = world / words[words.index("--output_dir") + 1]
    lines = [line.split("\r")[-1] for line in printed(world).splitlines()]
    lines = [line for line in lines if line.strip() and not NO_FAULT.search(line)]
    paths = [path for path in sorted(output.glob("*.*")) if path.suffix in READERS]
    return code, lines, {path: content(path) for path in paths}


def content(path):
    """A file's bytes; of safetensors those of the tensors alone: metadata come in any order."""
    data = path.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little") if path.suffix == ".safetensors" else 0
    return data[header:]


@functools.cache
def undamaged(whole, world, command):
    """{name: what a command writes where nothing is damaged}."""
    shutil.copytree(whole, world)
    code, lines, written = trial(world, command.split())
    shutil.rmtree(world)
    assert code == 0 and not lines, (command, lines)
    return {path.name: data for path, data in written.items()}


def judge(file, code, lines, written, expected):
    """refused, same, other, or FAILED: why."""
    if code == 2:
        names = {file.name, file.parent.name}
        if file.parent.name == "images":
            names |= {f"row {n} of" for n in range(9)}
        named = len(lines) == 1 and any(name in lines[0] for name in names)
        return "refused" if named else f"FAILED: not one line that names it: {lines[-3:]}"
    if code or lines:
        return f"FAILED: exit code {code}: {lines[-3:]}"
    written = {path: data for path, data in written.items() if path.name != file.name}
    if all(expected.get(path.name) == data for path, data in written.items()):
        return "same"
    if file.suffix in CHECKSUMS:
        return "FAILED: another result, though the file has checksums"
    for path in written:
        fault = READERS[path.suffix](path, expected.get(path.name, b""))
        if fault:
            return f"FAILED: {path.name} {fault}"
    return "other"


def fault_of_picture(path, _):
    pixels = np.array(Image.open(path))
    return "is black or white" if pixels.min() == pixels.max() else None


def fault_of_table(path, expected):
    """Some cells of an undamaged table are NaN, too: an error of one value."""
    before, now = (len(re.findall(rb"\b(?:nan|inf)\b", x)) for x in (expected, path.read_bytes()))
    return f"has {now} nan or inf, not {before}" if now > before else None


def fault_of_weights(path, _):
    finite = all(tensor.isfinite().all() for tensor in load_file(path).values())
    return None if finite else "is not finite"


READERS = {".png": fault_of_picture, ".safetensors": fault_of_weights}
READERS |= {".md": fault_of_table, ".csv": fault_of_table}


def flip(data, rng):
    data[rng.integers(len(data))] ^= 1 << rng.integers(8)


def cut_off(data, rng):
    del data[rng.integers(len(data)) :]


def cut_line(data, rng):
    """Of a binary file some bytes that end with the byte of a line's end."""
    lines = data.splitlines(keepends=True)
    del lines[rng.integers(len(lines))]
    data[:] = b"".join(lines)


def rename(data, rng):
    """A column or key, or any other word near the file's front, of the same length."""
    word = rng.choice([m.start() for m in re.finditer(rb"[A-Za-z_]{4,}", data[:4000])] or [0])
    data[word : word + 1] = b"q"


def empty(data, rng):
    data.clear()


def zero_tail(data, rng):
    start = rng.integers(len(data))
    data[start:] = bytes(len(data) - start)


DAMAGES = (flip, flip, cut_off, cut_line, rename, rename, empty, zero_tail)


if __name__ == "__main__":
    main()
