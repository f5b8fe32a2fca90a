"""
What the loop costs, side by side with the SPO reference's way of doing the same arithmetic, in one run.

    python tests/bench.py                        the toy, on this machine
    python tests/bench.py --pairs 4 --repeats 5 --model DIR_OR_HUB_ID --device cuda
    python tests/bench.py --fsim                 FSIM beside image-similarity-measures (pip install image-similarity-measures==0.3.6)

Reference-like: each child with a policy and a reference prediction of its own (RockeyCoss/SPO does so, though winner and
loser share x_t, t and prompt), the reference a second UNet in memory. Ours: train.pair_loss. The two alternate, the
medians are compared, and the LoRA gradients of the two must agree before a time is printed.
"""
import argparse
import copy
import itertools
import os
import statistics
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import numpy as np  # noqa: E402
import torch  # noqa: E402

import evaluate  # noqa: E402
import toy  # noqa: E402
import train  # noqa: E402
from divergences import get_divergence  # noqa: E402
from judges import load_judge  # noqa: E402
from loss import alignment_loss, step_log_ratio  # noqa: E402
from sample import add_lora, collect_pairs, ddim_mean_std, encode_prompts, load_pipeline, predict_noise, run_cli, UserError  # noqa: E402


def doubled_loss(pipe, reference, pairs, index, null, div, beta, args):
    """Eq. 5 with two policy and two reference predictions per pair, from two UNets."""
    x_t, t, text = pairs.x_t[index], pairs.t[index], pairs.text[pairs.prompt[index]]
    table, u = pipe.scheduler.alphas_cumprod, []
    for child in (pairs.x_w[index], pairs.x_l[index]):
        mean, std, _ = ddim_mean_std(predict_noise(pipe.unet, x_t, t, text, null, args.guidance_scale), x_t, t, table, 20)
        with torch.no_grad():
            ref, _, _ = ddim_mean_std(predict_noise(reference, x_t, t, text, null, args.guidance_scale), x_t, t, table, 20)
        u.append(step_log_ratio(child, mean, ref, std))
    return alignment_loss(*u, div, beta, args.clip_range)


def bench_fsim(repeats, K=4, size=512):
    """Seconds a pair for the K (K - 1) / 2 pairs of a prompt, the package's fsim and ours, alternated in one run."""
    try:
        from image_similarity_measures.quality_metrics import fsim as package_fsim
    except ImportError as e:
        raise UserError("--fsim compares with a package that is not here: pip install image-similarity-measures==0.3.6") from e
    rng = np.random.default_rng(0)
    images = torch.nn.functional.interpolate(toy.draw(K, rng)[0], size=(size, size), mode="bicubic") + .03 * torch.randn(K, 3, size, size)
    images = [(x.clamp(0, 1) * 255).byte().permute(1, 2, 0).numpy() for x in images]
    pairs = list(itertools.combinations(range(K), 2))
    def ours():
        maps = [evaluate.fsim_maps(x) for x in images]
        return [evaluate.fsim_of_maps(maps[i], maps[j]) for i, j in pairs]
    times, results = {"package": [], "ours": []}, {}
    evaluate.fsim(images[0][:64, :64], images[1][:64, :64])
    for _ in range(repeats):
        for name, f in (("package", lambda: [package_fsim(images[i], images[j]) for i, j in pairs]), ("ours", ours)):
            start = time.perf_counter()
            results[name] = f()
            times[name].append((time.perf_counter() - start) / len(pairs))
    worst = max(abs(a - b) for a, b in zip(*results.values()))
    assert worst < 1e-9, f"the values differ by {worst:.1e}: no time is worth printing"
    a, b = (statistics.median(times[k]) for k in ("package", "ours"))
    print(f"FSIM, {K} images of {size}x{size}, {len(pairs)} pairs, {torch.get_num_threads()} threads, medians of {repeats}: package {a:.2f} s a pair, "
          f"ours {b:.2f} s a pair, ratio {b / a:.2f}; largest difference of a value {worst:.0e}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="toy")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--pairs", type=int, default=10, help="pairs a step")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--fsim", action="store_true", help="time FSIM in place of the training step")
    opts = parser.parse_args()
    if opts.fsim:
        return bench_fsim(opts.repeats)
    args, _ = train.parse(["--model", opts.model])
    pipe = load_pipeline(opts.model, opts.device, torch.float32)
    reference = copy.deepcopy(pipe.unet)
    params = add_lora(pipe.unet, args.rank)
    for p in params[1::2]:
        torch.nn.init.normal_(p, std=1e-2)  # a LoRA under way, so that the gradients are of A and B both
    null, div, judge = encode_prompts(pipe, [""]), get_divergence("js"), load_judge("taste")

    sync = torch.cuda.synchronize if opts.device.startswith("cuda") else lambda: None
    def timed(f):
        sync()
        start = time.perf_counter()
        out = f()
        sync()
        return time.perf_counter() - start, out

    prompts = toy.prompts()[:args.sample_batch_size]
    seconds, pairs = timed(lambda: collect_pairs(pipe, judge, prompts, torch.Generator().manual_seed(0), threshold=0.0))
    index = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0))[:opts.pairs]

    def step(loss):
        gradients = torch.autograd.grad(loss()[0], params)
        return [g.double() for g in gradients]
    ours = lambda: step(lambda: train.pair_loss(pipe, pairs, index, null, div, args.beta, args))
    theirs = lambda: step(lambda: doubled_loss(pipe, reference, pairs, index, null, div, args.beta, args))
    flat = lambda gs: torch.cat([g.flatten() for g in gs])
    a, b = flat(ours()), flat(theirs())
    difference = ((a - b).norm() / b.norm()).item()
    assert difference < 1e-2, f"the gradients differ by {difference:.1e}: no time is worth printing"
    times = {"ours": [], "reference-like": []}
    for _ in range(opts.repeats):  # alternated, so that a drifting machine slows both
        for name, f in (("ours", ours), ("reference-like", theirs)):
            times[name].append(timed(f)[0])
    median = {k: statistics.median(v) for k, v in times.items()}
    ratio = statistics.median(y / x for x, y in zip(times["ours"], times["reference-like"]))
    where = torch.cuda.get_device_name() if opts.device.startswith("cuda") else f"cpu, {torch.get_num_threads()} threads"
    print(f"{opts.model}, {where}, {opts.pairs} pairs a step, median of {opts.repeats} alternated runs\n")
    print("| training step (forward, backward) | UNet rows a pair | seconds | UNets in memory |\n|---|---|---|---|")
    print(f"| reference-like | 8 | {median['reference-like']:.3f} | 2 |\n| ours | 4 | {median['ours']:.3f} | 1 |\n")
    print(f"speed-up {ratio:.2f} (median of the pairwise ratios); relative difference of the LoRA gradients {difference:.1e}")
    print(f"one rollout: {len(prompts)} prompts, {pairs.candidates} judged pairs, {seconds:.2f} s")


if __name__ == "__main__":
    run_cli(main)
