"""Several ranks on the CPU (gloo): one rank's gradient, uneven and empty ranks, a dead rank."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import zlib

import pytest
import torch
from child import Child, free_port, ranks
from conftest import PROMPTS, ROOT, paint_nothing
from safetensors.torch import load_file

import sample
import train
from parts import model
from parts.model import LORA_FILE


def log(folder, kind):
    try:
        with open(os.path.join(folder, "metrics.jsonl")) as file:
            lines = file.read().split("\n")[:-1]
    except OSError:
        return []
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def collect(pipe, judge, prompts, generator, progress, **settings):
    """Pairs that depend on their prompt alone, from none to five of it, in the prompts' order.

    What one rank with all prompts and two ranks with half of them each must agree on.
    """
    shape, rows, t, prompt = model.latent_shape(pipe), [], [], []
    for i, words in enumerate(prompts):
        seed = zlib.crc32(words.encode())
        g = torch.Generator().manual_seed(seed)
        for _ in range((0, 5, 1, 2)[seed % 4]):
            rows.append(torch.randn(3, *shape, generator=g, dtype=torch.float64))
            t.append(int(torch.randint(1, 900, (), generator=g)))
            prompt.append(i)
    x_t, x_w, x_l = torch.stack(rows).unbind(1) if rows else torch.zeros(3, 0, *shape).double()
    text, null = (model.encode_prompts(pipe, words) for words in (prompts, [""]))
    scores = torch.arange(len(prompts)).float().expand(3, 2, -1).mT  # (S, P, K)
    sampler = 5.0, pipe.scheduler.alphas_cumprod, 4, 1.0
    index = torch.tensor(t, dtype=torch.int64), torch.tensor(prompt, dtype=torch.int64)
    return sample.Pairs(x_t, x_w, x_l, *index, text, scores, null, *sampler)


def in_double():
    """Known pairs, and float64: Adam's first steps are lr * sign(g), however small g is, and make
    1e-6 of weight out of fp32's rounding."""

    def load(*args):
        pipe = model.load_pipeline(*args)
        pipe.unet.double()
        pipe.text_encoder.double()
        pipe.scheduler.alphas_cumprod = pipe.scheduler.alphas_cumprod.double()
        return pipe

    class DoublePolicy(model.Policy):
        def __init__(self, *args):
            super().__init__(*args)
            for parameter in self.parameters:
                parameter.data = parameter.data.double()

    train.collect_pairs, train.load_pipeline, train.Policy = collect, load, DoublePolicy
    paint_nothing()


def test_two_ranks_are_one_rank_with_the_union_of_their_pairs(small_run, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS[::9][:9]))  # 7 to train on
    common = [*small_run, "--prompts", prompts, "--num_eval_prompts", 2, "--num_epochs", 2]
    common += ["--learning_rate", 1e-4]
    one, two = tmp_path / "one", tmp_path / "two"
    alone = ["--sample_batch_size", 6, "--output_dir", one]
    shared = ["--sample_batch_size", 3, "--gradient_accumulation_steps", 1, "--output_dir", two]
    ended = [Child("train.py", *common, *alone, change=in_double).wait()]
    ended += ranks("train.py", *common, *shared, change=in_double)
    for code, out in ended:
        assert code == 0, out
    rollouts, steps = log(two, "rollout"), log(two, "step")
    assert len(rollouts) == 4 and len(steps) > 4  # each epoch's second has no prompt for rank 1
    assert any(s["pairs"] % 2 for s in steps), "no step in which the ranks' shares differ"
    for a, b in zip(log(one, "rollout"), rollouts, strict=True):
        for key in ("pairs", "valid"):
            assert a[key] == b[key], key
    for a, b in zip(log(one, "step"), steps, strict=True):
        for key in ("loss", "margin", "X_w", "X_l_q2", "grad_norm", "pairs"):
            # None: no pair of that quarter
            assert a[key] == b[key] or a[key] == pytest.approx(b[key], rel=1e-9, abs=1e-12), key
    a, b = (load_file(os.path.join(folder, LORA_FILE)) for folder in (one, two))
    gap = max((a[k] - b[k]).abs().max().item() for k in a)
    moved = max(v.abs().max().item() for k, v in a.items() if "lora_B" in k)
    print("largest difference", gap, "after a walk of", moved)
    assert moved > 1e-4 and gap < 1e-12


def workers(job):
    """Process ids of torchrun's children, by rank."""
    with open(f"/proc/{job.pid}/task/{job.pid}/children") as file:
        children = file.read().split()
    found = {}
    for pid in children:
        with open(f"/proc/{pid}/environ", "rb") as file:
            words = file.read().split(b"\0")
        environment = dict(word.split(b"=", 1) for word in words if b"=" in word)
        if b"RANK" in environment:
            found[int(environment[b"RANK"])] = int(pid)
    return found


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="finds the ranks in /proc")
def test_two_machines_and_one_that_dies(command, small_run, unpainted, tmp_path):
    """Two launchers, a rank each, are one launcher's two ranks; if one dies, the other alone can
    go on."""
    folder, again = tmp_path / "run", tmp_path / "again"
    place = "--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d", "--rdzv_endpoint"
    port = free_port()
    words = (*place, f"127.0.0.1:{port}", *long_run(small_run, folder))
    here = torchrun(*words)
    while socket.socket().connect_ex(("127.0.0.1", port)):  # until it holds the meeting place
        time.sleep(0.05)
    there = torchrun(*words)
    wait_for_steps(folder, here)
    for pid in (*workers(there).values(), there.pid):
        os.kill(pid, signal.SIGKILL)
    there.communicate()
    out, _ = here.communicate()
    assert here.returncode != 0 and "lost the other ranks" in out and "--resume goes on" in out, out

    step, _, _ = torch.load(folder / "state.pt", weights_only=True)["position"]
    ended = ranks("train.py", *long_run(small_run, again)[1:], "--max_train_steps", step)
    assert [code for code, _ in ended] == [0, 0], ended
    one, two = (load_file(path / LORA_FILE) for path in (again, folder))
    assert step > 0 and all(torch.equal(two[name], tensor) for name, tensor in one.items())
    more = ["--resume", "--output_dir", folder, "--max_train_steps", step + 3]
    code, out, err = command("train.py", *more)
    assert code == 0 and f"resumed at optimiser step {step}" in out, err
    assert [r["step"] for r in log(folder, "step")] == list(range(1, step + 4))


def long_run(small_run, folder):
    return ["train.py", *small_run, "--num_epochs", 200, "--output_dir", folder]


def torchrun(*words):
    words = [sys.executable, "-m", "torch.distributed.run", *map(str, words)]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(words, env=environment, **pipes)


def wait_for_steps(folder, job):
    while len(log(folder, "step")) < 4 and job.poll() is None:
        time.sleep(0.05)
    assert job.poll() is None, job.communicate()[0]


def test_a_rank_that_lost_the_others_says_so(tmp_path, small_run):
    kill = "KILL", "sample", "step_log_ratios", 3
    flags = ["--num_epochs", 3, "--output_dir", tmp_path / "run"]
    ended = ranks("train.py", *small_run, *flags, kill=kill, change=paint_nothing)
    (code, printed), (killed, _) = ended
    assert killed == -signal.SIGKILL and code == 2
    last = printed.strip().splitlines()[-1]
    assert "lost the other ranks" in last and "--resume goes on" in last


def test_bad_input_is_said_once(tmp_path, small_run):
    printed = ranks("train.py", *small_run, "--beta", -1, "--output_dir", tmp_path / "run")
    assert printed == [(2, "train.py: --beta must lie in (0, inf), got -1.0\n"), (2, "")]
    assert not (tmp_path / "run").exists()
