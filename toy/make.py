"""
Makes what toy/ holds: trains the tiny Stable Diffusion, writes preference pairs of the tiny world.

    python -m toy.make --check       how well the checker reads true pictures, and the shipped model paints its captions
    python -m toy.make               trains the model of toy/ again, from nothing: about 45 minutes on 2 cores
    python -m toy.make --pairs DIR   writes preference pairs for train.py --pairs: 2,000 captions, two pictures each
"""
import argparse
import csv
import math
import os
import shlex
import shutil

import numpy as np
import torch

from parts.common import Parser, UserError, make_folder, progress_bar, run_cli, to_pil
from parts.model import load_pipeline
from parts.weights import TOY
from sample import generate
from toy.world import CAPTIONS, LENGTH, SIZE, Taste, caption, draw, prompt_following, read_picture


def write_pairs(folder, count, seed):
    """A preference data set for train.py --pairs: `count` pairs of true pictures of one caption; the taste says which wins."""
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
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="train nothing; print what checker and model reach")
    parser.add_argument("--pairs", metavar="DIR", help="write a preference data set there")
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
    run_cli(main)
