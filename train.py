"""Preference alignment of a text-to-image diffusion model under any f-divergence.

python train.py --div js                              the main job: the toy on a laptop (2 cores: 4
                                                      minutes, taste of held-out prompts 3.47 ->
                                                      11.02), SD1.5 where there is CUDA
python train.py --div alpha --alpha 0.4 --seed 1      another divergence, another seed
python train.py --div js --resume                     go on where a run was stopped or killed
python train.py --div js --model DIR --prompts my.txt --judge pickscore    your model and prompts
python train.py --div js --pairs DIR                  preference pairs of your own, no judge
torchrun --standalone --nproc_per_node=4 train.py --div js --gradient_accumulation_steps 1

The method is SPO (arXiv 2406.04314) with the loss of arXiv 2409.09774: every denoising step is a
choice between children of one x_t, and loss = -log sigmoid(beta f'(X_w) - beta f'(X_l)), where X =
p_theta / p_ref of that step. With --pairs it is that loss on finished images, and log X is
Diffusion-DPO's bound (arXiv 2311.12908).

As SPO: K = 4 children from step 4 of 20 on, best against worst, a random child goes on, guidance in
sampling and in training, LoRA of rank 4, AdamW, X clamped to [0.9, 1.1], log X a mean over the
latent (loss.py says what that changes). Different on purpose:
  1. one policy and one reference prediction per pair, not two of each: the same gradient at half
     the cost; the reference is the same UNet with its LoRA off, not a second UNet;
  2. gradient clipping clips (SPO's never did: --max_grad_norm 0 is SPO as it was run);
  3. a short last group of pairs weighs in the gradient by its size;
  4. on one GPU four accumulated batches of 10 pairs stand for SPO's four GPUs in a step; but a
     rollout has 10 prompts where theirs has 40 (--sample_batch_size 40);
  5. training's random numbers follow from --seed and the position, never from what ran before, so
     that --resume replays the chunk (a rollout; with --pairs 20 steps) that was cut to the bit.
"""

import hashlib
import math
import os
import shlex
import sys
import time

import numpy as np
import torch

from divergences import NAMES, get_divergence
from loss import CLIPS, REDUCE, alignment_loss
from parts.common import UserError, hold_out, make_folder, progress_bar, read_prompts, run_cli
from parts.fast import load_preview, make_fast
from parts.flags import parse
from parts.judges import JUDGES, load_judge
from parts.model import Policy, load_pipeline, say_cut
from parts.pairs import hold_out_captions, open_pairs
from parts.ranks import World
from parts.run import Run, draw_curves, environment, read_evaluated, save_pictures
from parts.weights import find_training_prompts, read_train_json
from sample import collect_pairs, join_pairs, paint

# flag: (default, its range or choices, what it is). A model's folder may bring other defaults in
# train.json, as toy/ does; --help shows the values in force.
FLAGS = {
    # what to align, and to what
    "div": ("js", tuple(NAMES), "divergence: " + ", ".join(NAMES)),
    "alpha": (None, "(0, 1)", "of --div alpha; the paper: 0.2, 0.4, 0.6, 0.8"),
    "beta": (10.0, "(0, inf)", "strength of the divergence in the loss, never rescaled in silence"),
    "match_curvature": (False, None, "divide beta by f''(1): all rows pull alike near X = 1"),
    "clip": ("ratio", CLIPS, "ratio: SPO's; onesided: a losing pair keeps its gradient (ours)"),
    "clip_range": (0.1, "(0, 1)", "c of the clamp of X to [1-c, 1+c]"),
    "log_ratio": ("mean", REDUCE, "log X over the latent; sum is the paper's X, mean is SPO's"),
    "model": ("auto", None, "auto, toy, a diffusers folder, a single checkpoint or a hub id"),
    "judge": ("step_aware", ("none", *JUDGES), "which model scores"),
    "weights": (None, None, "a folder of the judge's weights (and SPO's prompts), not the hub"),
    "preview_decoder": (None, None, "a tiny VAE (madebyollin/taesd) for the judge: not equivalent"),
    "prompts": (None, None, "a file (default: the model's, or SPO's 4,000); of --pairs: held out"),
    "pairs": (None, None, "preference pairs, a folder or a file: docs/pairs.md"),
    "skip_bad": (False, None, "leave out pairs whose images are missing or damaged"),
    "cache_dir": ("out/latents", None, "where --pairs keeps encoded images, for all runs"),
    # sampling
    "num_epochs": (10, "[1, inf)", "passes over the prompts, or over --pairs"),
    "sample_batch_size": (10, "[1, inf)", "prompts a rollout, on every rank"),
    "num_children": (4, "[2, inf)", "K, children of one x_t; a pair needs two"),
    "first_step": (4, "[0, inf)", "the first step with children; earlier steps have one"),
    "threshold": (0.3, "[0, 1)", "a pair counts if softmax([best, worst]) differs by more"),
    "num_inference_steps": (20, "[1, 500]", "DDIM steps"),
    "eta": (1.0, "(0, inf)", "DDIM noise; children differ by it alone"),
    "guidance_scale": (5.0, "(-inf, inf)", "in sampling; but for --pairs in training; <= 1: none"),
    # training
    "train_batch_size": (10, "[1, inf)", "pairs a backward pass, on every rank"),
    "gradient_accumulation_steps": (4, "[1, inf)", "backward passes an optimiser step"),
    "learning_rate": (6e-5, "(0, inf)", "AdamW's, constant"),
    "adam_weight_decay": (1e-4, "[0, inf)", "AdamW's"),
    "max_grad_norm": (1.0, "[0, inf)", "0: no clipping"),
    "rank": (4, "[1, inf)", "of the LoRA; its alpha is its rank"),
    "full": (False, None, "train all weights, in fp32, against a frozen copy, in place of a LoRA"),
    "mixed_precision": ("auto", ("auto", "bf16", "fp16", "no"), "auto: bf16 on CUDA, no elsewhere"),
    "gradient_checkpointing": (False, None, "less memory, a third more time"),
    "compile": (False, None, "torch.compile UNet, VAE decoder and judge, for fixed batch sizes"),
    "device": ("auto", None, "auto, cpu, cuda, cuda:1"),
    # the run
    "seed": (0, "[0, 18446744073709551616)", "of everything random"),
    "max_train_steps": (0, "[0, inf)", "stop after so many optimiser steps; 0: after the epochs"),
    "checkpointing_chunks": (1, "[1, inf)", "rollouts (--pairs: 20 steps) between states"),
    "num_eval_prompts": (32, "[1, inf)", "held out for the table at the end, at most half"),
    "images_per_prompt": (4, "[1, 100]", "of that table"),
    "eval_interval": (0, "[0, inf)", "epochs between such figures; 0: before and after alone"),
    "output_dir": (None, None, "the run's folder (default: out/<model>-<div>)"),
    "resume": (False, None, "go on with the run in output_dir; flags left out are the run's"),
}
SECTIONS = {  # what a run with that flag changes; a model's train.json may have such sections too
    # Diffusion-DPO's beta (5000 in its code, which has our S = 1000 in it), no clamp
    "pairs": dict(beta=5.0, clip="none", judge="none"),
    "full": dict(learning_rate=2e-5, checkpointing_chunks=25),  # a state of SD1.5 is 14 GB
}
# what a resumed run may change: another value of any other would make it another run
FREE_ON_RESUME = ("weights", "num_epochs", "max_train_steps", "checkpointing_chunks")
FREE_ON_RESUME += ("device", "cache_dir", "pairs", "output_dir", "resume")


def train(args, policy, source, div, beta, run, world, show):
    """SPO's Algorithm 1 with eq. 5 as its loss.

    source (Rollouts below, or PairSet of parts/pairs.py): len(source) prompts or pairs an epoch;
    source.collect(run, pairs_a_step, bar) -> pairs, the chunk at position run.seen. pairs: .order
    (n,), .t (n,), .weight (n,), .log_ratios(policy, index, reduce) and .advance, by which the chunk
    moves the position. run: the folder and the position. show(epoch) paints its pictures.
    Returns the last epoch, whole or not.
    """
    device = policy.parameters[0].device
    decay, fused = args.adam_weight_decay, device.type == "cuda"
    opt = torch.optim.AdamW(policy.parameters, args.learning_rate, weight_decay=decay, fused=fused)
    scaler = torch.amp.GradScaler(device.type, enabled=args.mixed_precision == "fp16")
    # a scaler makes its scale when it first scales; a rank without a pair would never make one
    scaler.scale(torch.zeros((), device=device))
    run.begin(policy, opt, scaler)
    world.share(policy.parameters)
    # on all ranks: 40, as on SPO's four GPUs
    pairs_a_step = args.train_batch_size * args.gradient_accumulation_steps * world.size
    end, last_step = len(source) * args.num_epochs, args.max_train_steps or math.inf
    unit = "pairs" if args.pairs else "prompts"
    options = dict(initial=run.seen, unit=unit, disable=world.rank > 0)
    if run.seen == 0:
        show(0)

    with progress_bar(total=end, **options) as bar:
        while run.seen < end and run.step < last_step:
            # A chunk: sample and judge the next prompts or, with --pairs, take the next pairs.
            pairs = source.collect(run, pairs_a_step, bar)

            for group in slices(pairs.order, pairs_a_step):  # one optimiser step
                start, stats = time.time(), []
                share = group[world.rank :: world.size]  # this rank's
                for batch in slices(share, args.train_batch_size):
                    u_w, u_l = pairs.log_ratios(policy, batch, args.log_ratio)  # log X_w, log X_l
                    loss, batch_stats = alignment_loss(  # eq. 5
                        u_w, u_l, div, beta, args.clip_range, args.clip, pairs.weight[batch]
                    )
                    # the mean over a full group: a short last one takes a smaller gradient
                    scaler.scale(loss * len(batch) / pairs_a_step).backward()
                    stats.append(batch_stats | {"t": pairs.t[batch]})
                world.sum_gradients(policy.parameters)
                scaler.unscale_(opt)  # so that the norm is of the gradient itself
                limit = args.max_grad_norm or math.inf
                grad_norm = torch.nn.utils.clip_grad_norm_(policy.parameters, limit).item()
                stats = world.gather_rows(stats)  # of all pairs, on all ranks
                run.check_finite(stats, grad_norm, scaler)
                scaler.step(opt)  # skipped by the scaler if fp16 gradients overflowed
                scaler.update()
                opt.zero_grad()

                run.step += 1
                seconds = time.time() - start
                progress = run.log_step(stats, grad_norm, opt.param_groups[0]["lr"], seconds)
                bar.set_postfix_str(progress, refresh=False)
                bar.update(0)
                if run.step >= last_step:
                    # the weights are written; the state stays at the chunk's start, for a replay
                    run.export(policy)
                    epoch = run.seen // len(source) + 1
                    show(epoch)
                    return epoch

            # The position: all that a chunk depends on beside the seed and the weights.
            run.chunk, run.seen = run.chunk + 1, run.seen + pairs.advance
            bar.update(run.seen - bar.n)
            if run.seen % len(source) == 0:  # before the state, so that no picture is missing
                show(run.seen // len(source))
            if run.chunk % args.checkpointing_chunks == 0 or run.seen >= end:
                run.save(policy, opt, scaler)
    return math.ceil(run.seen / len(source))


def slices(rows, size):
    """rows[0:size], rows[size:2 size], ... (Tensor.split would make one empty slice of nothing)."""
    return [rows[start : start + size] for start in range(0, len(rows), size)]


# ---- Where SPO's pairs come from (those of --pairs: parts/pairs.py) ------------------------------


class Rollouts:
    """Chunks of pairs: the prompts in shuffled order, sample_batch_size a rank at a time."""

    def __init__(self, args, pipe, judge, prompts, world):
        self.args, self.pipe, self.judge = args, pipe, judge
        self.prompts, self.world = prompts, world
        self.digest = "\n".join(prompts)  # what --resume must find unchanged
        where = args.preview_decoder
        self.preview = load_preview(where, pipe) if where else None

    def __len__(self):
        return len(self.prompts)

    def collect(self, run, pairs_a_step, bar):
        """The next rollout: a function of (seed, run.chunk, weights, number of ranks) alone."""
        args, world, start = self.args, self.world, time.time()
        # An epoch is a permutation of the prompts; no rollout crosses its end.
        epoch, first = divmod(run.seen, len(self.prompts))
        shuffled = np.random.default_rng((args.seed, epoch)).permutation(len(self.prompts))
        batch = shuffled[first : first + args.sample_batch_size * world.size]
        mine = [self.prompts[i] for i in np.array_split(batch, world.size)[world.rank]]
        # Every rank draws noise of its own, and every rollout other noise.
        seed = np.random.SeedSequence((args.seed, run.chunk, world.rank)).generate_state(1)[0]
        generator = torch.Generator().manual_seed(int(seed))
        pairs = None  # of a rank that has no prompt left, at an epoch's end
        if mine:
            steps = args.num_inference_steps
            settings = dict(num_children=args.num_children, first_step=args.first_step)
            settings |= dict(threshold=args.threshold, eta=args.eta, num_steps=steps)
            settings |= dict(guidance=args.guidance_scale, preview=self.preview)
            settings["progress"] = lambda: bar.update(len(batch) / steps)
            pairs = collect_pairs(self.pipe, self.judge, mine, generator, **settings).to("cpu")
        # All ranks hold all pairs, so that they train on equal shares of them.
        everyone = [p for p in world.gather(pairs) if p is not None]
        pairs = join_pairs(everyone).to(self.pipe.unet.device)
        order = torch.randperm(len(pairs.t), generator=generator)
        pairs.order = world.gather(order)[0]  # rank 0's, for all
        judged = run.log_rollout(epoch, pairs, time.time() - start)
        bar.set_description_str(judged, refresh=False)
        return pairs


def make_show(args, pipe, policy, judge, held_out, run, world):
    """show(epoch): the fixed prompts' pictures of that epoch, the reference's above them; and every
    --eval_interval epochs all held-out prompts' figures."""
    reference, prompts = None, held_out[:4]

    def show(epoch):
        nonlocal reference
        if world.rank > 0:
            return
        if reference is None:  # it never changes
            with policy.reference():
                reference = paint_with_bar(args, pipe, prompts, 6, "pictures, reference")
        # before the first step the policy is the reference
        images = paint_with_bar(args, pipe, prompts, 6, "pictures") if epoch else reference
        save_pictures(args.output_dir, prompts, reference, images, epoch)
        if args.eval_interval and epoch % args.eval_interval == 0:
            score_held_out(args, pipe, judge, held_out, run, epoch)
            run.keep(policy, epoch)

    return show


def score_held_out(args, pipe, judge, prompts, run, epoch):
    """A line of kind eval: held-out prompts under the policy in force, the same seeds always."""
    title = f"held-out prompts, epoch {epoch}"
    images = paint_with_bar(args, pipe, prompts, args.images_per_prompt, title)
    run.log_eval(epoch, judge, prompts, images)


def paint_with_bar(args, pipe, prompts, count, title):
    # no more at once than a rollout paints, whose memory fits
    settings = args.num_inference_steps, args.guidance_scale, min(16, args.sample_batch_size)
    total = len(prompts) * count
    with progress_bar(total=total, unit="images", desc=title, leave=False) as bar:
        return paint(pipe, prompts, count, *settings, progress=bar.update)


def final_table(args, pipe, policy, judge, prompts, run, epoch):
    """table.md: held-out prompts under the reference and under the policy."""
    evaluated = read_evaluated(args.output_dir)
    if 0 not in evaluated:
        with policy.reference():
            score_held_out(args, pipe, judge, prompts, run, 0)
    if epoch not in evaluated:
        score_held_out(args, pipe, judge, prompts, run, epoch)
    run.save_table(args.images_per_prompt)


# ---- The run -------------------------------------------------------------------------------------


def set_up(args, device, world):
    """(pipe, judge, policy, source of pairs, held-out prompts). What can be wrong is found here,
    before the run's folder is made."""
    if args.mixed_precision == "auto":
        args.mixed_precision = "bf16" if device.startswith("cuda") else "no"
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "no": torch.float32}
    dtype = dtypes[args.mixed_precision]
    make_folder(args.output_dir, only_look=True)  # before anything is downloaded
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    if not args.pairs:
        path = find_training_prompts(args.model, args.prompts, args.weights)
        prompts, held_out = hold_out(read_prompts(path), args.num_eval_prompts)
        print(f"{len(prompts)} prompts to train on, {len(held_out)} held out")
    # --full keeps the UNet's weights in fp32 and computes under autocast (model.predict_noise)
    precision = {"default": dtype, "unet": torch.float32} if args.full else dtype
    pipe = load_pipeline(args.model, device, precision)
    judge = None if args.judge == "none" else load_judge(args.judge, device, args.weights)
    if args.pairs:
        quiet = world.rank > 0
        data = open_pairs(args.pairs, pipe, args.cache_dir, args.skip_bad, args.seed, quiet)
        source, held_out = hold_out_captions(data, args.prompts, args.num_eval_prompts)
    else:
        say_cut(pipe, prompts + held_out)
        source = Rollouts(args, pipe, judge, prompts, world)
    if device.startswith("cuda"):
        for part in (pipe.unet, pipe.vae):  # the layout that half-precision convolutions like best
            part.to(memory_format=torch.channels_last)
    torch.manual_seed(args.seed)  # of the LoRA's first values
    policy = Policy(pipe.unet, args.rank, args.full)
    if args.gradient_checkpointing:
        pipe.unet.enable_gradient_checkpointing()
        pipe.unet.train()  # diffusers checkpoints in training mode alone; SD has no dropout
    if args.compile:
        rows = 2 if args.pairs or args.guidance_scale > 1 else 1  # a pair, or guidance
        batches = {rows * args.train_batch_size}
        if not args.pairs:
            batches.add(rows * args.sample_batch_size)
        make_fast(pipe, judge, batches, args.sample_batch_size * args.num_children)
    make_folder(os.path.join(args.output_dir, "samples"))
    return pipe, judge, policy, source, held_out


def check(args):
    """What a range cannot say. Returns (divergence, effective beta). Raises UserError."""
    if not args.pairs and args.first_step >= args.num_inference_steps:
        limit = args.num_inference_steps
        raise UserError(f"--first_step must be below --num_inference_steps ({limit})")
    if not args.pairs and args.judge == "none":
        raise UserError("--judge none goes with --pairs: without them a judge must choose")
    try:
        div = get_divergence(args.div, args.alpha)
    except ValueError as error:
        raise UserError(f"--div {args.div}: {error}") from error
    return div, args.beta / div.curvature if args.match_curvature else args.beta


def main():
    world = World()
    with world.one_voice():
        args, why = parse(sys.argv[1:], __doc__, FLAGS, SECTIONS, FREE_ON_RESUME)
        div, beta = check(args)
        device = world.join(args.device)
    if world.rank > 0:
        sys.stdout = open(os.devnull, "w")
    print(f"model: {args.model} ({why}); judge: {args.judge}; {world.size} rank(s)")
    print(f"divergence: {div.name}, f''(1) = {div.curvature:g}, effective beta {beta:g}, ", end="")
    print(f"learning rate {args.learning_rate:g}; output: {args.output_dir}", flush=True)
    with world.in_turn():  # downloads are made once
        pipe, judge, policy, source, held_out = set_up(args, device, world)
    config = {"args": vars(args), "held_out": held_out, "command": " ".join(sys.argv)}
    # --resume refuses prompts or pairs that were edited meanwhile
    config["digest"] = hashlib.sha256((source.digest + "\n".join(held_out)).encode()).hexdigest()
    run = Run(args.output_dir, config | environment(device), world.rank)
    show = make_show(args, pipe, policy, judge, held_out, run, world)
    try:
        epoch = train(args, policy, source, div, beta, run, world, show)
        world.leave()
        if world.rank == 0:
            final_table(args, pipe, policy, judge, held_out, run, epoch)
            draw_curves(args.output_dir)
    except KeyboardInterrupt:
        again = f"python train.py --resume --output_dir {shlex.quote(args.output_dir)}"
        raise KeyboardInterrupt(f"to go on: {again}") from None
    print(f"\nIn {args.output_dir}: samples/, evolution.gif, curves.png, table.md, the log. Next:")
    where = f"{shlex.quote(args.output_dir)} --model {shlex.quote(args.model)}"
    print(f"  python sample.py {shlex.quote(held_out[0])} --lora {where}")
    judges = "" if "judge" in read_train_json(args.model) else " (36.5 GB of judges)"
    print(f"  python evaluate.py {shlex.quote(args.output_dir)}      Tables 2 and 3{judges}")


if __name__ == "__main__":
    run_cli(main)
