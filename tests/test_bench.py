"""The benches: what they compare is the same, their statistics are right. No time is asserted."""

import functools
import itertools
import sys
import types
from unittest import mock

import bench
import numpy as np
import pytest
import random_models
import real_size
import timing
import torch
from test_fast import tiny_decoder

from divergences import TABLE
from parts import diversity
from parts.judges_clip import StepAware
from parts.model import load_pipeline


@pytest.fixture(autouse=True)
def short_rollouts(monkeypatch):
    """Six denoising steps in place of 20: the children of two of them are judged."""
    short = functools.partial(bench.collect_pairs, num_steps=6)
    monkeypatch.setattr(bench, "collect_pairs", short)


def run(capsys, *argv):
    """What `python tests/bench.py ...` prints."""
    with mock.patch.object(sys, "argv", ["bench.py", "--device", "cpu", *map(str, argv)]):
        bench.main()
    return capsys.readouterr().out


def test_paired_ratio_against_numpy():
    rng = np.random.default_rng(0)
    for rounds in (1, 2, 5, 8):
        slow, fast = rng.uniform(1, 2, (2, rounds))
        wanted = np.quantile(slow / fast, [0.5, 0.25, 0.75])
        assert timing.paired_ratio(list(slow), list(fast)) == pytest.approx(list(wanted), rel=1e-12)


def test_a_slow_while_does_not_show_in_a_paired_ratio():
    slow_while = np.array([1, 1, 9, 7, 1])  # of the machine: both ways of the round suffer
    ratio = timing.paired_ratio(list(3 * slow_while), list(2 * slow_while))
    assert ratio == pytest.approx([1.5, 1.5, 1.5])


def test_every_round_runs_every_way_and_begins_with_another():
    calls = []
    ways = {name: lambda number, name=name: calls.append((number, name)) for name in "abc"}
    timing.in_rounds(ways, 4)
    rounds = [calls[i : i + 3] for i in range(0, 12, 3)]
    assert [sorted(each) for each in rounds] == [[(r, n) for n in "abc"] for r in range(4)]
    assert "".join(each[0][1] for each in rounds) == "abca"


def test_training_step_has_the_gradients_of_the_reference_way(capsys, micro):
    out = run(capsys, "--model", micro, "--repeats", 2, "--prompts", 2, "--pairs", 3)
    difference = float(out.split("gradients differ by ")[1])
    assert 0 < difference < 1e-4
    assert "| reference-like | 8 |" in out and "3 pairs a step, 2 rounds" in out


def test_loop_prints_each_part_and_its_ratio(capsys, micro, tmp_path):
    tiny = tiny_decoder(tmp_path)
    flags = ["--loop", "--repeats", 1, "--prompts", 1, "--preview", tiny]
    out = run(capsys, "--model", micro, *flags)
    assert "2 pairs a prompt, 1 rounds" in out  # every candidate, whatever the judge says
    assert out.count("| UNet | decode | judge | training | all |") == 2
    ours = [line for line in out.splitlines() if line.startswith("| ours |")]
    assert len(ours) == 2 and ours[1].count(" to ") == 5 and out.count("| ours, previewed |") == 2


def test_both_ways_of_the_loop_train_alike(micro):
    """The same pairs of the same rollout, and the gradient of the reference's way."""
    opts = types.SimpleNamespace(model=micro, device="cpu", pairs=2, prompts=2, preview=None)
    gradients = {}
    for name in (bench.THEIRS, bench.OURS):
        way = bench.Way(name, opts)
        torch.manual_seed(0)
        for lora_B in way.policy.parameters[1::2]:
            torch.nn.init.normal_(lora_B, std=1e-2)
        way.optimizer.zero_grad = lambda: None  # leave the gradients to be read
        way.run(bench.some_prompts(2))
        gradients[name] = torch.cat([p.grad.flatten() for p in way.policy.parameters])
    ours, theirs = gradients[bench.OURS], gradients[bench.THEIRS]
    assert (ours - theirs).norm() < 1e-4 * theirs.norm()


def test_same_order_against_the_definition():
    a, b = torch.randn(2, 3, 5, 4, generator=torch.Generator().manual_seed(0))
    alike, clear = bench.same_order(a, b), bench.clear_difference(a)
    for s, p in itertools.product(range(3), range(5)):
        for n, (i, j) in enumerate(itertools.combinations(range(4), 2)):
            assert alike[s, p, n] == ((a[s, p, i] > a[s, p, j]) == (b[s, p, i] > b[s, p, j]))
            probabilities = torch.softmax(a[s, p, [i, j]], 0)
            assert clear[s, p, n] == ((probabilities[0] - probabilities[1]).abs() > 0.3)


def test_preview_orders_as_the_vae_if_it_is_the_vae(capsys, monkeypatch):
    monkeypatch.setattr(bench, "load_preview", lambda where, pipe: pipe.vae)
    out = run(capsys, "--preview", "itself", "--repeats", 1, "--prompts", 2)
    assert "| all | 24 | 1.000 |" in out  # 2 steps x 2 prompts x 6 pairs


def test_preview_with_a_random_decoder(capsys, tmp_path):
    from diffusers import AutoencoderTiny

    torch.manual_seed(0)
    sizes = dict(encoder_block_out_channels=(8,) * 3, decoder_block_out_channels=(8,) * 3)
    blocks = dict(num_encoder_blocks=(1,) * 3, num_decoder_blocks=(1,) * 3)
    AutoencoderTiny(**sizes, **blocks, latent_channels=4).save_pretrained(tmp_path)
    out = run(capsys, "--preview", tmp_path, "--repeats", 2, "--prompts", 2)
    alike = float(out.split("| all | 48 | ")[1].split(" |")[0])
    assert 0 < alike < 1 and "of the VAE's time" in out


def test_memory_grows_with_the_pairs_and_shrinks_with_checkpoints():
    one, two = random_models.held_gb(1, False), random_models.held_gb(2, False)
    assert two == pytest.approx(2 * one, rel=0.02)
    assert random_models.held_gb(1, True) < one / 3


def test_optimum(capsys):
    bench.bench_optimum(rounds=2, count=1000)
    assert capsys.readouterr().out.count("longest") == len(TABLE)


def test_fsim_beside_a_package(capsys, monkeypatch):
    package = types.ModuleType("image_similarity_measures.quality_metrics")
    package.fsim = diversity.fsim
    monkeypatch.setitem(sys.modules, "image_similarity_measures", types.ModuleType("package"))
    monkeypatch.setitem(sys.modules, package.__name__, package)
    bench.bench_fsim(rounds=2, count=3, size=48)
    assert "differ by 0e+00" in capsys.readouterr().out
    package.fsim = lambda a, b: diversity.fsim(a, b) + 1e-6
    with pytest.raises(ValueError, match="the values differ by 1.0e-06"):
        bench.bench_fsim(rounds=1, count=3, size=48)


def test_real_size_at_a_tiny_size(capsys, command, micro, tmp_path, monkeypatch):
    """Random models saved, train.py on them, its LoRA in plain diffusers, its log summed up."""
    monkeypatch.setattr(StepAware, "CONFIG", random_models.SMALL_JUDGE)

    def make(device, dtype):
        return load_pipeline(micro, device, dtype)

    def in_this_process(words):
        code, _, err = command(*words)
        assert code == 0, err

    monkeypatch.setattr(real_size, "run_script", in_this_process)
    real_size.measure(str(tmp_path.absolute()), random_models.SMALL_JUDGE, make)
    out = capsys.readouterr().out
    assert "| train.py in all, its peak memory " in out and "| 1 optimiser step(s) |" in out
    assert "LoRA of 112 tensors opened in plain diffusers: 56 layers" in out
    out = run(capsys, "--summary", tmp_path / "run")
    assert ", no: 1 optimiser steps (0 skipped)" in out and "loss 0.6931" in out
