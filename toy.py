"""
The tiny world: captioned 32x32 landscapes, a tiny Stable Diffusion that paints them, and a taste to align it to.

    python toy.py --check       how well the checker reads true pictures, and the shipped model paints its captions
    python toy.py               trains the model of toy/ again, from nothing: about 45 minutes on 2 cores
    python toy.py --pairs DIR   writes preference pairs for train.py --pairs: 2,000 captions, two pictures each, the taste's choice

Why it exists: preference alignment is about what a model could paint and does not prefer to. Noise and random
weights cannot show that. Here a model of SD1.5's own classes (UNet2DConditionModel, AutoencoderKL, CLIPTextModel,
SD1.5's noise schedule, so SD1.5's 20 DDIM steps) follows its prompts, leaves open what they leave open, and
meets a taste that it can be aligned to in minutes on a laptop. Nothing else in the project knows that it is tiny.

The shipped weights: the defaults below, in fp32 on two cores (VAE 3,000 steps of 24 pictures, UNet and text encoder
7,000 steps of 64), then 600 more steps of the latter at a third of the learning rate, since a first tokenizer split two
words and cut the longest captions. Stored in fp16, 5.6 MB. `python toy.py --check` prints what they reach.
"""
import argparse
import csv
import itertools
import math
import os
import shlex
import shutil

import numpy as np
import torch
import torch.nn.functional as F

SIZE = 32        # pixels
LENGTH = 16      # tokens: the longest caption has 11 words, and start and end

# ---------------------------------------------------------------------------------------------------------------
# Pictures. The words of a caption and the colours (RGB in [0, 1]) that the checker looks for are the same tables.

SKIES = {"blue": (.36, .63, .96), "pink": (.99, .62, .74), "purple": (.46, .26, .66),
         "orange": (.96, .60, .22), "black": (.07, .06, .10), "gray": (.64, .64, .66)}
GROUNDS = {"field": (.24, .58, .15), "desert": (.84, .70, .42), "sea": (.07, .27, .58),
           "snow": (.88, .91, .98), "hills": (.42, .25, .13)}
LIGHTS = {"yellow sun": (1., .90, .22), "red sun": (.90, .13, .10), "white moon": (.99, .98, .91)}
RADII = {"small": (2.8, 3.5), "large": (5.4, 6.4)}  # pixels


def caption(size, light, ground, sky):
    """Words of one picture; None leaves a word out, and with it real freedom to the painter."""
    words = f"a {size} {light}" if size else f"a {light}"
    if ground:
        words += f" over {ground}" if ground in ("hills", "snow") else f" over a {ground}"
    return words + (f" under a {sky} sky" if sky else "")


def read_caption(words):
    """The inverse of caption: (size, light, ground, sky), None for what is not said. Any wording with those words."""
    said = words.replace(",", " ").split()
    first = lambda table, among: next((k for k in table if k in among), None)
    sky = first(SKIES, [said[i - 1] for i, w in enumerate(said) if w == "sky" and i])
    return first(RADII, said), first(LIGHTS, words), first(GROUNDS, said), sky


CAPTIONS = [caption(*c) for c in itertools.product((None, *RADII), LIGHTS, (None, *GROUNDS), (None, *SKIES))]  # 378


def prompts():
    """The 81 prompts to align on: 54 leave the sky open, where a taste may choose; 27 name it, where it may not."""
    rng = np.random.default_rng(0)
    open_sky, named = ([c for c in CAPTIONS if (read_caption(c)[3] is None) == is_open] for is_open in (True, False))
    both = open_sky + [named[i] for i in rng.permutation(len(named))[:27]]
    return [both[i] for i in rng.permutation(len(both))]


def draw(n, rng, captions=None):
    """n true pictures: images (n, 3, 32, 32) fp32 in [0, 1], and n tuples (size, light, ground, sky), of these n captions if given.

    A sky, paler below; a sun or moon with a soft edge and a glow, anywhere above the horizon; a textured ground below
    a wavy line. Every colour varies a little. Soft edges forgive a tiny painter; hard shapes stay blobs.
    """
    y, x = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32) + .5
    u = lambda lo, hi: rng.uniform(lo, hi, (n, 1, 1, 1)).astype(np.float32)
    tint = lambda s: rng.normal(0, s, (n, 3, 1, 1)).astype(np.float32)
    tables = RADII, LIGHTS, GROUNDS, SKIES
    size, light, ground, sky = picks = [rng.integers(len(t), size=n) for t in tables]
    for i, said in enumerate(map(read_caption, captions or ())):
        for pick, table, word in zip(picks, tables, said):
            pick[i] = pick[i] if word is None else list(table).index(word)
    colour = lambda table, i: np.array(list(table.values()), np.float32)[i][:, :, None, None]  # (n, 3, 1, 1)

    top = colour(SKIES, sky) + tint(.025)
    image = top + (y / SIZE) * u(0, .16) * (1 - top) * np.array([1.1, 1, .9], np.float32)[:, None, None]
    horizon = u(.52, .66) * SIZE
    wave = horizon + u(0, 1.2) * np.sin(x * u(.15, .5) + u(0, 6.3)) + u(0, .5) * np.sin(x * u(.4, .7) + u(0, 6.3))

    low, high = (np.array([r[i] for r in RADII.values()], np.float32)[size][:, None, None, None] for i in (0, 1))
    r = low + (high - low) * u(0, 1)
    cx, cy = r + (SIZE - 2 * r) * u(0, 1), r + (horizon - 1.2 * r) * u(0, 1)
    away = np.sqrt((x - cx) ** 2 + (y - cy) ** 2)
    lamp = colour(LIGHTS, light) + tint(.01)
    image = image + u(.15, .35) * np.exp(-np.maximum(away - r, 0) / (.6 * r)) * (lamp - image)  # glow
    image = image + np.clip(r - away + .5, 0, 1) * (lamp - image)                               # disc

    noise = torch.from_numpy(rng.normal(0, 1, (n, 1, 12, 8)).astype(np.float32))
    noise = F.interpolate(noise, size=(SIZE, SIZE), mode="bilinear", align_corners=False).numpy()
    land = (colour(GROUNDS, ground) + tint(.025)) * (1 + .09 * noise) * (1 - .12 * (y - horizon) / (SIZE - horizon))
    image = image + np.clip(y - wave + .5, 0, 1) * (land - image)
    names = [tuple(list(t)[i] for t, i in zip(tables, row)) for row in zip(*picks)]
    return torch.from_numpy(np.clip(image, 0, 1).astype(np.float32)), names


# ---------------------------------------------------------------------------------------------------------------
# The analytic checker, and the taste

def read_picture(images):
    """What is painted, by pixel rules: images (N, 3, H, W) in [0, 1] -> N tuples (size, light, ground, sky).

    Sky and ground: the named colour nearest to the median of the top 9 and the bottom 7 rows. Lamp: every pixel above
    row 23 goes to the nearest of this sky, this ground and the three lamps; the lamp with most pixels is it, and
    their number tells small from large. `python toy.py --check` says how often that is right on true pictures.
    """
    nearest = lambda v, table: list(table)[int(((np.array(list(table.values())) - v) ** 2).sum(1).argmin())]
    out = []
    for image in F.interpolate(images.detach().float().cpu(), size=(SIZE, SIZE), mode="area").numpy():
        sky, ground = np.median(image[:, :9].reshape(3, -1), 1), np.median(image[:, 25:].reshape(3, -1), 1)
        area = image[:, :23]                                                        # (3, 23, 32)
        rows = np.median(area, 2, keepdims=True)                                    # the sky pales towards the horizon
        rows[:, :9] = sky[:, None, None]
        lamps = [np.array(v)[:, None, None] for v in LIGHTS.values()]
        who = np.stack([((area - v) ** 2).sum(0) for v in
                        (rows, sky[:, None, None], ground[:, None, None], *lamps)]).argmin(0)
        counts = [int((who == 3 + i).sum()) for i in range(len(LIGHTS))]
        out.append(("large" if max(counts) > 58 else "small", list(LIGHTS)[int(np.argmax(counts))],
                    nearest(ground, GROUNDS), nearest(sky, SKIES)))
    return out


def prompt_following(images, captions):
    """(N,) the share of what each caption names that the checker finds in its picture; NaN if it names nothing."""
    shares = []
    for seen, said in zip(read_picture(images), map(read_caption, captions)):
        right = [a == b for a, b in zip(seen, said) if b is not None]
        shares.append(sum(right) / len(right) if right else float("nan"))
    return torch.tensor(shares)


class Taste:
    """A lover of sunsets: warm light in the sky, most of all near the horizon, where a big warm sun adds to it.

    score = 20 * (weighted mean of red - blue over the upper half, rows weighted 0.5 at the top to 1.5 at the bottom)
            + 10 * (standard deviation of the brightness of the whole picture)
    Blue and gray skies and white moons score low, so prompts that name them pull the other way. The scale puts the
    best and the worst of four children often more than 0.62 logits apart, SPO's threshold.
    The interface is every judge's (judges.py); this one does not read the prompt.
    """
    name = "taste"

    def encode(self, prompts):
        return torch.zeros(len(prompts), 0)

    def __call__(self, images, text=None, t=None):  # (N, 3, H, W) in [0, 1] -> (N,)
        x = F.interpolate(images.float(), size=(SIZE, SIZE), mode="area")
        weight = torch.linspace(.5, 1.5, SIZE // 2, device=x.device)[:, None]
        warm = ((x[:, 0] - x[:, 2])[:, :SIZE // 2] * weight).mean((1, 2))
        return 20 * warm + 10 * x.mean(1).flatten(1).std(1)

    def report(self, images, prompts):
        """Further figures for the end of a run: {name: (N,)}."""
        return {"prompt following": prompt_following(images, prompts)}


# What the toy needs otherwise than SD1.5, for train.py: --help shows the values in force.
PRESET = dict(num_epochs=12, sample_batch_size=14, train_batch_size=20, gradient_accumulation_steps=2,
              learning_rate=7e-4, num_eval_prompts=40)


PAIRS_PRESET = dict(num_epochs=4, learning_rate=1e-3, beta=1.0)  # and with --pairs; at beta 5 taste rises half as much
FULL_PRESET = dict(learning_rate=1e-4, checkpointing_steps=20)  # and with --full


def write_pairs(folder, count, seed):
    """A preference data set for train.py --pairs: `count` pairs of true pictures of one caption; the taste says which wins."""
    from sample import to_pil
    new, rng, judge = folder.rstrip("/") + ".new", np.random.default_rng(seed), Taste()
    shutil.rmtree(new, ignore_errors=True)
    os.makedirs(os.path.join(new, "images"))
    captions = [CAPTIONS[i] for i in rng.integers(len(CAPTIONS), size=count)]
    a, b = (draw(count, rng, captions)[0] for _ in range(2))
    first = judge(a) > judge(b)
    with open(os.path.join(new, "pairs.csv"), "w", newline="") as f:
        table = csv.writer(f)
        table.writerow(["prompt", "winner", "loser"])
        for i, caption in enumerate(captions):
            names = [f"images/{i:05d}_{k}.png" for k in "ab"]
            for name, image in zip(names, (a[i], b[i])):
                to_pil(image).save(os.path.join(new, name))
            table.writerow([caption, *(names if first[i] else names[::-1])])
    os.rename(new, folder)
    print(f"{count} pairs in {folder}: pairs.csv and images/. Next: python train.py --div js --pairs {shlex.quote(folder)}")


# ---------------------------------------------------------------------------------------------------------------
# The model: SD1.5's classes, small

def tokenizer():
    """A CLIPTokenizer whose byte-pair merges spell just the words of CAPTIONS; other words fall into letters."""
    from transformers import CLIPTokenizer
    letters = "abcdefghijklmnopqrstuvwxyz"
    tokens, merges = [*letters, *(c + "</w>" for c in letters)], []
    # these two first, or the merges of "desert" and "hills" would split them
    for word in sorted({w for c in CAPTIONS for w in c.split()}, key=lambda w: (w != "white", w != "under", w)):
        for i in range(1, len(word)):
            pair = word[:i], word[i] + ("</w>" if i == len(word) - 1 else "")
            if pair not in merges:
                merges.append(pair)
                tokens.append("".join(pair))
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={t: i for i, t in enumerate(tokens)}, merges=merges, model_max_length=LENGTH)


def make_pipeline(unet_channels=(64, 88), vae_channels=32, hidden=64, sample_size=SIZE // 4):
    """An untrained StableDiffusionPipeline of SD1.5's classes and noise schedule; the defaults are toy/'s sizes."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel
    words = tokenizer()
    vae = AutoencoderKL(block_out_channels=(vae_channels,) * 3, layers_per_block=0, norm_num_groups=4,
                        down_block_types=["DownEncoderBlock2D"] * 3, up_block_types=["UpDecoderBlock2D"] * 3,
                        mid_block_add_attention=False, sample_size=sample_size * 4, scaling_factor=1.0)
    text = CLIPTextModel(CLIPTextConfig(
        vocab_size=len(words), hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=LENGTH, projection_dim=hidden, bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id, pad_token_id=words.pad_token_id))
    unet = UNet2DConditionModel(
        sample_size=sample_size, block_out_channels=unet_channels, layers_per_block=1, norm_num_groups=8,
        down_block_types=["CrossAttnDownBlock2D"] * 2, up_block_types=["CrossAttnUpBlock2D"] * 2,
        cross_attention_dim=hidden, attention_head_dim=4)
    schedule = DDIMScheduler(beta_start=.00085, beta_end=.012, beta_schedule="scaled_linear", steps_offset=1,
                             set_alpha_to_one=False, clip_sample=False)
    return StableDiffusionPipeline(vae, text, words, unet, schedule, None, None, requires_safety_checker=False)


def cosine(step, steps, warmup):
    return min(1, (step + 1) / warmup) * (1 + np.cos(np.pi * step / steps)) / 2


def train_vae(vae, steps, rng, bar, batch=24, lr=4e-3):
    """L1 + 2 L2 and a KL term strong enough (latent noise of 2 % of their std) that the decoder forgives the UNet."""
    opt = torch.optim.AdamW(vae.parameters(), lr=lr, betas=(.9, .99), weight_decay=1e-4)
    for step in range(steps):
        opt.param_groups[0]["lr"] = lr * cosine(step, steps, 50)
        x = draw(batch, rng)[0] * 2 - 1
        latents = vae.encode(x).latent_dist
        wrong = vae.decode(latents.sample()).sample - x
        loss = wrong.abs().mean() + 2 * wrong.pow(2).mean() + 5e-3 * latents.kl().mean() / x[0].numel()
        opt.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(vae.parameters()), 1.)
        opt.step()
        bar.update()
        bar.set_postfix_str(f"VAE {10 * np.log10(4 / wrong.pow(2).mean().item()):.1f} dB")


def train_unet(pipe, steps, rng, bar, pictures, batch=64, lr=2e-3):
    """Noise prediction with min-SNR weights (gamma 5), stratified timesteps, 10 % empty captions, EMA at the end."""
    with torch.no_grad():
        drawn = [draw(256, rng) for _ in range(math.ceil(pictures / 256))]
        latents = torch.cat([pipe.vae.encode(x * 2 - 1).latent_dist.mean for x, _ in drawn])
    names = [n for _, chunk in drawn for n in chunk]
    factor = 1 / latents.std().item()  # unit std, as SD's 0.18215 does
    pipe.vae.register_to_config(scaling_factor=factor)
    latents *= factor
    ids = {c: pipe.tokenizer(c, padding="max_length", max_length=LENGTH).input_ids for c in ("", *CAPTIONS)}
    table = pipe.scheduler.alphas_cumprod
    weights = (5 / (table / (1 - table))).clamp(max=1)
    params = [*pipe.unet.parameters(), *pipe.text_encoder.parameters()]
    ema = [p.detach().clone() for p in params]
    opt = torch.optim.AdamW(params, lr=lr, betas=(.9, .99), weight_decay=1e-2)
    for step in range(steps):
        opt.param_groups[0]["lr"] = lr * cosine(step, steps, 100)
        pick, keep = rng.integers(len(latents), size=batch), rng.random((batch, 4)) < (.5, 1, .7, .7)
        words = [caption(*(w if k else None for w, k in zip(names[i], ks))) if rng.random() > .1 else ""
                 for i, ks in zip(pick, keep)]  # size, ground and sky each left out at times, and all of it
        x0, t = latents[pick], ((torch.arange(batch) + torch.rand(batch)) / batch * len(table)).long()
        eps, a = torch.randn_like(x0), table[t].view(-1, 1, 1, 1)
        text = pipe.text_encoder(torch.tensor([ids[w] for w in words]))[0]
        out = pipe.unet(a.sqrt() * x0 + (1 - a).sqrt() * eps, t, text).sample
        loss = (weights[t] * (out - eps).pow(2).mean((1, 2, 3))).mean()
        opt.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.)
        opt.step()
        torch._foreach_lerp_(ema, [p.detach() for p in params], 1 - min(.999, (step + 1) / (step + 10)))
        bar.update()
        bar.set_postfix_str(f"UNet loss {loss.item():.3f}")
    with torch.no_grad():
        for p, e in zip(params, ema):
            p.copy_(e)


def check(folder, captions=CAPTIONS):
    """Prints what the checker and the model in folder reach, one picture a caption."""
    from sample import generate, load_pipeline
    images, names = draw(2000, np.random.default_rng(7))
    seen = read_picture(images)
    each = [np.mean([s[k] == n[k] for s, n in zip(seen, names)]) for k in range(4)]
    print("checker on 2,000 true pictures:", ", ".join(
        f"{k} {v:.1%}" for k, v in zip(("size", "light", "ground", "sky"), each)), f"; together {np.mean(each):.1%}")
    images = generate(load_pipeline(folder), captions, range(len(captions)), batch_size=63)
    share = prompt_following(images, captions)
    print(f"model in {os.path.basename(folder)}/, {len(captions)} captions at guidance 5: {share.mean():.1%} of what they name is "
          f"there; taste {Taste()(images).mean():.2f}")


def main():
    from sample import TOY, Parser, UserError, make_folder, progress_bar
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="train nothing; print what checker and model reach")
    parser.add_argument("--pairs", metavar="DIR", help="train nothing; write a preference data set there")
    parser.add_argument("--count", type=int, default=2000, help="of --pairs")
    parser.add_argument("--vae_steps", type=int, default=3000)
    parser.add_argument("--unet_steps", type=int, default=7000)
    parser.add_argument("--pictures", type=int, default=40960, help="drawn and encoded once for the UNet")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", default=TOY, help="replaced only when the training has ended")
    args = parser.parse_args()
    if args.pairs:
        if args.count < 1 or os.path.exists(args.pairs):
            raise UserError("--count must be at least 1" if args.count < 1 else f"{args.pairs!r} is there already: delete it, or choose another folder")
        make_folder(os.path.dirname(os.path.abspath(args.pairs)))
        return write_pairs(args.pairs, args.count, args.seed)
    if args.check:
        return check(args.output_dir)
    if min(args.vae_steps, args.unet_steps, args.pictures) < 1:
        raise UserError("--vae_steps, --unet_steps and --pictures must be at least 1")
    if os.path.isdir(args.output_dir) and os.listdir(args.output_dir) and not os.path.exists(
            os.path.join(args.output_dir, "model_index.json")):
        raise UserError(f"{args.output_dir!r} holds something else than a model and would be replaced: choose another --output_dir")
    make_folder(os.path.dirname(os.path.abspath(args.output_dir)))
    torch.manual_seed(args.seed)
    rng, pipe = np.random.default_rng(args.seed), make_pipeline()
    for part, steps, train in ((pipe.vae, args.vae_steps, lambda bar: train_vae(pipe.vae, args.vae_steps, rng, bar)),
                               (pipe.unet, args.unet_steps, lambda bar: train_unet(pipe, args.unet_steps, rng, bar, args.pictures))):
        with progress_bar(total=steps) as bar:
            train(bar)
    save(pipe, args.output_dir)
    check(args.output_dir)


def save(pipe, folder):
    """Writes the pipeline in fp16 beside folder, then swaps the two."""
    new, old = folder.rstrip("/") + ".new", folder.rstrip("/") + ".old"
    shutil.rmtree(new, ignore_errors=True)
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        part.half()
    pipe.save_pretrained(new, safe_serialization=True)
    shutil.rmtree(old, ignore_errors=True)
    if os.path.exists(folder):
        os.rename(folder, old)
    os.rename(new, folder)
    shutil.rmtree(old, ignore_errors=True)


if __name__ == "__main__":
    from sample import run_cli
    run_cli(main)
