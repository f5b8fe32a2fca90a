"""Preference pairs of one's own: eq. 5 and Diffusion-DPO's formula written out, readers, cache.

What runs train.py on them is in test_train_pairs.py.
"""

import csv
import io
import json
import os
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import shake
from PIL import Image

from divergences import NAMES, get_divergence
from loss import alignment_loss, noise_log_ratio
from parts import pairs
from parts.common import UserError
from parts.model import Policy, encode_prompts, load_pipeline
from parts.pairs import hold_out_captions, open_pairs
from toy import make, world


@pytest.fixture(scope="module")
def pair_folder(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("sets") / "twelve")
    make.write_pairs(folder, 12, 0)
    return folder


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def twelve(pipe, pair_folder, cache):
    return open_pairs(pair_folder, pipe, cache)


def write_csv(folder, rows, header=("prompt", "winner", "loser")):
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, "pairs.csv"), "w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return str(folder)


def read_csv(folder):
    with open(os.path.join(folder, "pairs.csv"), newline="") as file:
        return list(csv.DictReader(file))


def picture(path, size=(48, 48), seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    image.save(path)
    return image


def to_minus_one_one(image):
    """(1, 3, H, W) of a PIL image."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 127.5 - 1


def moved_policy(pipe):
    """A LoRA some way from its reference."""
    policy = Policy(pipe.unet, rank=2)
    shake(policy, scale=1e-2)
    return policy


def chunk_at(data, seen, pairs_a_step=1):
    return data.collect(SimpleNamespace(seen=seen), pairs_a_step, bar=None)


def order(data, epoch):
    """Of the pairs in an epoch: a function of (seed, epoch) alone."""
    return np.random.default_rng((data.seed, epoch)).permutation(len(data))


def in_float64(pipe):
    pipe.unet.double(), pipe.text_encoder.double()
    pipe.scheduler.alphas_cumprod = pipe.scheduler.alphas_cumprod.double()


# --------------------------------------------------------------------------------------------------
# The objective


def dpo_loss(prediction, reference, target, beta_dpo):
    """Diffusion-DPO's loss as its formula is stated: winners, then losers, in the rows."""
    error_w, error_l = (prediction - target).pow(2).mean((1, 2, 3)).chunk(2)
    reference_w, reference_l = (reference - target).pow(2).mean((1, 2, 3)).chunk(2)
    inside = -0.5 * beta_dpo * ((error_w - reference_w) - (error_l - reference_l))
    return -torch.log(torch.sigmoid(inside)).mean()


@pytest.mark.parametrize("scale", (1e-5, 1e-3, 1e-1))
def test_reverse_kl_is_diffusion_dpo(scale):
    """--beta 5 is its 5000; loss and gradient in float64."""
    generator = torch.Generator().manual_seed(0)
    reference, eps = torch.randn(2, 4, 4, 8, 8, generator=generator, dtype=torch.float64)
    eps = eps[:2].repeat(2, 1, 1, 1)
    step = torch.randn(reference.shape, generator=generator, dtype=torch.float64)
    prediction = (reference + scale * step).requires_grad_()
    u_w, u_l = noise_log_ratio(prediction, reference, eps).chunk(2)
    ours, _ = alignment_loss(u_w, u_l, get_divergence("rkl"), 5.0, clip="none")
    theirs = dpo_loss(prediction, reference, eps, 5000)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    (our_gradient,) = torch.autograd.grad(ours, prediction)
    (their_gradient,) = torch.autograd.grad(theirs, prediction)
    torch.testing.assert_close(our_gradient, their_gradient, rtol=1e-10, atol=1e-10)


def test_the_factored_log_ratio_keeps_digits():
    """Near the reference, err - err_ref in fp32 has none left; the product has seven."""
    generator = torch.Generator().manual_seed(1)
    reference, eps = torch.randn(2, 3, 4, 8, 8, generator=generator)
    prediction = reference + 1e-6 * torch.randn(reference.shape, generator=generator)
    error = (prediction.double() - eps) ** 2 - (reference.double() - eps) ** 2
    mean, total = (noise_log_ratio(prediction, reference, eps, reduce=r) for r in ("mean", "sum"))
    expected = -500 * error.mean((1, 2, 3))
    torch.testing.assert_close(mean.double(), expected, rtol=1e-4, atol=0)
    torch.testing.assert_close(total.double(), expected * 256, rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_the_loss_of_a_batch_is_eq_5(pipe, pair_folder, cache, name):
    """From files to the LoRA's gradient, in float64: eq. 5 with log X = -500 (err - err_ref)."""
    div = get_divergence(name, 0.4 if name == "alpha" else None)
    data = open_pairs(pair_folder, pipe, cache)
    policy = moved_policy(pipe)
    in_float64(pipe)

    chunk, index = chunk_at(data, 12), torch.tensor([0, 3, 5])
    u_w, u_l = chunk.log_ratios(policy, index)
    ours, _ = alignment_loss(u_w, u_l, div, 5.0, clip="none")

    numbers = order(data, 1)[index].tolist()  # 12 pairs are one epoch
    drawn = [data.draw(1, i) for i in numbers]
    t, eps = torch.stack([t for t, _ in drawn]), torch.stack([eps for _, eps in drawn]).double()
    text = encode_prompts(pipe, [data.captions[i] for i in numbers])
    a_t = pipe.scheduler.alphas_cumprod[t].view(-1, 1, 1, 1)
    assert chunk.t[index].tolist() == t.tolist()
    rewards = []
    for side in ("winner", "loser"):
        files = [data.folder / getattr(data.pairs[i], side) for i in numbers]
        x_0 = np.stack([np.fromfile(file, np.float32).reshape(4, 12, 12) for file in files])
        x_t = a_t.sqrt() * torch.from_numpy(x_0).double() + (1 - a_t).sqrt() * eps
        error = (pipe.unet(x_t, t, text).sample - eps).pow(2).mean((1, 2, 3))
        with policy.reference():
            error_ref = (pipe.unet(x_t, t, text).sample - eps).pow(2).mean((1, 2, 3))
        rewards.append(div.df((-500 * (error - error_ref)).exp()))
    theirs = -F.logsigmoid(5.0 * (rewards[0] - rewards[1])).mean()

    assert ours.dtype == torch.float64 and abs(ours.item() - np.log(2)) > 1e-4
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    our_gradient = torch.autograd.grad(ours, policy.parameters)
    their_gradient = torch.autograd.grad(theirs, policy.parameters)
    torch.testing.assert_close(our_gradient, their_gradient, rtol=1e-10, atol=1e-10)


def test_a_pair_weighs_what_its_label_says(pipe, cache, tmp_path):
    """|2 label - 1|, in a mean that is still over the number of pairs."""
    picture(tmp_path / "a.png"), picture(tmp_path / "b.png", seed=1)
    rows = [("a sun", "a.png", "b.png", label) for label in (1, 0.75, 0.4)]
    folder = write_csv(tmp_path, rows, ("prompt", "winner", "loser", "label"))
    data = open_pairs(folder, pipe, cache)
    chunk, policy = chunk_at(data, 0, 3), moved_policy(pipe)
    expected = torch.tensor([1, 0.5, 0.2])[order(data, 0)]
    torch.testing.assert_close(chunk.weight, expected)
    u_w, u_l = chunk.log_ratios(policy, chunk.order)
    settings = get_divergence("js"), 5.0, 0.1, "none"
    loss, stats = alignment_loss(u_w, u_l, *settings, weight=chunk.weight)
    torch.testing.assert_close(loss, (expected * stats["loss"]).sum() / 3)


def test_the_sum_is_the_mean_times_the_dimensions(pipe, twelve):
    chunk, policy = chunk_at(twelve, 0), moved_policy(pipe)
    mean = torch.stack(chunk.log_ratios(policy, torch.tensor([2, 7])))
    total = torch.stack(chunk.log_ratios(policy, torch.tensor([2, 7]), reduce="sum"))
    torch.testing.assert_close(total, mean * 4 * 12 * 12)


def test_noise_is_a_pairs_own(pipe, twelve):
    """t and eps depend on seed, epoch and pair, not on the batch; t is uniform in 0..999."""
    entropy = np.random.SeedSequence((0, 2, 5)).generate_state(1, np.uint64)[0]
    generator = torch.Generator().manual_seed(int(entropy))
    t, eps = twelve.draw(2, 5)
    assert t == torch.randint(1000, (), generator=generator)
    assert torch.equal(eps, torch.randn(4, 12, 12, generator=generator))

    chunk, policy = chunk_at(twelve, 0), moved_policy(pipe)
    in_float64(pipe)
    together = torch.stack(chunk.log_ratios(policy, torch.tensor([4, 1, 7])))
    for column, k in enumerate((4, 1, 7)):
        alone = torch.stack(chunk.log_ratios(policy, torch.tensor([k])))
        torch.testing.assert_close(together[:, column : column + 1], alone, rtol=1e-9, atol=1e-12)

    times = torch.stack([twelve.draw(epoch, i)[0] for epoch in range(300) for i in range(8)])
    counts = torch.bincount(times // 250, minlength=4)
    five_sigma = 5 * (2400 * 0.25 * 0.75) ** 0.5
    assert len(counts) == 4 and (counts - 600).abs().max() < five_sigma


def test_chunks_walk_through_the_epochs(pipe, twelve, pair_folder, cache):
    """20 steps a chunk, cut at the epoch's end; a chunk is a function of the position alone."""
    many = pairs.PairSet(twelve.pairs * 4, pipe, twelve.folder)  # 48 pairs
    seen, sizes, walked = 0, [], []
    while seen < 2 * len(many):
        chunk = chunk_at(many, seen, 2)
        assert chunk.advance == len(chunk.t) == len(chunk.weight) == len(chunk.order)
        assert chunk.order.tolist() == list(range(chunk.advance))
        walked += chunk.pairs
        sizes.append(chunk.advance)
        seen += chunk.advance
    assert sizes == [40, 8, 40, 8]
    orders = [order(many, epoch).tolist() for epoch in (0, 1)]
    assert orders[0] != orders[1] and sorted(orders[0]) == sorted(orders[1]) == list(range(48))
    assert walked == [many.pairs[i] for numbers in orders for i in numbers]
    again = chunk_at(open_pairs(pair_folder, pipe, cache), 17)
    first = chunk_at(twelve, 17)
    assert again.pairs == first.pairs and again.advance == 7
    assert torch.equal(again.t, first.t) and torch.equal(again.eps, first.eps)


def test_no_pair_of_a_held_out_caption_is_trained_on(twelve, tmp_path):
    rest, held_out = hold_out_captions(twelve, None, 2)
    assert len(held_out) == 2 and not set(held_out) & set(rest.captions)
    assert set(held_out) | set(rest.captions) == set(twelve.captions)
    assert rest.digest != twelve.digest

    own = tmp_path / "own.txt"  # --prompts
    own.write_text(f"a moon over my house\n{twelve.captions[0]}\n{twelve.captions[1]}\n")
    rest, held_out = hold_out_captions(twelve, own, 2)
    assert held_out == ["a moon over my house", twelve.captions[0]]
    assert not set(rest.captions) & set(twelve.captions[:2])  # the third of the file, too
    assert set(rest.captions) == set(twelve.captions) - set(twelve.captions[:2])
    own.write_text("\n".join(twelve.captions))
    with pytest.raises(UserError, match="names every caption of the pairs"):
        hold_out_captions(twelve, own, 99)


def test_a_single_caption_is_on_both_sides(twelve, capsys):
    single = pairs.PairSet(twelve.pairs[:1], twelve.pipe, twelve.folder)
    rest, held_out = hold_out_captions(single, None, 32)
    assert rest is single and held_out == [twelve.captions[0]]
    assert "one prompt: none is held out" in capsys.readouterr().out


def test_all_weights_start_at_their_reference(micro, pair_folder, cache, monkeypatch):
    """Policy and reference must compute alike, also where autocast runs norms in fp32, as on CUDA;
    imitated here. And the weights that train are the file's, not rounded to bf16."""
    pipe = load_pipeline(micro, dtype={"default": torch.bfloat16, "unet": torch.float32})
    policy, seen = Policy(pipe.unet, full=True), []

    def in_fp32(norm):
        def wide(x, *args, **options):
            if not torch.is_autocast_enabled("cpu"):
                return norm(x, *args, **options)
            seen.append(norm)
            with torch.autocast("cpu", enabled=False):
                return norm(x.float(), *args, **options)

        return wide

    for name in ("group_norm", "layer_norm"):
        monkeypatch.setattr(F, name, in_fp32(getattr(F, name)))
    chunk = chunk_at(open_pairs(pair_folder, pipe, cache), 0)
    u_w, u_l = chunk.log_ratios(policy, chunk.order[:4])
    assert seen and (u_w == 0).all() and (u_l == 0).all()
    loaded = load_pipeline(micro).unet.state_dict()
    assert all(torch.equal(value, loaded[k]) for k, value in pipe.unet.state_dict().items())
    loss, _ = alignment_loss(u_w, u_l, get_divergence("js"), 5.0, clip="none")
    loss.backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in policy.parameters)


# --------------------------------------------------------------------------------------------------
# What is read


@pytest.mark.parametrize("size", ((100, 60), (60, 100), (48, 48), (30, 20), (97, 61)))
def test_to_model_covers_and_cuts_the_middle(tmp_path, size):
    image = picture(tmp_path / "x.png", size)
    data = (tmp_path / "x.png").read_bytes()
    scale = 48 / min(size)
    shape = round(size[1] * scale), round(size[0] * scale)
    full = F.interpolate(to_minus_one_one(image), size=shape, mode="bilinear", antialias=True)
    top, left = (shape[0] - 48) // 2, (shape[1] - 48) // 2
    expected = full[0, :, top : top + 48, left : left + 48]
    two_roundings = 2.1 / 127.5  # PIL's, to 8 bits
    torch.testing.assert_close(pairs.to_model(data, 48, 48), expected, rtol=0, atol=two_roundings)
    assert pairs.to_model(data, 24, 64).shape == (3, 24, 64)


def test_photos_stand_upright(tmp_path):
    image = picture(tmp_path / "a.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned by 90 degrees
    image.rotate(90).save(tmp_path / "b.png", exif=exif)
    upright, turned = ((tmp_path / f).read_bytes() for f in ("a.png", "b.png"))
    assert torch.equal(pairs.to_model(upright, 48, 48), pairs.to_model(turned, 48, 48))


def test_labels_swap_weigh_and_tie(pipe, cache, tmp_path, capsys):
    picture(tmp_path / "a.png"), picture(tmp_path / "b.png", seed=1)
    labels = ("1", "", "0.25", "0", "0.5", "0.75")
    rows = [("a sun", "a.png", "b.png", label) for label in labels]
    folder = write_csv(tmp_path, rows, ("caption", "winner", "loser", "label"))
    data = open_pairs(folder, pipe, cache)
    a, b = data.pairs[0].winner, data.pairs[0].loser
    assert [pair.winner for pair in data.pairs] == [a, a, b, b, a]
    assert [pair.weight for pair in data.pairs] == [1, 1, 0.5, 1, 0.5]
    assert "left out, ties (label 0.5 or null): 1" in capsys.readouterr().out


def test_csv_jsonl_and_parquet_are_one_set(pipe, cache, tmp_path):
    """The same pairs in five writings; Parquet as Pick-a-Pic has it, bytes or the hub's struct."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow.parquet import write_table

    folder = tmp_path / "csv"
    rows = [(f"a sun {i}", f"{2 * i}.jpg", f"{2 * i + 1}.jpg") for i in range(3)]
    write_csv(folder, rows)
    for i in range(6):
        picture(folder / f"{i}.jpg", seed=i)

    lines = [json.dumps({"caption": c, "winner": w, "loser": l, "label": 1}) for c, w, l in rows]
    lines.append(json.dumps({"caption": "a tie", "winner": "", "loser": "", "label": None}))
    json_folder = shutil.copytree(folder, tmp_path / "jsonl")
    os.remove(json_folder / "pairs.csv")
    (json_folder / "pairs.jsonl").write_text("\n\n".join(lines) + "\n")

    columns = {"jpg_1": [], "jpg_0": [], "label_0": [], "label_1": [], "caption": []}
    for i, (caption, winner, loser) in enumerate(rows):
        first, second = (loser, winner) if i == 1 else (winner, loser)
        columns["caption"].append(caption)
        columns["jpg_0"].append((folder / first).read_bytes())
        columns["jpg_1"].append((folder / second).read_bytes())
        columns["label_0"].append(float(i != 1))
        columns["label_1"].append(float(i == 1))
    tie = {name: [*cells, cells[0]] for name, cells in columns.items()}
    tie["label_0"][-1] = None
    write_table(pyarrow.table(tie), tmp_path / "plain.parquet", row_group_size=2)
    os.makedirs(tmp_path / "shards")
    for n, part in enumerate((slice(0, 1), slice(1, 3))):
        shard = {name: cells[part] for name, cells in columns.items()}
        for name in ("jpg_0", "jpg_1"):
            shard[name] = [{"bytes": data, "path": None} for data in shard[name]]
        write_table(pyarrow.table(shard), tmp_path / "shards" / f"{n}.parquet")

    paths = folder, folder / "pairs.csv", json_folder
    paths = *paths, tmp_path / "plain.parquet", tmp_path / "shards"
    sets = [open_pairs(path, pipe, cache) for path in paths]
    assert [len(data) for data in sets] == [3] * 5 and len({data.digest for data in sets}) == 1


def test_long_captions_are_cut_and_counted(pipe, cache, tmp_path, capsys):
    picture(tmp_path / "a.png"), picture(tmp_path / "b.png", seed=1)
    rows = [("a sun " * 40, "a.png", "b.png"), ("a sun", "b.png", "a.png")]
    open_pairs(write_csv(tmp_path, rows), pipe, cache)
    most = pipe.tokenizer.model_max_length
    assert f"1 of 2 prompts have over {most} tokens, and are cut there" in capsys.readouterr().out


# --------------------------------------------------------------------------------------------------
# The cache


@pytest.fixture
def count_encoded(pipe, monkeypatch):
    """count_encoded(path, cache) -> (the set, how many images it cost to open it)."""
    seen, encode = [], pipe.vae.encode

    def counted(x):
        seen.append(len(x))
        return encode(x)

    monkeypatch.setattr(pipe.vae, "encode", counted)

    def opened(path, cache):
        seen.clear()
        return open_pairs(path, pipe, cache), sum(seen)

    return opened


def test_latents_are_the_vaes_and_are_made_once(pipe, pair_folder, cache, count_encoded):
    data, count = count_encoded(pair_folder, cache)
    _, again = count_encoded(pair_folder, cache)
    assert count == 24 and again == 0
    for pair, row in zip(data.pairs, read_csv(pair_folder), strict=True):
        for side in ("winner", "loser"):
            image = Image.open(os.path.join(pair_folder, row[side]))
            x = to_minus_one_one(image.resize((48, 48), Image.Resampling.BILINEAR))
            with torch.no_grad():
                expected = pipe.vae.encode(x).latent_dist.mode()[0] * pipe.vae.config.scaling_factor
            latent = np.fromfile(data.folder / getattr(pair, side), np.float32)
            latent = torch.from_numpy(latent).view(4, 12, 12)
            torch.testing.assert_close(latent, expected, rtol=1e-4, atol=1e-5)


def test_a_change_is_seen(pipe, pair_folder, cache, tmp_path, count_encoded):
    """A changed image, same name, size and time: it alone is encoded anew. A changed table: another
    digest. Another VAE: all."""
    folder = shutil.copytree(pair_folder, tmp_path / "set")
    first, _ = count_encoded(folder, cache)
    image = folder / "images" / "00003_a.png"
    stat, pixels = os.stat(image), np.array(Image.open(image))
    Image.fromarray(pixels[::-1]).save(image)
    os.utime(image, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    second, count = count_encoded(folder, cache)
    assert count == 1 and second.digest != first.digest
    lines = (folder / "pairs.csv").read_text().splitlines()
    (folder / "pairs.csv").write_text("\n".join(lines[:-1]) + "\n")
    third, count = count_encoded(folder, cache)
    assert count == 0 and third.digest != second.digest and len(third) == 11
    with torch.no_grad():
        pipe.vae.decoder.conv_out.bias += 1
    assert count_encoded(folder, cache)[1] == 22


def test_a_latent_cut_short_is_made_again(pair_folder, cache, count_encoded):
    data, _ = count_encoded(pair_folder, cache)
    path = data.folder / data.pairs[0].winner
    whole = path.read_bytes()
    path.write_bytes(whole[:100])
    assert count_encoded(pair_folder, cache)[1] == 1 and path.read_bytes() == whole


def test_a_kill_loses_one_image(pair_folder, cache, count_encoded, monkeypatch):
    """Killed between writing and renaming, or while the seventh image is encoded."""
    replaced, replace = [], pairs.pathlib.Path.replace

    def killed_at_the_seventh(self, target):
        replaced.append(target)
        if len(replaced) == 7:
            raise KeyboardInterrupt
        return replace(self, target)

    with monkeypatch.context() as context:
        context.setattr(pairs.pathlib.Path, "replace", killed_at_the_seventh)
        with pytest.raises(KeyboardInterrupt):
            count_encoded(pair_folder, cache)
    assert count_encoded(pair_folder, cache)[1] == 24 - 6


def test_latents_do_not_sit_in_memory(pipe, twelve, monkeypatch):
    """A set holds names; a batch of three reads six files and no more."""
    assert {type(cell) for pair in twelve.pairs for cell in pair} == {str, float}
    chunk, policy = chunk_at(twelve, 0), Policy(pipe.unet, rank=2)
    read, fromfile = [], np.fromfile

    def counted(path, *args):
        read.append(path)
        return fromfile(path, *args)

    monkeypatch.setattr(np, "fromfile", counted)
    chunk.log_ratios(policy, torch.tensor([2, 5, 9]))
    assert len(read) == 6


# --------------------------------------------------------------------------------------------------
# Bad input: one UserError that names the fix. spoil(folder) spoils a copy of the twelve pairs, and
# may return another path to open


def write(name, content):
    def spoil(folder):
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)

    return spoil


def rows_of(*lines):
    return write("pairs.csv", "\n".join(["prompt,winner,loser,label", *lines]) + "\n")


def json_lines(content):
    def spoil(folder):
        os.remove(folder / "pairs.csv")
        (folder / "pairs.jsonl").write_text(content)

    return spoil


def cut(folder):
    for name in ("00000_a.png", "00004_b.png"):
        path = folder / "images" / name
        path.write_bytes(path.read_bytes()[:300])
    os.remove(folder / "images" / "00007_a.png")


def parquet(columns):
    def spoil(folder):
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow.parquet import write_table

        write_table(pyarrow.table(columns), folder / "x.parquet")
        return folder / "x.parquet"

    return spoil


def no_parquet(folder):
    os.remove(folder / "pairs.csv")
    (folder / "x.parquet").write_bytes(b"PAR1 nothing")


def jpeg():
    buffer = io.BytesIO()
    Image.new("RGB", (48, 48)).save(buffer, "JPEG")
    return buffer.getvalue()


A, B = "images/00000_a.png", "images/00000_b.png"
OTHER_COLUMNS = {"caption": ["a"], "image": [jpeg()]}
NAMES_INSIDE = {"caption": ["a"], "jpg_0": ["a.png"], "jpg_1": ["b.png"], "label_0": [1.0]}
NO_IMAGE = {"caption": ["a"], "jpg_0": [b"no"], "jpg_1": [jpeg()], "label_0": [1.0]}
NULL_IMAGE = {"caption": ["a"], "jpg_0": [jpeg()], "jpg_1": [None], "label_0": [1.0]}
NO_CAPTION = {"caption": [None], "jpg_0": [jpeg()], "jpg_1": [jpeg()], "label_0": [1.0]}
WHAT_IS_NEEDED = "its columns prompt (or caption), winner, loser and, if any, label in [0, 1]"
BAD = {
    "nowhere": (lambda folder: folder / "nowhere", "No such file or directory"),
    "an image": (lambda folder: folder / A, "give a folder with pairs.csv, pairs.jsonl"),
    "no table": (lambda folder: os.remove(folder / "pairs.csv"), "is a folder without pairs"),
    "two tables": (write("pairs.jsonl", "{}"), "a pairs.csv and a pairs.jsonl: remove one"),
    "other names": (write("pairs.csv", "text,good,bad\na,b,c\n"), WHAT_IS_NEEDED),
    "only a header": (rows_of(), "holds no pair that can be trained on"),
    "nothing": (write("pairs.csv", ""), "holds no pair that can be trained on"),
    "semicolons": (write("pairs.csv", "prompt;winner;loser\na;b;c\n"), "with commas between them"),
    "commas": (rows_of("", f"a red sun, a big one,{A},{B},1"), "quote a caption that has commas"),
    "zero byte": (rows_of(f"a sun,{A},images/\0,1"), "missing, damaged or too large: 1 (row 1 of"),
    "itself": (rows_of(f"a sun,{A},{A},1"), "holds no pair that can be trained on"),
    "tie": (rows_of(f"a sun,{A},{B},0.5"), "holds no pair that can be trained on"),
    "label 2": (rows_of(f"a sun,{A},{B},1", f"a sun,{A},{B},2"), "row 2 of"),
    "label yes": (rows_of(f"a sun,{A},{B},yes"), WHAT_IS_NEEDED),
    "label nan": (rows_of(f"a sun,{A},{B},nan"), WHAT_IS_NEEDED),
    "no loser": (rows_of(f"a sun,{A},,1"), "missing, damaged or too large: 1 (row 1 of"),
    "no prompt": (rows_of(f"  ,{A},{B},1"), "pairs with no caption or images"),
    "not UTF-8": (write("pairs.csv", b"prompt,winner,loser\n\xff\xfe\x00,b,c\n"), "utf-8"),
    "cut images": (
        cut,
        "too large: 3 (row 1 of X, row 5 of X, row 8 of X)",
    ),
    "HTML": (write("images/00002_a.png", b"<html>"), "too large: 1 (row 3 of"),
    "not Parquet": (no_parquet, "Parquet magic bytes not found"),
    "other Parquet columns": (parquet(OTHER_COLUMNS), "its columns are caption, image"),
    "other columns": (write("pairs.csv", "prompt,good,bad\n"), "holds no pair"),
    "other columns, a row": (
        write("pairs.csv", "prompt,good,bad\na,b,c\n"),
        "are prompt, good, bad",
    ),
    "names in Parquet": (parquet(NAMES_INSIDE), "too large: 1 (row 1 of"),
    "no image in Parquet": (parquet(NO_IMAGE), "too large: 1 (row 1 of"),
    "null in Parquet": (parquet(NULL_IMAGE), "too large: 1 (row 1 of"),
    "no caption in Parquet": (parquet(NO_CAPTION), "pairs with no caption or images"),
    "a caption that is a list": (
        json_lines('{"prompt": ["a"], "winner": "b", "loser": "c"}'),
        "pairs with no caption or images",
    ),
    "no JSON": (json_lines('{"prompt": "a"'), "Expecting ',' delimiter"),
    "surrogate": (json_lines('{"prompt": "\\ud800", "winner": "b", "loser": "c"}'), "\\ud800"),
    "a list": (json_lines("[1]\n"), "row 1 of"),
    "a number": (json_lines("1\n"), WHAT_IS_NEEDED),
    "one column": (json_lines('{"prompt": "a"}\n'), WHAT_IS_NEEDED),
    "deep": (json_lines("[" * 100_000), "recursion"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(pipe, pair_folder, cache, tmp_path, name):
    spoil, message = BAD[name]
    folder = shutil.copytree(pair_folder, tmp_path / "set")
    path = spoil(folder) or folder
    with pytest.raises(UserError) as caught:
        open_pairs(path, pipe, cache)
    printed = str(caught.value).replace(str(folder / "pairs.csv"), "X")
    assert message in printed and len(printed.splitlines()) == 1


def test_a_cache_that_cannot_be_written_is_refused(pipe, pair_folder, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="choose another --cache_dir"):
        open_pairs(pair_folder, pipe, tmp_path / "file")


def test_parquet_without_pyarrow(pipe, cache, monkeypatch, tmp_path):
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(UserError, match="pip install pyarrow"):
        open_pairs(tmp_path / "x.parquet", pipe, cache)


def test_skip_bad_leaves_their_pairs_out(pipe, pair_folder, cache, tmp_path, capsys):
    folder = shutil.copytree(pair_folder, tmp_path / "set")
    cut(folder)
    data = open_pairs(folder, pipe, cache, skip_bad=True)
    out = capsys.readouterr().out
    assert (
        len(data) == 9 and "left out, pairs with no caption or images missing, damaged or " in out
    )
    assert f"too large: 3 (row 1 of {folder / 'pairs.csv'}, row 5 of " in out


# --------------------------------------------------------------------------------------------------
# The toy's own


def test_toy_writes_what_it_says(command, tmp_path):
    """The winner is the one the taste prefers, and both pictures are of the caption."""
    folder = tmp_path / "set"
    code, out, err = command("toy.make", "--pairs", folder, "--count", 60)
    assert code == 0 and "60 pairs" in out, err
    rows = read_csv(folder)

    def load(side):
        images = [to_minus_one_one(Image.open(folder / row[side])) for row in rows]
        return torch.cat(images) / 2 + 0.5

    winners, losers = load("winner"), load("loser")
    taste = world.Taste()
    assert (taste(winners) - taste(losers) > -0.02).all()  # files have 8 bits
    captions = [row["prompt"] for row in rows]
    following = [world.prompt_following(images, captions) for images in (winners, losers)]
    assert torch.cat(following).nanmean() > 0.97


@pytest.mark.parametrize("count, message", ((60, "is there already"), (0, "at least 1")))
def test_toy_refuses(command, tmp_path, count, message):
    folder = tmp_path if count else tmp_path / "new"
    code, _, err = command("toy.make", "--pairs", folder, "--count", count)
    assert code == 2 and message in err


# ---- as people have them (cases.md 6 and 13)


def test_train_files_alone_are_read_where_there_are_splits(tmp_path, capsys):
    for name in ("train-0", "train-1", "validation-0", "test-0"):
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / f"{name}.parquet").touch()
    found = pairs.parquet_files(tmp_path)
    assert [file.name for file in found] == ["train-0.parquet", "train-1.parquet"]
    assert "left out: 2 others" in capsys.readouterr().out
    for name in ("train-0", "train-1"):
        (tmp_path / "data" / f"{name}.parquet").unlink()
    with pytest.raises(UserError, match="no train-"):
        pairs.parquet_files(tmp_path)
    assert pairs.parquet_files(tmp_path / "nowhere") == []


def test_chosen_and_rejected_and_windows_paths(pipe, cache, pair_folder, tmp_path):
    rows = [list(row.values()) for row in read_csv(pair_folder)]
    shutil.copytree(os.path.join(pair_folder, "images"), tmp_path / "images")
    for row in rows:
        row[1:3] = [cell.replace("/", "\\") for cell in row[1:3]]
    other = write_csv(tmp_path, rows, ("Prompt", "Chosen", "rejected"))
    assert open_pairs(other, pipe, cache).pairs == open_pairs(pair_folder, pipe, cache).pairs


def test_chosen_and_rejected_in_parquet(pipe, cache, pair_folder, tmp_path):
    import pyarrow
    from pyarrow.parquet import write_table

    rows = read_csv(pair_folder)

    def images(column):
        paths = [os.path.join(pair_folder, row[column]) for row in rows]
        return [{"bytes": open(path, "rb").read(), "path": None} for path in paths]

    columns = {"prompt": [row["prompt"] for row in rows], "chosen": images("winner")}
    table = pyarrow.table(columns | {"rejected": images("loser"), "extra": [1] * len(rows)})
    write_table(table, tmp_path / "train-0.parquet")
    found = open_pairs(str(tmp_path), pipe, cache)
    assert found.pairs == open_pairs(pair_folder, pipe, cache).pairs
