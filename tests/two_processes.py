"""Two processes at once in one folder: no lost column, no mixed run, no stale lock.

python tests/two_processes.py --trials 30 --seed 0        some minutes of one core

Exit code 1 if any trial failed.
"""

import argparse
import functools
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

import fuzz
import numpy as np
from child import Child
from conftest import paint_nothing
from safetensors import safe_open


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("trials", 30), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args, failures = parser.parse_args(), 0
    with tempfile.TemporaryDirectory() as home:
        world, copy = Path(home, "world"), Path(home, "copy")
        fuzz.build(world)
        for number in range(args.trials):
            rng = np.random.default_rng((args.seed, number))
            trial = TRIALS[number % len(TRIALS)]
            shutil.copytree(world, copy)
            try:
                trial(copy, rng)
                outcome = "as it should be"
            except AssertionError as error:
                outcome, failures = f"FAILED: {error}", failures + 1
            print(f"{number} {trial.__name__}: {outcome}", flush=True)
            shutil.rmtree(copy)
    print(f"{args.trials} trials, {failures} failures")
    sys.exit(1 if failures else 0)


def start(folder, command, kill=None):
    """A command that runs in FOLDER. kill: of child.Child."""
    return Child(*command.split(), kill=kill, change=functools.partial(enter, folder))


def enter(folder):
    os.chdir(folder)
    paint_nothing()


def both(folder, rng, *commands):
    """The exit codes and outputs of two commands, the second some moments after the first."""
    first = start(folder, commands[0])
    time.sleep(rng.choice([0, 0, rng.uniform(0, 3)]))
    second = start(folder, commands[1])
    return list(zip(*[child.wait() for child in (first, second)]))


def two_trainings(folder, rng):
    """One of them trains; the other is refused in one line."""
    command = f"{fuzz.TRAIN} --model micro --num_epochs 2 {fuzz.SMALL} out --seed"
    codes, printed = both(folder, rng, f"{command} 1", f"{command} 2")
    assert sorted(codes) == [0, 2], printed
    (refused,) = [text for code, text in zip(codes, printed) if code == 2]
    line = refused.strip().splitlines()[-1]
    assert "trains in" in line or "already holds a run" in line, refused
    assert "Traceback" not in refused, refused
    check_run(folder / "out", 8)


def two_resumed(folder, rng):
    """The same, but where the first has ended already, the second finds nothing to do."""
    command = "train.py --resume --num_epochs 4 --output_dir run1"
    codes, printed = both(folder, rng, command, command)
    assert sorted(codes) in ([0, 2], [0, 0]), printed
    for code, text in zip(codes, printed):
        assert "Traceback" not in text and (code == 0 or "trains in" in text), text
    check_run(folder / "run1", 16)


def two_evaluations(folder, rng):
    """Each with metrics of its own: the tables have the columns of both."""
    command = f"evaluate.py run1 --images_per_prompt 2 {fuzz.SMALL} out"
    first = f"{command} --judges taste --metrics none --batch_size 1"
    second = f"{command} --judges none --metrics rmse entropy_1d --batch_size 3"
    codes, printed = both(folder, rng, first, second)
    assert codes == (0, 0), printed
    summary = (folder / "out/summary.csv").read_text()
    for metric in ("taste", "rmse", "entropy_1d"):
        assert summary.count(f",{metric},") == 2, summary


def a_killed_holder(folder, rng):
    """Its lock ends with it: --resume goes on at once."""
    at_call = int(rng.integers(1, 9))
    command = f"{fuzz.TRAIN} --model micro --num_epochs 2 {fuzz.SMALL} out"
    code, printed = start(folder, command, kill=("KILL", "train", "alignment_loss", at_call)).wait()
    assert code == -9, printed
    code, printed = start(folder, "train.py --resume --output_dir out").wait()
    assert code == 0, printed
    check_run(folder / "out", 8)


def check_run(folder, steps):
    """Every step stands once in the log, and weights and config are of one run."""
    log = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    logged = [line["step"] for line in log if line["kind"] == "step"]
    assert logged == list(range(1, steps + 1)), logged
    config = json.loads((folder / "config.json").read_text())["args"]
    with safe_open(folder / "pytorch_lora_weights.safetensors", "pt") as file:
        assert file.metadata()["seed"] == str(config["seed"])
    assert (folder / "table.md").exists()


TRIALS = (two_trainings, two_resumed, two_evaluations, a_killed_holder)


if __name__ == "__main__":
    main()
