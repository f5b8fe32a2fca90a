"""Forks that work: what strangers change first, each by editing the text of a copy of the tree.

A divergence, another optimiser, a term of the loss with a statistic of its own, a judge. One copy
has all four, and one process of it starts all its commands: to import torch is what takes long.
"""

import json
import os
import shutil
import subprocess
import sys
import textwrap

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file

import divergences
from parts import judges
from parts.model import LORA_FILE
from toy import make

# a line of the form "[number of ranks, [script, flag, ...]]" -> [[exit code, output] of each rank]
SERVER = """
import json, multiprocessing, sys
sys.path.insert(0, "tests")
import child, conftest
# this process has imported everything and computed nothing: it can be forked as it is
child.server = multiprocessing.get_context("fork")
for line in sys.stdin:
    n, words = json.loads(line)
    ended = child.ranks(*words, n=n, change=conftest.paint_nothing)
    print(json.dumps(ended), flush=True)
"""


class Fork:
    """A copy of the tree, without what a run, git or Python left in it."""

    def __init__(self, root):
        self.root = root
        left_behind = shutil.ignore_patterns(".git", "out", "venv", ".venv", "__pycache__")
        shutil.copytree(ROOT, root, ignore=left_behind)
        outside = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        self.options = dict(cwd=root, env=outside | {"OMP_NUM_THREADS": "1"}, text=True)

    def edit(self, name, before, after):
        path = self.root / name
        text = path.read_text()
        assert text.count(before) == 1, f"{name} has no such place any more: {before}"
        path.write_text(text.replace(before, after))

    def serve(self):
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.server = subprocess.Popen([sys.executable, "-c", SERVER], **pipes, **self.options)

    def run(self, *words, n=1):
        """What the copy's command prints (rank 0), run as n ranks; it must succeed."""
        self.server.stdin.write(json.dumps([n, [str(word) for word in words]]) + "\n")
        self.server.stdin.flush()
        ended = json.loads(self.server.stdout.readline())
        assert [code for code, _ in ended] == [0] * n, "\n".join(output for _, output in ended)
        return ended[0][1]


def example(module, begin, end):
    """The code between two places of a module's docstring."""
    return textwrap.dedent(module.__doc__.split(begin)[1].split(end)[0])


@pytest.fixture(scope="module")
def fork(tmp_path_factory):
    fork = Fork(tmp_path_factory.mktemp("fork") / "tree")

    mixed = example(divergences, "knows it by its name:\n", "(reverse KL and")
    below_table = "NAMES = TABLE.keys()"
    fork.edit("divergences.py", below_table, mixed + below_table)

    adamw = "opt = torch.optim.AdamW(policy.parameters, args.learning_rate, weight_decay=decay, "
    adamw += "fused=fused)"
    nadam = "opt = torch.optim.NAdam(policy.parameters, args.learning_rate)"
    fork.edit("train.py", adamw, nadam)

    # what stands next below alignment_loss in train()
    below_loss = " " * 20 + "# the mean over a full group"
    term = """
    batch_stats["u_squared"] = (u_w**2 + u_l**2).detach()
    loss = loss + 0.01 * (u_w**2 + u_l**2).mean()
    """
    term = textwrap.indent(textwrap.dedent(term).lstrip(), " " * 20)
    fork.edit("train.py", below_loss, term + below_loss)

    bright = example(judges, "Your own judge is a class, here\n", "and a line in JUDGES")
    fork.edit("parts/judges.py", "JUDGES = {\n", bright + 'JUDGES = {\n    "bright": Bright,\n')

    fork.serve()
    yield fork
    fork.server.communicate()  # closes its stdin, and so ends it


def steps_of(folder):
    with open(folder / "metrics.jsonl") as file:
        return [record for record in map(json.loads, file) if record["kind"] == "step"]


def test_a_divergence(fork, small_run, tmp_path):
    """The maths' own tests pass with one row more, and train.py knows it."""
    files = [f"tests/test_{name}.py" for name in ("divergences", "loss", "landscape")]
    chosen = ["-k", "(mixed or names or statement or curvature) and not random_search"]
    pytest_ = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    ended = subprocess.run([*pytest_, *chosen, *files], capture_output=True, **fork.options)
    assert ended.returncode == 0, ended.stdout

    flags = ["--div", "mixed", "--max_train_steps", 2, "--output_dir", tmp_path / "run"]
    printed = fork.run("train.py", *small_run, *flags)
    assert "divergence: mixed, f''(1) = 1.1, " in printed
    assert len(steps_of(tmp_path / "run")) == 2


def test_another_optimiser(fork, small_run, tmp_path):
    """NAdam's state has other entries than AdamW's: a resumed run ends with the same bits."""
    through, stopped = tmp_path / "through", tmp_path / "stopped"
    fork.run("train.py", *small_run, "--output_dir", through)
    # in the second rollout, which is then replayed from the state before it
    fork.run("train.py", *small_run, "--max_train_steps", 4, "--output_dir", stopped)
    printed = fork.run("train.py", "--resume", "--max_train_steps", 0, "--output_dir", stopped)
    assert "resumed at optimiser step 3, chunk 2" in printed
    state = torch.load(stopped / "state.pt", weights_only=True)
    assert "mu_product" in state["optimizer"]["state"][0]
    expected, lora = load_file(through / LORA_FILE), load_file(stopped / LORA_FILE)
    assert lora.keys() == expected.keys()
    assert all(torch.equal(lora[name], expected[name]) for name in lora)


def test_a_loss_term_with_a_statistic(fork, micro, tmp_path):
    """One rank with two pairs a step, and two ranks with one each: the same pairs and means."""
    make.write_pairs(str(tmp_path / "pairs"), 12, 0)
    flags = ["--model", micro, "--pairs", tmp_path / "pairs", "--cache_dir", tmp_path / "cache"]
    flags += ["--num_inference_steps", 2, "--images_per_prompt", 1, "--num_eval_prompts", 1]
    flags += [
        "--train_batch_size",
        1,
        "--learning_rate",
        1e-2,
        "--num_epochs",
        1,
        "--device",
        "cpu",
    ]
    logs = []
    for n in (1, 2):
        folder = tmp_path / f"{n} ranks"
        same_steps = ["--gradient_accumulation_steps", 2 // n, "--output_dir", folder]
        fork.run("train.py", *flags, *same_steps, n=n)
        logs.append(steps_of(folder))
    assert [step["pairs"] for step in logs[0]] == [2, 2, 2, 2, 2, 1]
    one, two = ([step["u_squared"] for step in steps] for steps in logs)
    assert one[0] == 0 and min(one[1:]) > 0  # the policy begins as the reference
    assert two == pytest.approx(one, rel=1e-6, abs=0)
    last = logs[0][-1]  # a single pair, of rank 0: the mean of its square is its square
    squares = last["log_X_w"] ** 2 + last["log_X_l"] ** 2
    assert last["u_squared"] == pytest.approx(squares, rel=1e-6)


def test_a_judge(fork, small_run, tmp_path):
    """It chooses the pairs, stands in the run's table, and has a column in Table 2."""
    run, home = tmp_path / "run", tmp_path / "evaluation"
    flags = ["--judge", "bright", "--max_train_steps", 2, "--output_dir", run]
    fork.run("train.py", *small_run, *flags)
    assert len(steps_of(run)) == 2
    assert "| bright |" in (run / "table.md").read_text()
    flags = ["--judges", "bright", "--metrics", "none", "--images_per_prompt", 1]
    fork.run("evaluate.py", run, *flags, "--device", "cpu", "--output_dir", home)
    head, _, original, aligned = (home / "table2.md").read_text().splitlines()[:4]
    assert head.startswith("| model | bright ↑ |")
    for line in (original, aligned):
        score = float(line.split("|")[2].strip(" *").split(" ")[0])
        assert 0 < score < 10
