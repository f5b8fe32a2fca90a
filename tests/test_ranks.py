"""Several ranks on the CPU (gloo): the same gradient as one rank, uneven and empty ranks, a rank that is killed."""
import json
import os
import signal
import subprocess
import sys
import time
import zlib

import pytest
import torch
from safetensors.torch import load_file

import sample
from toy import world as toy
import train
from child import Child, ranks
from conftest import ROOT
from sample import LORA_FILE


def log(folder, kind):
    try:
        with open(os.path.join(folder, "metrics.jsonl")) as f:
            return [r for r in map(json.loads, f.read().split("\n")[:-1]) if r["kind"] == kind]
    except OSError:
        return []


def collect(pipe, judge, prompts, generator, *_, progress, **__):
    """Pairs that depend on their prompt alone, from none to five of it, in the prompts' order: what one rank with all prompts
    and two ranks with half of them each must agree on."""
    shape, rows = sample.latent_shape(pipe), []
    for i, prompt in enumerate(prompts):
        crc = zlib.crc32(prompt.encode())
        g = torch.Generator().manual_seed(crc)
        rows += [(*torch.randn(3, *shape, generator=g), int(torch.randint(1, 900, (), generator=g)), i) for _ in range((0, 5, 1, 2)[crc % 4])]
    for _ in range(4):
        progress()
    stack = lambda k: torch.stack([r[k] for r in rows]) if rows else torch.empty(0, *shape)
    index = lambda k: torch.tensor([r[k] for r in rows], dtype=torch.int64)
    return sample.Pairs(stack(0), stack(1), stack(2), index(3), index(4), sample.encode_prompts(pipe, prompts),
                        dict(mean=float(len(rows)), std=1.0, final=0.0), 4 * len(prompts))


def predict(unet, x, t, text, null, guidance):
    """sample.predict_noise without its cast to fp32."""
    if guidance <= 1:
        return unet(x.double(), t, text).sample
    a, b = unet(torch.cat([x, x]).double(), torch.cat([t, t]), torch.cat([null.expand_as(text), text])).sample.chunk(2)
    return a + guidance * (b - a)


def in_double():
    """Known pairs, and float64: Adam's first steps are lr * sign(g), however small g is, and make 1e-6 of weight out of fp32's
    rounding."""
    def load(*args):
        pipe = sample.load_pipeline(*args)
        pipe.unet.double(), pipe.text_encoder.double()
        return pipe
    def lora(unet, rank):
        params = sample.add_lora(unet, rank)
        for p in params:
            p.data = p.data.double()
        return params
    train.collect_pairs, train.load_pipeline, train.add_lora, train.predict_noise = collect, load, lora, predict


def test_two_ranks_are_one_rank_with_the_union_of_their_pairs(small_run, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(toy.prompts()[::9][:9]))
    common = small_run + ["--prompts", prompts, "--num_eval_prompts", 2, "--num_epochs", 2, "--learning_rate", 1e-4]  # 7 to train
    one, two = tmp_path / "one", tmp_path / "two"
    for code, out in (Child("train.py", *common, "--sample_batch_size", 6, "--output_dir", one, change=in_double).wait(),
                      *ranks("train.py", *common, "--sample_batch_size", 3, "--gradient_accumulation_steps", 1, "--output_dir", two, change=in_double)):
        assert code == 0, out
    rolls, steps = log(two, "rollout"), log(two, "step")
    assert len(rolls) == 4 and len(steps) > 4                   # an epoch's second rollout has one prompt: rank 1 has none
    assert any(s["pairs"] % 2 for s in steps), "no step in which the ranks' shares differ"
    assert [(r["pairs"], r["judge_mean"] > 0) for r in rolls if r["pairs"]] == [(r["pairs"], True) for r in log(one, "rollout") if r["pairs"]]
    for a, b in zip(log(one, "step"), steps, strict=True):
        for key in ("loss", "margin", "X_w", "X_l_q2", "grad_norm", "pairs"):
            assert a[key] == b[key] or a[key] == pytest.approx(b[key], rel=1e-5, abs=1e-9), key  # no pair of a quarter: None
    a, b, start = (load_file(os.path.join(f, LORA_FILE)) for f in (one, two, one))
    gap = max((a[k] - b[k]).abs().max().item() for k in a)
    moved = max(v.abs().max().item() for k, v in start.items() if "lora_B" in k)
    print("largest difference", gap, "after a walk of", moved)
    assert moved > 1e-4 and gap < 1e-6


def workers(job):
    """Process ids of torchrun's children, by rank."""
    with open(f"/proc/{job.pid}/task/{job.pid}/children") as f:
        children = f.read().split()
    found = {}
    for pid in children:
        with open(f"/proc/{pid}/environ", "rb") as f:
            entries = dict(e.split(b"=", 1) for e in f.read().split(b"\0") if b"=" in e)
        if b"RANK" in entries:
            found[int(entries[b"RANK"])] = int(pid)
    return found


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="finds the ranks in /proc")
def test_a_killed_rank_ends_the_job_and_one_rank_goes_on(command, small_run, tmp_path):
    folder = tmp_path / "run"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    job = subprocess.Popen([*torchrun, "train.py", *map(str, small_run), "--num_epochs", "200", "--output_dir", str(folder)], cwd=ROOT, text=True,
                           env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    deadline = time.time() + 120
    while len(log(folder, "step")) < 4 and job.poll() is None and time.time() < deadline:
        time.sleep(0.05)
    assert job.poll() is None, job.communicate()[0]
    os.kill(workers(job)[1], signal.SIGKILL)
    out, _ = job.communicate(timeout=90)
    assert job.returncode != 0 and "lost the other ranks" in out and "--resume goes on" in out, out
    state = torch.load(folder / "state.pt", weights_only=True)
    step = state["step"]
    assert step >= 2 and state["policy"].keys() == load_file(folder / LORA_FILE).keys()
    code, out, err = command("train.py", "--resume", "--output_dir", folder, "--max_train_steps", step + 3, "--model", small_run[1])
    assert code == 0 and f"resumed at optimiser step {step}" in out, err
    assert [r["step"] for r in log(folder, "step")] == list(range(1, step + 4))


def test_bad_input_is_said_once(tmp_path, small_run):
    said = ranks("train.py", *small_run, "--beta", -1, "--output_dir", tmp_path / "run")
    assert said == [(2, "train.py: --beta must be positive, got -1.0\n"), (2, "")] and not (tmp_path / "run").exists()
