"""Preference pairs of one's own: eq. 5 against Diffusion-DPO's formula, what is read, cached, refused, and that runs go on."""
import csv
import io
import json
import os
import shutil
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file

from parts import pairs
import sample
from toy import make
from toy import world as toy
import train
from child import Child, ranks
from divergences import NAMES, get_divergence
from loss import alignment_loss, noise_log_ratio
from sample import FULL_FILE, LORA_FILE, UserError
from test_ranks import log, predict


@pytest.fixture(scope="module")
def pair_folder(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("sets") / "twelve")
    make.write_pairs(folder, 12, 0)
    return folder


@pytest.fixture
def pair_run(micro, pair_folder, tmp_path):
    """Flags of a run over 12 pairs of some seconds."""
    return ["--model", micro, "--pairs", pair_folder, "--cache_dir", tmp_path / "cache", "--judge", "taste", "--num_epochs", 1,
            "--num_inference_steps", 4, "--train_batch_size", 2, "--gradient_accumulation_steps", 2, "--learning_rate", 1e-3, "--rank", 2,
            "--num_eval_prompts", 2, "--images_per_prompt", 2, "--device", "cpu", "--checkpointing_steps", 2]


@pytest.fixture
def pipe(micro):
    return sample.load_pipeline(micro)


def table(folder, rows, header=("prompt", "winner", "loser"), name="pairs.csv"):
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, name), "w", newline="") as f:
        csv.writer(f).writerows([header, *rows])
    return str(folder)


def picture(path, size=(48, 48), seed=0):
    image = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    image.save(path)
    return image


def weights(folder, name=LORA_FILE):
    return load_file(os.path.join(folder, name))


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# ---- the objective

def dpo_loss(model_pred, ref_pred, target, beta_dpo):
    """Diffusion-DPO's loss as its formula is stated: winners in the first half of the rows, losers in the second."""
    err = lambda pred: (pred - target).pow(2).mean((1, 2, 3))
    (w, l), (w_ref, l_ref) = err(model_pred).chunk(2), err(ref_pred).chunk(2)
    return -torch.log(torch.sigmoid(-0.5 * beta_dpo * ((w - w_ref) - (l - l_ref)))).mean()


def test_reverse_kl_is_diffusion_dpo():
    """--beta 5 is its 5000; loss and gradient in float64."""
    g = torch.Generator().manual_seed(0)
    ref, eps = torch.randn(2, 4, 4, 8, 8, generator=g, dtype=torch.float64)
    eps = eps[:2].repeat(2, 1, 1, 1)
    for scale in (1e-5, 1e-3, 1e-1):
        hat = (ref + scale * torch.randn(ref.shape, generator=g, dtype=torch.float64)).requires_grad_()
        u = noise_log_ratio(hat, ref, eps)
        ours, _ = alignment_loss(u[:2], u[2:], get_divergence("rkl"), 5.0, clip="none")
        theirs = dpo_loss(hat, ref, eps, 5000)
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(*(torch.autograd.grad(v, hat)[0] for v in (ours, theirs)), rtol=1e-10, atol=1e-10)


def test_the_factored_log_ratio_keeps_digits():
    """Near the reference, err - err_ref in fp32 has none left; the product has seven."""
    g = torch.Generator().manual_seed(1)
    ref, eps = torch.randn(2, 3, 4, 8, 8, generator=g)
    hat = ref + 1e-6 * torch.randn(ref.shape, generator=g)
    want = -500 * ((hat.double() - eps) ** 2 - (ref.double() - eps) ** 2).mean((1, 2, 3))
    torch.testing.assert_close(noise_log_ratio(hat, ref, eps).double(), want, rtol=1e-4, atol=0)
    torch.testing.assert_close(noise_log_ratio(hat, ref, eps, reduce="sum").double(), want * 256, rtol=1e-4, atol=0)


@pytest.fixture
def started(pair_run, tmp_path):
    args, _ = train.parse([str(a) for a in pair_run] + ["--output_dir", str(tmp_path / "run")])
    div, beta = train.validate(args)
    run, _ = train.setup(args)
    return run, div, beta


@pytest.mark.parametrize("name", NAMES)
def test_a_whole_step_is_the_formula(started, monkeypatch, name):
    """From files to the LoRA's gradient, in float64, for every divergence: eq. 5 with log X = -500 (err - err_ref)."""
    run, _, _ = started
    div, data, pipe = get_divergence(name, 0.4 if name == "alpha" else None), run.data, run.pipe
    pipe.unet.double(), pipe.text_encoder.double()
    pipe.scheduler.alphas_cumprod = table_ = pipe.scheduler.alphas_cumprod.double()
    for _, m in sample.lora_layers(pipe.unet):
        m.lora_B.data = 1e-2 * torch.randn(m.lora_B.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    monkeypatch.setattr(train, "predict_noise", predict)
    real = data.batch
    monkeypatch.setattr(data, "batch", lambda i, T: tuple(x.double() if torch.is_tensor(x) and x.is_floating_point() else x for x in real(i, T)))
    index = torch.tensor([0, 3, 5])
    ours, stats = train.pair_loss(pipe, data, index, None, div, 5.0, run.args)
    x_w, x_l, eps, t, captions, _ = data.batch(index, 1000)
    text, a = sample.encode_prompts(pipe, captions), table_[t].view(-1, 1, 1, 1)
    assert stats["t"].tolist() == t.tolist()
    u = []
    for x in (x_w, x_l):
        noisy = a.sqrt() * x + (1 - a).sqrt() * eps
        hat = pipe.unet(noisy, t, text).sample
        with torch.no_grad(), sample.lora_off(pipe.unet):
            ref = pipe.unet(noisy, t, text).sample
        u.append(-500 * ((hat - eps).pow(2).mean((1, 2, 3)) - (ref - eps).pow(2).mean((1, 2, 3))))
    theirs = -F.logsigmoid(5.0 * (div.df(u[0].exp()) - div.df(u[1].exp()))).mean()
    assert abs(ours.item() - np.log(2)) > 1e-4
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    for p, q in zip(torch.autograd.grad(ours, run.params), torch.autograd.grad(theirs, run.params)):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-10)


def test_a_pair_weighs_what_its_label_says(started, monkeypatch):
    """|2 label - 1|, of a mean that is still divided by the number of pairs."""
    run, div, beta = started
    index, losses = torch.tensor([1, 2]), []
    for _, m in sample.lora_layers(run.pipe.unet):
        torch.nn.init.normal_(m.lora_B, std=.1, generator=torch.Generator().manual_seed(0))
    for w in ([1., 1.], [1., 0.], [0., .5]):
        run.data.weights[1:3] = w
        losses.append(train.pair_loss(run.pipe, run.data, index, None, div, beta, run.args)[0].item())
    assert losses[0] == pytest.approx(losses[1] + 2 * losses[2], rel=1e-5) and losses[1] != pytest.approx(losses[2], rel=1e-3)


def test_noise_is_a_pairs_own(started):
    """t and eps depend on seed, epoch and pair, not on the batch; t is uniform over all 1,000 steps."""
    data = started[0].data
    x_w, x_l, eps, t, captions, weight = data.batch(torch.tensor([4, 1, 7]))
    for k, i in enumerate((4, 1, 7)):
        alone = data.batch(torch.tensor([i]))
        assert torch.equal(alone[2][0], eps[k]) and alone[3][0] == t[k] and alone[4][0] == captions[k]
        assert torch.equal(alone[0][0], x_w[k]) and torch.equal(alone[1][0], x_l[k])
    data.epoch = 1
    assert not torch.equal(data.batch(torch.tensor([4]))[2][0], eps[0])
    many = []
    for data.epoch in range(300):
        many.append(data.batch(torch.arange(8))[3])
    counts = torch.bincount(torch.cat(many) // 250, minlength=4)
    assert len(counts) == 4 and (counts - 600).abs().max() < 5 * (2400 * .25 * .75) ** .5
    assert sorted(data.order(0).tolist()) == list(range(len(data))) and not torch.equal(data.order(0), data.order(1))


# ---- what is read

def test_to_model_scales_covers_and_cuts_the_middle(tmp_path):
    for size in ((100, 60), (60, 100), (48, 48), (30, 20), (97, 61)):
        image = picture(tmp_path / "x.png", size)
        got = pairs.to_model((tmp_path / "x.png").read_bytes(), 48, 48)
        x = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 127.5 - 1
        s = 48 / min(size)
        full = F.interpolate(x, size=(round(size[1] * s), round(size[0] * s)), mode="bilinear", antialias=True)
        top, left = (full.shape[2] - 48) // 2, (full.shape[3] - 48) // 2
        assert got.shape == (3, 48, 48)
        torch.testing.assert_close(got, full[0, :, top:top + 48, left:left + 48], rtol=0, atol=2.1 / 127.5)  # PIL rounds twice to 8 bits
    wide = pairs.to_model((tmp_path / "x.png").read_bytes(), 24, 64)
    assert wide.shape == (3, 24, 64)


def test_photos_stand_upright(tmp_path):
    image = picture(tmp_path / "a.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned by 90 degrees
    image.rotate(90).save(tmp_path / "b.png", exif=exif)
    a, b = (pairs.to_model((tmp_path / f).read_bytes(), 48, 48) for f in ("a.png", "b.png"))
    assert torch.equal(a, b)


def test_labels_swap_weigh_and_tie(pipe, tmp_path, capsys):
    for name, seed in (("a.png", 0), ("b.png", 1)):
        picture(tmp_path / name, seed=seed)
    rows = [("a sun", "a.png", "b.png", label) for label in ("1", "", "0.25", "0", "0.5", "0.75")]
    data = pairs.open_pairs(table(tmp_path, rows, ("caption", "winner", "loser", "label")), pipe, str(tmp_path / "cache"))
    a = data.winners[0]
    assert [w == a for w in data.winners] == [True, True, False, False, True] and data.weights == [1, 1, .5, 1, .5]
    assert "left out: 1 ties" in capsys.readouterr().out


def test_csv_jsonl_and_parquet_are_one_set(pipe, tmp_path):
    """The same pairs in four writings; Parquet as Pick-a-Pic has it (label_0: is jpg_0 the better one), bytes or hub's struct."""
    pa = pytest.importorskip("pyarrow")
    from pyarrow.parquet import write_table
    folder = tmp_path / "csv"
    os.makedirs(folder)
    for i in range(6):
        picture(folder / f"{i}.jpg", seed=i)
    rows = [(f"a sun {i}", f"{2 * i}.jpg", f"{2 * i + 1}.jpg") for i in range(3)]
    table(folder, rows)
    lines = shutil.copytree(folder, tmp_path / "jsonl")
    os.remove(lines / "pairs.csv")
    (lines / "pairs.jsonl").write_text("\n".join(json.dumps(dict(zip(("caption", "winner", "loser"), r))) for r in rows) + "\n\n")
    read = lambda name: (folder / name).read_bytes()
    columns = dict(caption=[r[0] for r in rows], jpg_0=[read(rows[0][1]), read(rows[1][2]), read(rows[2][1])],
                   jpg_1=[read(rows[0][2]), read(rows[1][1]), read(rows[2][2])], label_0=[1., 0., 1.], label_1=[0., 1., 0.])
    write_table(pa.table(columns), tmp_path / "plain.parquet", row_group_size=2)
    os.makedirs(tmp_path / "shards")
    for n, part in enumerate((slice(0, 1), slice(1, 3))):
        write_table(pa.table({k: [{"bytes": x, "path": None} for x in v[part]] if k.startswith("jpg") else v[part] for k, v in columns.items()}),
                    tmp_path / "shards" / f"{n}.parquet")
    sets = [pairs.open_pairs(str(p), pipe, str(tmp_path / "cache"))
            for p in (folder, folder / "pairs.csv", lines, tmp_path / "plain.parquet", tmp_path / "shards")]
    assert len({s.digest for s in sets}) == 1 and len(sets[0]) == 3


def test_long_captions_are_cut_and_counted(pipe, tmp_path, capsys):
    picture(tmp_path / "a.png"), picture(tmp_path / "b.png", seed=1)
    pairs.open_pairs(table(tmp_path, [("a sun " * 40, "a.png", "b.png"), ("a sun", "b.png", "a.png")]), pipe, str(tmp_path / "cache"))
    assert f"1 of 2 captions are longer than {pipe.tokenizer.model_max_length} tokens" in capsys.readouterr().out


# ---- the cache

def encoded(pipe, path, cache):
    """The set, and how many images it cost to open it."""
    seen, real = [], pipe.vae.encode
    pipe.vae.encode = lambda x: (seen.append(len(x)), real(x))[1]
    try:
        return pairs.open_pairs(str(path), pipe, str(cache)), sum(seen)
    finally:
        pipe.vae.encode = real


def test_latents_are_the_vaes_and_are_made_once(pipe, pair_folder, tmp_path):
    data, n = encoded(pipe, pair_folder, tmp_path / "cache")
    assert n == 24 and encoded(pipe, pair_folder, tmp_path / "cache")[1] == 0
    with open(os.path.join(pair_folder, "pairs.csv")) as f:
        rows = list(csv.DictReader(f))
    x_w, x_l, *_ = data.batch(torch.arange(12))
    for name, got in (("winner", x_w), ("loser", x_l)):
        for i, row in enumerate(rows):
            image = Image.open(os.path.join(pair_folder, row[name])).resize((48, 48), Image.Resampling.BILINEAR)
            x = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 127.5 - 1
            with torch.no_grad():
                want = pipe.vae.encode(x).latent_dist.mode()[0] * pipe.vae.config.scaling_factor
            torch.testing.assert_close(got[i], want, rtol=1e-4, atol=1e-5)


def test_a_change_is_seen(pipe, pair_folder, tmp_path):
    """A changed image, same name, size and time: it alone is encoded anew. A changed table: another digest. Another VAE: all."""
    folder, cache = shutil.copytree(pair_folder, tmp_path / "set"), tmp_path / "cache"
    first, _ = encoded(pipe, folder, cache)
    image = folder / "images" / "00003_a.png"
    stat, pixels = os.stat(image), np.array(Image.open(image))
    Image.fromarray(pixels[::-1]).save(image)
    os.utime(image, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    second, n = encoded(pipe, folder, cache)
    assert n == 1 and second.digest != first.digest
    lines = (folder / "pairs.csv").read_text().splitlines()
    (folder / "pairs.csv").write_text("\n".join(lines[:-1]) + "\n")
    third, n = encoded(pipe, folder, cache)
    assert n == 0 and third.digest != second.digest and len(third) == 11
    with torch.no_grad():
        pipe.vae.decoder.conv_out.bias += 1
    assert encoded(pipe, folder, cache)[1] > 0


def test_a_latent_cut_short_is_made_again(pipe, pair_folder, tmp_path):
    data, _ = encoded(pipe, pair_folder, tmp_path / "cache")
    path = data.latents.path(data.winners[0])
    with open(path, "r+b") as f:
        f.truncate(100)
    assert encoded(pipe, pair_folder, tmp_path / "cache")[1] == 1
    os.remove(path)
    with pytest.raises(UserError, match="--resume encodes it again"):
        data.batch(torch.tensor([0]))


def test_latents_do_not_sit_in_memory(pipe, pair_folder, tmp_path, monkeypatch):
    """A set holds names; a batch of three reads six files and no more."""
    data, _ = encoded(pipe, pair_folder, tmp_path / "cache")
    assert all(isinstance(v, (str, float)) for rows in (data.captions, data.winners, data.losers, data.weights) for v in rows)
    read, load = [], np.load
    monkeypatch.setattr(np, "load", lambda *a, **kw: (read.append(a[0]), load(*a, **kw))[1])
    data.batch(torch.tensor([2, 5, 9]))
    assert len(read) == 6


# ---- whole runs

FLAGS = [["--div", n] + (["--alpha", "0.4"] if n == "alpha" else []) for n in NAMES]
FLAGS += [["--full"], ["--full", "--gradient_checkpointing"], ["--full", "--mixed_precision", "bf16"], ["--full", "--mixed_precision", "fp16"],
          ["--mixed_precision", "bf16"], ["--log_ratio", "sum", "--beta", "0.02"], ["--clip", "ratio"], ["--judge", "none"]]


@pytest.mark.parametrize("flags", FLAGS, ids=" ".join)
def test_a_run(command, pair_run, tmp_path, flags):
    out = tmp_path / "r"
    code, said, err = command("train.py", *pair_run, *flags, "--output_dir", out)
    assert code == 0, err
    steps = log(out, "step")
    assert abs(steps[0]["loss"] - np.log(2)) < 1e-4 and steps[0]["accuracy"] == .5 and np.isfinite([s["loss"] for s in steps]).all()
    assert [s["pairs"] for s in steps] == [4, 4, 2] and log(out, "rollout") == []  # 12 pairs, of which 2 have held-out captions
    kind = FULL_FILE if "--full" in flags else LORA_FILE
    assert all(v.isfinite().all() for v in weights(out, kind).values())
    expected = {"config.json", "metrics.jsonl", "samples", "state.pt", "curves.png", "table.md", "unet" if "--full" in flags else LORA_FILE}
    assert set(os.listdir(out)) == expected and sorted(os.listdir(out / "samples")) == ["epoch_000.png", "epoch_001.png"]
    assert ("taste" in (out / "table.md").read_text()) == ("none" not in flags)


def test_no_pair_of_a_held_out_caption_is_trained_on(started):
    run, _, _ = started
    with open(os.path.join(run.args.pairs, "pairs.csv")) as f:
        captions = {r["prompt"] for r in csv.DictReader(f)}
    assert len(run.held_out) == 2 and not {*run.held_out} & {*run.data.captions} and {*run.held_out} | {*run.data.captions} == captions


def test_own_prompts_for_the_table(command, pair_run, pair_folder, tmp_path):
    with open(os.path.join(pair_folder, "pairs.csv")) as f:
        known = next(csv.DictReader(f))["prompt"]
    (tmp_path / "p.txt").write_text(f"a moon over my house\n{known}\n")
    code, out, err = command("train.py", *pair_run, "--prompts", tmp_path / "p.txt", "--max_train_steps", 1, "--output_dir", tmp_path / "r")
    assert code == 0 and "11 pairs of" in out, err
    assert json.load(open(tmp_path / "r/config.json"))["held_out"] == ["a moon over my house", known]


def test_full_training_leaves_a_unet_that_opens_elsewhere(command, pair_run, micro, tmp_path):
    """unet/ opens in plain diffusers; sample.py draws it below its reference, evaluate.py measures it."""
    from diffusers import UNet2DConditionModel
    code, _, err = command("train.py", *pair_run, "--full", "--learning_rate", 1e-2, "--output_dir", tmp_path / "r")
    assert code == 0, err
    aligned, original = UNet2DConditionModel.from_pretrained(tmp_path / "r/unet"), UNet2DConditionModel.from_pretrained(micro, subfolder="unet")
    assert sum(not torch.equal(a, b) for a, b in zip(aligned.state_dict().values(), original.state_dict().values())) > 100
    pipe = sample.load_pipeline(micro)
    sample.load_policy(pipe, str(tmp_path / "r"))
    x, t, text = torch.randn(1, 4, 12, 12), torch.tensor([300]), torch.randn(1, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(pipe.unet(x, t, text).sample, aligned(x, t, text).sample)
        with sample.as_reference(pipe):
            torch.testing.assert_close(pipe.unet(x, t, text).sample, original(x, t, text).sample)
    for wrong, message in ((micro, "no LoRA at"), (tmp_path, "no LoRA at")):
        code, _, err = command("sample.py", "a sun", "--model", micro, "--lora", wrong, "--output_dir", tmp_path / "x")
        assert code == 2 and message in err and "(of --full) unet/" in err
    for same_policy in ("r/unet", f"r/{FULL_FILE}"):
        again = sample.load_pipeline(micro)
        sample.load_policy(again, str(tmp_path / same_policy))
        assert same(again.unet.state_dict(), aligned.state_dict())
    for policy in (["--lora", tmp_path / "r"], []):
        code, _, err = command("sample.py", "a sun", "--model", micro, *policy, "--seeds", 0, "--num_inference_steps", 4, "--device", "cpu",
                               "--output_dir", tmp_path / ("aligned" if policy else "plain"))
        assert code == 0, err
    a, b = (np.array(Image.open(tmp_path / f / "000_seed0.png")) for f in ("aligned", "plain"))
    assert (a != b).any()
    code, out, err = command("evaluate.py", tmp_path / "r", "--images_per_prompt", 2, "--num_inference_steps", 4, "--judges", "taste", "--metrics",
                             "rmse", "--device", "cpu", "--output_dir", tmp_path / "e")
    assert code == 0 and "| r |" in out and "| micro (original) |" in out, err
    a, b = (np.array(Image.open(tmp_path / "e" / f / "images/00000_0.png")) for f in ("r", "micro"))
    assert (a != b).any()


KILLS = [("KILL", "numpy", "save", 7),                      # while images are encoded
         ("KILL", "train", "noise_log_ratio", 4),           # after the checkpoint of step 1... in the second step
         ("TERM", "train", "noise_log_ratio", 3),           # politely: saves and says how to go on
         ("KILL", "os", "fsync", 3)]                        # while a checkpoint is written


@pytest.mark.parametrize("flags", ([], ["--full"]), ids=("lora", "full"))
def test_killed_anywhere_resume_ends_with_the_same_bits(pair_run, tmp_path, flags):
    base = [*pair_run, *flags, "--num_epochs", 2, "--checkpointing_steps", 1]
    code, said = Child("train.py", *base, "--output_dir", tmp_path / "whole").wait()
    assert code == 0, said
    shutil.rmtree(tmp_path / "cache")
    folder, died = tmp_path / "killed", []
    for kill in KILLS:
        resume = ["--resume"] if (folder / "config.json").exists() else []
        died.append(Child("train.py", *base, *resume, "--output_dir", folder, kill=kill).wait()[0])
    assert died == [-9, -9, 130, -9]
    code, said = Child("train.py", "--resume", "--output_dir", folder).wait()
    assert code == 0, said
    name = FULL_FILE if flags else LORA_FILE
    assert same(weights(folder, name), weights(tmp_path / "whole", name))
    strip = lambda rs: [{k: v for k, v in r.items() if k != "seconds"} for r in rs]
    for kind in ("step", "table"):
        assert strip(log(folder, kind)) == strip(log(tmp_path / "whole", kind))
    assert sorted(os.listdir(folder / "samples")) == sorted(os.listdir(tmp_path / "whole" / "samples"))


def test_resume_refuses_an_edited_set(command, pair_run, pair_folder, tmp_path):
    folder = shutil.copytree(pair_folder, tmp_path / "set")
    flags = [folder if a == pair_folder else a for a in pair_run]
    code, _, err = command("train.py", *flags, "--max_train_steps", 1, "--output_dir", tmp_path / "r")
    assert code == 0, err
    before = weights(tmp_path / "r")
    picture(folder / "images" / "00000_a.png", (32, 32))
    code, _, err = command("train.py", "--resume", "--max_train_steps", 3, "--output_dir", tmp_path / "r")
    assert code == 2 and "were edited since this run began" in err.splitlines()[-1] and same(before, weights(tmp_path / "r"))


def test_resume_refuses_other_prompts_and_takes_a_moved_set(command, pair_run, pair_folder, tmp_path):
    folder, own = shutil.copytree(pair_folder, tmp_path / "set"), tmp_path / "p.txt"
    own.write_text("a moon over my house\n")
    code, _, err = command("train.py", *[folder if a == pair_folder else a for a in pair_run], "--prompts", own, "--max_train_steps", 1,
                           "--output_dir", tmp_path / "r")
    assert code == 0, err
    moved = shutil.move(folder, tmp_path / "elsewhere")
    code, out, err = command("train.py", "--resume", "--pairs", moved, "--max_train_steps", 2, "--output_dir", tmp_path / "r")
    assert code == 0 and "resumed at optimiser step 1" in out, err
    own.write_text("another moon\n")
    code, _, err = command("train.py", "--resume", "--pairs", moved, "--max_train_steps", 3, "--output_dir", tmp_path / "r")
    assert code == 2 and "--prompts were edited" in err.splitlines()[-1], err


def test_every_caption_held_out_is_refused(command, pair_run, pair_folder, tmp_path):
    with open(os.path.join(pair_folder, "pairs.csv")) as f:
        (tmp_path / "p.txt").write_text("\n".join(r["prompt"] for r in csv.DictReader(f)))
    code, _, err = command("train.py", *pair_run, "--prompts", tmp_path / "p.txt", "--num_eval_prompts", 99, "--output_dir", tmp_path / "r")
    assert code == 2 and "names every caption of the pairs" in err.splitlines()[-1]


def test_two_ranks_are_one(pair_run, tmp_path):
    """Every other pair to each rank, one rank with an odd one less: the same log but for rounding."""
    code, said = Child("train.py", *pair_run, "--max_train_steps", 3, "--output_dir", tmp_path / "one").wait()
    assert code == 0, said
    for code, said in ranks("train.py", *pair_run, "--gradient_accumulation_steps", 1, "--max_train_steps", 3, "--output_dir", tmp_path / "two"):
        assert code == 0, said
    for a, b in zip(log(tmp_path / "one", "step"), log(tmp_path / "two", "step"), strict=True):
        for key in ("loss", "margin", "X_w", "X_l", "grad_norm", "accuracy", "pairs"):
            assert a[key] == pytest.approx(b[key], rel=1e-2, abs=1e-5), key


# ---- bad input: one line that names the fix, exit code 2, no run begun. edit(folder) spoils a copy of the twelve pairs, and may
# return another path for --pairs

def write(name, content):
    def edit(folder):
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return edit


def cut(folder):
    for name in ("00000_a.png", "00004_b.png"):
        path = folder / "images" / name
        path.write_bytes(path.read_bytes()[:300])
    os.remove(folder / "images" / "00007_a.png")


def second_table(folder):
    (folder / "pairs.jsonl").write_text("{}")


def parquet(folder):
    os.remove(folder / "pairs.csv")
    (folder / "x.parquet").write_bytes(b"PAR1 nothing")


HEAD = "prompt,winner,loser,label\n"
BAD = [(lambda f: f / "nowhere", [], "no pairs at"),
       (lambda f: f / "images" / "00000_a.png", [], "no pairs at"),
       (lambda f: os.remove(f / "pairs.csv"), [], "no pairs at"),
       (second_table, [], "remove one"),
       (write("pairs.csv", "text,good,bad\na,b,c\n"), [], "line 2: its columns are text, good, bad; needed are prompt (or caption), winner, loser"),
       (write("pairs.csv", HEAD), [], "is empty: give one with pairs in it"),
       (write("pairs.csv", ""), [], "is empty: give one with pairs in it"),
       (write("pairs.csv", "prompt;winner;loser\na;b;c\n"), [], "with commas between them"),
       (write("pairs.csv", HEAD + "\n\na red sun, a big one,images/00000_a.png,images/00000_b.png,1\n"), [], "line 4: more cells than the header has"),
       (write("pairs.csv", HEAD + "a sun,images/00000_a.png,images/\0,1\n"), [], "1 image is missing or damaged"),
       (write("pairs.csv", HEAD + "a sun,images/00000_a.png,images/00000_a.png,1\n"), [], "holds no pair that can be trained on"),
       (write("pairs.csv", HEAD + "a sun,images/00000_a.png,images/00000_b.png,0.5\n"), [], "holds no pair that can be trained on"),
       (write("pairs.csv", HEAD + "a sun,images/00000_a.png,images/00000_b.png,2\n"), [], "line 2: label must be a number in [0, 1]"),
       (write("pairs.csv", HEAD + "a sun,images/00000_a.png,images/00000_b.png,yes\n"), [], "line 2: label must be a number in [0, 1]"),
       (write("pairs.csv", HEAD + "a sun,images/00000_a.png,,1\n"), [], "line 2: prompt, winner or loser is empty"),
       (write("pairs.csv", HEAD.encode() + b"\xff\xfe\x00,b,c\n"), [], "is not text"),
       (cut, [], "3 images are missing or damaged (images/"),
       (write("images/00002_a.png", b"<html>"), [], "1 image is missing or damaged (images/00002_a.png: damaged or no image), 1 of 12 pairs"),
       (parquet, [], "Parquet"),
       (lambda f: None, ["--num_children", 3], "--num_children is about sampling pairs"),
       (lambda f: None, ["--judge", "nobody"], "unknown judge 'nobody'"),
       (lambda f: None, ["--cache_dir", "/proc/nowhere"], "choose another --cache_dir"),
       (lambda f: None, ["--learning_rate", "0"], "--learning_rate must be positive")]


@pytest.mark.parametrize("edit, flags, message", BAD, ids=[m[:40] for _, _, m in BAD])
def test_bad_input(command, pair_run, pair_folder, tmp_path, edit, flags, message):
    folder = shutil.copytree(pair_folder, tmp_path / "set")
    path = edit(folder) or folder
    argv = [path if a == pair_folder else a for a in pair_run]
    code, _, err = command("train.py", *argv, *flags, "--output_dir", tmp_path / "r")
    lines = [x for x in err.splitlines() if x.startswith("train.py: ")]
    assert code == 2 and len(lines) == 1 and message in lines[0] and "Traceback" not in err, err
    assert not (tmp_path / "r").exists()


def test_bad_json_lines(command, pair_run, pair_folder, tmp_path):
    for content, message in (('{"prompt": "a"', "cannot be read as JSON lines"), ('{"prompt": "a\\ud800", "winner": "b", "loser": "c"}', "is not text"), ("[1]\n", "line 1: not an object"), ('{"prompt": "a"}\n', "its columns are prompt")):
        folder = tmp_path / str(len(message))
        os.makedirs(folder)
        (folder / "pairs.jsonl").write_text(content)
        code, _, err = command("train.py", *[folder if a == pair_folder else a for a in pair_run], "--output_dir", tmp_path / "r")
        assert code == 2 and message in err.splitlines()[-1], err


def test_parquet_without_pyarrow(monkeypatch, tmp_path):
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match="pip install pyarrow"):
        list(pairs.records(str(tmp_path / "x.parquet")))


def test_parquet_of_other_columns(tmp_path, pipe):
    pa = pytest.importorskip("pyarrow")
    from pyarrow.parquet import write_table
    buffer = io.BytesIO()
    Image.new("RGB", (48, 48)).save(buffer, "JPEG")
    write_table(pa.table({"caption": ["a"], "image": [buffer.getvalue()]}), tmp_path / "x.parquet")
    with pytest.raises(UserError, match="has no column jpg_0, jpg_1, label_0; it has caption, image"):
        list(pairs.records(str(tmp_path / "x.parquet")))
    write_table(pa.table({"caption": ["a"], "jpg_0": ["a.png"], "jpg_1": ["b.png"], "label_0": [1.]}), tmp_path / "x.parquet")
    with pytest.raises(UserError, match="row 0: jpg_0 must hold the image's bytes"):
        list(pairs.records(str(tmp_path / "x.parquet")))
    write_table(pa.table({"caption": ["a"], "jpg_0": [b"no"], "jpg_1": [buffer.getvalue()], "label_0": [1.]}), tmp_path / "x.parquet")
    with pytest.raises(UserError, match="jpg_0 of row 0 of x.parquet: damaged or no image"):
        pairs.open_pairs(str(tmp_path / "x.parquet"), pipe, str(tmp_path / "cache"))


def test_skip_bad_leaves_their_pairs_out(command, pair_run, pair_folder, tmp_path):
    folder = shutil.copytree(pair_folder, tmp_path / "set")
    cut(folder)
    code, out, err = command("train.py", *[folder if a == pair_folder else a for a in pair_run], "--skip_bad", "--max_train_steps", 1, "--output_dir", tmp_path / "r")
    assert code == 0 and "left out: 3 images are missing or damaged" in out and "3 of 12 pairs" in out, err


def test_toy_writes_what_it_says(command, tmp_path):
    """The winner is the one the taste prefers, and both pictures are of the caption."""
    code, out, err = command("toy.make", "--pairs", tmp_path / "set", "--count", 60)
    assert code == 0 and "60 pairs" in out, err
    with open(tmp_path / "set" / "pairs.csv") as f:
        rows = list(csv.DictReader(f))
    load = lambda k: torch.stack([torch.from_numpy(np.array(Image.open(tmp_path / "set" / r[k]))).permute(2, 0, 1) / 255 for r in rows])
    w, l = load("winner"), load("loser")
    assert (toy.Taste()(w) - toy.Taste()(l) > -.02).all()  # files have 8 bits
    assert torch.cat([toy.prompt_following(x, [r["prompt"] for r in rows]) for x in (w, l)]).nanmean() > .97
    for argv, message in ((["--pairs", tmp_path / "set"], "is there already"), (["--pairs", tmp_path / "new", "--count", 0], "at least 1")):
        code, _, err = command("toy.make", *argv)
        assert code == 2 and message in err


def test_full_training_starts_at_its_reference_where_autocast_widens_norms(pair_run, tmp_path, monkeypatch):
    """On CUDA autocast runs normalisations in fp32, on the CPU it does not; imitated here. Policy and reference must compute alike:
    X is exactly 1 at the start. And the weights that train are the file's, not rounded to bf16."""
    args, _ = train.parse([str(a) for a in pair_run] + ["--full", "--mixed_precision", "bf16", "--output_dir", str(tmp_path / "run")])
    div, beta = train.validate(args)
    run, _ = train.setup(args)
    for name in ("group_norm", "layer_norm"):
        original, seen = getattr(F, name), []
        def wide(x, *a, original=original, **kw):
            if torch.is_autocast_enabled("cpu"):
                seen.append(1)
                with torch.autocast("cpu", enabled=False):
                    return original(x.float(), *a, **kw)
            return original(x, *a, **kw)
        monkeypatch.setattr(F, name, wide)
    loss, stats = train.pair_loss(run.pipe, run.data, torch.arange(4), None, div, beta, args)
    assert seen and (stats["log_X_w"] == 0).all() and (stats["log_X_l"] == 0).all()
    assert run.pipe.vae.dtype == torch.bfloat16 and run.pipe.unet.dtype == torch.float32
    loaded = sample.load_pipeline(args.model).unet.state_dict()
    assert all(torch.equal(v, loaded[k]) for k, v in run.pipe.unet.state_dict().items())
    loss.backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in run.params)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("flags", (["--mixed_precision", "bf16"], ["--mixed_precision", "fp16"], ["--full", "--mixed_precision", "bf16"],
                                   ["--full", "--mixed_precision", "fp16", "--gradient_checkpointing"]), ids=" ".join)
def test_a_run_on_cuda(command, pair_run, tmp_path, flags):
    i = pair_run.index("--device")
    code, _, err = command("train.py", *pair_run[:i], *pair_run[i + 2:], "--device", "cuda", *flags, "--output_dir", tmp_path / "r")
    steps = log(tmp_path / "r", "step")
    assert code == 0 and abs(steps[0]["loss"] - np.log(2)) < 1e-4 and np.isfinite([s["loss"] for s in steps]).all(), err
