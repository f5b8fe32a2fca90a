"""What is painted: images from seeds, and SPO's rollout of preference pairs.

python sample.py "a red sun over a sea"                 the toy where there is no CUDA, else SD1.5
python sample.py "a red sun over a sea" --model toy --lora out/toy-js      a run's LoRA, and above
                                                        it the reference, from the same seeds
python sample.py --prompts my.txt --lora out/toy-rkl out/toy-js            a gallery, as the paper's
                                                        Figure 1: a row a model, a column a prompt

Writes a PNG per image of the model asked for, and a labelled grid, to --output_dir.
Seed k gives the same picture at any batch size. train.py and evaluate.py call the same functions.
"""

import contextlib
import dataclasses
import os

import torch

from loss import ddim_mean_std, step_log_ratios
from parts import common, model
from parts.flags import build_parser, check_range, check_ranges
from parts.weights import resolve_model


@torch.no_grad()
def generate(
    pipe, prompts, seeds, num_steps=20, guidance=5.0, eta=0.0, batch_size=16, progress=None
):
    """Images (N, 3, H, W) in [0, 1], on the CPU, of N prompts and N seeds, by DDIM.

    One generator per image, on the CPU: seed k is the same picture at any batch size, of the same
    noise on any device. progress: called after every denoising step with the part of the images
    that it has made, so that a bar of N images moves.
    """
    if len(prompts) != len(seeds):
        raise ValueError(f"{len(prompts)} prompts but {len(seeds)} seeds")
    pipe.scheduler.set_timesteps(num_steps)  # 951, 901, .., 1 of 20 steps
    device, null = pipe.unet.device, model.encode_prompts(pipe, [""])
    images = []
    for start in range(0, len(prompts), batch_size):
        text = model.encode_prompts(pipe, prompts[start : start + batch_size])  # (B, 77, C)
        generators = [torch.Generator().manual_seed(s) for s in seeds[start : start + batch_size]]

        def noise(generators=generators):
            each = [torch.randn(model.latent_shape(pipe), generator=g) for g in generators]
            return torch.stack(each).to(device)

        x = noise()  # (B, 4, h, w)
        for t in pipe.scheduler.timesteps.tolist():
            times = torch.full((len(x),), t, device=device)
            eps = model.predict_noise(pipe.unet, x, times, text, null, guidance)  # (B, 4, h, w)
            alphas_cumprod = pipe.scheduler.alphas_cumprod
            mean, std, _ = ddim_mean_std(eps, x, times, alphas_cumprod, num_steps, eta)
            x = mean + std * noise() if eta > 0 else mean
            if progress:
                progress(len(x) / num_steps)
        decoded = model.decode(pipe, x)
        if not decoded.isfinite().all():  # it would be a black picture, and be scored as one
            raise common.UserError("a picture is not finite: damaged weights, or training diverged")
        images.append(decoded.clamp(0, 1).cpu())
    return torch.cat(images)


def seed_of(p, k):
    """The seed of image k of prompt p: the same for every model, so that models share noise."""
    return 10_000 + 100 * p + k


def paint(pipe, prompts, count, num_steps=20, guidance=5.0, batch_size=16, progress=None):
    """(P, count, 3, H, W) in [0, 1]: `count` images of every prompt, with the seeds of seed_of."""
    each = [prompt for prompt in prompts for _ in range(count)]  # P * count, prompt by prompt
    seeds = [seed_of(p, k) for p in range(len(prompts)) for k in range(count)]
    settings = dict(batch_size=batch_size, progress=progress)
    images = generate(pipe, each, seeds, num_steps, guidance, **settings)  # (P count, 3, H, W)
    return images.view(len(prompts), count, *images.shape[1:])


# ---- Preference pairs: SPO's step-wise pool ------------------------------------------------------


@dataclasses.dataclass
class Pairs:
    """M pairs of a rollout over P prompts: two children of one x_t, of which the judge prefers x_w.
    Eq. 5 needs their log_ratios; parts/pairs.py has the same method for pairs of images."""

    x_t: torch.Tensor  # (M, 4, h, w) fp32
    x_w: torch.Tensor  # (M, 4, h, w)
    x_l: torch.Tensor  # (M, 4, h, w)
    t: torch.Tensor  # (M,) int64, the timestep of x_t
    prompt: torch.Tensor  # (M,) int64, a row of text
    text: torch.Tensor  # (P, 77, C)
    scores: torch.Tensor  # (steps, P, K), the judge's, of the K children at every judged step
    null: torch.Tensor  # (1, 77, C), the empty prompt
    guidance: float
    alphas_cumprod: torch.Tensor  # (T,)
    num_steps: int
    eta: float
    order: torch.Tensor = None  # (M,), in which to train on them; train.Rollouts sets it

    @property
    def advance(self):
        """How many prompts the rollout saw."""
        return len(self.text)

    def log_ratios(self, policy, index, reduce="mean"):
        """(u_w, u_l), each (B,), of the pairs `index`: one step's log X, loss.step_log_ratios.
        Winner and loser share x_t, t and prompt: one prediction of each policy serves both."""
        x_t, t, text = self.x_t[index], self.t[index], self.text[self.prompt[index]]
        # both (B, 4, h, w)
        eps, eps_ref = policy.predict_both(x_t, t, text, self.null, self.guidance)
        x_w, x_l = self.x_w[index], self.x_l[index]
        sampler = dict(alphas_cumprod=self.alphas_cumprod, num_steps=self.num_steps, eta=self.eta)
        return step_log_ratios(eps, eps_ref, x_t, x_w, x_l, t, **sampler, reduce=reduce)

    @property
    def weight(self):
        """(M,), of each pair in the loss: all count the same."""
        return torch.ones(len(self.t), device=self.t.device)

    def to(self, device):
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        moved = {k: v.to(device) for k, v in fields.items() if torch.is_tensor(v)}
        return dataclasses.replace(self, **moved)


def join_pairs(parts):
    """The union of several ranks' Pairs, in their order."""
    rows = ("x_t", "x_w", "x_l", "t", "text")
    joined = {name: torch.cat([getattr(part, name) for part in parts]) for name in rows}
    joined["scores"] = torch.cat([part.scores for part in parts], 1)
    # prompt is a row of text: of the union's text it lies below those of the parts before
    counts = torch.tensor([0] + [len(part.text) for part in parts[:-1]]).cumsum(0)
    shifted = [part.prompt + below for part, below in zip(parts, counts)]
    return dataclasses.replace(parts[0], **joined, prompt=torch.cat(shifted))


@torch.no_grad()
def collect_pairs(
    pipe,
    judge,
    prompts,
    generator,
    num_children=4,
    first_step=4,
    threshold=0.3,
    num_steps=20,
    eta=1.0,
    guidance=5.0,
    progress=None,
    preview=None,
):
    """One rollout of SPO (arXiv 2406.04314, sec. 3): a trajectory per prompt, judged step by step.

    Every x_t from first_step on has K = num_children children x_{t-1}; best against worst is a pair
    where the judge is clear (threshold). judge: encode(prompts) -> text, a row per prompt;
    judge(images, text, t) -> (N,) scores. generator: of the CPU; the pairs are a function of its
    seed and the policy. progress: called after each of the num_steps steps. preview: a tiny
    autoencoder that decodes for the judge. Returns Pairs.
    Raises ValueError for settings under which no pair can exist.
    """
    if num_children < 2 or not 0 <= first_step < num_steps or eta <= 0:
        raise ValueError("pairs need num_children >= 2, 0 <= first_step < num_steps and eta > 0")
    P, K = len(prompts), num_children
    text, null = model.encode_prompts(pipe, prompts), model.encode_prompts(pipe, [""])
    judge_text = judge.encode(prompts).repeat_interleave(K, 0)  # a row per child
    sampler = dict(alphas_cumprod=pipe.scheduler.alphas_cumprod, num_steps=num_steps, eta=eta)

    def predict(x, times, text):
        return model.predict_noise(pipe.unet, x, times, text, null, guidance)

    pool, all_scores = [], []
    steps = branching_trajectory(pipe, predict, text, generator, K, first_step, sampler, progress)
    for t, x_t, children, t_child, x0 in steps:
        images = model.decode(pipe, x0, preview)
        if not getattr(judge, "unclamped", False):  # the step-aware judge clamps after its resize
            images = images.clamp(0, 1)
        times = torch.full((P * K,), t_child, device=x0.device)
        scores = judge(images, judge_text, times).float().view(P, K)
        all_scores.append(scores)  # (P, K)
        pool.append(clear_pairs(x_t, children, t, scores, threshold))
    x_t, x_w, x_l, t, prompt = (torch.cat(column) for column in zip(*pool))
    rows = dict(x_t=x_t, x_w=x_w, x_l=x_l, t=t, prompt=prompt, text=text, null=null)
    return Pairs(**rows, scores=torch.stack(all_scores), guidance=guidance, **sampler)


@torch.no_grad()
def branching_trajectory(pipe, predict, text, generator, K, first_step, sampler, progress=None):
    """A DDIM trajectory per prompt with K children a step from first_step on; one of them goes on.

    Yields (t, x_t (P, 4, h, w), its children (P K, 4, h, w), t_child, their x0 (P K, 4, h, w)):

        steps 0 .. first_step - 1   one x a prompt; predict, take one noisy DDIM step
        step first_step             predict at x; its K children differ by their noise alone
        every later step            predict at all children, which tells their x0: yield; a RANDOM
                                    child goes on, its prediction is there, and has K children
        after the last step         the children are images: yield them at timestep 0

    So the judge, who sees what is yielded, does not steer the trajectory. UNet rows per prompt at
    the defaults: 5 steps with one x, 15 with 4 children, twice for guidance: 2 (5 + 60) = 130.
    """
    P, device = len(text), text.device
    pipe.scheduler.set_timesteps(sampler["num_steps"])

    def noise(rows):
        return torch.randn(rows, *model.latent_shape(pipe), generator=generator).to(device)

    x, x_t, t_parent = noise(P), None, None
    for i, t in enumerate(pipe.scheduler.timesteps.tolist()):
        # x: (P, 4, h, w) or, where there are children, all of them, (P K, 4, h, w)
        times = torch.full((len(x),), t, device=device)
        # P rows at a time, with children and without: memory and compiled code know one size
        eps = model.in_slices(predict, P, x, times, text.repeat_interleave(len(x) // P, 0))
        mean, std, x0 = ddim_mean_std(eps, x, times, **sampler)
        if x_t is not None:
            yield t_parent, x_t, x, t, x0
            # x, its mean and its std are of the child that goes on; the others end here
            child = torch.randint(K, (P,), generator=generator).to(device)
            chosen = K * torch.arange(P, device=device) + child
            x, mean, std = x[chosen], mean[chosen], std[chosen]
        if i < first_step:
            x = mean + std * noise(P)
        else:
            x_t, t_parent = x, t
            x = mean.repeat_interleave(K, 0) + std.repeat_interleave(K, 0) * noise(P * K)
        if progress:
            progress()
    yield t_parent, x_t, x, 0, x  # at timestep 0 a latent is its own x0


def clear_pairs(parent, children, t, scores, threshold):
    """Best against worst child of every x_t, where softmax([best, worst]) differs by > threshold.
    parent (P, 4, h, w) at timestep t; children (P K, 4, h, w); scores (P, K), a NaN or infinite one
    makes its pair invalid. Returns x_t, x_w, x_l, t, prompt of the M <= P clear pairs."""
    prompt = torch.arange(len(parent), device=parent.device)
    (best, w), (worst, l) = scores.max(1), scores.min(1)  # (P,) each
    difference = torch.tanh((best - worst) / 2)  # p - (1 - p), p = sigmoid(best - worst)
    clear = scores.isfinite().all(1) & (difference > threshold)
    # children lie flat: those of prompt p begin at row p K
    first_child = prompt * scores.shape[1]
    x_w, x_l = children[first_child + w], children[first_child + l]
    times = torch.full_like(prompt, t)
    return [rows[clear] for rows in (parent, x_w, x_l, times, prompt)]


FLAGS = {  # flag: (default, its range, what it is)
    "prompts": (None, None, "a file of prompts, one a line, instead or as well"),
    "model": ("auto", None, "auto, toy, a folder, a single checkpoint or a hub id"),
    "num_inference_steps": (20, "[1, 500]", "DDIM steps"),
    "guidance_scale": (5.0, "(-inf, inf)", "<= 1 is none"),
    "eta": (0.0, "[0, inf)", "0: deterministic; 1: what training samples with"),
    "batch_size": (16, "[1, inf)", "images at once"),
    "device": ("auto", None, "auto, cpu, cuda, cuda:1"),
    "output_dir": ("out/samples", None, "of the images and grid.png"),
}


def parse_args():
    parser = build_parser(FLAGS, __doc__)
    parser.add_argument("prompt", nargs="*", help="prompts, each in quotes")
    runs = "runs' folders, --full or not, or LoRA files; of several, a gallery: a row a model"
    parser.add_argument("--lora", metavar="RUN", nargs="+", default=[], help=runs)
    seeds = "of every prompt (default: 0 to 5; a gallery: 0)"
    parser.add_argument("--seeds", type=int, nargs="+", help=seeds)
    args = parser.parse_args()
    check_ranges(FLAGS, args)
    args.prompt += common.read_prompts(args.prompts) if args.prompts else []
    if not args.prompt:
        raise common.UserError("nothing to paint: give a prompt in quotes, or --prompts FILE")
    args.seeds = args.seeds or ([0] if len(args.lora) > 1 else [0, 1, 2, 3, 4, 5])
    for seed in args.seeds:
        check_range("seeds", seed, "[0, 18446744073709551616)")  # 64 bits
    return args


def main():
    args = parse_args()
    prompts, gallery = args.prompt, len(args.lora) > 1
    device = common.pick_device(args.device)
    config = os.path.join(args.lora[0] if args.lora else "", "config.json")
    if args.model == "auto" and args.lora and os.path.exists(config):  # a run knows its model
        args.model = common.read_json(config, "say --model")["args"]["model"]
    where, why = resolve_model(args.model)
    print(f"model: {where} ({why}), on {device}")
    each = [prompt for prompt in prompts for _ in args.seeds]
    seeds = args.seeds * len(prompts)  # every prompt with every seed
    names = {os.path.basename(os.path.normpath(run)): run for run in args.lora}
    models = names | {"reference": None}  # which is last, so that a wrong run is found at once
    if len(models) <= len(args.lora):
        raise common.UserError("two of --lora have one name, or one is called reference: rename it")
    painted, policy = {}, None  # name -> (P, seeds, 3, H, W), the same noise for all models
    # painting needs no more than half precision, which CPUs are slow in
    dtype = torch.float16 if device.startswith("cuda") else torch.float32
    settings = args.num_inference_steps, args.guidance_scale, args.eta, args.batch_size
    for name, run in models.items():
        if run or not painted:  # the reference is in the UNet of the run before it
            pipe = model.load_pipeline(where, device, dtype)
        policy = model.load_policy(pipe.unet, run) if run else policy
        common.make_folder(args.output_dir)  # before anything is painted
        if not painted:
            model.say_cut(pipe, prompts)
        is_reference = policy is not None and run is None
        with policy.reference() if is_reference else contextlib.nullcontext():
            with common.progress_bar(total=len(each), unit="images", desc=name) as bar:
                images = generate(pipe, each, seeds, *settings, progress=bar.update)
        painted[name] = images.view(len(prompts), len(args.seeds), *images.shape[1:])
    for name in names or models:  # files of the model asked for, its LoRA on
        folder = os.path.join(args.output_dir, name if gallery else "")
        common.make_folder(folder)
        for p, images in enumerate(painted[name]):
            for seed, image in zip(args.seeds, images):
                common.write_png(common.to_pil(image), f"{folder}/{p:03d}_seed{seed}.png")
    top_down = ["reference", *names]
    rows = [(name, painted[name].flatten(0, 1)) for name in top_down]
    if not gallery:  # a row a prompt and a model, a column a seed
        rows = []
        for p, prompt in enumerate(prompts):
            for name in top_down:
                rows.append((f"{prompt}   [{name}]" if names else prompt, painted[name][p]))
    cell = 128 if images.shape[-1] < 128 else 256
    captions = each if gallery else None
    common.labelled_grid(rows, os.path.join(args.output_dir, "grid.png"), cell, captions)
    print(f"{len(each)} images and grid.png in {args.output_dir}")


if __name__ == "__main__":
    common.run_cli(main)
