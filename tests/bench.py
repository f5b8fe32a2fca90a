"""
What the loop costs, side by side with the SPO reference's way of doing the same arithmetic, in one run.

    python tests/bench.py                        the toy, on this machine
    python tests/bench.py --pairs 4 --repeats 5 --model DIR_OR_HUB_ID --device cuda
    python tests/bench.py --loop [--model sd15 --device cuda --compile]      the whole loop by part; sd15: its size, random weights
    python tests/bench.py --memory               counted at SD1.5's size, on any machine: what a training step must hold
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
import torch.nn.functional as F  # noqa: E402

import evaluate  # noqa: E402
import sample  # noqa: E402
from toy import make
from toy import world as toy  # noqa: E402
import train  # noqa: E402
from divergences import get_divergence  # noqa: E402
from parts import judges_clip  # noqa: E402
from parts.judges import load_judge  # noqa: E402
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
    images = F.interpolate(toy.draw(K, rng)[0], size=(size, size), mode="bicubic") + .03 * torch.randn(K, 3, size, size)
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


def sd15(device, dtype):
    """A Stable Diffusion v1.5 at its published size with random weights, and the toy's words: for time and memory alone."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel
    words = make.tokenizer()
    words.model_max_length = 77
    with torch.device(device):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)    # diffusers' defaults are otherwise SD1.5's
        vae = AutoencoderKL(block_out_channels=(128, 256, 512, 512), layers_per_block=2, sample_size=512, scaling_factor=.18215,
                            down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4)
        text = CLIPTextModel(CLIPTextConfig(vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12))
    scheduler = DDIMScheduler(beta_start=.00085, beta_end=.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    for part in (unet, vae, text):
        part.requires_grad_(False).eval().to(dtype)
    return StableDiffusionPipeline(vae=vae, text_encoder=text, tokenizer=words, unet=unet, scheduler=scheduler, safety_checker=None,
                                   feature_extractor=None, requires_safety_checker=False)


def random_judge(device, dtype, full):
    """The step-aware judge at its published size (or, for the CPU, tiny), random weights."""
    from transformers import CLIPConfig, CLIPModel
    config = CLIPConfig(**judges_clip.VIT_H)
    if not full:
        small = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
        config = CLIPConfig(projection_dim=64, text_config=small, vision_config=small | dict(image_size=224, patch_size=32))
    judge = object.__new__(judges_clip.StepAware)
    with torch.device(device):
        judge.clip = judges_clip.add_time(CLIPModel(config)).requires_grad_(False).eval().to(dtype)
    judge.name, judge.size, judge.tokenizer = "step_aware", config.vision_config.image_size, make.tokenizer()
    return judge


class TextEveryStep:
    """The reference's way with the judge: the prompt is encoded again for every child at every step."""

    def __init__(self, judge):
        self.judge, self.prompts = judge, None

    def encode(self, prompts):
        self.prompts = list(prompts)
        return torch.arange(len(prompts), device=self.judge.clip.device)

    def __call__(self, images, rows, t=None):
        return self.judge(images, self.judge.encode([self.prompts[i] for i in rows.tolist()]), t)


class Clock:
    """Seconds by part; wraps functions, and waits for the device before it looks."""

    def __init__(self, device):
        self.seconds, self.sync = {}, torch.cuda.synchronize if device.startswith("cuda") else lambda: None

    def of(self, part, f):
        def timed(*args, **kw):
            self.sync()
            start = time.perf_counter()
            out = f(*args, **kw)
            self.sync()
            self.seconds[part] = self.seconds.get(part, 0) + time.perf_counter() - start
            return out
        return timed


def prompt_by_prompt(opts):
    """Seconds a prompt of the whole loop, by part: a rollout and the training on its pairs, reference-like and ours."""
    from torch.utils.flop_counter import FlopCounterMode
    device, full = opts.device, opts.model == "sd15"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True  # as SPO's own settings, for both
    half = torch.bfloat16 if device.startswith("cuda") else torch.float32
    args, _ = train.parse(["--model", "toy"])
    args.train_batch_size = min(opts.pairs, 10)
    rows, prompts = [], toy.prompts()[:opts.prompts]
    ways = ["reference-like", "ours"] + (["ours, compiled"] if opts.compile else [])
    for way in ways:
        torch.manual_seed(0)
        pipe = sd15(device, half) if full else load_pipeline(opts.model, device, half)
        reference = copy.deepcopy(pipe.unet) if way == "reference-like" else None
        params = add_lora(pipe.unet, 4)
        judge = random_judge(device, torch.float32 if way == "reference-like" else torch.float16 if device.startswith("cuda") else torch.float32, full)
        judge = TextEveryStep(judge) if way == "reference-like" else judge
        if way != "reference-like":
            args.sample_batch_size, args.compile = len(prompts), "compiled" in way
            train.make_fast(pipe, judge, args)
        null, div, clock = encode_prompts(pipe, [""]), get_divergence("js"), Clock(device)
        opt = torch.optim.AdamW(params, lr=1e-9)
        step = (lambda *a: doubled_loss(pipe, reference, *a[1:])) if reference is not None else train.pair_loss
        real = sample.predict_noise, sample.decode

        def once(count):
            generator = torch.Generator().manual_seed(0)
            sample.predict_noise, sample.decode = clock.of("UNet", real[0]), clock.of("decode", real[1])
            timed_judge = type("Timed", (), {"encode": staticmethod(judge.encode), "__call__": lambda self, *a: clock.of("judge", judge)(*a)})()
            pairs = collect_pairs(pipe, timed_judge, prompts[:count], generator, threshold=0.0)
            sample.predict_noise, sample.decode = real
            def learn():
                for index in torch.arange(len(pairs)).split(args.train_batch_size):
                    step(pipe, pairs, index, null, div, args.beta, args)[0].backward()
                opt.step()
                opt.zero_grad()
            clock.of("training", learn)()
            return len(pairs)
        once(len(prompts))      # warm-up: allocator, cuDNN's choices, compilation
        clock.seconds.clear()
        if device.startswith("cuda"):
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        n = once(len(prompts))
        clock.sync()
        wall, parts = (time.perf_counter() - start) / len(prompts), {k: v / len(prompts) for k, v in clock.seconds.items()}
        peak = f"{evaluate.peak_gb(device):.1f}" if device.startswith("cuda") else "-"  # of the process, it cannot be told apart
        if way == "ours":
            with FlopCounterMode(display=False) as counter:
                once(1)
            flops = counter.get_total_flops()
        rows.append((way, wall, parts, peak, n / len(prompts)))
        del pipe, reference, judge, params, opt
    where = torch.cuda.get_device_name() if device.startswith("cuda") else f"cpu, {torch.get_num_threads()} threads"
    print(f"{opts.model}, {where}, {len(prompts)} prompts a rollout, {rows[0][4]:.0f} pairs a prompt; seconds a prompt\n")
    print("| loop | UNet | decode | judge | training | all | prompts an hour | peak GB | TFLOP/s of the work that ours needs |\n" + "|---" * 9 + "|")
    for way, wall, parts, peak, _ in rows:
        print(f"| {way} | " + " | ".join(f"{parts[k]:.3f}" for k in ("UNet", "decode", "judge", "training"))
              + f" | {wall:.3f} | {3600 / wall:.0f} | {peak} | {flops / wall / 1e12:.3g} |")
    print(f"\n{flops / 1e12:.4g} TFLOP a prompt (counted); ours is {rows[0][1] / rows[1][1]:.2f} times faster than reference-like, prompt by prompt"
          + (f"; share of the FLOP floor at {opts.peak:g} TFLOP/s: " + ", ".join(f"{r[0]} {flops / r[1] / 1e12 / opts.peak:.0%}" for r in rows)
             if device.startswith("cuda") else ""))


class Flash(torch.autograd.Function):
    """What fused attention keeps for its backward pass: q, k, v, its output, and a number a row; no matrix of weights."""

    @staticmethod
    def forward(ctx, q, k, v):
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:3], dtype=torch.float32))
        return out


def held_gb(pairs, checkpointing):
    """GB that autograd holds between the forward and the backward pass of `pairs` guided pairs: the UNet at SD1.5's size, run
    on the meta device in bf16, storages counted once. Checkpoints count, but not the one block that is made again."""
    pipe = sd15("meta", torch.bfloat16)
    add_lora(pipe.unet, 4)
    if checkpointing:
        pipe.unet.enable_gradient_checkpointing()
        pipe.unet.train()
    weights, held, alive = {p.untyped_storage()._cdata for p in pipe.unet.parameters()}, {}, []
    def pack(x):
        alive.append(x)     # so that no address is used twice
        held[x.untyped_storage()._cdata] = x.untyped_storage().nbytes()
        return x
    half = dict(device="meta", dtype=torch.bfloat16)
    x, text = torch.empty(2 * pairs, 4, 64, 64, **half), torch.empty(2 * pairs, 77, 768, **half)
    attention, F.scaled_dot_product_attention = F.scaled_dot_product_attention, lambda q, k, v, **kw: Flash.apply(q, k, v)
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            pipe.unet(x, torch.empty(2 * pairs, device="meta", dtype=torch.int64), text)
    finally:
        F.scaled_dot_product_attention = attention
    return sum(v for k, v in held.items() if k not in weights) / 1e9


def memory():
    """A Markdown table: frozen weights, and what a training step adds, by settings. Counted, not measured."""
    from transformers import CLIPConfig, CLIPModel
    pipe = sd15("meta", torch.bfloat16)
    with torch.device("meta"):
        judge = judges_clip.add_time(CLIPModel(CLIPConfig(**judges_clip.VIT_H)))
    size = lambda *parts: sum(p.numel() * 2 for m in parts for p in m.parameters()) / 1e9
    frozen = size(pipe.unet), size(pipe.vae, pipe.text_encoder), size(judge)
    print(f"frozen weights in half precision: UNet {frozen[0]:.2f} GB, VAE and text encoder {frozen[1]:.2f} GB, step-aware judge {frozen[2]:.2f} GB\n")
    print("| --train_batch_size | --gradient_checkpointing | activations held for backward, GB | with the weights, GB |\n|---|---|---|---|")
    for pairs, checkpointing in ((10, False), (4, False), (1, False), (10, True), (1, True)):
        held = held_gb(pairs, checkpointing)
        print(f"| {pairs} | {'yes' if checkpointing else 'no'} | {held:.1f} | {held + sum(frozen):.1f} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="toy")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--pairs", type=int, default=10, help="pairs a step")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--loop", action="store_true", help="time rollouts and training, by part, prompt by prompt; --model sd15 is SD1.5's "
                        "size with random weights")
    parser.add_argument("--prompts", type=int, default=4, help="of --loop: prompts a rollout")
    parser.add_argument("--compile", action="store_true", help="of --loop: ours, compiled, as well")
    parser.add_argument("--peak", type=float, default=790, help="of --loop on CUDA: TFLOP/s of the FLOP floor (H100, H200 in bf16: 790)")
    parser.add_argument("--memory", action="store_true", help="count what a training step at SD1.5's size must hold; needs no GPU")
    parser.add_argument("--fsim", action="store_true", help="time FSIM in place of the training step")
    opts = parser.parse_args()
    if opts.fsim:
        return bench_fsim(opts.repeats)
    if opts.memory:
        return memory()
    if opts.loop:
        return prompt_by_prompt(opts)
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
