"""
Preference alignment of a text-to-image diffusion model under any f-divergence: the whole loop, plainly.

    python train.py --div js                                the main job: the toy on a laptop (2 cores: 4 minutes, taste
                                                            of held-out prompts 3.6 -> 11), SD1.5 where there is CUDA
    python train.py --div alpha --alpha 0.4 --seed 1        another divergence, another seed
    python train.py --div js --resume                       go on where a run was stopped or killed
    python train.py --div js --model DIR --prompts my.txt --judge pickscore     your model, prompts, judge
    python train.py --div js --pairs DIR                    preference pairs of your own (pairs.py) in place of a judge
    torchrun --standalone --nproc_per_node=4 train.py --div js --gradient_accumulation_steps 1     SPO's four GPUs

The method is SPO (arXiv 2406.04314) with the loss of arXiv 2409.09774: every denoising step is a choice between
children of one x_t, and loss = -log sigmoid(beta f'(X_w) - beta f'(X_l)), X = p_theta / p_ref of that step. With --pairs
it is the same loss on finished images, where log X is Diffusion-DPO's bound (arXiv 2311.12908).

As SPO: K = 4 children from step 4 of 20 on, best against worst, a random child goes on, guidance in sampling and in
training, LoRA of rank 4, AdamW, X clamped to [0.9, 1.1], log-ratios averaged over the latent.
Different on purpose:
  1. one policy and one reference prediction per pair, not two of each: the same gradient at half the cost;
  2. the reference is the same UNet with its LoRA off, not a second UNet;
  3. gradient clipping clips (SPO's never did: its parameters were a used-up iterator); --max_grad_norm 0 is SPO as run;
  4. a short last group of pairs weighs in the gradient by its size;
  5. on one GPU, four accumulated batches of 10 pairs stand for SPO's four GPUs;
  6. every random number is a function of --seed and the rollout (and rank; with --pairs, of the epoch and the pair), so --resume
     needs no generator's state.
"""
import argparse
import hashlib
import io
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import torch

from toy import world as toy
from divergences import NAMES, get_divergence
from evaluate import before_after, hold_out, paint, peak_gb, per_prompt
from parts.judges import JUDGES, load_judge
from parts.weights import find_spo_prompts
from loss import CLIPS, REDUCE, alignment_loss, noise_log_ratio, step_log_ratios
from parts.pairs import open_pairs
from parts.ranks import World, no_pairs
from sample import (SD15, TOY, Pairs, Parser, UserError, add_lora, as_reference, collect_pairs, compile_pipeline, encode_prompts,
                    labelled_grid, load_pipeline, load_preview, make_folder, pick_device, policy_state, predict_noise, progress_bar,
                    read_prompts, resolve_model, run_cli, save_policy, set_policy, train_all, write_file)

FREE_ON_RESUME = ("resume", "weights", "output_dir", "num_epochs", "max_train_steps", "checkpointing_steps", "device", "cache_dir",
                  "pairs")  # the last by its content: see split_pairs
PAIRS_PRESET = dict(beta=5.0, clip="none")  # Diffusion-DPO's, whose code says 5000 where S = 1000 is not drawn out; no clamp
FULL_PRESET = dict(checkpointing_steps=500, learning_rate=2e-5)  # a state of SD1.5 is 14 GB; the rate is Diffusion-DPO's
NOT_WITH_PAIRS = ("sample_batch_size", "num_children", "first_step", "threshold", "eta", "preview_decoder")


def build_parser(preset):
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    def flag(name, default, help, **kw):
        default = preset.get(name, default)
        text = help if isinstance(default, bool) or default is None else f"{help} (default: {default})"
        p.add_argument(f"--{name}", default=default, help=text.replace("%", "%%"), **(kw if "action" in kw else {"type": type(default)} | kw))
    on = dict(action="store_true")
    # what to align, and to what
    flag("div", "js", "divergence: " + ", ".join(NAMES))
    flag("alpha", None, "of --div alpha, strictly between 0 and 1; the paper: 0.2, 0.4, 0.6, 0.8", type=float)
    flag("beta", 10.0, "strength of the divergence in the loss, not scaled behind your back")
    flag("match_curvature", False, "divide beta by f''(1), so that all divergences pull equally near X = 1", **on)
    flag("clip_range", 0.1, "c of the clamp of X to [1-c, 1+c]")
    flag("clip", "ratio", "ratio: SPO's clamp; onesided: pairs on the wrong side keep their gradient; none", choices=CLIPS)
    flag("log_ratio", "mean", "log X as the mean or the sum over the latent's dimensions", choices=REDUCE)
    flag("model", "auto", "auto, toy, a diffusers folder or a hub id")
    flag("judge", "auto", "auto, " + ", ".join(JUDGES))
    flag("weights", None, "a folder with the judge's weights, in place of the hub (judges.py says how)", type=str)
    flag("preview_decoder", None, "a tiny autoencoder (madebyollin/taesd) that decodes for the judge: faster, not equivalent; its agreement "
         "with the VAE is logged", type=str)
    flag("pairs", None, "preference pairs of your own: a folder with pairs.csv or .jsonl, or a .parquet file (pairs.py)", type=str)
    flag("skip_bad", False, "leave out pairs whose images are missing or damaged", **on)
    flag("cache_dir", os.path.join("out", "latents"), "where --pairs keeps encoded images, for all runs (SD1.5: 64 KB each)")
    flag("prompts", None, "a .txt file, one prompt a line, or .json, .jsonl, .csv (default: the toy's own; for SD1.5 SPO's 4,000, "
         "downloaded once); with --pairs: of the pictures and the table (default: held-out captions)", type=str)
    # sampling
    flag("num_epochs", 10, "passes over the prompts, or over --pairs")
    flag("sample_batch_size", 10, "prompts a rollout, on every rank")
    flag("num_children", 4, "K: children of one x_t, at least 2")
    flag("first_step", 4, "the first step with children; earlier steps have one")
    flag("threshold", 0.3, "a pair counts if softmax([best, worst]) differs by more")
    flag("num_inference_steps", 20, "DDIM steps")
    flag("eta", 1.0, "DDIM noise; above 0, since children differ by it alone")
    flag("guidance_scale", 5.0, "in sampling and in training, with --pairs in pictures alone; <= 1 is none")
    # training
    flag("train_batch_size", 10, "pairs a backward pass, on every rank")
    flag("gradient_accumulation_steps", 4, "backward passes an optimiser step")
    flag("learning_rate", 6e-5, "AdamW, constant")
    flag("adam_weight_decay", 1e-4, "AdamW's")
    flag("max_grad_norm", 1.0, "0: no clipping")
    flag("rank", 4, "of the LoRA; alpha = rank")
    flag("full", False, "train all weights of the UNet, in fp32, with a frozen copy as the reference, in place of a LoRA", **on)
    flag("mixed_precision", "auto", "of the frozen weights and activations; auto: bf16 on CUDA, no elsewhere",
         choices=("auto", "bf16", "fp16", "no"))
    flag("gradient_checkpointing", False, "less memory, a third more time", **on)
    flag("compile", False, "torch.compile of UNet, VAE decoder and judge, for batches of fixed size", **on)
    flag("device", "auto", "auto, cpu, cuda, cuda:1")
    # the run
    flag("seed", 0, "of everything random")
    flag("max_train_steps", 0, "stop after this many optimiser steps; 0: at the end of the epochs")
    flag("checkpointing_steps", 20, "optimiser steps between checkpoints")
    flag("num_eval_prompts", 32, "prompts held out of training for the table at the end, at most half")
    flag("images_per_prompt", 4, "of that table")
    flag("output_dir", None, "the run's folder (default: out/<model>-<div>, or -<div>-pairs)", type=str)
    flag("resume", False, "go on with the run in output_dir; flags left out are the run's own", **on)
    return p


def parse(argv):
    """Flags -> (args, where the model is, why). The toy's preset replaces a few defaults, so --help shows those in force."""
    first = Parser(add_help=False)
    first.add_argument("--model", default="auto")
    first.add_argument("--pairs")
    first.add_argument("--full", action="store_true")
    known, _ = first.parse_known_args(argv)
    where, why = resolve_model(known.model)
    is_toy = os.path.realpath(where) == TOY
    preset = {}
    for wanted, values in ((known.full, FULL_PRESET), (is_toy, toy.PRESET), (known.pairs, PAIRS_PRESET), (is_toy and known.pairs, toy.PAIRS_PRESET),
                           (is_toy and known.full, toy.FULL_PRESET)):
        preset |= values if wanted else {}
    parser = build_parser(preset)
    args = parser.parse_args(argv)
    untyped = argparse.Namespace(**dict.fromkeys(vars(args), missing := object()))
    typed = {k: v for k, v in vars(parser.parse_args(argv, untyped)).items() if v is not missing}
    if args.output_dir is None:
        tag = args.div + (f"{args.alpha:g}" if args.alpha is not None else "") + ("-pairs" if args.pairs else "")
        args.output_dir = os.path.join("out", f"{os.path.basename(where.rstrip('/'))}-{tag}")
    args.model = "toy" if is_toy else where
    if args.judge == "auto":
        args.judge = "taste" if is_toy else "none" if args.pairs else "step_aware"
    if args.resume:
        args = resumed_args(args, typed)
    idle = [k for k in NOT_WITH_PAIRS if args.pairs and k in typed]
    if idle:
        raise UserError(f"--{idle[0]} is about sampling pairs, and --pairs has them already: leave one of the two out")
    return args, why


def resumed_args(args, typed):
    """The settings of the run in output_dir; raises UserError if there is none or if a typed flag contradicts it."""
    path = os.path.join(args.output_dir, "config.json")
    try:
        with open(path) as f:
            saved = json.load(f)["args"]
    except (OSError, ValueError, KeyError) as e:
        raise UserError(f"nothing to resume in {args.output_dir!r} (no readable config.json): drop --resume, or give the "
                        "run's folder with --output_dir") from e
    now = vars(args)
    free = [k for k in FREE_ON_RESUME if k != "pairs" or saved.get(k)]
    other = [k for k in typed if k not in free and k in saved and saved[k] != now[k]]
    if other:
        raise UserError("--resume with different settings: " + ", ".join(f"{k} was {saved[k]}, now {now[k]}" for k in other)
                        + "; leave them out, or start another run with another --output_dir")
    return argparse.Namespace(**{**now, **saved, **{k: now[k] for k in typed if k in FREE_ON_RESUME},
                                 "resume": True, "output_dir": args.output_dir})


def validate(args):
    """Every flag checked before anything is loaded or written; raises UserError. Returns (divergence, effective beta)."""
    try:
        div = get_divergence(args.div, args.alpha)
    except ValueError as e:
        raise UserError(f"--div {args.div}: {e}") from e
    need = [
        *((math.isfinite(v), f"--{k} must be a finite number, got {v}") for k, v in vars(args).items() if isinstance(v, float)),
        (args.judge in JUDGES or args.pairs and args.judge == "none",
         f"unknown judge {args.judge!r}: choose one of {', '.join(JUDGES)}" + (", none" if args.pairs else "")),
        (args.beta > 0, f"--beta must be positive, got {args.beta}"),
        (0 < args.clip_range < 1, f"--clip_range must lie strictly between 0 and 1, got {args.clip_range}"),
        (1 <= args.num_inference_steps <= 500, f"--num_inference_steps must lie in 1..500, got {args.num_inference_steps}"),
        *([] if args.pairs else [
            (args.num_children >= 2, f"--num_children must be at least 2 (a pair needs two), got {args.num_children}"),
            (0 <= args.first_step < args.num_inference_steps,
             f"--first_step must be below --num_inference_steps ({args.num_inference_steps}), got {args.first_step}"),
            (0 <= args.threshold < 1, f"--threshold is a difference of probabilities, in [0, 1), got {args.threshold}"),
            (args.eta > 0, f"--eta must be positive: without noise all children are the same, got {args.eta}")]),
        (args.learning_rate > 0, f"--learning_rate must be positive, got {args.learning_rate}"),
        (args.adam_weight_decay >= 0, f"--adam_weight_decay must be at least 0, got {args.adam_weight_decay}"),
        (args.max_grad_norm >= 0, f"--max_grad_norm must be at least 0, got {args.max_grad_norm}"),
        (args.seed >= 0, f"--seed must be at least 0, got {args.seed}"),
        *((getattr(args, k) >= 1, f"--{k} must be at least 1, got {getattr(args, k)}") for k in (
            "num_epochs", "sample_batch_size", "train_batch_size", "gradient_accumulation_steps", "rank",
            "checkpointing_steps", "images_per_prompt", "num_eval_prompts"))]
    for ok, message in need:
        if not ok:
            raise UserError(message)
    return div, args.beta / div.curvature if args.match_curvature else args.beta


def split_pairs(args, pipe, quiet=False):
    """(PairSet to train on, held-out captions); no pair of a held-out caption is trained on. --prompts FILE names them itself."""
    data = open_pairs(args.pairs, pipe, args.cache_dir, args.skip_bad, args.seed, quiet)
    captions = list(dict.fromkeys(data.captions))
    held = read_prompts(args.prompts)[:args.num_eval_prompts] if args.prompts else hold_out(captions, args.num_eval_prompts)[1]
    if not held:
        print("one caption: none is held out, the table at the end is about it")
        held = captions
    digest = hashlib.sha256((data.digest + json.dumps(held)).encode()).hexdigest()
    if args.resume and getattr(args, "pairs_sha256", digest) != digest:
        raise UserError("the pairs, their images or --prompts were edited since this run began: put them back, or start another run with "
                        "another --output_dir")
    args.pairs_sha256 = digest
    rest = data.without(held)
    if not len(rest) and len(captions) > 1:
        raise UserError(f"{args.prompts} names every caption of the pairs, and those are held out: leave some to train on")
    return (rest if len(rest) else data), held


def split_prompts(args):
    """(training prompts, held-out prompts): held out evenly through the file, whatever the seed, so runs compare."""
    if args.prompts:
        prompts = read_prompts(args.prompts)
    elif args.model == "toy":
        prompts = toy.prompts()
    elif args.model == SD15:
        prompts = read_prompts(find_spo_prompts(args.weights))
    else:
        raise UserError("this model needs --prompts FILE: a text file with one prompt a line, or SPO's 4k_training_prompts.json")
    digest = hashlib.sha256("\n".join(prompts).encode()).hexdigest()
    if args.resume and getattr(args, "prompts_sha256", digest) != digest:
        raise UserError("the prompts were edited since this run began: put them back, or start another run with another --output_dir")
    args.prompts_sha256 = digest
    if len(set(prompts)) < 2:
        print("one prompt: none is held out, the table at the end is about the training prompts")
        return prompts[:1], prompts[:1]
    return hold_out(prompts, args.num_eval_prompts)


# ---------------------------------------------------------------------------------------------------------------
# One step

def pair_loss(pipe, pairs, index, null, div, beta, args):
    """Eq. 5 on some pairs of a rollout. Winner and loser share x_t, t and prompt, so one prediction of either policy serves both."""
    if args.pairs:
        return image_pair_loss(pipe, pairs, index, div, beta, args)
    x_t, t, text = pairs.x_t[index], pairs.t[index], pairs.text[pairs.prompt[index]]
    eps = predict_noise(pipe.unet, x_t, t, text, null, args.guidance_scale)           # (B, 4, h, w)
    with torch.no_grad(), as_reference(pipe):
        eps_ref = predict_noise(pipe.unet, x_t, t, text, null, args.guidance_scale)
    u_w, u_l = step_log_ratios(eps, eps_ref, x_t, pairs.x_w[index], pairs.x_l[index], t, pipe.scheduler.alphas_cumprod,
                               args.num_inference_steps, args.eta, args.log_ratio)
    loss, stats = alignment_loss(u_w, u_l, div, beta, args.clip_range, args.clip)
    return loss, stats | {"t": t}


def image_pair_loss(pipe, data, index, div, beta, args):
    """Eq. 5 on some pairs of finished images (pairs.py): winner and loser under one noise, no guidance, t of all T."""
    *tensors, captions, weight = data.batch(index, len(pipe.scheduler.alphas_cumprod))
    device = pipe.unet.device
    x_w, x_l, eps, t, weight = (x.to(device) for x in (*tensors, weight))
    a = pipe.scheduler.alphas_cumprod.to(t.device)[t].view(-1, 1, 1, 1)
    both, B = lambda x: torch.cat([x, x]), len(t)
    x_t = a.sqrt().repeat(2, 1, 1, 1) * torch.cat([x_w, x_l]) + both((1 - a).sqrt() * eps)   # (2B, 4, h, w)
    rows = x_t, both(t), both(encode_prompts(pipe, captions)), None, 0.0
    eps_hat = predict_noise(pipe.unet, *rows)
    with torch.no_grad(), as_reference(pipe):
        eps_ref = predict_noise(pipe.unet, *rows)
    u = noise_log_ratio(eps_hat, eps_ref, both(eps), len(pipe.scheduler.alphas_cumprod), args.log_ratio)
    loss, stats = alignment_loss(u[:B], u[B:], div, beta, args.clip_range, args.clip, weight)
    return loss, stats | {"t": t}


def optimiser_step(pipe, pairs, group, null, div, beta, args, params, opt, scaler, world=None):
    """Accumulates the mean loss of a group of pairs, clips, steps. Returns (stats of every pair, grad norm).

    Of several ranks each takes every size-th pair of the group, which is that much larger, and the gradients are summed:
    the mean over all pairs of all ranks, whoever had how many.

    A short last group is divided by the full group's size, so that each pair of a rollout has the same weight in the
    gradient (AdamW forgives most of a gradient's scale, but its moments remember who was small).
    """
    world = world or World()
    full = args.train_batch_size * args.gradient_accumulation_steps * world.size
    mine, stats = group[world.rank::world.size], []
    scaler.scale(torch.zeros(1, device=pipe.unet.device))  # makes its scale known to a rank without a pair, too
    for index in mine.split(args.train_batch_size) if len(mine) else ():
        loss, s = pair_loss(pipe, pairs, index, null, div, beta, args)
        if not torch.isfinite(loss):
            i = int((~torch.isfinite(s["loss"])).nonzero()[0])
            raise FloatingPointError(f"timestep {int(s['t'][i])}, X_w {float(s['X_w'][i]):g}, X_l {float(s['X_l'][i]):g}")
        scaler.scale(loss * (len(index) / full)).backward()
        stats.append(s)
    world.sum_gradients(params)
    scaler.unscale_(opt)
    norm = torch.nn.utils.clip_grad_norm_(params, args.max_grad_norm or math.inf)
    if not scaler.is_enabled() and not torch.isfinite(norm):  # the loss can saturate to 0 while its gradient overflows
        raise FloatingPointError(f"gradient norm {norm.item()}, timesteps {sorted({int(t) for s in stats for t in s['t']})}, "
                                 f"X_w up to {max((s['X_w'].max().item() for s in stats), default=math.nan):g}")
    scaler.step(opt)    # skipped by the scaler if fp16 gradients overflowed
    scaler.update()
    opt.zero_grad(set_to_none=True)
    return _join_stats(stats, len(group), world), norm.item()


def _join_stats(stats, n, world):
    """[{name: (n_i,)}] of this rank's batches -> {name: (n,)} over all ranks, in the group's order, on the CPU."""
    if world.size == 1:
        return {k: torch.cat([s[k] for s in stats]).cpu() for k in stats[0]}
    names = ("loss", "margin", "accuracy", "log_X_w", "log_X_l", "X_w", "X_l", "clip_fraction", "t")
    table = torch.cat([torch.zeros(0, len(names)), *(torch.stack([s[k].float().cpu() for k in names], 1) for s in stats)])
    where = torch.cat([torch.arange(n)[r::world.size] for r in range(world.size)])  # row i of the union is pair where[i]
    return dict(zip(names, world.join_rows(table)[where.argsort()].unbind(1)))


def step_record(stats):
    """Means over the step's pairs, and over each quarter of the timesteps: loss_q1 (t 0..249) .. loss_q4 (750..999)."""
    stats = dict(stats)
    quarter = (stats.pop("t") // 250).clamp(max=3)
    record = {k: v.mean().item() for k, v in stats.items()}
    for q in range(4):
        here = quarter == q
        record |= {f"{k}_q{q + 1}": v[here].mean().item() if here.any() else None for k, v in stats.items()}
    return record


# ---------------------------------------------------------------------------------------------------------------
# The run's folder

class Run:
    """config.json, metrics.jsonl, samples/, the policy and state.pt: whatever a run leaves, and how it comes back."""

    def __init__(self, args, pipe, params, opt, scaler):
        self.args, self.pipe, self.params, self.opt, self.scaler = args, pipe, params, opt, scaler
        self.folder, self.stop = args.output_dir, False
        self.rollout = self.step = self.seen = 0     # seen: prompts of all finished rollouts, or --pairs trained on, the epochs' in a row
        self.done = 0                                # pairs of this rollout already trained on
        self.pairs = self.order = self.preview = None
        self.data = self.held_out = None             # of --pairs
        self.world = World()
        self.log_path, self.state_path = (os.path.join(self.folder, f) for f in ("metrics.jsonl", "state.pt"))

    def begin(self, held_out):
        config = {"args": vars(self.args), "held_out": held_out, "command": " ".join(sys.argv), "versions": versions(), "git_commit": git_commit(),
                  "device": device_name(self.pipe.unet.device)}
        there = os.path.exists(self.state_path)
        self.world.any(False)  # nobody writes before all have looked
        if self.args.resume and there:
            self.load()
            self.world.any(False)
        elif self.args.resume and os.path.exists(self.log_path):
            raise UserError(f"nothing to resume in {self.folder!r}: its state.pt is gone; start again in another --output_dir")
        if self.world.rank:
            return
        write_file(os.path.join(self.folder, "config.json"), (json.dumps(config, indent=2) + "\n").encode())
        if not os.path.exists(self.state_path):
            self.save()

    def save(self):
        """The policy for others, then all that a bit-for-bit continuation needs, its own copy of the policy included."""
        if self.world.rank:
            return
        policy = policy_state(self.pipe)
        pairs = None if self.pairs is None else vars(self.pairs)
        state = {"policy": policy, "optimizer": self.opt.state_dict(), "scaler": self.scaler.state_dict(),
                 "rollout": self.rollout, "seen": self.seen, "step": self.step, "done": self.done, "pairs": pairs, "order": self.order,
                 "log_bytes": os.path.getsize(self.log_path) if os.path.exists(self.log_path) else 0}
        save_policy(self.pipe, self.folder, policy)
        write_file(self.state_path, lambda f: torch.save(state, f))

    def load(self):
        try:
            state = torch.load(self.state_path, map_location="cpu", weights_only=True)
        except Exception as e:  # torch raises many types for a damaged archive
            raise UserError(f"{self.state_path} is damaged ({type(e).__name__}): start again in another --output_dir") from e
        if "policy" not in state:
            raise UserError(f"{self.state_path} was written by an earlier version of this code: go on with that one, or start again in "
                            "another --output_dir")
        set_policy(self.pipe, state["policy"], self.state_path)
        for group in state["optimizer"]["param_groups"]:
            group["fused"] = self.opt.defaults["fused"]  # this device's, not that of the run so far
        self.opt.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.rollout, self.seen, self.step, self.done, self.order = (state[k] for k in ("rollout", "seen", "step", "done", "order"))
        if state["pairs"]:
            device = self.pipe.unet.device
            self.pairs = Pairs(**{k: v.to(device) if torch.is_tensor(v) else v for k, v in state["pairs"].items()})
        if os.path.exists(self.log_path) and not self.world.rank:
            os.truncate(self.log_path, min(state["log_bytes"], os.path.getsize(self.log_path)))
        print(f"resumed at optimiser step {self.step}, rollout {self.rollout + 1}")

    def log(self, kind, **record):
        if self.world.rank and kind != "error":
            return
        try:
            with open(self.log_path, "a") as f:
                f.write(json.dumps({"kind": kind, "step": self.step, "rollout": self.rollout, **record}) + "\n")
        except OSError as e:
            raise UserError(f"cannot write {self.log_path} ({e.strerror}): free some space, then --resume") from e

    def check_stop(self):
        """Called wherever the state is whole or untouched since it was, by all ranks: SIGINT and SIGTERM end the run here."""
        if self.world.any(bool(self.stop)):
            self.save()
            self.world.any(False)  # nobody leaves before rank 0 has written: torchrun would end it
            raise KeyboardInterrupt


def versions():
    import diffusers
    import transformers
    return {"python": sys.version.split()[0], "torch": torch.__version__, "diffusers": diffusers.__version__,
            "transformers": transformers.__version__, "numpy": np.__version__}


def git_commit():
    if not shutil.which("git"):
        return None
    here = os.path.dirname(os.path.abspath(__file__))
    out = subprocess.run(["git", "-C", here, "describe", "--always", "--dirty", "--abbrev=12"], capture_output=True, text=True)
    return out.stdout.strip() or None


def device_name(device):
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"


# ---------------------------------------------------------------------------------------------------------------
# What a person sees

def samples_path(run, epoch):
    return os.path.join(run.folder, "samples", f"epoch_{epoch:03d}.png")


def save_samples(run, prompts, epoch, reference):
    images = paint(run.pipe, prompts, reference.shape[1], run.args)
    rows = [row for i, p in enumerate(prompts)
            for row in ((f"{p}   [reference]", reference[i]), (f"{p}   [aligned, epoch {epoch}]", images[i]))]
    labelled_grid(rows, samples_path(run, epoch), cell=96 if images.shape[-1] < 128 else 256)


def final_table(run, judge, prompts):
    """Held-out prompts under the reference and under the policy; printed, logged, and written to table.md."""
    count = run.args.images_per_prompt
    with progress_bar(total=2 * len(prompts) * count, unit="image", desc="held-out prompts") as bar:
        before, after = (per_prompt(judge, prompts, paint(run.pipe, prompts, count, run.args, reference, bar.update))
                         for reference in (True, False))
    table, figures = before_after(before, after, count)
    write_file(os.path.join(run.folder, "table.md"), table.encode())
    run.log("table", figures=figures)
    print(f"\n{table}(+- is the standard error over prompts; of the change, that of the paired difference. It does not see "
          "the noise\nof training: run other seeds for that.)")


def draw_curves(run):
    """curves.png: what metrics.jsonl says, so that a person sees whether the judge rose and at what price."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    with open(run.log_path) as f:
        lines = [json.loads(line) for line in f]
    steps, rolls = ([r for r in lines if r["kind"] == kind] for kind in ("step", "rollout"))
    if not steps:
        return
    x = [r["step"] for r in steps]
    window = np.ones(min(9, len(x)))
    smooth = lambda v: np.convolve(v, window, "same") / np.convolve(np.ones(len(v)), window, "same")
    figure, axes = plt.subplots(1, 4, figsize=(15, 3.2), constrained_layout=True)
    if rolls:
        axes[0].plot([r["step"] for r in rolls], [r["judge_final"] for r in rolls], "o-", ms=3, color="#b2182b")
        axes[0].set_title("judge, finished training images")
    else:  # --pairs
        axes[0].plot(x, smooth([r["margin"] for r in steps]), color="#b2182b")
        axes[0].set_title("margin")
    for ax, key, title, level in ((axes[1], "loss", "loss", math.log(2)), (axes[2], "accuracy", "accuracy before the step", .5),
                                  (axes[3], "clip_fraction", "clip fraction", None)):
        v = [r[key] for r in steps]
        ax.plot(x, v, ".", ms=2, color="#bbbbbb")
        ax.plot(x, smooth(v), color="#2166ac")
        ax.set_title(title)
        if level is not None:
            ax.axhline(level, ls=":", color="black", lw=1)
    for ax in axes:
        ax.set_xlabel("optimiser step")
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=130)
    plt.close(figure)
    write_file(os.path.join(run.folder, "curves.png"), buffer.getvalue())


# ---------------------------------------------------------------------------------------------------------------
# The run

def setup(args, world=None):
    """Model, judge, LoRA, optimiser, folder; everything that can be wrong is found before a file is written."""
    device = world.device if world else pick_device(args.device)
    if args.mixed_precision == "auto":
        args.mixed_precision = "bf16" if device.startswith("cuda") else "no"  # so that config.json says what it was
    precision = args.mixed_precision
    if not args.resume and any(os.path.exists(os.path.join(args.output_dir, f)) for f in ("config.json", "state.pt")):
        raise UserError(f"{args.output_dir!r} already holds a run: --resume goes on with it, another --output_dir starts anew")
    if args.pairs:
        make_folder(args.cache_dir, "--cache_dir")
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "no": torch.float32}[precision]
    parts = {"default": dtype, "unet": torch.float32} if args.full else dtype
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    pipe = load_pipeline(args.model, device, parts)
    preview = load_preview(args.preview_decoder, pipe) if args.preview_decoder else None
    judge = load_judge(args.judge, device, args.weights) if args.judge != "none" else None
    data, held_out = split_pairs(args, pipe, bool(world and world.rank)) if args.pairs else (None, None)
    torch.manual_seed(args.seed)
    params = train_all(pipe, dtype) if args.full else add_lora(pipe.unet, args.rank)  # lists: see there
    opt = torch.optim.AdamW(params, lr=args.learning_rate, betas=(0.9, 0.999), weight_decay=args.adam_weight_decay, eps=1e-8,
                            fused=device.startswith("cuda"))
    scaler = torch.amp.GradScaler(device.split(":")[0], enabled=precision == "fp16")
    if args.gradient_checkpointing:
        pipe.unet.enable_gradient_checkpointing()
        pipe.unet.train()  # diffusers checkpoints in training mode alone; SD's UNet has no dropout that would differ
    make_fast(pipe, judge, args)
    make_folder(os.path.join(args.output_dir, "samples"))
    run = Run(args, pipe, params, opt, scaler)
    run.preview, run.world, run.data, run.held_out = preview, world or World(), data, held_out
    return run, judge


def make_fast(pipe, judge, args):
    """What is about time alone: memory layout on CUDA, --compile. Compiled code rounds otherwise with its LoRA on and off: in half
    precision X is 1 at the start to the digits that the mean log-ratio leaves, not to the last bit."""
    if pipe.unet.device.type == "cuda":
        for part in (pipe.unet, pipe.vae, *([pipe.frozen_unet] if args.full else [])):
            part.to(memory_format=torch.channels_last)  # what convolutions in half precision are fastest in
    if args.compile:
        rows = 2 if args.guidance_scale > 1 or args.pairs else 1
        compile_pipeline(pipe, rows * args.train_batch_size, *([] if args.pairs else [rows * args.sample_batch_size]))
        if hasattr(judge, "compile"):
            judge.compile(args.sample_batch_size * args.num_children)


def rollout(run, judge, prompts, bar):
    """Fills run.pairs and run.order for this rollout, a function of (seed, rollout, weights, number of ranks) alone."""
    args, world, start = run.args, run.world, time.time()
    epoch, at = divmod(run.seen, len(prompts))
    shuffled = np.random.default_rng((args.seed, epoch)).permutation(len(prompts))
    batch = shuffled[at:at + args.sample_batch_size * world.size]
    mine = [prompts[k] for k in np.array_split(batch, world.size)[world.rank]]  # none, perhaps, at an epoch's end
    seed = np.random.SeedSequence((args.seed, run.rollout, world.rank)).generate_state(1)[0]
    generator = torch.Generator().manual_seed(int(seed))
    steps_done = iter(range(1, args.num_inference_steps + 1))
    def progress():
        bar.n = run.seen + len(batch) * next(steps_done) / args.num_inference_steps
        bar.update(0)
        run.check_stop()
    if mine:
        pairs = collect_pairs(run.pipe, judge, mine, generator, args.num_children, args.first_step, args.threshold,
                              args.num_inference_steps, args.eta, args.guidance_scale, progress=progress, preview=run.preview)
    else:
        pairs = no_pairs(run.pipe)
        for _ in range(args.num_inference_steps):  # the other ranks ask at every step whether to stop
            progress()
    run.pairs = world.join_pairs(pairs)
    order = torch.randperm(len(run.pairs), generator=generator)
    run.order, run.done = world.join_rows(order if world.rank == 0 else order[:0]), 0  # rank 0's, for all
    s = run.pairs.scores
    if not math.isfinite(s["mean"]):
        raise UserError("none of the judge's scores is finite: try --mixed_precision bf16, or another --judge")
    run.log("rollout", epoch=epoch, judge_mean=s["mean"], judge_std=s["std"], judge_final=s["final"],
            **{k: s[k] for k in s if k == "preview_agreement"}, pairs=len(run.pairs),
            valid=len(run.pairs) / run.pairs.candidates, seconds=time.time() - start, peak_gb=peak_gb(run.pipe.unet.device))


def one_step(run, pairs, group, div, beta, null, bar):
    """One optimiser step on a group of pairs, and its line in the log."""
    start = time.time()
    try:
        stats, norm = optimiser_step(run.pipe, pairs, group, null, div, beta, run.args, run.params, run.opt, run.scaler, run.world)
    except FloatingPointError as e:
        run.log("error", message=f"not finite: {e}")
        raise UserError(f"loss or gradient is not finite at optimiser step {run.step + 1}, {e}: lower --learning_rate or --beta, "
                        f"or keep the clip; the last checkpoint is in {run.folder}") from e
    run.step += 1
    run.log("step", **step_record(stats), pairs=len(group), grad_norm=norm if math.isfinite(norm) else None,  # fp16 may overflow;
            lr=run.opt.param_groups[0]["lr"], seconds=time.time() - start)                                  # the scaler then skips the step
    judged = "" if run.args.pairs else f" judge {run.pairs.scores['final']:.2f},"
    bar.set_postfix_str(f"step {run.step},{judged} accuracy {stats['accuracy'].mean():.2f}", refresh=False)


def checkpoint(run):
    """After every step, where the state is whole. False at --max_train_steps."""
    if run.step == run.args.max_train_steps:
        return False
    if run.step % run.args.checkpointing_steps == 0:
        run.save()
    run.check_stop()
    return True


def group_size(run):
    return run.args.train_batch_size * run.args.gradient_accumulation_steps * run.world.size


def train_on_rollout(run, div, beta, null, bar):
    """One pass over run.pairs in run.order, from run.done on. False at --max_train_steps."""
    while run.done < len(run.pairs):
        group = run.order[run.done:run.done + group_size(run)]
        one_step(run, run.pairs, group, div, beta, null, bar)
        run.done += len(group)
        if not checkpoint(run):
            return False
    run.rollout, run.seen = run.rollout + 1, run.seen + len(run.pairs.text)
    run.pairs, run.order, run.done = None, None, 0
    return True


def train_on_data(run, div, beta, null, bar):
    """The rest of an epoch over --pairs. False at --max_train_steps."""
    N = len(run.data)
    run.data.epoch, at = divmod(run.seen, N)
    for group in run.data.order(run.data.epoch)[at:].split(group_size(run)):
        one_step(run, run.data, group, div, beta, null, bar)
        run.seen += len(group)
        bar.n = run.seen
        bar.update(0)
        if not checkpoint(run):
            return False
    return True


def train(run, judge, prompts, held_out, div, beta):
    """Epochs over the prompts, by rollouts, or over --pairs; a picture after every epoch. Ends there or at --max_train_steps."""
    args, first = run.args, run.world.rank == 0
    null, shown = encode_prompts(run.pipe, [""]), held_out[:4]
    reference = paint(run.pipe, shown, 6, args, reference=True) if first else None
    def picture(epoch, anew=True):
        if first and (anew or not os.path.exists(samples_path(run, epoch))):
            save_samples(run, shown, epoch, reference)
    limit, N = args.max_train_steps, len(run.data or prompts)
    if run.seen % N == 0 and run.pairs is None:  # a new run; or one that was stopped before it had painted
        picture(run.seen // N, anew=not args.resume)
    with progress_bar(total=N * args.num_epochs, initial=run.seen, disable=not first,
                      bar_format="{l_bar}{bar}| {n:.0f}/{total} " + ("pairs" if args.pairs else "prompts") + " [{elapsed}<{remaining}]{postfix}") as bar:
        while run.seen < N * args.num_epochs and not 0 < limit <= run.step:
            run.check_stop()
            if run.data:
                more = train_on_data(run, div, beta, null, bar)
            else:
                if run.pairs is None:
                    rollout(run, judge, prompts, bar)
                if len(run.pairs) == 0 and first:
                    print(f"\nrollout {run.rollout + 1}: no valid pair, nothing to learn from (judge std "
                          f"{run.pairs.scores['std']:.3g}; a lower --threshold makes more pairs valid)", file=sys.stderr)
                more = train_on_rollout(run, div, beta, null, bar)
            if run.seen % N == 0 and run.pairs is None:
                picture(run.seen // N)
            if not more:
                break
    if run.done or run.seen % N:  # --max_train_steps cut an epoch short: its picture all the same
        picture(run.seen // N + 1)
    run.save()
    run.check_stop()


def main():
    world = World.from_env()
    try:
        args, why = parse(sys.argv[1:])
        div, beta = validate(args)
        device = pick_device(args.device)
    except UserError:
        if world.local:
            sys.exit(2)  # the first rank of each machine says it
        raise
    world.join(device)
    if world.rank:
        sys.stdout = open(os.devnull, "w")
    with world.in_turn():
        prompts, held_out = (None, None) if args.pairs else split_prompts(args)
    about = f"pairs: {args.pairs}" if args.pairs else f"{len(prompts)} training prompts, {len(held_out)} held out"
    print(f"model: {args.model} ({why}); judge: {args.judge}; {about}" + (f"; {world.size} ranks" if world.size > 1 else ""))
    print(f"divergence: {div.name}, f''(1) = {div.curvature:g}, effective beta {beta:g}, learning rate {args.learning_rate:g}; "
          f"output: {args.output_dir}", flush=True)
    with world.in_turn():
        run, judge = setup(args, world)
    if args.pairs:
        held_out = run.held_out
        print(f"{len(run.data)} pairs of {len(set(run.data.captions))} captions to train on; {len(held_out)} prompts held out")
    run.begin(held_out)
    world.share(run.params)
    def on_signal(number, frame):
        if run.stop and number == signal.SIGINT and time.time() - run.stop > 3:
            raise KeyboardInterrupt  # a second Ctrl-C does not wait; sooner it is a scheduler that signals twice
        run.stop = run.stop or time.time()
        if world.rank == 0:
            print("\nstopping: saving a checkpoint", file=sys.stderr)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, on_signal)
    try:
        train(run, judge, prompts, held_out, div, beta)
        for number in (signal.SIGINT, signal.SIGTERM):  # all is saved: from here on a signal simply ends the process
            signal.signal(number, signal.default_int_handler)
        world.leave()
        if world.rank:
            return
        draw_curves(run)
        final_table(run, judge, held_out)
    except KeyboardInterrupt:
        if world.rank == 0:
            print(f"stopped at optimiser step {run.step}; to go on: python train.py --resume --output_dir {shlex.quote(args.output_dir)}",
                  file=sys.stderr)
        sys.exit(130)
    print(f"\nIn {args.output_dir}: samples/ (reference above aligned), curves.png, table.md, metrics.jsonl, {'unet/' if args.full else 'the LoRA'}. Next:")
    folder, model = shlex.quote(args.output_dir), shlex.quote(args.model)
    print(f"  python sample.py {shlex.quote(held_out[0])} --lora {folder} --model {model}")
    other = " ".join(f"--{k} {shlex.quote(getattr(args, k))}" for k in ("model", "judge", "prompts", "pairs") if getattr(args, k))
    other += f" --seed {args.seed}" + " --full" * args.full
    print(f"  python evaluate.py {folder}      Tables 2 and 3 of the paper, as far as they go without downloads")
    print(f"  python train.py --div {'rkl' if args.div != 'rkl' else 'js'} {other}      the same under another divergence")


if __name__ == "__main__":
    run_cli(main)
