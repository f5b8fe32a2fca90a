"""The loop: what a step costs and does, what a run leaves behind, and that no kill loses work."""
import gc
import json
import math
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file

from parts import judges, judges_clip
import sample
from toy import world as toy
import train
from child import Child
from conftest import ROOT
from divergences import NAMES, get_divergence
from sample import LORA_FILE, Pairs, collect_pairs, encode_prompts, lora_off, predict_noise

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


def records(folder, kind="step"):
    with open(os.path.join(folder, "metrics.jsonl")) as f:
        return [r for r in map(json.loads, f) if r["kind"] == kind]


def weights(folder):
    return load_file(os.path.join(folder, LORA_FILE))


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture
def started(small_run, tmp_path):
    """A run set up, its first rollout collected: (run, judge, null, divergence, beta)."""
    args, _ = train.parse([str(a) for a in small_run] + ["--output_dir", str(tmp_path / "run")])
    div, beta = train.validate(args)
    run, judge = train.setup(args)
    prompts, _ = train.split_prompts(args)
    run.pairs = collect_pairs(run.pipe, judge, prompts[:3], torch.Generator().manual_seed(0), 2, 1, 0.0, 4)
    return run, judge, encode_prompts(run.pipe, [""]), div, beta


# ---- one step

@pytest.mark.parametrize("guidance, rows", [(5.0, 2), (1.0, 1)])
def test_one_policy_and_one_reference_row_per_pair(started, guidance, rows):
    run, _, null, div, beta = started
    run.args.guidance_scale = guidance
    calls = []
    layer = sample.lora_layers(run.pipe.unet)[0][1]
    run.pipe.unet.register_forward_pre_hook(lambda m, a: calls.append((layer.on, len(a[0]))))
    loss, _ = train.pair_loss(run.pipe, run.pairs, torch.arange(5), null, div, beta, run.args)
    assert sorted(calls) == [(False, 5 * rows), (True, 5 * rows)]


def test_no_second_unet_in_memory(small_run, tmp_path):
    """Setting up a run, its rollout and its loss bring exactly one UNet into being: the reference is no copy."""
    unets = lambda: [o for o in gc.get_objects() if type(o) is UNet2DConditionModel]
    before = unets()
    args, _ = train.parse([str(a) for a in small_run] + ["--output_dir", str(tmp_path / "run")])
    run, judge = train.setup(args)
    run.pairs = collect_pairs(run.pipe, judge, ["a sun"], torch.Generator().manual_seed(0), 2, 1, 0.0, 4)
    loss, _ = train.pair_loss(run.pipe, run.pairs, torch.arange(2), encode_prompts(run.pipe, [""]), get_divergence("js"), 10.0, args)
    loss.backward()
    assert len(unets()) == len(before) + 1


def reference_like_loss(run, index, null, div, beta):
    """The same loss as SPO's code has it: every child with a prediction of its own, log-probabilities of Normals."""
    pairs, args, table = run.pairs, run.args, run.pipe.scheduler.alphas_cumprod
    x_t, t, text = pairs.x_t[index], pairs.t[index], pairs.text[pairs.prompt[index]]
    X = []
    for child in (pairs.x_w[index], pairs.x_l[index]):
        mean, std, _ = sample.ddim_mean_std(predict_noise(run.pipe.unet, x_t, t, text, null, 5.0), x_t, t, table, 4)
        with torch.no_grad(), lora_off(run.pipe.unet):
            ref, _, _ = sample.ddim_mean_std(predict_noise(run.pipe.unet, x_t, t, text, null, 5.0), x_t, t, table, 4)
        log = lambda m: torch.distributions.Normal(m, std.expand_as(m)).log_prob(child).mean((1, 2, 3))
        X.append(torch.clamp(torch.exp(log(mean) - log(ref)), 0.9, 1.1))
    return -torch.log(torch.sigmoid(beta * div.df(X[0]) - beta * div.df(X[1]))).mean()


@pytest.mark.parametrize("name", NAMES)
def test_gradient_is_the_reference_loops(started, name):
    """In float64: the fused step and SPO's doubled one have the same loss and the same LoRA gradient."""
    run, _, null, _, beta = started
    div = get_divergence(name, 0.4 if name == "alpha" else None)
    run.pipe.unet.double()
    run.pipe.scheduler.alphas_cumprod = run.pipe.scheduler.alphas_cumprod.double()
    for k in ("x_t", "x_w", "x_l", "text"):
        setattr(run.pairs, k, getattr(run.pairs, k).double())
    for _, m in sample.lora_layers(run.pipe.unet):
        m.lora_B.data = torch.randn(m.lora_B.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64) * 1e-2
    params, index, wide = [p for p in run.params], torch.arange(6), null.double()

    def exact(unet, x, t, text, null, guidance):  # predict_noise without its cast to fp32
        a, b = unet(torch.cat([x, x]), torch.cat([t, t]), torch.cat([null.expand_as(text), text])).sample.chunk(2)
        return a + guidance * (b - a)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(train, "predict_noise", exact)
        m.setitem(globals(), "predict_noise", exact)
        ours, stats = train.pair_loss(run.pipe, run.pairs, index, wide, div, beta, run.args)
        theirs = reference_like_loss(run, index, wide, div, beta)
    assert abs(ours.item() - math.log(2)) > 1e-6
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)
    for a, b in zip(torch.autograd.grad(ours, params), torch.autograd.grad(theirs, params)):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-14)


@pytest.mark.parametrize("name", NAMES)
def test_loss_at_step_0_is_ln2(started, name):
    run, _, null, _, beta = started
    div = get_divergence(name, 0.4 if name == "alpha" else None)
    loss, _ = train.pair_loss(run.pipe, run.pairs, torch.arange(len(run.pairs)), null, div, beta, run.args)
    assert abs(loss.item() - math.log(2)) < 1e-6


def test_accumulated_gradient_is_the_mean_over_the_group(started):
    """4 pairs as 2 + 2 are 4 at once; a short group of 3 in batches of 2 and 1 is weighted by 3/4, pair for pair."""
    run, _, null, div, beta = started
    grads = {}

    class Still:  # an optimiser that only looks at the gradients
        param_groups = [{"params": run.params}]
        def step(self): self.grads = [p.grad.clone() for p in run.params]
        def zero_grad(self, set_to_none): [setattr(p, "grad", None) for p in run.params]

    for _, m in sample.lora_layers(run.pipe.unet):
        torch.nn.init.normal_(m.lora_B, std=1e-2)
    run.args.max_grad_norm = 0
    for n in (4, 3):
        still, scaler = Still(), torch.amp.GradScaler("cpu", enabled=False)
        stats, norm = train.optimiser_step(run.pipe, run.pairs, torch.arange(n), null, div, beta, run.args, run.params, still, scaler)
        loss, _ = train.pair_loss(run.pipe, run.pairs, torch.arange(n), null, div, beta, run.args)
        want = torch.autograd.grad(loss * n / 4, run.params)
        for a, b in zip(still.grads, want):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-8)
        assert len(stats["loss"]) == n
        assert norm == pytest.approx(math.sqrt(sum((b ** 2).sum().item() for b in want)), rel=1e-4)


def test_clipping_clips(started):
    """A huge gradient: the norm before is logged, what the optimiser sees is max_grad_norm."""
    run, _, null, div, _ = started
    for _, m in sample.lora_layers(run.pipe.unet):
        torch.nn.init.normal_(m.lora_B, std=1e-2)
    run.args.clip, run.args.max_grad_norm, seen = "none", 1e-3, []
    hook = run.opt.register_step_pre_hook(lambda o, *a: seen.append(math.sqrt(sum((p.grad ** 2).sum().item() for p in run.params))))
    _, norm = train.optimiser_step(run.pipe, run.pairs, torch.arange(4), null, div, 1e4, run.args, run.params, run.opt, run.scaler)
    hook.remove()
    assert norm > 1 and seen[0] == pytest.approx(1e-3, rel=1e-3)


def test_steps_move_winners_up_and_losers_down(started):
    run, _, null, div, beta = started
    group = torch.arange(4)
    run.opt.param_groups[0]["lr"] = 3e-3
    for _ in range(12):
        train.optimiser_step(run.pipe, run.pairs, group, null, div, beta, run.args, run.params, run.opt, run.scaler)
    _, stats = train.pair_loss(run.pipe, run.pairs, group, null, div, beta, run.args)
    assert stats["margin"].mean() > 0 and stats["loss"].mean() < math.log(2) - 1e-2 and (stats["X_w"] > stats["X_l"]).sum() >= 3


# ---- a whole run

def test_a_run_leaves_what_the_readme_says(command, small_run, tmp_path):
    code, out, err = command("train.py", *small_run, "--div", "js", "--output_dir", tmp_path / "r")
    assert code == 0, err
    assert set(os.listdir(tmp_path / "r")) == {"config.json", "metrics.jsonl", "samples", LORA_FILE, "state.pt", "curves.png", "table.md"}
    assert sorted(os.listdir(tmp_path / "r/samples")) == ["epoch_000.png", "epoch_001.png"]
    steps, rolls = records(tmp_path / "r"), records(tmp_path / "r", "rollout")
    assert len(rolls) == 2 and all(r["pairs"] == 9 and r["valid"] == 1 for r in rolls)  # 3 prompts x 3 judged steps
    assert [s["pairs"] for s in steps] == [4, 4, 1] * 2 and [s["step"] for s in steps] == list(range(1, 7))
    assert abs(steps[0]["loss"] - math.log(2)) < 1e-6 and steps[0]["accuracy"] == 0.5
    for key in ("loss", "margin", "accuracy", "log_X_w", "log_X_l", "X_w", "X_l", "clip_fraction"):
        quarters = [steps[0][f"{key}_q{q}"] for q in (1, 2, 3, 4)]
        assert all(v is None or math.isfinite(v) for v in quarters) and any(v is not None for v in quarters)
    assert steps[0]["grad_norm"] > 0 and steps[0]["lr"] == 1e-3
    assert not same(weights(tmp_path / "r"), {k: torch.zeros_like(v) for k, v in weights(tmp_path / "r").items()})
    config = json.load(open(tmp_path / "r/config.json"))
    assert config["args"]["div"] == "js" and config["versions"]["torch"] == torch.__version__ and config["device"].startswith("cpu")
    table = open(tmp_path / "r/table.md").read()
    assert all(k in table for k in ("taste", "prompt following", "RMSE", "entropy", "before", "+-"))
    assert "python sample.py" in out


CHOICES = [["--div", n] + (["--alpha", "0.4"] if n == "alpha" else []) for n in NAMES]
CHOICES += [["--clip", c] for c in ("ratio", "onesided", "none")] + [["--log_ratio", r] for r in ("mean", "sum")]
CHOICES += [["--mixed_precision", m] for m in ("auto", "no", "bf16", "fp16")]
CHOICES += [["--match_curvature"], ["--gradient_checkpointing"], ["--judge", "taste"], ["--guidance_scale", "1"], ["--max_grad_norm", "0"]]


@pytest.mark.parametrize("flags", CHOICES, ids=" ".join)
def test_every_value_of_every_choice_runs(command, small_run, tmp_path, flags):
    code, out, err = command("train.py", *small_run, *flags, "--max_train_steps", 2, "--output_dir", tmp_path / "r")
    assert code == 0, err
    first, second = records(tmp_path / "r")
    assert abs(first["loss"] - math.log(2)) < 1e-6 and math.isfinite(second["loss"])
    assert all(v.isfinite().all() for v in weights(tmp_path / "r").values())
    if flags == ["--match_curvature"]:
        assert "f''(1) = 0.5, effective beta 20" in out


def test_gradient_checkpointing_changes_nothing(command, small_run, tmp_path):
    for name, flags in (("a", []), ("b", ["--gradient_checkpointing"])):
        command("train.py", *small_run, *flags, "--max_train_steps", 2, "--output_dir", tmp_path / name)
    a, b = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert all(torch.allclose(a[k], b[k], atol=1e-6) for k in a)


def test_compile_meets_few_shapes_and_changes_nothing(command, small_run, tmp_path, monkeypatch):
    """--compile, with the tracing half of the compiler (the C++ it would write is not ours to test): the same weights, and
    no graph beyond the first epoch's although batches are ragged: 4 and 2 prompts, 2 pairs and 1, 16 and 8 pictures."""
    graphs, known, compile_, rollout = [], [], torch.compile, train.rollout
    def trace(gm, inputs):
        graphs.append({len(x) for x in inputs if torch.is_tensor(x) and x.shape[1:] == (4, 12, 12)})
        return gm.forward
    monkeypatch.setattr(torch, "compile", lambda f, **kw: compile_(f, backend=trace, **kw))
    monkeypatch.setattr(train, "rollout", lambda *a: (known.append(len(graphs)), rollout(*a)))
    for name, flags in (("a", []), ("b", ["--compile"])):
        code, _, err = command("train.py", *small_run, *flags, "--sample_batch_size", 4, "--num_epochs", 2, "--output_dir", tmp_path / name)
        assert code == 0, err
        assert graphs or not flags
    print(known, graphs)
    assert known[-2] == len(graphs) <= 6                 # UNet: 2 sizes x (LoRA off, on, on with gradient); decoder
    assert set().union(*graphs) == {8, 4, 16}            # 2 x 4 prompts, 2 x 2 pairs, 16 images
    a, b = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert all(torch.allclose(a[k], b[k], atol=1e-4) for k in a)
    torch._dynamo.reset()


def test_js_at_twice_beta_is_reverse_kl_inside_the_clamp(command, small_run, tmp_path):
    """End to end: --match_curvature makes js and rkl nearly the same run (SPO's regime), and its absence does not."""
    for name, flags in (("rkl", ["--div", "rkl"]), ("js", ["--div", "js"]), ("matched", ["--div", "js", "--match_curvature"])):
        command("train.py", *small_run, *flags, "--max_grad_norm", 0, "--output_dir", tmp_path / name)
    margin = {n: np.array([r["margin"] for r in records(tmp_path / n)])[1:3] for n in ("rkl", "js", "matched")}
    assert np.allclose(margin["matched"], margin["rkl"], rtol=0.05)
    assert np.allclose(margin["js"], margin["rkl"] / 2, rtol=0.3)


def test_an_empty_rollout_is_survived_and_logged(command, small_run, tmp_path):
    code, out, err = command("train.py", *small_run, "--threshold", 0.99999, "--output_dir", tmp_path / "r")
    assert code == 0 and "no valid pair" in err
    assert [r["pairs"] for r in records(tmp_path / "r", "rollout")] == [0, 0] and records(tmp_path / "r") == []


def test_a_judge_without_a_finite_score_stops_the_run(command, small_run, tmp_path, monkeypatch):
    monkeypatch.setattr(toy.Taste, "__call__", lambda self, images, text=None, t=None: torch.full((len(images),), math.nan))
    code, _, err = command("train.py", *small_run, "--output_dir", tmp_path / "r")
    assert code == 2 and "none of the judge's scores is finite" in err.strip().splitlines()[-1]


@pytest.mark.parametrize("div", ("js", "fkl"))
def test_a_non_finite_loss_or_gradient_stops_with_step_timestep_and_ratio(command, small_run, tmp_path, div):
    code, _, err = command("train.py", *small_run, "--div", div, "--learning_rate", 1e30, "--clip", "none", "--output_dir", tmp_path / "r")
    assert code == 2
    last = err.strip().splitlines()[-1]
    assert "is not finite at optimiser step 2" in last and "timestep" in last and "X_w" in last
    assert all(v.isfinite().all() for v in weights(tmp_path / "r").values())  # the checkpoint before it is whole


@cuda
@pytest.mark.parametrize("precision", ("bf16", "fp16"))
def test_mixed_precision_on_cuda(command, small_run, tmp_path, precision):
    i = small_run.index("--device")
    code, _, err = command("train.py", *small_run[:i], *small_run[i + 2:], "--device", "cuda", "--mixed_precision", precision,
                           "--output_dir", tmp_path / "r")
    assert code == 0, err
    assert all(math.isfinite(r["loss"]) for r in records(tmp_path / "r"))


# ---- kills and resumption

# (signal, module, function, at which of its calls), each in a process that resumed where the one before it died
KILLS = [("KILL", "sample", "predict_noise", 11),   # in the first rollout
         ("TERM", "sample", "predict_noise", 10),   # the same, politely: saves and says how to go on
         ("KILL", "train", "step_log_ratios", 5),   # after a checkpoint, within the third optimiser step
         ("INT", "train", "step_log_ratios", 1),    # Ctrl-C in mid-rollout: its pairs are saved too
         ("KILL", "os", "fsync", 4),                # while state.pt is written: the LoRA file is newer than the state
         ("KILL", "os", "replace", 3),              # while the epoch's picture is written
         ("KILL", "train", "draw_curves", 1)]       # when training has ended


def go(argv, kill=None):
    return Child("train.py", *argv, kill=kill).wait()


def test_killed_anywhere_resume_ends_with_the_same_bits(small_run, tmp_path):
    """The same run killed seven times at seven kinds of moment, each time resumed: bit-identical LoRA and log."""
    base = small_run + ["--num_epochs", 2]
    assert go(base + ["--output_dir", tmp_path / "whole"])[0] == 0
    folder, died = tmp_path / "killed", []
    for i, kill in enumerate(KILLS):
        code, said = go(base + ["--output_dir", folder] + (["--resume"] if i else []), kill)
        died.append(code)
        if kill[0] != "KILL":
            assert code == 130 and "--resume --output_dir" in said, said
    assert died == [130 if k[0] != "KILL" else -signal.SIGKILL for k in KILLS]  # every one of them hit a living process
    code, said = go(["--resume", "--output_dir", folder])
    assert code == 0, said
    assert same(weights(folder), weights(tmp_path / "whole"))
    strip = lambda rs: [{k: v for k, v in r.items() if k not in ("seconds", "peak_gb")} for r in rs]
    for kind in ("step", "rollout", "table"):
        assert strip(records(folder, kind)) == strip(records(tmp_path / "whole", kind))


def test_a_run_may_be_made_longer(command, small_run, tmp_path):
    """Stopped by --max_train_steps in mid-rollout, resumed to its end, then given another epoch: one run."""
    command("train.py", *small_run, "--max_train_steps", 2, "--output_dir", tmp_path / "a")
    for flags in (["--max_train_steps", 0], ["--num_epochs", 2]):
        code, _, err = command("train.py", "--resume", *flags, "--output_dir", tmp_path / "a")
        assert code == 0, err
    command("train.py", *small_run, "--num_epochs", 2, "--output_dir", tmp_path / "b")
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))


def test_log_opens_in_pandas(command, small_run, tmp_path):
    """Every line is one flat JSON object of numbers, strings and nulls (the table's figures aside), and pandas has them as columns."""
    import pandas
    command("train.py", *small_run, "--max_train_steps", 1, "--output_dir", tmp_path / "r")
    steps, rolls = records(tmp_path / "r"), records(tmp_path / "r", "rollout")
    for r in steps + rolls:
        assert all(v is None or isinstance(v, (int, float, str)) for v in r.values())
    log = pandas.read_json(tmp_path / "r" / "metrics.jsonl", lines=True)
    assert log[log.kind == "step"].loss.tolist() == pytest.approx([s["loss"] for s in steps])
    assert log[log.kind == "rollout"].judge_final.tolist() == pytest.approx([r["judge_final"] for r in rolls])


def test_held_out_prompts_do_not_depend_on_the_seed_and_are_not_trained_on(small_run):
    split = lambda seed: train.split_prompts(train.parse([str(a) for a in small_run] + ["--seed", str(seed)])[0])
    assert split(0) == split(1)
    training, held = split(0)
    assert len(held) == 2 and len(training) == 6 and not set(training) & set(held)


def test_the_presets_of_help_are_those_in_force(command):
    code, out, _ = command("train.py", "--help", "--model", "toy")
    flat = " ".join(out.split())
    for k, v in toy.PRESET.items():
        assert f"(default: {v})" in flat.split(f"--{k} ")[-1][:200]
        assert getattr(train.parse(["--model", "toy"])[0], k) == v
    assert train.parse(["--model", "somewhere"])[0].learning_rate == 6e-5  # SPO's, for every other model


def test_a_finite_loss_with_a_broken_gradient_does_not_reach_the_weights(started):
    """Forward KL, no clamp, a ratio whose inverse overflows fp32: the loss saturates at 0, the gradient is NaN."""
    run, _, null, _, beta = started
    for k in ("x_w", "x_l"):
        getattr(run.pairs, k).mul_(300)
    run.args.clip, run.args.log_ratio = "none", "sum"
    for _, m in sample.lora_layers(run.pipe.unet):
        torch.nn.init.normal_(m.lora_B, std=1e-1)
    before = [p.clone() for p in run.params]
    with pytest.raises(FloatingPointError):
        train.optimiser_step(run.pipe, run.pairs, torch.arange(4), null, get_divergence("fkl"), beta, run.args, run.params, run.opt, run.scaler)
    assert all(torch.equal(a, b) for a, b in zip(before, run.params))


HUB = """import os, sys
sys.path[:0] = sys.argv[1:3]
import sample, train
import json
from parts import judges
with open(os.path.join(sys.argv[3], "CLIP-ViT-H-14-laion2B-s32B-b79K", "config.json")) as file:
    judges.StepAware.CONFIG = json.load(file)  # the one size that no file states
sys.argv = ["train.py", *sys.argv[4:]]
sample.run_cli(train.main)
"""


def test_the_readmes_sd15_command_from_a_hub_cache(micro, weights_dir, tmp_path):
    """Offline after the first download: SD1.5's own id, the step-aware judge and SPO's prompts, found where the hub's
    library and torch.hub keep what they downloaded; here small things of the same formats lie there."""
    def cached(repo, source, names=None):
        home = tmp_path / "hub" / ("models--" + repo.replace("/", "--"))
        (home / "refs").mkdir(parents=True)
        (home / "refs/main").write_text("a" * 40)
        if names is None:
            shutil.copytree(source, home / "snapshots" / ("a" * 40))
        else:
            (home / "snapshots" / ("a" * 40)).mkdir(parents=True)
            for n in names:
                shutil.copy(os.path.join(source, n), home / "snapshots" / ("a" * 40) / n)
    cached(sample.SD15, micro)
    cached(judges_clip.CLIP_H, os.path.join(weights_dir, "CLIP-ViT-H-14-laion2B-s32B-b79K"))
    cached(judges.StepAware.repo, os.path.join(weights_dir, "Step-Aware_Preference_Models"), [judges.StepAware.file])
    prompts = tmp_path / "4k.json"
    prompts.write_text(json.dumps([{"caption": c, "trainset_idx": i} for i, c in enumerate(toy.prompts()[:8])]))
    flags = ["--model", sample.SD15, "--prompts", prompts, "--max_train_steps", 1, "--sample_batch_size", 3, "--num_children", 2, "--first_step", 1,
             "--threshold", 0, "--num_inference_steps", 4, "--train_batch_size", 2, "--num_eval_prompts", 2, "--images_per_prompt", 1,
             "--device", "cpu", "--output_dir", tmp_path / "run"]
    env = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", HUB, ROOT, os.path.join(ROOT, "tests"), weights_dir, *map(str, flags)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert config["args"]["judge"] == "step_aware" and config["args"]["model"] == sample.SD15
    assert "step_aware (the judge)" in done.stdout and (tmp_path / "run" / sample.LORA_FILE).exists()


def test_preview_agreement_is_logged(command, small_run, tmp_path):
    from test_sample import tiny_decoder
    out = tmp_path / "r"
    code, _, err = command("train.py", *small_run, "--preview_decoder", tiny_decoder(tmp_path / "tiny"), "--max_train_steps", 1, "--output_dir", out)
    assert code == 0, err
    assert 0 <= records(out, "rollout")[0]["preview_agreement"] <= 1
    code, _, err = command("train.py", *small_run, "--preview_decoder", tmp_path / "nowhere", "--output_dir", tmp_path / "q")
    assert code == 2 and "such as madebyollin/taesd" in err and err.count("\n") == 1 and not (tmp_path / "q").exists()
