"""The loop: what a step costs and does, what a run leaves behind, and that no kill loses work."""

import csv
import json
import math
import os
import shutil
import signal

import numpy as np
import pytest
import torch
from child import Child
from conftest import PROMPTS, ROOT
from filelock import FileLock
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

import sample
import train
from divergences import NAMES, get_divergence
from loss import alignment_loss, ddim_mean_std
from parts.flags import parse
from parts.model import LORA_FILE, predict_noise
from parts.ranks import World
from parts.run import Run, before_after_table, save_pictures
from toy import world as toy

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
by_name = pytest.mark.parametrize("name", NAMES)


def records(folder, kind="step"):
    with open(os.path.join(folder, "metrics.jsonl")) as file:
        return [record for record in map(json.loads, file) if record["kind"] == kind]


def weights(folder):
    return load_file(os.path.join(folder, LORA_FILE))


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def divergence(name):
    return get_divergence(name, 0.4 if name == "alpha" else None)


def parsed(flags):
    words = [str(word) for word in flags]
    return parse(words, "", train.FLAGS, train.SECTIONS, train.FREE_ON_RESUME)[0]


class Started:
    """A run set up, with the pairs of its first rollout as the only chunk it ever trains on."""

    def __init__(self, flags, folder):
        self.args = parsed([*flags, "--output_dir", folder])
        self.div, self.beta = train.check(self.args)
        setup = train.set_up(self.args, "cpu", World())
        self.pipe, self.judge, self.policy, self.source, _ = setup
        g = torch.Generator().manual_seed(0)
        three = self.source.prompts[:3]
        self.pairs = sample.collect_pairs(self.pipe, self.judge, three, g, 2, 1, 0.0, 4)
        self.pairs.order = torch.arange(len(self.pairs.t))

    def shake(self, scale=1e-2):
        g = torch.Generator().manual_seed(3)
        for layer in self.policy.layers.values():
            layer.lora_B.data = scale * torch.randn(layer.lora_B.shape, generator=g)

    def double(self):
        self.pipe.unet.double()
        p = self.pairs
        for name in ("x_t", "x_w", "x_l", "text", "null", "alphas_cumprod"):
            setattr(p, name, getattr(p, name).double())

    def loss(self, index, div=None, beta=None, **options):
        u_w, u_l = self.pairs.log_ratios(self.policy, index)
        return alignment_loss(u_w, u_l, div or self.div, beta or self.beta, **options)

    def train(self, steps=1, div=None):
        """train.train() on self.pairs for some optimiser steps; the records that it logged."""
        pairs = self.pairs

        class OneChunk:
            digest = ""

            def __len__(self):
                return 10**6

            def collect(self, run, pairs_a_step, bar):
                return pairs

        self.args.max_train_steps = steps
        environment = {"git_commit": None, "digest": ""}
        run = Run(self.args.output_dir, {"args": vars(self.args), **environment})
        everything = self.args, self.policy, OneChunk(), div or self.div, self.beta, run, World()
        train.train(*everything, show=lambda epoch: None)
        return records(self.args.output_dir)


@pytest.fixture
def started(small_run, tmp_path):
    return Started(small_run, tmp_path / "run")


# ---- one step


@pytest.mark.parametrize("guidance, rows", [(5.0, 2), (1.0, 1)])
def test_one_policy_and_one_reference_row_per_pair(started, guidance, rows):
    calls = []
    layer = next(iter(started.policy.layers.values()))
    hook = lambda module, inputs: calls.append((layer.on, len(inputs[0])))  # noqa: E731
    started.pipe.unet.register_forward_pre_hook(hook)
    started.pairs.guidance = guidance
    started.loss(torch.arange(5))
    assert sorted(calls) == [(False, 5 * rows), (True, 5 * rows)]


def reference_like_loss(started, index, div):
    """The same loss as SPO's code has it: every child with a prediction of its own, log-probs."""
    pairs, policy = started.pairs, started.policy
    x_t, t, text = pairs.x_t[index], pairs.t[index], pairs.text[pairs.prompt[index]]

    def log_probability(child):
        eps = predict_noise(policy.unet, x_t, t, text, pairs.null, 5.0)
        mean, std, _ = ddim_mean_std(eps, x_t, t, pairs.alphas_cumprod, 4)
        normal = torch.distributions.Normal(mean, std.expand_as(mean))
        return normal.log_prob(child).mean((1, 2, 3))

    X = []
    for child in (pairs.x_w[index], pairs.x_l[index]):
        ours = log_probability(child)
        with policy.reference():
            theirs = log_probability(child)
        X.append(torch.clamp(torch.exp(ours - theirs), 0.9, 1.1))
    margin = started.beta * div.df(X[0]) - started.beta * div.df(X[1])
    return -torch.log(torch.sigmoid(margin)).mean()


@by_name
def test_gradient_is_the_reference_loops(started, name):
    """In float64 the fused step and SPO's doubled one have the same loss and LoRA gradient."""
    started.shake()
    started.double()
    div, index, parameters = divergence(name), torch.arange(6), started.policy.parameters
    ours, _ = started.loss(index, div)
    theirs = reference_like_loss(started, index, div)
    assert abs(ours.item() - math.log(2)) > 1e-6
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)
    gradients = [torch.autograd.grad(loss, parameters) for loss in (ours, theirs)]
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-14)


@by_name
def test_loss_at_step_0_is_ln2(started, name):
    loss, _ = started.loss(started.pairs.order, divergence(name))
    assert abs(loss.item() - math.log(2)) < 1e-6


class Still(torch.optim.SGD):
    """An optimiser that only looks at the gradients."""

    def __init__(self, parameters, lr, **options):
        super().__init__(parameters, lr)
        self.seen = []
        Still.last = self

    def step(self):
        self.seen.append([p.grad.clone() for p in self.param_groups[0]["params"]])


def norm(gradients):
    return math.sqrt(sum((g**2).sum().item() for g in gradients))


@pytest.mark.parametrize("n", (4, 3))
def test_accumulated_gradient_is_the_mean_over_the_group(started, monkeypatch, n):
    """4 pairs as 2 + 2 are 4 at once; a short group of 3 weighs 3/4: pair for pair the same."""
    monkeypatch.setattr(torch.optim, "AdamW", Still)
    started.shake()
    started.args.max_grad_norm = 0.0
    started.pairs.order = torch.arange(n)
    (record,) = started.train()
    loss, _ = started.loss(torch.arange(n))
    want = torch.autograd.grad(loss * n / 4, started.policy.parameters)
    for a, b in zip(Still.last.seen[0], want):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-8)
    assert record["pairs"] == n and record["grad_norm"] == pytest.approx(norm(want), rel=1e-4)


def test_clipping_clips(started, monkeypatch):
    """A huge gradient: the norm before is logged, the optimiser sees one of max_grad_norm."""
    monkeypatch.setattr(torch.optim, "AdamW", Still)
    started.shake()
    started.args.clip, started.args.max_grad_norm, started.beta = "none", 1e-3, 1e4
    record = started.train()[0]
    assert record["grad_norm"] > 1
    assert norm(Still.last.seen[0]) == pytest.approx(1e-3, rel=1e-3)


def test_the_optimiser_is_spos(started, monkeypatch):
    """facts of SPO's published settings: AdamW 6e-5, betas .9/.999, decay 1e-4, eps 1e-8."""
    made = []
    adamw = torch.optim.AdamW
    monkeypatch.setattr(
        torch.optim, "AdamW", lambda *a, **k: made.append(adamw(*a, **k)) or made[0]
    )
    for name in ("learning_rate", "adam_weight_decay"):
        setattr(started.args, name, train.FLAGS[name][0])
    started.train()
    group = made[0].param_groups[0]
    assert (group["lr"], group["betas"], group["eps"]) == (6e-5, (0.9, 0.999), 1e-8)
    assert group["weight_decay"] == 1e-4


def test_steps_move_winners_up_and_losers_down(started):
    started.pairs.order = torch.arange(4)
    started.args.learning_rate = 3e-3
    started.train(12)
    _, stats = started.loss(torch.arange(4))
    assert stats["margin"].mean() > 0 and stats["loss"].mean() < math.log(2) - 1e-2
    assert (stats["X_w"] > stats["X_l"]).sum() >= 3


def test_a_finite_loss_with_a_broken_gradient_does_not_reach_the_weights(started):
    """Forward KL, no clamp, a ratio whose inverse overflows: the loss is 0, its gradient NaN."""
    started.pairs.x_w.mul_(300)
    started.pairs.x_l.mul_(300)
    started.args.clip, started.args.log_ratio = "none", "sum"
    started.shake(0.1)
    before = [p.clone() for p in started.policy.parameters]
    with pytest.raises(train.UserError, match="not finite at optimiser step 1, timestep"):
        started.train(div=get_divergence("fkl"))
    assert all(torch.equal(a, b) for a, b in zip(before, started.policy.parameters))


# ---- a whole run

FILES = {"config.json", "metrics.jsonl", "samples", LORA_FILE, "state.pt", "curves.png", "table.md"}
FILES |= {"evolution.gif", "lock", "kohya.safetensors"}
STATS = ("loss", "margin", "accuracy", "log_X_w", "log_X_l", "X_w", "X_l", "clip_fraction")


def test_a_run_leaves_what_run_py_says(command, small_run, tmp_path):
    folder = tmp_path / "r"
    code, out, err = command("train.py", *small_run, "--div", "js", "--output_dir", folder)
    assert code == 0, err
    assert set(os.listdir(folder)) == FILES
    assert sorted(os.listdir(folder / "samples")) == ["epoch_000.png", "epoch_001.png"]
    assert Image.open(folder / "evolution.gif").n_frames == 2
    steps, rollouts = records(folder), records(folder, "rollout")
    assert [r["pairs"] for r in rollouts] == [9, 9]  # 3 prompts x 3 judged steps, twice
    assert [r["valid"] for r in rollouts] == [1, 1]
    assert [s["pairs"] for s in steps] == [4, 4, 1] * 2
    assert [s["step"] for s in steps] == list(range(1, 7))
    assert abs(steps[0]["loss"] - math.log(2)) < 1e-6 and steps[0]["accuracy"] == 0.5
    for key in STATS:
        quarters = [steps[0][f"{key}_q{q}"] for q in (1, 2, 3, 4)]
        known = [v for v in quarters if v is not None]
        assert known and np.isfinite(known).all()
    assert steps[0]["grad_norm"] > 0 and steps[0]["lr"] == 1e-3
    assert any(v.any() for k, v in weights(folder).items() if "lora_B" in k)
    config = json.loads((folder / "config.json").read_text())
    assert config["args"]["div"] == "js" and config["versions"]["torch"] == torch.__version__
    assert config["device"].startswith("cpu")
    table = (folder / "table.md").read_text()
    assert all(k in table for k in ("taste", "prompt following", "rmse", "fsim", "before", "+-"))
    assert "python sample.py" in out
    with safe_open(folder / LORA_FILE, "pt") as file:
        about = file.metadata()
    assert about["div"] == "js" and about["beta"] == "10.0" and about["seed"] == "0"


def test_eval_interval_scores_the_way_and_changes_no_weight(command, small_run, micro, tmp_path):
    """Its figures are those that evaluate.py writes of the same pictures."""
    flags = [*small_run, "--num_epochs", 3, "--images_per_prompt", 3]
    for name, interval in (("a", 2), ("b", 0)):
        place = ["--eval_interval", interval, "--output_dir", tmp_path / name]
        code, _, err = command("train.py", *flags, *place)
        assert code == 0, err
    a, b = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert sorted(os.listdir(tmp_path / "a" / "epochs")) == ["000.safetensors", "002.safetensors"]
    with safe_open(tmp_path / "a" / "epochs" / "000.safetensors", "pt") as start:
        assert not start.get_tensor(next(k for k in a if "lora_B" in k)).any()
    evals = {name: records(tmp_path / name, "eval") for name in "ab"}
    assert [(r["epoch"], r["step"]) for r in evals["a"]] == [(0, 0), (2, 12), (3, 18)]
    assert [(r["epoch"], r["step"]) for r in evals["b"]] == [(0, 0), (3, 18)]
    assert evals["a"][0] == evals["b"][0] and evals["a"][2]["values"] == evals["b"][1]["values"]
    metrics = ["taste", "prompt following", "rmse", "psnr", "ssim", "fsim"]
    metrics += ["entropy_1d", "entropy_2d"]
    # evaluate.py opens the way: the policy of epoch 2
    held_out = json.loads((tmp_path / "a" / "config.json").read_text())["held_out"]
    (tmp_path / "held_out.txt").write_text("\n".join(held_out) + "\n")
    way = [tmp_path / "a" / "epochs" / "002.safetensors", "--model", micro, "--prompts"]
    way += [tmp_path / "held_out.txt", "--images_per_prompt", 3, "--num_inference_steps", 4]
    way += ["--judges", "taste", "--metrics", *metrics[2:], "--output_dir", tmp_path / "scored"]
    code, _, err = command("evaluate.py", *way)
    assert code == 0, err
    values = evals["a"][1]["values"]
    assert [m for m in metrics if m in values] == list(values)
    with open(tmp_path / "scored" / "summary.csv") as file:
        theirs = {r["metric"]: r for r in csv.DictReader(file) if r["model"] == "002"}
    for metric in values:
        ours = np.nanmean(np.array(values[metric], dtype=float))
        assert ours == pytest.approx(float(theirs[metric]["mean"]), rel=2e-3), metric


def test_evolution_shows_an_epoch_a_frame(tmp_path):
    os.makedirs(tmp_path / "samples")
    for epoch in range(3):
        pictures = torch.rand(2, 2, 6, 3, 48, 48)  # reference and aligned, of two prompts
        save_pictures(tmp_path, PROMPTS[:2], *pictures, epoch)
    movie = Image.open(tmp_path / "evolution.gif")
    assert movie.n_frames == 3 and max(movie.size) <= 640


CHOICES = [["--div", n] + (["--alpha", "0.4"] if n == "alpha" else []) for n in NAMES]
for flag, (_, allowed, _) in train.FLAGS.items():
    if isinstance(allowed, tuple) and flag not in ("div", "judge"):  # all judges: test_judges.py
        CHOICES += [[f"--{flag}", value] for value in allowed]
CHOICES += [["--match_curvature"], ["--gradient_checkpointing"]]
CHOICES += [["--guidance_scale", "1"], ["--max_grad_norm", "0"], ["--checkpointing_chunks", "2"]]
CHOICES += [["--full"], ["--full", "--mixed_precision", "bf16"]]


@pytest.mark.parametrize("flags", CHOICES, ids=" ".join)
def test_every_value_of_every_choice_runs(command, small_run, unpainted, tmp_path, flags):
    folder = tmp_path / "r"
    steps = ["--max_train_steps", 2, "--output_dir", folder]
    code, out, err = command("train.py", *small_run, "--judge", "taste", *flags, *steps)
    assert code == 0, err
    first, second = records(folder)
    assert abs(first["loss"] - math.log(2)) < 1e-6 and math.isfinite(second["loss"])
    if "--full" not in flags:
        assert all(v.isfinite().all() for v in weights(folder).values())
    if flags == ["--match_curvature"]:
        assert "f''(1) = 0.5, effective beta 20" in out


def test_gradient_checkpointing_changes_nothing(command, small_run, unpainted, tmp_path):
    for name, flags in (("a", []), ("b", ["--gradient_checkpointing"])):
        steps = ["--max_train_steps", 2, "--output_dir", tmp_path / name]
        command("train.py", *small_run, *flags, *steps)
    a, b = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert all(torch.allclose(a[k], b[k], atol=1e-6) for k in a)


@pytest.fixture
def thin(micro, tmp_path):
    """The micro model with a UNet of one block down and one up: traced in half the time."""
    from diffusers import UNet2DConditionModel

    folder = shutil.copytree(micro, tmp_path / "thin")
    unet = UNet2DConditionModel(
        sample_size=12,
        block_out_channels=(16,),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=["CrossAttnDownBlock2D"],
        mid_block_type=None,
        up_block_types=["CrossAttnUpBlock2D"],
        cross_attention_dim=16,
        attention_head_dim=4,
    )
    unet.save_pretrained(folder / "unet")
    return folder


def test_compile_meets_few_shapes_and_changes_nothing(
    command, small_run, thin, tmp_path, monkeypatch
):
    """With the tracing half of the compiler (the C++ it would write is not ours to test): the same
    weights, and no graph after the first epoch although batches are ragged: 4 and 2 prompts, 2
    pairs and 1, 12, 8 and 4 pictures."""
    graphs, known, compile_, collect = [], [], torch.compile, train.Rollouts.collect

    def trace(module, inputs):
        graphs.append({len(x) for x in inputs if torch.is_tensor(x) and x.shape[1:] == (4, 12, 12)})
        return module.forward

    def counted(self, *args):
        known.append(len(graphs))
        return collect(self, *args)

    monkeypatch.setattr(
        torch, "compile", lambda f, **options: compile_(f, backend=trace, **options)
    )
    monkeypatch.setattr(train.Rollouts, "collect", counted)
    for name, flags in (("a", []), ("b", ["--compile"])):
        more = ["--model", thin, "--sample_batch_size", 4, "--num_epochs", 2]
        more += ["--max_train_steps", 7, "--output_dir", tmp_path / name]  # 5 an epoch
        code, _, err = command("train.py", *small_run, *flags, *more)
        assert code == 0, err
    assert len(known) == 6 and len(records(tmp_path / "b")) == 7  # 3 rollouts of either run
    # UNet: 2 sizes x LoRA off and on, 1 with gradient; decoder
    assert known[-1] == len(graphs) <= 6
    assert set().union(*graphs) == {8, 4, 16}  # 2 x 4 prompts, 2 x 2 pairs, 16 images
    a, b = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert all(torch.allclose(a[k], b[k], atol=1e-4) for k in a)
    torch._dynamo.reset()


def test_js_at_twice_beta_is_reverse_kl_inside_the_clamp(command, small_run, unpainted, tmp_path):
    """--match_curvature makes js and rkl nearly the same run (SPO's regime); without it, not."""
    margins = {}
    runs = dict(rkl=["rkl"], js=["js"], matched=["js", "--match_curvature"])
    for name, flags in runs.items():
        more = ["--max_grad_norm", 0, "--max_train_steps", 3, "--output_dir", tmp_path / name]
        command("train.py", *small_run, "--div", *flags, *more)
        margins[name] = np.array([r["margin"] for r in records(tmp_path / name)])[1:3]
    assert np.allclose(margins["matched"], margins["rkl"], rtol=0.05)
    assert np.allclose(margins["js"], margins["rkl"] / 2, rtol=0.3)


def test_an_empty_rollout_is_survived_and_logged(command, small_run, unpainted, tmp_path):
    flags = ["--threshold", 0.99999, "--output_dir", tmp_path / "r"]
    code, _, err = command("train.py", *small_run, *flags)
    assert code == 0 and "no valid pair" in err
    assert [r["pairs"] for r in records(tmp_path / "r", "rollout")] == [0, 0]
    assert records(tmp_path / "r") == []


def test_a_judge_without_a_finite_score_stops_the_run(command, small_run, tmp_path, monkeypatch):
    def broken(self, images, text=None, t=None):
        return torch.full((len(images),), math.nan)

    monkeypatch.setattr(toy.Taste, "__call__", broken)
    code, _, err = command("train.py", *small_run, "--output_dir", tmp_path / "r")
    assert code == 2
    assert "none of the judge's scores is finite" in err.strip().splitlines()[-1]


@pytest.mark.parametrize("div", ("js", "fkl"))
def test_a_non_finite_loss_stops_with_step_timestep_and_ratio(command, small_run, tmp_path, div):
    folder = tmp_path / "r"
    flags = ["--div", div, "--learning_rate", 1e30, "--clip", "none", "--output_dir", folder]
    code, _, err = command("train.py", *small_run, *flags)
    assert code == 2
    last = err.strip().splitlines()[-1]
    assert "is not finite at optimiser step 2" in last and "timestep" in last and "X_w" in last
    assert all(v.isfinite().all() for v in weights(folder).values())  # of the checkpoint before it
    assert records(folder, "error")


@cuda
@pytest.mark.parametrize("precision", ("bf16", "fp16"))
def test_mixed_precision_on_cuda(command, small_run, tmp_path, precision):
    flags = ["--device", "cuda", "--mixed_precision", precision, "--output_dir", tmp_path / "r"]
    code, _, err = command("train.py", *small_run, *flags)
    assert code == 0, err
    assert all(math.isfinite(r["loss"]) for r in records(tmp_path / "r"))


# ---- kills and resumption

# (signal, module, function, at which of its calls), each in a process that resumed where the one
# before it died
KILLS = [
    ("KILL", "parts.model", "predict_noise", 11),  # in the first rollout
    ("KILL", "os", "fsync", 3),  # while state.pt is written: the LoRA is newer than the state
    ("TERM", "parts.model", "predict_noise", 21),  # in the second rollout
    ("KILL", "sample", "step_log_ratios", 3),  # within an optimiser step
    ("INT", "parts.model", "predict_noise", 3),  # Ctrl-C
    ("KILL", "parts.common", "labelled_grid", 1),  # while an epoch's picture is made
    ("KILL", "parts.run", "values_per_prompt", 1),  # while the held-out prompts are scored
    ("KILL", "train", "draw_curves", 1),  # when training has ended
]


def without_times(records):
    return [{k: r[k] for k in r if k not in ("seconds", "peak_gb")} for r in records]


def test_killed_anywhere_resume_ends_with_the_same_bits(small_run, tmp_path):
    """The same run killed at eight kinds of moment, each time resumed: bit-identical LoRA, log."""
    whole, folder = tmp_path / "whole", tmp_path / "killed"
    flags = [*small_run, "--eval_interval", 1, "--output_dir"]
    assert Child("train.py", *flags, whole).wait()[0] == 0
    for i, kill in enumerate(KILLS):
        resume = ["--resume"] if i else []
        code, printed = Child("train.py", *flags, folder, *resume, kill=kill).wait()
        if kill[0] == "INT":
            assert code == 130 and "--resume --output_dir" in printed, printed
        else:  # every one of them hit a living process
            assert code == -getattr(signal, f"SIG{kill[0]}"), (kill, printed)
    code, printed = Child("train.py", "--resume", "--output_dir", folder).wait()
    assert code == 0, printed
    assert same(weights(folder), weights(whole))
    for kind in ("step", "rollout", "eval", "table"):
        assert without_times(records(folder, kind)) == without_times(records(whole, kind))


def test_two_processes_do_not_train_in_one_folder(command, small_run, unpainted, tmp_path):
    (tmp_path / "r").mkdir()
    flags = [*small_run, "--max_train_steps", 1, "--output_dir", tmp_path / "r"]
    with FileLock(tmp_path / "r" / "lock"):  # as another process holds it
        code, _, err = command("train.py", *flags)
    assert code == 2 and "another process trains in" in err
    assert sorted(os.listdir(tmp_path / "r")) == ["lock", "samples"]  # nothing was written
    assert command("train.py", *flags)[0] == 0


def test_a_damaged_log_is_one_line_before_any_work(command, small_run, unpainted, tmp_path):
    """cases.md 15. Without the log the run goes on, to the same weights."""
    for name in ("whole", "hurt"):
        place = ["--output_dir", tmp_path / name]
        assert command("train.py", *small_run, *place)[0] == 0
    log = tmp_path / "hurt" / "metrics.jsonl"
    content = log.read_bytes()
    resume = ["--resume", "--num_epochs", 2, "--output_dir"]
    for damage in (b"\xff", b"<html>\n", b'{"kind"; '):
        log.write_bytes(damage + content[len(damage) :])
        code, _, err = command("train.py", *resume, tmp_path / "hurt")
        assert code == 2 and "metrics.jsonl as JSON" in err and err.count("\n") == 1
    log.unlink()
    for name in ("whole", "hurt"):
        code, _, err = command("train.py", *resume, tmp_path / name)
        assert code == 0, err
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "hurt"))
    log.unlink()  # now that nothing is left to train: the table is made anew
    code, out, err = command("train.py", *resume, tmp_path / "hurt")
    assert code == 0 and "before | after" in out, err


def test_a_run_that_has_enough_steps_keeps_its_epoch(command, small_run, unpainted, tmp_path):
    """--resume with nothing left to do: the table is of the weights there, not of epoch 0 twice.
    "auto" stands for what the run took."""
    place = ["--output_dir", tmp_path / "r"]
    assert (
        command("train.py", *small_run, "--num_epochs", 2, "--max_train_steps", 4, *place)[0] == 0
    )
    state = torch.load(tmp_path / "r" / "state.pt", weights_only=True)["position"]
    more = ["--resume", "--max_train_steps", 1, "--mixed_precision", "auto", *place]
    code, _, err = command("train.py", *more)
    assert code == 0 and state[0] >= 1, err
    assert [line["epoch"] for line in records(tmp_path / "r", "eval")] == [0, 1]


def test_a_collapsed_policy_gets_its_table():
    """Equal pictures have no PSNR, and the log holds none."""
    table, figures = before_after_table(
        {"taste": [1.0, 2.0], "psnr": [30.0, 31.0]}, {"taste": [2, 2]}, 4
    )
    assert "| psnr | 30.50 +- 0.5 | nan | +nan | - |" in table.replace("0.500", "0.5"), table


def test_a_run_may_be_made_longer(command, small_run, unpainted, tmp_path):
    """Stopped in mid-chunk, resumed to its end, then given another epoch: one run."""
    whole = tmp_path / "whole"
    command("train.py", *small_run, "--num_epochs", 2, "--output_dir", whole)
    for chunks in (1, 2):
        folder, states = tmp_path / str(chunks), ["--checkpointing_chunks", chunks]
        command("train.py", *small_run, *states, "--max_train_steps", 2, "--output_dir", folder)
        for flags in (["--max_train_steps", 0], ["--num_epochs", 2]):
            code, _, err = command("train.py", "--resume", *flags, "--output_dir", folder)
            assert code == 0, err
        assert same(weights(folder), weights(whole))
        assert without_times(records(folder)) == without_times(records(whole))


def test_log_opens_in_pandas(command, small_run, unpainted, tmp_path):
    """Every line is one flat JSON object (the table's figures aside), and pandas has columns."""
    import pandas

    command("train.py", *small_run, "--max_train_steps", 1, "--output_dir", tmp_path / "r")
    steps, rollouts = records(tmp_path / "r"), records(tmp_path / "r", "rollout")
    for record in steps + rollouts:
        assert all(v is None or isinstance(v, (int, float, str)) for v in record.values())
    log = pandas.read_json(tmp_path / "r" / "metrics.jsonl", lines=True)
    losses, judged = log[log.kind == "step"].loss, log[log.kind == "rollout"].judge_final
    assert losses.tolist() == pytest.approx([s["loss"] for s in steps])
    assert judged.tolist() == pytest.approx([r["judge_final"] for r in rollouts])


def test_held_out_prompts_depend_on_no_seed_and_are_not_trained_on(small_run, tmp_path):
    found = []
    for seed in (0, 1):
        args = parsed([*small_run, "--seed", seed, "--output_dir", tmp_path / str(seed)])
        *_, source, held_out = train.set_up(args, "cpu", World())
        found.append((source.prompts, held_out))
    assert found[0] == found[1]
    prompts, held_out = found[0]
    assert len(held_out) == 2 and len(prompts) == 6 and not set(prompts) & set(held_out)


def test_help_shows_the_defaults_in_force(command):
    """A model's train.json replaces defaults, in sections for --pairs and --full as well."""
    code, out, _ = command("train.py", "--help", "--model", "toy")
    flat = " ".join(out.split())
    with open(os.path.join(ROOT, "toy", "train.json")) as file:
        own = json.load(file)
    sections = [own.pop(name) for name in ("pairs", "full")]
    for name, value in own.items():
        assert f"(default: {value})" in flat.split(f"--{name} ")[-1][:300]
        assert getattr(parsed(["--model", "toy"]), name) == value
    for flag, section in zip((["--pairs", "x"], ["--full"]), sections):
        args = parsed(["--model", "toy", *flag])
        assert all(getattr(args, name) == value for name, value in section.items())
    assert parsed(["--model", "somewhere"]).learning_rate == 6e-5  # SPO's, for any other model


def test_a_preview_decoder_paints_for_the_judge(command, small_run, unpainted, tmp_path):
    from test_fast import tiny_decoder

    tiny, out = tiny_decoder(tmp_path / "tiny"), tmp_path / "r"
    flags = ["--max_train_steps", 1, "--output_dir", out]
    code, _, err = command("train.py", *small_run, "--preview_decoder", tiny, *flags)
    assert code == 0, err
    command("train.py", *small_run, "--max_train_steps", 1, "--output_dir", tmp_path / "vae")
    judged = [records(folder, "rollout")[0]["judge_mean"] for folder in (out, tmp_path / "vae")]
    assert judged[0] != judged[1]  # two decoders, two pictures
    nowhere = ["--preview_decoder", tmp_path / "nowhere", "--output_dir", tmp_path / "q"]
    code, _, err = command("train.py", *small_run, *nowhere)
    assert code == 2 and "such as madebyollin/taesd" in err and err.count("\n") == 1
    assert not (tmp_path / "q").exists()
