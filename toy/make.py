"""Makes what toy/ holds: paints its world, trains the tiny Stable Diffusion, writes pairs of it.

    python -m toy.make --check       what the checker and the shipped model reach
    python -m toy.make               trains the model of toy/ anew: about 45 minutes on 2 cores
    python -m toy.make --pairs DIR   2,000 preference pairs, as train.py --pairs takes them

The shipped weights are the defaults below, in fp32 on two cores, and 600 further steps of UNet and
text encoder at a third of the learning rate: a first tokenizer had split two words and cut the
longest captions. They are stored in fp16, 5.6 MB.
"""

import csv
import itertools
import json
import math
import os
import shlex
import shutil

import numpy as np
import torch
import torch.nn.functional as F

from parts.common import (
    Parser,
    UserError,
    make_folder,
    progress_bar,
    run_cli,
    to_pil,
    write_file,
)
from parts.model import load_pipeline
from parts.weights import TOY
from sample import generate
from toy import world
from toy.world import GROUNDS, LIGHTS, RADII, SIZE, SKIES, VOCABULARIES, Taste, look_up

LENGTH = 16  # tokens: the longest caption has 11 words, and there are a start and an end

# train.json: flags of train.py that must differ for this model. With 14 prompts a rollout and 40
# pairs a step, the main job takes minutes on a laptop. How they were found: docs/toy.md.
FLAGS = {
    "judge": "taste",
    "num_epochs": 12,
    "sample_batch_size": 14,
    "train_batch_size": 20,
    "gradient_accumulation_steps": 2,
    "learning_rate": 7e-4,
    "num_eval_prompts": 40,
    # With --pairs; at beta 5 the taste rises half as much.
    "pairs": {"judge": "taste", "num_epochs": 4, "learning_rate": 1e-3, "beta": 1.0},
    # With --full; a state of this model is small enough to be saved after every chunk.
    "full": {"learning_rate": 1e-4, "checkpointing_chunks": 1},
}


def main():
    args = parse_args()
    if args.pairs:
        write_pairs(args.pairs, args.count, args.seed)
        return
    if args.check:
        check(args.output_dir)
        return
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    pipe = make_pipeline()
    with progress_bar(total=args.vae_steps) as bar:
        train_vae(pipe.vae, args.vae_steps, rng, bar)
    with progress_bar(total=args.unet_steps) as bar:
        train_unet(pipe, args.unet_steps, args.pictures, rng, bar)
    save(pipe, args.output_dir)
    check(args.output_dir)


def parse_args():
    """The flags; whatever can be refused is refused here, before minutes are spent."""
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--check", action="store_true", help="train nothing; print what checker and model reach")
    add("--pairs", metavar="DIR", help="train nothing; write a preference data set there")
    add("--count", type=int, default=2000, help="pairs to write (default: 2000)")
    add("--vae_steps", type=int, default=3000, help="of 24 pictures (default: 3000)")
    add("--unet_steps", type=int, default=7000, help="of 64 pictures (default: 7000)")
    add("--pictures", type=int, default=40960, help="for the UNet (default: 40960)")
    add("--seed", type=int, default=0)
    add("--output_dir", default=TOY, help="replaced only after training (default: toy/)")
    args = parser.parse_args()

    for flag in ("count", "vae_steps", "unet_steps", "pictures"):
        if getattr(args, flag) < 1:
            raise UserError(f"--{flag} must be at least 1")
    if args.pairs:
        if os.path.exists(args.pairs):
            raise UserError(f"{args.pairs!r} is there already: delete it, or choose another folder")
        make_folder(os.path.dirname(os.path.abspath(args.pairs)), "--pairs")
    elif not args.check:
        make_folder(args.output_dir)
        names = os.listdir(args.output_dir)
        if names and "model_index.json" not in names:
            why = f"{args.output_dir!r} holds something else than a model"
            raise UserError(f"{why}: choose another --output_dir")
    return args


# ---- Its pictures and captions -------------------------------------------------------------------


def write_caption(size, light, ground, sky):
    """As in "a large red sun over a sea under a pink sky"; what is None is left unsaid."""
    words = f"a {size} {light}" if size else f"a {light}"
    if ground:
        article = "" if ground in ("hills", "snow") else "a "
        words += f" over {article}{ground}"
    if sky:
        words += f" under a {sky} sky"
    return words


CAPTIONS = [  # all 3 x 3 x 6 x 7 = 378
    write_caption(*words)
    for words in itertools.product((None, *RADII), LIGHTS, (None, *GROUNDS), (None, *SKIES))
]


def draw(count, rng, captions=None):
    """True pictures, of these captions if given: what a caption leaves open is drawn at random.

    Returns images (n, 3, 32, 32), fp32 in [0, 1], and their words (n, 4): size, light, ground, sky.
    Edges are soft, since a tiny model paints hard shapes as blobs; every colour varies a little.
    """

    def uniform(low, high):  # one number a picture
        return rng.uniform(low, high, (count, 1, 1, 1)).astype(np.float32)

    def tint(std):  # one shift of colour a picture
        return rng.normal(0, std, (count, 3, 1, 1)).astype(np.float32)

    words = np.stack([rng.choice(list(each), count) for each in VOCABULARIES], axis=1)
    for row, caption in zip(words, captions or ()):
        for i, word in enumerate(world.read_caption(caption)):
            row[i] = word or row[i]
    sizes, lights, grounds, skies = words.T
    y, x = np.indices((SIZE, SIZE), np.float32) + 0.5  # centres of the pixels, (32, 32)

    # The sky pales downwards, in red more than in blue. (n, 3, 32, 32)
    top = look_up(SKIES, skies) + tint(0.025)
    haze = np.float32([1.1, 1, 0.9])[:, None, None]
    image = top + y / SIZE * uniform(0, 0.16) * (1 - top) * haze

    # The ground begins below two waves. (n, 1, 32, 32)
    horizon = uniform(0.52, 0.66) * SIZE
    long_wave = uniform(0, 1.2) * np.sin(x * uniform(0.15, 0.5) + uniform(0, 6.3))
    short_wave = uniform(0, 0.5) * np.sin(x * uniform(0.4, 0.7) + uniform(0, 6.3))
    shore = horizon + long_wave + short_wave

    # The sun or moon stands anywhere above the horizon, or touches it: a glow, and a disc in it.
    smallest, largest = np.split(look_up(RADII, sizes), 2, axis=1)
    radius = smallest + (largest - smallest) * uniform(0, 1)
    centre_x = radius + (SIZE - 2 * radius) * uniform(0, 1)
    centre_y = radius + (horizon - 1.2 * radius) * uniform(0, 1)
    distance = np.sqrt((x - centre_x) ** 2 + (y - centre_y) ** 2)
    colour = look_up(LIGHTS, lights) + tint(0.01)
    glow = uniform(0.15, 0.35) * np.exp(-np.maximum(distance - radius, 0) / (0.6 * radius))
    image = blend(image, colour, glow)
    image = blend(image, colour, np.clip(radius - distance + 0.5, 0, 1))

    # The ground has a coarse texture and darkens towards the viewer.
    noise = torch.from_numpy(rng.normal(0, 1, (count, 1, 12, 8))).float()
    texture = F.interpolate(noise, size=SIZE, mode="bilinear").numpy()
    shade = 1 - 0.12 * (y - horizon) / (SIZE - horizon)
    land = (look_up(GROUNDS, grounds) + tint(0.025)) * (1 + 0.09 * texture) * shade
    image = blend(image, land, np.clip(y - shore + 0.5, 0, 1))
    return torch.from_numpy(image).clamp(0, 1), words


def blend(image, colour, share):
    """The image where share is 0, the colour where it is 1."""
    return image + share * (colour - image)


# ---- The model: SD1.5's classes, small -----------------------------------------------------------


def make_pipeline(unet_channels=(64, 88), vae_channels=32, hidden=64, sample_size=SIZE // 4):
    """An untrained StableDiffusionPipeline with SD1.5's noise schedule; the defaults are toy/'s."""
    import diffusers
    from transformers import CLIPTextConfig, CLIPTextModel

    vae = diffusers.AutoencoderKL(
        block_out_channels=(vae_channels,) * 3,
        layers_per_block=0,
        norm_num_groups=4,
        down_block_types=["DownEncoderBlock2D"] * 3,
        up_block_types=["UpDecoderBlock2D"] * 3,
        mid_block_add_attention=False,
        sample_size=sample_size * 4,
        scaling_factor=1.0,
    )
    words = tokenizer()
    text_config = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
        projection_dim=hidden,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )
    text_encoder = CLIPTextModel(text_config)
    unet = diffusers.UNet2DConditionModel(
        sample_size=sample_size,
        block_out_channels=unet_channels,
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=["CrossAttnDownBlock2D"] * 2,
        up_block_types=["CrossAttnUpBlock2D"] * 2,
        cross_attention_dim=hidden,
        attention_head_dim=4,
    )
    schedule = diffusers.DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        set_alpha_to_one=False,
        clip_sample=False,
    )
    return diffusers.StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=words,
        unet=unet,
        scheduler=schedule,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def tokenizer():
    """A CLIPTokenizer with one token for each word of CAPTIONS; other words fall into letters."""
    from transformers import CLIPTokenizer

    letters = "abcdefghijklmnopqrstuvwxyz"
    tokens = [*letters, *(letter + "</w>" for letter in letters)]
    merges = []
    words = {word for caption in CAPTIONS for word in caption.split()}
    # These two go first, or the merges of "desert" and "hills" would split them.
    first = ["white", "under"]
    for word in first + sorted(words.difference(first)):
        # Byte-pair merges that spell the word from its front: w+h, wh+i, whi+t, whit+e</w>.
        for i in range(1, len(word)):
            end = "</w>" if i == len(word) - 1 else ""
            merge = (word[:i], word[i] + end)
            if merge not in merges:
                merges.append(merge)
                tokens.append("".join(merge))
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=LENGTH)


# ---- Its training --------------------------------------------------------------------------------


def train_vae(vae, steps, rng, bar, batch_size=24, peak_rate=4e-3):
    """L1 + 2 L2, and a KL term: latents get noise of 2 % of their std, so that the decoder forgives
    the UNet's small errors."""
    params = list(vae.parameters())
    opt = torch.optim.AdamW(params, lr=peak_rate, betas=(0.9, 0.99), weight_decay=1e-4)
    for step in range(steps):
        x = draw(batch_size, rng)[0] * 2 - 1  # (B, 3, 32, 32)
        latents = vae.encode(x).latent_dist
        error = vae.decode(latents.sample()).sample - x
        kl = latents.kl().mean()
        loss = error.abs().mean() + 2 * error.pow(2).mean() + 5e-3 * kl / x[0].numel()
        take_step(opt, params, loss, peak_rate * warm_cosine(step, steps, 50))
        bar.update()
        bar.set_postfix_str(f"VAE {10 * np.log10(4 / error.pow(2).mean().item()):.1f} dB")


def train_unet(pipe, steps, num_pictures, rng, bar, batch_size=64, peak_rate=2e-3):
    """UNet and text encoder together: noise prediction with min-SNR weights (gamma 5), EMA."""
    latents, names = encode_pictures(pipe.vae, num_pictures, rng)
    ids = {}
    for caption in ("", *CAPTIONS):
        ids[caption] = pipe.tokenizer(caption, padding="max_length", max_length=LENGTH).input_ids
    alphas_cumprod = pipe.scheduler.alphas_cumprod
    weights = (5 / (alphas_cumprod / (1 - alphas_cumprod))).clamp(max=1)  # min(SNR, 5) / SNR
    params = [*pipe.unet.parameters(), *pipe.text_encoder.parameters()]
    averages = [p.detach().clone() for p in params]
    opt = torch.optim.AdamW(params, lr=peak_rate, betas=(0.9, 0.99), weight_decay=1e-2)
    for step in range(steps):
        chosen = rng.integers(len(latents), size=batch_size)
        captions = loose_captions([names[i] for i in chosen], rng)
        x0 = latents[chosen]  # (B, 4, 8, 8)
        # One timestep from each of B equal parts of the schedule: less noise in the gradient.
        where = (torch.arange(batch_size) + torch.rand(batch_size)) / batch_size
        t = (where * len(alphas_cumprod)).long()  # (B,)
        eps = torch.randn_like(x0)
        a = alphas_cumprod[t].view(-1, 1, 1, 1)
        x_t = a.sqrt() * x0 + (1 - a).sqrt() * eps
        text = pipe.text_encoder(torch.tensor([ids[caption] for caption in captions]))[0]
        error = pipe.unet(x_t, t, text).sample - eps
        loss = (weights[t] * error.pow(2).mean((1, 2, 3))).mean()
        take_step(opt, params, loss, peak_rate * warm_cosine(step, steps, 100))
        decay = min(0.999, (step + 1) / (step + 10))
        torch._foreach_lerp_(averages, [p.detach() for p in params], 1 - decay)
        bar.update()
        bar.set_postfix_str(f"UNet loss {loss.item():.3f}")
    with torch.no_grad():
        for p, average in zip(params, averages):
            p.copy_(average)


@torch.no_grad()
def encode_pictures(vae, count, rng):
    """Latents (N, 4, 8, 8) of unit std, and what is in each picture; N is a multiple of 256.

    The scale is left in the VAE's config, as SD's 0.18215 is.
    """
    latents, names = [], []
    for _ in range(math.ceil(count / 256)):
        images, words = draw(256, rng)
        latents.append(vae.encode(images * 2 - 1).latent_dist.mean)
        names.extend(words)
    latents = torch.cat(latents)
    scale = 1 / latents.std().item()
    vae.register_to_config(scaling_factor=scale)
    return latents * scale, names


def loose_captions(names, rng):
    """Captions that leave out the size, the ground or the sky at times, and one in ten everything.

    What is unsaid stays free, and the empty caption serves guidance.
    """
    keep = rng.random((len(names), 4)) < (0.5, 1, 0.7, 0.7)
    silent = rng.random(len(names)) <= 0.1
    captions = []
    for words, kept, empty in zip(names, keep, silent):
        said = [word if stays else None for word, stays in zip(words, kept)]
        captions.append("" if empty else write_caption(*said))
    return captions


def warm_cosine(step, steps, warmup):
    """The share of the peak learning rate: up in a line, down in half a cosine."""
    return min(1, (step + 1) / warmup) * (1 + np.cos(np.pi * step / steps)) / 2


def take_step(opt, params, loss, learning_rate):
    opt.param_groups[0]["lr"] = learning_rate
    opt.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(params, 1.0)
    opt.step()


# ---- Its folder ----------------------------------------------------------------------------------


def save(pipe, folder):
    """Writes the model in fp16 with train.json and prompts.txt; other files there stay as they are.

    All is written beside the folder first, then moved: a kill leaves the old model whole.
    """
    new = folder.rstrip("/") + ".new"
    shutil.rmtree(new, ignore_errors=True)
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        part.half()
    pipe.save_pretrained(new, safe_serialization=True)
    write_file(os.path.join(new, "train.json"), json.dumps(FLAGS, indent=2) + "\n")
    write_file(os.path.join(new, "prompts.txt"), "\n".join(prompts()) + "\n")
    for name in os.listdir(new):
        place = os.path.join(folder, name)
        if os.path.isdir(place):
            shutil.rmtree(place)
        os.replace(os.path.join(new, name), place)
    os.rmdir(new)


def prompts():
    """The 81 prompts to align on: 54 leave the sky open, where a taste may choose; 27 name it."""
    open_sky = [c for c in CAPTIONS if "sky" not in c]
    named_sky = [c for c in CAPTIONS if "sky" in c]
    rng = np.random.default_rng(0)
    both = open_sky + [named_sky[i] for i in rng.permutation(len(named_sky))[:27]]
    return [both[i] for i in rng.permutation(len(both))]


def check(folder, captions=CAPTIONS):
    """Prints what the checker and the model in a folder reach, one picture a caption."""
    images, names = draw(2000, np.random.default_rng(7))
    right = np.array(world.read_pictures(images)) == np.array(names)  # (2000, 4)
    shares = right.mean(0)
    size, light, ground, sky = shares
    each = f"size {size:.1%}, light {light:.1%}, ground {ground:.1%}, sky {sky:.1%}"
    print(f"checker on 2,000 true pictures: {each}; together {shares.mean():.1%}")

    images = generate(load_pipeline(folder), captions, range(len(captions)), batch_size=63)
    following = world.prompt_following(images, captions).mean()
    taste = Taste()(images).mean()
    what = f"model in {os.path.basename(os.path.abspath(folder))}/, {len(captions)} captions"
    print(f"{what} at guidance 5: {following:.1%} of what they name is there; taste {taste:.2f}")


# ---- Preference pairs ----------------------------------------------------------------------------


def write_pairs(folder, count, seed):
    """`count` pairs of true pictures of one caption; the taste says which of the two wins.

    Writes pairs.csv (prompt, winner, loser) and images/, whole or not at all.
    """
    rng = np.random.default_rng(seed)
    captions = [CAPTIONS[i] for i in rng.integers(len(CAPTIONS), size=count)]
    first, _ = draw(count, rng, captions)
    second, _ = draw(count, rng, captions)
    judge = Taste()
    first_wins = judge(first) > judge(second)  # (count,)

    new = folder.rstrip("/") + ".new"
    shutil.rmtree(new, ignore_errors=True)
    os.makedirs(os.path.join(new, "images"))
    with open(os.path.join(new, "pairs.csv"), "w", newline="") as file:
        lines = csv.writer(file)
        lines.writerow(["prompt", "winner", "loser"])
        for i, caption in enumerate(captions):
            a, b = f"images/{i:05d}_a.png", f"images/{i:05d}_b.png"
            to_pil(first[i]).save(os.path.join(new, a))
            to_pil(second[i]).save(os.path.join(new, b))
            winner, loser = (a, b) if first_wins[i] else (b, a)
            lines.writerow([caption, winner, loser])
    os.rename(new, folder)
    print(f"{count} pairs in {folder}: pairs.csv and images/")
    print(f"Next: python train.py --div js --pairs {shlex.quote(folder)}")


if __name__ == "__main__":
    run_cli(main)
