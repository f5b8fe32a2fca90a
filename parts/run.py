"""A run's folder: what is written there, how --resume reads it, and what a person looks at.

config.json          flags, held-out prompts, versions, commit, device
metrics.jsonl        pandas.read_json(..., lines=True); docs/log.md: what each number means
samples/             epoch_NNN.png: the reference above the aligned model, fixed prompts and seeds
evolution.gif        those pictures, from the first epoch to the last
curves.png table.md  the log as curves; held-out prompts before and after
epochs/              with --eval_interval N: NNN.safetensors, the policy of every N-th epoch
pytorch_lora_weights.safetensors, or unet/ of a --full run: for others
state.pt             for --resume: policy, optimiser, position; every --checkpointing_chunks
"""

import itertools
import json
import math
import os
import shutil
import socket
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock, Timeout
from PIL import Image

from parts import common
from parts.common import UserError, markdown, peak_gb, read_json, write_file
from parts.diversity import FORMULAS
from parts.images import to_pixels
from parts.model import policy_file


class Run:
    """The folder, and the position in the run: optimiser steps, chunks, prompts or pairs seen."""

    def __init__(self, folder, config, rank=0):
        self.folder, self.config, self.rank = folder, config, rank
        self.step = self.chunk = self.seen = 0
        self.config_path, self.state_path = f"{folder}/config.json", f"{folder}/state.pt"
        self.log_path = f"{folder}/metrics.jsonl"

    def begin(self, policy, opt, scaler):
        """Writes a new run's first state or, with --resume, goes on from the one that is there."""
        if self.rank == 0:
            self.lock_folder()
        resume, there = self.config["args"]["resume"], os.path.exists(self.state_path)
        elsewhere = "start again in another --output_dir"
        if resume:
            saved = read_json(self.config_path, "nothing to resume")
            if saved["digest"] != self.config["digest"]:
                what = "the prompts, or the pairs or their images, were edited since this run began"
                raise UserError(f"{self.config_path}: {what}: put them back, or {elsewhere}")
            if not there and os.path.exists(self.log_path):
                raise UserError(f"nothing to resume: {self.state_path} is gone: {elsewhere}")
        if self.rank == 0:
            write_file(self.config_path, json.dumps(self.config, indent=2) + "\n")
        if resume and there:
            self.load(policy, opt, scaler)
            print(f"resumed at optimiser step {self.step}, chunk {self.chunk + 1}")
        else:  # a run that was killed before its first state begins again
            self.save(policy, opt, scaler)

    def lock_folder(self):
        """One process a folder; a lock that its death releases."""
        self.lock = FileLock(f"{self.folder}/lock")
        try:
            self.lock.acquire(timeout=0)
        except Timeout as error:
            who = "another process"
            if os.path.exists(self.config_path):
                who = read_json(self.config_path, "wait").get("process", who)
            fix = "wait for it, or take another --output_dir"
            raise UserError(f"{who} trains in {self.folder!r}: {fix}") from error
        # another process may have begun here since flags.parse looked
        if os.path.exists(self.config_path) and not self.config["args"]["resume"]:
            raise UserError(f"{self.folder!r} already holds a run: take another --output_dir")

    def save(self, policy, opt, scaler):
        """The policy for others, then all that a bit-for-bit continuation needs."""
        if self.rank:
            return
        self.export(policy)
        log = Path(self.log_path)
        state = {
            "policy": policy.state(),
            "optimizer": opt.state_dict(),
            "scaler": scaler.state_dict(),
            "position": [self.step, self.chunk, self.seen],
            "log_bytes": log.stat().st_size if log.exists() else 0,
        }
        write_file(self.state_path, lambda file: torch.save(state, file))

    def export(self, policy):
        """Writes the policy alone: state.pt stays where the chunk began."""
        if self.rank == 0:
            args = self.config["args"]
            about = {k: str(args[k]) for k in ("model", "div", "alpha", "beta", "seed")}
            policy.save(self.folder, about | {"commit": str(self.config["git_commit"])})

    def keep(self, policy, epoch):
        """epochs/NNN.safetensors: that epoch's policy, a LoRA or a whole UNet, for evaluate.py."""
        self.export(policy)
        os.makedirs(f"{self.folder}/epochs", exist_ok=True)
        weights = Path(policy_file(self.folder)).read_bytes()
        write_file(f"{self.folder}/epochs/{epoch:03d}.safetensors", weights)

    def load(self, policy, opt, scaler):
        try:
            if zipfile.ZipFile(self.state_path).testzip():  # torch leaves the checksums alone
                raise zipfile.BadZipFile
            state = torch.load(self.state_path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises many types for a damaged archive
            what = f"{self.state_path} is damaged ({type(error).__name__})"
            raise UserError(f"{what}: start again in another --output_dir") from error
        policy.load_state(state["policy"], self.state_path)
        opt.load_state_dict(state["optimizer"])
        for group in opt.param_groups:
            if "fused" in group:  # as suits this device, not the one of the run so far
                group["fused"] = opt.defaults["fused"]
        scaler.load_state_dict(state["scaler"])
        self.step, self.chunk, self.seen = state["position"]
        if self.rank == 0 and os.path.exists(self.log_path):
            # what was logged after the state is logged again when its chunk is replayed
            size = os.path.getsize(self.log_path)
            os.truncate(self.log_path, min(state["log_bytes"], size))
            read_log(self.folder, "step")  # or a damaged line would be met when all is done

    def log(self, kind, **record):
        """Appends a line to metrics.jsonl."""
        if self.rank:
            return
        line = json.dumps({"kind": kind, "step": self.step, "rollout": self.chunk} | record)
        try:
            with open(self.log_path, "a") as file:
                file.write(line + "\n")
        except OSError as error:
            why = f"cannot write {self.log_path} ({error.strerror})"
            raise UserError(f"{why}: free some space, then --resume") from error

    def log_rollout(self, epoch, pairs, seconds):
        """Returns what the progress bar says of it. Raises UserError if no score is finite."""
        scores, last = (x[x.isfinite()] for x in (pairs.scores, pairs.scores[-1]))
        if len(scores) == 0:
            fix = "try --mixed_precision bf16, or another --judge"
            raise UserError(f"none of the judge's scores is finite: {fix}")
        mean, std, final = scores.mean().item(), scores.std().item(), last.mean().item()
        clear, candidates = len(pairs.t), pairs.scores[..., 0].numel()
        record = dict(judge_mean=mean, judge_std=std, judge_final=final, seconds=seconds)
        record |= dict(pairs=clear, valid=clear / candidates, peak_gb=peak_gb(pairs.t.device))
        self.log("rollout", epoch=epoch, **record)
        if clear == 0 and self.rank == 0:
            what = f"rollout {self.chunk + 1}: no valid pair, nothing to learn from"
            print(f"\n{what} (judge std {std:.3g}; try a lower --threshold)", file=sys.stderr)
        return f"judge {final:.2f}"

    def log_step(self, stats, grad_norm, learning_rate, seconds):
        """stats: {name: (n,)} of the step's pairs. Returns what the progress bar says of it."""
        record = means(stats) | dict(pairs=len(stats["loss"]), lr=learning_rate, seconds=seconds)
        record["grad_norm"] = grad_norm if math.isfinite(grad_norm) else None
        self.log("step", **record)
        return f"step {self.step}, accuracy {record['accuracy']:.2f}"

    def log_eval(self, epoch, judge, prompts, images):
        """What the held-out prompts' pictures (P, K, 3, H, W) are like, prompt by prompt."""
        start = {} if epoch else dict(step=0, rollout=0)  # the reference may be painted at the end
        values = values_per_prompt(judge, prompts, images)
        self.log("eval", epoch=epoch, **start, values=values)

    def save_table(self, count):
        """table.md, printed: the first and the last epoch of those evaluated, count images each."""
        evaluated = read_evaluated(self.folder)
        first, last = evaluated[min(evaluated)], evaluated[max(evaluated)]
        table, changes = before_after_table(first, last, count)
        write_file(f"{self.folder}/table.md", table)
        self.log("table", figures=changes)
        print(f"\n{table}(+- is the standard error over prompts; of the change, of the paired")
        print("difference. It does not see the noise of training: run other seeds for that.)")

    def check_finite(self, stats, grad_norm, scaler):
        """Raises UserError, naming step, timestep and ratio, before a weight is broken."""
        broken = ~stats["loss"].isfinite()
        # a loss can saturate while its gradient overflows; in fp16 the scaler sees to the latter
        if not broken.any() and (scaler.is_enabled() or math.isfinite(grad_norm)):
            return
        worst = broken if broken.any() else stats["log_X_w"].abs() == stats["log_X_w"].abs().max()
        t, X_w, X_l = (stats[name][worst][0].item() for name in ("t", "X_w", "X_l"))
        why = f"loss or gradient is not finite at optimiser step {self.step + 1}, timestep {t:g}, "
        why += f"X_w {X_w:g}, X_l {X_l:g}"
        self.log("error", message=why)
        fix = "lower --learning_rate or --beta, or keep the clip"
        raise UserError(f"{why}: {fix}; the last checkpoint is in {self.folder}")


def means(stats):
    """Means over the pairs, and over each quarter of the timesteps: loss_q1 (0..249) .. loss_q4."""
    quarter = (stats["t"] // 250).clamp(max=3)
    record = {}
    for name, values in stats.items():
        if name == "t":
            continue
        record[name] = values.mean().item()
        for q in range(4):
            here = values[quarter == q]
            record[f"{name}_q{q + 1}"] = here.mean().item() if len(here) else None
    return record


def environment(device):
    """What config.json says of the machine and the code."""
    import diffusers
    import transformers

    libraries = dict(torch=torch, diffusers=diffusers, transformers=transformers)
    versions = {name: library.__version__ for name, library in libraries.items()}
    name = f"cpu, {torch.get_num_threads()} threads"
    if device.startswith("cuda"):
        name = torch.cuda.get_device_name(device)
    commit = None  # where there is no git, or no repository
    if shutil.which("git"):
        command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
        options = dict(cwd=Path(__file__).parent, capture_output=True, text=True)
        commit = subprocess.run(command, **options).stdout.strip() or None
    process = f"process {os.getpid()} on {socket.gethostname()}"
    return {"versions": versions, "git_commit": commit, "device": name, "process": process}


def save_pictures(folder, prompts, reference, images, epoch):
    """samples/epoch_NNN.png, and evolution.gif anew. reference, images: (P, n, 3, H, W)."""
    rows = []
    for p, prompt in enumerate(prompts):
        rows.append((f"{prompt}   [reference]", reference[p]))
        rows.append((f"{prompt}   [aligned, epoch {epoch}]", images[p]))
    cell = 96 if images.shape[-1] < 128 else 256
    common.labelled_grid(rows, f"{folder}/samples/epoch_{epoch:03d}.png", cell)
    frames = []
    for path in sorted(Path(folder, "samples").glob("*.png")):
        frame = Image.open(path)
        frame.thumbnail((640, 640))
        frames.append(frame.quantize(64))
    options = dict(save_all=True, append_images=frames[1:], duration=600, loop=0)
    path = f"{folder}/evolution.gif"
    write_file(path, lambda file: frames[0].save(file, "GIF", **options))


def read_log(folder, kind):
    path = f"{folder}/metrics.jsonl"
    fix = "delete that file and --resume, which goes on; a cut end --resume mends itself"
    records = read_json(path, fix) if os.path.exists(path) else []
    return [record for record in records if record["kind"] == kind]


def read_evaluated(folder):
    """{epoch: {metric: P values}} of the lines of kind eval."""
    return {line["epoch"]: line["values"] for line in read_log(folder, "eval")}


def running_mean(values, width=9):
    """(n,) -> (n,), over fewer values at the ends."""
    window = np.ones(min(width, len(values)))
    return np.convolve(values, window, "same") / np.convolve(np.ones(len(values)), window, "same")


def draw_curves(folder):
    """curves.png: whether the judge (with --pairs the margin) rose, what the loss did, and the
    judge's mean over the held-out prompts."""
    from matplotlib.figure import Figure

    lines = {kind: read_log(folder, kind) for kind in ("step", "rollout")}
    if not lines["step"]:
        return
    first = ("rollout", "judge_final") if lines["rollout"] else ("step", "margin")
    panels = [first, *(("step", key) for key in ("loss", "accuracy", "clip_fraction"))]
    figure = Figure((18, 3.2), layout="constrained")
    axes = figure.subplots(1, 5)
    for ax, (kind, key) in zip(axes, panels):
        x, values = zip(*[(record["step"], record[key]) for record in lines[kind]])
        ax.plot(x, values, ".", ms=3, color="#bbbbbb")
        ax.plot(x, running_mean(values), color="#2166ac")
        ax.set(title=key, xlabel="optimiser step")
    axes[1].axhline(math.log(2), ls=":", color="black", lw=1)  # where the policy is the reference
    axes[2].axhline(0.5, ls=":", color="black", lw=1)  # where the pairs' order is a guess
    evaluated = read_evaluated(folder)
    metric = next(iter(evaluated[0]))
    means = [np.nanmean(np.array(values[metric], dtype=float)) for values in evaluated.values()]
    axes[4].plot(evaluated.keys(), means, "o-", color="#2166ac")
    axes[4].set(title=f"held-out prompts: {metric}", xlabel="epoch")
    common.save_figure(figure, f"{folder}/curves.png")


def values_per_prompt(judge, prompts, images):
    """{metric: P values} of images (P, K, 3, H, W), as 8-bit files hold them: means over a prompt's
    K images, or over each two of them; None where no value is finite. judge None: no scores."""
    P, K = images.shape[:2]
    pictures = common.to_8_bits(images)  # (P, K, H, W, 3)
    flat = to_pixels(pictures.flatten(0, 1)).contiguous()  # (P K, 3, H, W)
    values = {}  # {metric: P rows}
    if judge:
        text = judge.encode(prompts).repeat_interleave(K, 0)
        scores = [judge(x, y).float().cpu() for x, y in zip(flat.split(16), text.split(16))]
        values[judge.name] = torch.cat(scores).view(P, K)
    if hasattr(judge, "report"):
        each = [prompt for prompt in prompts for _ in range(K)]
        values |= {name: x.view(P, K) for name, x in judge.report(flat, each).items()}
    for metric, (prepare, compare) in FORMULAS.items():
        rows = [[prepare(picture) for picture in row] for row in pictures]
        if compare:
            rows = [[compare(*two) for two in itertools.combinations(row, 2)] for row in rows]
        values[metric] = rows
    result = {}
    for metric, rows in values.items():
        rows = [[float(x) for x in row if math.isfinite(x)] for row in rows]
        if any(rows):  # not of captions that a checker cannot read, nor of one image a prompt
            result[metric] = [sum(row) / len(row) if row else None for row in rows]
    return result


def before_after_table(before, after, count):
    """(Markdown, {metric: {before, after, change, se}}) of two values_per_prompt of the same
    prompts and seeds. +- is the standard error over prompts; of the change, of its paired mean."""
    prompts = len(next(iter(before.values())))
    lacking = [None] * prompts
    head = f"{prompts} held-out prompts x {count} images"
    rows, figures = [[head, "before", "after", "change", "change / its error"]], {}
    for name in before:
        # equal pictures have no PSNR
        old, new = (np.array(values.get(name, lacking), dtype=float) for values in (before, after))
        cells, numbers = [name], []
        for values, sign in ((old, ""), (new, ""), (new - old, "+")):
            values = values[~np.isnan(values)]
            mean = values.mean() if len(values) else math.nan
            error, spread = math.nan, ""
            if len(values) > 1:
                error = values.std(ddof=1) / math.sqrt(len(values))
                spread = f" +- {error:#.3g}"
            cells.append(f"{mean:{sign}#.4g}{spread}")
            numbers.append(float(mean))
        rows.append([*cells, f"{mean / error:+.1f}" if error > 0 else "-"])
        figures[name] = dict(zip(("before", "after", "change"), numbers), se=float(error))
    return markdown(rows), figures
