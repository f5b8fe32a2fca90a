"""What the loop costs beside the SPO reference's way of doing the same arithmetic, in one process.

python tests/bench.py                           a training step on the toy: forward and backward of
                                                --pairs 10 pairs
python tests/bench.py --loop                    the whole loop by part: a rollout of --prompts 4
                                                and the training on its pairs
python tests/bench.py --loop --model sd15 --device cuda --compile    SD1.5's size, random weights;
                                                with --preview DIR the judge sees that decoder
python tests/bench.py --preview madebyollin/taesd --model HUB_ID     how often a preview decoder
                                                and the VAE order two children alike
python tests/bench.py --memory                  what a training step must hold at SD1.5's size:
                                                counted, so on any machine
python tests/bench.py --fsim                    FSIM beside the package whose numbers it gives
python tests/bench.py --optimum                 theorem 1's optimum of a million items, every row
python tests/bench.py --real_size               train.py on SD1.5's size on a CPU, random weights:
                                                memory and time by part; 10 GB, a quarter of an hour
python tests/bench.py --summary RUN             a run of train.py: its steps' time, peak memory
python tests/bench.py --save DIR                SD1.5 and its judge with random weights, 5 GB in
                                                fp16, for train.py --model DIR/sd15 (tests/gpu.sh)

The two ways. Reference-like: each child of a pair has a policy and a reference prediction of its
own (RockeyCoss/SPO does so, though winner and loser share x_t, t and prompt), the reference is a
second UNet in memory, the judge runs in fp32 and encodes the prompt for every child at every step.
Ours: Pairs.log_ratios and collect_pairs as train.py calls them. In the training step the gradients
of the LoRA must agree before a time is printed; in --fsim the values must.

How to read the numbers. Every way runs once in each of --repeats rounds, and each round begins with
another way, so that a machine that is slow for a while is slow for all. A ratio is taken within a
round; printed are the median over the rounds and, in brackets, the quartiles: where these lie far
apart, run it again on a quiet machine. On a CPU only the ratios mean anything, never the seconds:
they stand beside the device's name and belong to it.
"""

import argparse
import copy
import functools
import itertools
import json
import os
import sys
import time
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import random_models
import real_size
from timing import Clock, device_name, in_rounds, ratio_text, seconds_of

from divergences import TABLE, get_divergence
from loss import alignment_loss, ddim_mean_std, step_log_ratio
from parts import diversity, model
from parts.common import UserError, pick_device, read_prompts, run_cli
from parts.fast import load_preview, make_fast
from parts.judges import load_judge
from parts.judges_clip import StepAware
from parts.model import Policy, load_pipeline, predict_noise
from parts.optimum import optimal_policy
from parts.run import read_log
from parts.weights import TOY, find_prompts, read_train_json, resolve_model
from sample import collect_pairs
from toy.make import draw
from toy.world import Taste

DIV, BETA = get_divergence("js"), 10.0
THEIRS, OURS, COMPILED, PREVIEWED = "reference-like", "ours", "ours, compiled", "ours, previewed"


def main():
    opts = build_parser().parse_args()
    opts.device = pick_device(opts.device)
    if opts.save:
        random_models.save(opts.save, make=functools.partial(load, opts.model), device=opts.device)
    elif opts.real_size:
        real_size.measure("out/real_size")
    elif opts.summary:
        summarise(opts.summary)
    elif opts.fsim:
        bench_fsim(opts.repeats)
    elif opts.optimum:
        bench_optimum(opts.repeats)
    elif opts.memory:
        random_models.count_memory()
    elif opts.loop:
        bench_loop(opts)
    elif opts.preview:
        bench_preview(opts)
    else:
        bench_step(opts)


def build_parser():
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    flag = parser.add_argument
    flag("--model", default="toy", help="toy, a folder, a hub id, or sd15: random weights")
    flag("--device", default="auto")
    flag("--repeats", type=int, default=9, help="rounds")
    flag("--pairs", type=int, default=10, help="pairs a backward pass")
    flag("--prompts", type=int, default=4, help="prompts a rollout")
    flag("--loop", action="store_true", help="rollout and training, by part")
    flag("--compile", action="store_true", help="of --loop: ours, compiled, as well")
    flag("--peak", type=float, default=790, help="of --loop on CUDA: TFLOP/s (H100, H200 in bf16)")
    flag("--preview", metavar="MODEL_OR_FOLDER", help="an AutoencoderTiny, against the VAE")
    flag("--judge", help="of --preview (default: the model's own, or step_aware)")
    flag("--weights", help="of --preview: a folder with the judge's weights")
    flag("--memory", action="store_true", help="count what a training step must hold")
    flag("--fsim", action="store_true", help="FSIM against image-similarity-measures")
    flag("--optimum", action="store_true", help="theorem 1's optimum of a million items")
    flag("--real_size", action="store_true", help="train.py on SD1.5's size, on a CPU")
    flag("--summary", metavar="RUN", help="what a run's log says of time and memory")
    flag("--save", metavar="DIR", help="write SD1.5, judge and preview decoder with random weights")
    return parser


# --------------------------------------------------------------------------------------------------
# What is timed


def load(model, device, dtype=torch.float32):
    if model == "sd15":
        return random_models.sd15(device, dtype)
    return load_pipeline(model, device, dtype)


def working_dtype(device):
    """train.py's default for frozen weights."""
    return torch.bfloat16 if device.startswith("cuda") else torch.float32


def some_prompts(count):
    return read_prompts(find_prompts(TOY))[:count]


# --------------------------------------------------------------------------------------------------
# A training step


def doubled_log_ratios(policy, reference, pairs, index):
    """(u_w, u_l), each (B,), by two policy and two reference predictions per pair, of two UNets."""
    x_t, t, text = pairs.x_t[index], pairs.t[index], pairs.text[pairs.prompt[index]]
    where = x_t, t, text, pairs.null, pairs.guidance
    sampler = t, pairs.alphas_cumprod, pairs.num_steps, pairs.eta
    log_ratios = []
    for child in (pairs.x_w[index], pairs.x_l[index]):
        mean, std, _ = ddim_mean_std(predict_noise(policy.unet, *where), x_t, *sampler)
        with torch.no_grad():
            eps_ref = predict_noise(reference, *where)
            mean_ref, _, _ = ddim_mean_std(eps_ref, x_t, *sampler)
        log_ratios.append(step_log_ratio(child, mean, mean_ref, std))
    return log_ratios


def bench_step(opts):
    device = opts.device
    pipe = load(opts.model, device)
    reference = copy.deepcopy(pipe.unet)
    policy = Policy(pipe.unet, rank=4)
    for lora_B in policy.parameters[1::2]:
        torch.nn.init.normal_(lora_B, std=1e-2)  # a LoRA under way: where B is 0, A has no gradient
    generator = torch.Generator().manual_seed(0)
    judge, prompts = Taste(), some_prompts(opts.prompts)
    pairs = collect_pairs(pipe, judge, prompts, generator, threshold=0.0)
    index = torch.randperm(len(pairs.t), generator=generator)[: opts.pairs].to(device)

    def gradient(log_ratios):
        loss, _ = alignment_loss(*log_ratios, DIV, BETA)
        gradients = torch.autograd.grad(loss, policy.parameters)
        return torch.cat([g.flatten() for g in gradients]).double()

    def ours():
        return gradient(pairs.log_ratios(policy, index))

    def theirs():
        return gradient(doubled_log_ratios(policy, reference, pairs, index))

    g, wanted = ours(), theirs()
    difference = ((g - wanted).norm() / wanted.norm()).item()
    if not difference < 1e-2:
        raise UserError(f"the gradients differ by {difference:.1e}: no time is worth printing")
    ways = {THEIRS: lambda _: seconds_of(theirs, device), OURS: lambda _: seconds_of(ours, device)}
    seconds = in_rounds(ways, opts.repeats)
    medians = {name: np.median(values) for name, values in seconds.items()}
    print(f"{opts.model}, {device_name(device)}, {len(index)} pairs a step, ", end="")
    print(f"{opts.repeats} rounds\n")
    print("| training step (forward, backward) | UNet rows a pair | seconds | UNets in memory |")
    print("|---|---|---|---|")
    print(f"| {THEIRS} | 8 | {medians[THEIRS]:.3f} | 2 |")
    print(f"| {OURS} | 4 | {medians[OURS]:.3f} | 1 |")
    ratio = ratio_text(seconds[THEIRS], seconds[OURS])
    print(f"\nours is {ratio} times faster; the LoRA's gradients differ by {difference:.1e}")


# --------------------------------------------------------------------------------------------------
# The whole loop, by part

PARTS = ("UNet", "decode", "judge", "training", "all")


class TimedJudge:
    """A judge on the clock. every_step: the prompts are encoded again for each child."""

    def __init__(self, judge, clock, every_step):
        self.judge, self.clock, self.every_step = judge, clock, every_step
        self.unclamped = getattr(judge, "unclamped", False)

    def encode(self, prompts):
        self.prompts = prompts
        rows = torch.arange(len(prompts), device=self.clock.device)
        return rows if self.every_step else self.judge.encode(prompts)

    def __call__(self, images, text, t):
        with self.clock.part("judge"):
            if self.every_step:
                text = self.judge.encode([self.prompts[row] for row in text.tolist()])
            return self.judge(images, text, t)


class Way:
    """One of the ways to run the loop, and what it needs in memory."""

    def __init__(self, name, opts):
        self.device, self.pairs_a_batch = opts.device, opts.pairs
        on_cuda, theirs = opts.device.startswith("cuda"), name == THEIRS
        before = allocated_gb(opts.device)
        torch.manual_seed(0)
        self.pipe = load(opts.model, opts.device, working_dtype(opts.device))
        self.reference = copy.deepcopy(self.pipe.unet) if theirs else None
        if on_cuda and not theirs:
            for part in (self.pipe.unet, self.pipe.vae):
                part.to(memory_format=torch.channels_last)
        self.preview = load_preview(opts.preview, self.pipe) if name == PREVIEWED else None
        self.policy = Policy(self.pipe.unet, rank=4)
        judge_size = StepAware.CONFIG if opts.model == "sd15" else random_models.SMALL_JUDGE
        judge_dtype = torch.float16 if on_cuda and not theirs else torch.float32
        self.judge = random_models.step_aware(judge_size, opts.device, judge_dtype)
        if name == COMPILED:
            unet_batches = {2 * opts.pairs, 2 * opts.prompts}
            make_fast(self.pipe, self.judge, unet_batches, judge_batch=4 * opts.prompts)
        self.optimizer = torch.optim.AdamW(self.policy.parameters, lr=1e-9)
        self.own_gb = allocated_gb(opts.device) - before

    def run(self, prompts, seed=0):
        """A rollout and the training on its pairs: {"seconds": {part: ...}, "pairs", "peak_gb"}."""
        others_gb = allocated_gb(self.device) - self.own_gb
        if self.device.startswith("cuda"):
            torch.cuda.reset_peak_memory_stats(self.device)
        clock = Clock(self.device)
        with clock.part("all"):
            pairs = self.sample(prompts, seed, clock)
            with clock.part("training"):
                self.train(pairs)
        peak_gb = None
        if self.device.startswith("cuda"):
            peak_gb = torch.cuda.max_memory_allocated(self.device) / 1e9 - others_gb
        return dict(seconds=clock.seconds, pairs=len(pairs.t), peak_gb=peak_gb)

    def sample(self, prompts, seed, clock):
        timed = {
            "predict_noise": clock.timed("UNet", model.predict_noise),
            "decode": clock.timed("decode", model.decode),
        }
        judge = TimedJudge(self.judge, clock, every_step=self.reference is not None)
        generator = torch.Generator().manual_seed(seed)
        with mock.patch.multiple(model, **timed):
            # threshold -1: every candidate is a pair, also where two scores are the same in fp16
            options = dict(threshold=-1.0, preview=self.preview)
            return collect_pairs(self.pipe, judge, prompts, generator, **options)

    def train(self, pairs):
        for batch in torch.arange(len(pairs.t), device=self.device).split(self.pairs_a_batch):
            if self.reference is None:
                log_ratios = pairs.log_ratios(self.policy, batch)
            else:
                log_ratios = doubled_log_ratios(self.policy, self.reference, pairs, batch)
            loss, _ = alignment_loss(*log_ratios, DIV, BETA)
            loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def allocated_gb(device):
    return torch.cuda.memory_allocated(device) / 1e9 if device.startswith("cuda") else 0.0


def bench_loop(opts):
    from torch.utils.flop_counter import FlopCounterMode

    # SPO's own settings, for all ways
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    prompts = some_prompts(opts.prompts)
    names = [THEIRS, OURS]
    names += [COMPILED] * opts.compile + [PREVIEWED] * bool(opts.preview)
    ways = {name: Way(name, opts) for name in names}
    for way in ways.values():
        way.run(prompts)  # warm-up: allocator, cuDNN's choices, compilation
    with FlopCounterMode(display=False) as counter:
        ways[OURS].run(prompts[:1])
    tflop = counter.get_total_flops() / 1e12
    runs = {name: functools.partial(way.run, prompts) for name, way in ways.items()}
    results = in_rounds(runs, opts.repeats)
    pairs = results[OURS][0]["pairs"] / len(prompts)
    print(f"{opts.model}, {device_name(opts.device)}, {len(prompts)} prompts a rollout, ", end="")
    print(f"{pairs:g} pairs a prompt, {opts.repeats} rounds; medians of the seconds a prompt\n")
    seconds = {}  # a prompt: {way: {part: [of each round]}}
    for name in names:
        rounds = [result["seconds"] for result in results[name]]
        seconds[name] = {p: [r[p] / len(prompts) for r in rounds] for p in PARTS}
    peaks = {name: results[name][-1]["peak_gb"] for name in names}
    print_loop(seconds, peaks, tflop, opts.peak)


def print_loop(seconds, peaks, tflop, peak_rate):
    """tflop: of a prompt, as ours computes it. peaks: None on a CPU."""
    print(f"| loop | {' | '.join(PARTS)} | prompts an hour | peak GB | TFLOP/s | of the floor |")
    print("|---" * 10 + "|")
    for name, parts in seconds.items():
        medians = [np.median(parts[part]) for part in PARTS]
        hour, rate = 3600 / medians[-1], tflop / medians[-1]
        cells = [f"{median:.3f}" for median in medians] + [f"{hour:.0f}"]
        if peaks[name] is None:
            cells += ["-", f"{rate:.3g}", "-"]
        else:
            cells += [f"{peaks[name]:.1f}", f"{rate:.3g}", f"{rate / peak_rate:.0%}"]
        print(f"| {name} | {' | '.join(cells)} |")
    print(f"\nTFLOP/s: of the {tflop:.4g} TFLOP a prompt that ours needs (counted); ", end="")
    print(f"the floor is these at {peak_rate:g} TFLOP/s on CUDA")
    print(f"\n| times faster than {THEIRS} | {' | '.join(PARTS)} |")
    print("|---" * 6 + "|")
    for name, parts in seconds.items():
        if name != THEIRS:
            cells = [ratio_text(seconds[THEIRS][part], parts[part]) for part in PARTS]
            print(f"| {name} | {' | '.join(cells)} |")


# --------------------------------------------------------------------------------------------------
# A preview decoder against the VAE


def bench_preview(opts):
    """Both decode the same children: the rollout goes on with a random child whatever is judged."""
    pipe = load(opts.model, opts.device, working_dtype(opts.device))
    preview = load_preview(opts.preview, pipe)
    where, _ = resolve_model(opts.model)
    judge_name = opts.judge or read_train_json(where).get("judge", "step_aware")
    judge = load_judge(judge_name, opts.device, opts.weights)
    prompts = some_prompts(opts.prompts)

    def run(decoder, seed):
        clock = Clock(opts.device)
        generator = torch.Generator().manual_seed(seed)
        with mock.patch.object(model, "decode", clock.timed("decode", model.decode)):
            pairs = collect_pairs(pipe, judge, prompts, generator, preview=decoder)
        return pairs.scores.cpu(), clock.seconds["decode"]

    decoders = {"VAE": None, "preview": preview}
    ways = {name: functools.partial(run, decoder) for name, decoder in decoders.items()}
    results = in_rounds(ways, opts.repeats)
    scores = {name: torch.cat([s for s, _ in results[name]], 1) for name in ways}  # (S, R P, K)
    seconds = {name: [s for _, s in results[name]] for name in ways}
    alike = same_order(scores["VAE"], scores["preview"])
    clear = clear_difference(scores["VAE"])
    times = pipe.scheduler.timesteps.tolist()[-len(alike) + 1 :] + [0]  # of the children
    quarters = torch.tensor(times) // 250
    print(f"{opts.preview} beside the VAE of {opts.model}, judge {judge_name}, ", end="")
    print(f"{device_name(opts.device)}, {opts.repeats} rounds of {len(prompts)} prompts\n")
    print("| timesteps of the children | pairs | ordered alike | clear pairs | ordered alike |")
    print("|---|---|---|---|---|")
    rows = {f"{250 * q} to {250 * q + 249}": quarters == q for q in quarters.unique().tolist()}
    rows["all"] = quarters >= 0
    for title, some in rows.items():
        cells = []
        for verdicts in (alike[some].flatten(), alike[some][clear[some]]):
            share = f"{verdicts.float().mean():.3f}" if len(verdicts) else "-"
            cells += [str(len(verdicts)), share]
        print(f"| {title} | {' | '.join(cells)} |")
    print("\nclear: the VAE's two scores differ enough to train on (--threshold 0.3); ", end="")
    print("0.5 would be no relation at all")
    ratio = ratio_text(seconds["preview"], seconds["VAE"])
    print(f"decoding takes {ratio} of the VAE's time")


def sibling_pairs(scores):
    """(..., K) -> the scores of both children of each of the K (K - 1) / 2 pairs."""
    K = scores.shape[-1]
    i, j = torch.triu_indices(K, K, 1)
    return scores[..., i], scores[..., j]


def same_order(scores, others):
    """(..., K) twice -> (..., K (K - 1) / 2): do both prefer the same of two children?"""
    (a, b), (c, d) = sibling_pairs(scores), sibling_pairs(others)
    return torch.sign(a - b) == torch.sign(c - d)


def clear_difference(scores, threshold=0.3):
    """(..., K) -> (..., K (K - 1) / 2): do the softmax probabilities differ by more?"""
    a, b = sibling_pairs(scores)
    return torch.tanh((a - b).abs() / 2) > threshold


# --------------------------------------------------------------------------------------------------
# FSIM


def bench_fsim(rounds, count=4, size=512):
    """Seconds a pair, for the pairs of a prompt's `count` images: the package's fsim, and ours."""
    try:
        from image_similarity_measures.quality_metrics import fsim as package_fsim
    except ImportError as error:
        what = "--fsim compares with a package that is not here"
        raise UserError(f"{what}: pip install image-similarity-measures==0.3.6") from error
    torch.manual_seed(0)
    pictures, _ = draw(count, np.random.default_rng(0))
    large = F.interpolate(pictures, size=(size, size), mode="bicubic")
    noisy = (large + 0.03 * torch.randn(large.shape)).clamp(0, 1)
    images = [(x * 255).byte().permute(1, 2, 0).numpy() for x in noisy]
    pairs = list(itertools.combinations(range(count), 2))
    values = {}

    def theirs():
        values["package"] = [package_fsim(images[i], images[j]) for i, j in pairs]

    def ours():
        maps = [diversity.fsim_maps(image) for image in images]
        values["ours"] = [diversity.fsim_of_maps(maps[i], maps[j]) for i, j in pairs]

    ours()
    ways = {"package": lambda _: seconds_of(theirs), "ours": lambda _: seconds_of(ours)}
    seconds = in_rounds(ways, rounds)
    worst = np.abs(np.subtract(values["package"], values["ours"])).max()
    if not worst < 1e-9:
        raise UserError(f"the values differ by {worst:.1e}: no time is worth printing")
    package, own = (np.median(seconds[name]) / len(pairs) for name in ways)
    print(f"FSIM, {device_name('cpu')}, {count} images of {size} x {size}, {rounds} rounds")
    print(f"the package {package:.2f} s a pair, ours {own:.2f} s a pair")
    ratio = ratio_text(seconds["ours"], seconds["package"])
    print(f"ours takes {ratio} of the package's time; the values differ by {worst:.0e} at most")


def bench_optimum(rounds, count=10**6):
    """Seconds of parts.optimum.optimal_policy; its optima must sum to 1."""
    for name in TABLE:
        div = get_divergence(name, 0.4 if name == "alpha" else None)
        seconds = []
        for i in range(rounds):
            generator = torch.Generator().manual_seed(i)
            p_ref, reward = torch.randn(2, count, dtype=torch.float64, generator=generator)
            p_ref, beta = torch.softmax(p_ref, 0), 10 ** (-1.5 + 3 * i / max(1, rounds - 1))
            start = time.perf_counter()
            log_x, _ = optimal_policy(p_ref, reward, beta, div)
            seconds.append(time.perf_counter() - start)
            assert abs((p_ref * log_x.exp()).sum().item() - 1) < 1e-12
        print(f"{div.name}: median {np.median(seconds):.2f} s, longest {max(seconds):.2f} s")


# --------------------------------------------------------------------------------------------------
# A run of train.py


def summarise(folder):
    """Medians over the optimiser steps and the rollouts of a run (not of --pairs), from its log."""
    steps, rollouts = read_log(folder, "step"), read_log(folder, "rollout")
    if not rollouts:
        raise UserError(f"{folder} has no log of rollouts: give a run's folder")
    with open(os.path.join(folder, "config.json")) as file:
        config = json.load(file)
    skipped = sum(step["grad_norm"] is None for step in steps)
    peak = max(rollout["peak_gb"] for rollout in rollouts)
    medians = [np.median([record["seconds"] for record in log]) for log in (steps, rollouts)]
    precision = config["args"]["mixed_precision"]
    print(f"{folder}, {config['device']}, {precision}: {len(steps)} optimiser steps ", end="")
    print(f"({skipped} skipped), {medians[0]:.2f} s each; {len(rollouts)} rollouts, ", end="")
    print(f"{medians[1]:.2f} s each; peak {peak:.1f} GB; loss {steps[0]['loss']:.4f}, ", end="")
    print(f"at the end {steps[-1]['loss']:.4f}")


if __name__ == "__main__":
    run_cli(main)
