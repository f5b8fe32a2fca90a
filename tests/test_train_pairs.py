"""train.py --pairs from end to end: whole runs, LoRA or --full, kills, ranks, what it refuses."""

import csv
import json
import os
import shutil
import signal

import numpy as np
import pytest
import torch
from child import Child, ranks
from conftest import paint_nothing
from PIL import Image
from safetensors.torch import load_file
from test_ranks import log

from divergences import NAMES
from parts import pairs
from parts.model import LORA_FILE, UNET_FILE, load_pipeline, load_policy
from toy import make

FULL_FILE = os.path.join("unet", UNET_FILE)


@pytest.fixture(scope="module")
def pair_folder(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("sets") / "twelve")
    make.write_pairs(folder, 12, 0)
    return folder


@pytest.fixture
def pair_run(micro, pair_folder, tmp_path):
    """pair_run(folder of pairs): flags of a run of some seconds, 4 pairs a step."""

    def flags(folder=pair_folder):
        words = ["--model", micro, "--pairs", folder, "--cache_dir", tmp_path / "cache"]
        words += ["--judge", "taste", "--num_epochs", 1, "--num_inference_steps", 4]
        words += ["--train_batch_size", 2, "--gradient_accumulation_steps", 2]
        words += ["--learning_rate", 1e-3, "--rank", 2, "--num_eval_prompts", 2]
        return words + ["--images_per_prompt", 2, "--device", "cpu"]

    return flags


def captions_of(folder):
    with open(os.path.join(folder, "pairs.csv"), newline="") as file:
        return [row["prompt"] for row in csv.DictReader(file)]


def weights(folder, name=LORA_FILE):
    return load_file(os.path.join(folder, name))


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def without_times(records):
    return [{name: v for name, v in record.items() if name != "seconds"} for record in records]


# --------------------------------------------------------------------------------------------------
# Whole runs

FLAGS = [["--div", n] + (["--alpha", "0.4"] if n == "alpha" else []) for n in NAMES]
FLAGS += [["--full"], ["--full", "--gradient_checkpointing"], ["--mixed_precision", "bf16"]]
FLAGS += [["--full", "--mixed_precision", precision] for precision in ("bf16", "fp16")]
FLAGS += [["--log_ratio", "sum", "--beta", "0.02"], ["--clip", "ratio"], ["--judge", "none"]]


@pytest.mark.parametrize("flags", FLAGS, ids=" ".join)
def test_a_run(command, pair_run, unpainted, tmp_path, flags):
    folder = tmp_path / "r"
    code, _, err = command("train.py", *pair_run(), *flags, "--output_dir", folder)
    assert code == 0, err
    steps = log(folder, "step")
    assert abs(steps[0]["loss"] - np.log(2)) < 1e-4 and steps[0]["accuracy"] == 0.5
    assert np.isfinite([step["loss"] for step in steps]).all()
    # 12 pairs, of which 2 have held-out captions
    assert [step["pairs"] for step in steps] == [4, 4, 2] and log(folder, "rollout") == []
    file = FULL_FILE if "--full" in flags else LORA_FILE
    assert all(tensor.isfinite().all() for tensor in weights(folder, file).values())
    assert ("taste" in (folder / "table.md").read_text()) == ("none" not in flags)


@pytest.mark.parametrize("flags", ([], ["--full"]), ids=("lora", "full"))
def test_what_a_run_leaves(command, pair_run, tmp_path, flags):
    folder = tmp_path / "r"
    code, _, err = command("train.py", *pair_run(), *flags, "--output_dir", folder)
    assert code == 0, err
    expected = {"config.json", "metrics.jsonl", "samples", "state.pt", "curves.png", "table.md"}
    expected |= {"lock", "evolution.gif"}
    expected |= {"unet"} if flags else {LORA_FILE, "kohya.safetensors"}
    assert set(os.listdir(folder)) == expected
    assert sorted(os.listdir(folder / "samples")) == ["epoch_000.png", "epoch_001.png"]


def test_own_prompts_for_the_table(command, pair_run, unpainted, pair_folder, tmp_path):
    known, own = captions_of(pair_folder)[0], tmp_path / "p.txt"
    own.write_text(f"a moon over my house\n{known}\n")
    flags = ["--prompts", own, "--max_train_steps", 1, "--output_dir", tmp_path / "r"]
    code, out, err = command("train.py", *pair_run(), *flags)
    assert code == 0 and "11 pairs to train on" in out, err
    config = json.loads((tmp_path / "r" / "config.json").read_text())
    assert config["held_out"] == ["a moon over my house", known]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("precision", ("bf16", "fp16"))
@pytest.mark.parametrize("flags", ([], ["--full", "--gradient_checkpointing"]))
def test_a_run_on_cuda(command, pair_run, tmp_path, precision, flags):
    folder = tmp_path / "r"
    flags = [*flags, "--device", "cuda", "--mixed_precision", precision, "--output_dir", folder]
    code, _, err = command("train.py", *pair_run(), *flags)
    losses = [step["loss"] for step in log(folder, "step")]
    assert code == 0 and abs(losses[0] - np.log(2)) < 1e-4 and np.isfinite(losses).all(), err


# --------------------------------------------------------------------------------------------------
# --full


@pytest.fixture
def full_run(command, pair_run, unpainted, tmp_path):
    folder = tmp_path / "r"
    flags = ["--full", "--learning_rate", 1e-2, "--output_dir", folder]
    code, _, err = command("train.py", *pair_run(), *flags)
    assert code == 0, err
    return folder


def test_full_training_leaves_a_unet_that_opens_in_diffusers(full_run, micro):
    from diffusers import UNet2DConditionModel

    aligned = UNet2DConditionModel.from_pretrained(full_run / "unet")
    original = UNet2DConditionModel.from_pretrained(micro, subfolder="unet")
    both = zip(aligned.state_dict().values(), original.state_dict().values(), strict=True)
    assert sum(not torch.equal(a, b) for a, b in both) > 100
    pipe = load_pipeline(micro)
    policy = load_policy(pipe.unet, full_run)
    where = torch.randn(1, 4, 12, 12), torch.tensor([300]), torch.randn(1, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(pipe.unet(*where).sample, aligned(*where).sample)
        with policy.reference():
            torch.testing.assert_close(pipe.unet(*where).sample, original(*where).sample)
    for name in ("unet", FULL_FILE):
        again = load_pipeline(micro)
        load_policy(again.unet, str(full_run / name))
        assert same(again.unet.state_dict(), aligned.state_dict())


def test_full_training_is_painted_and_measured(command, full_run, micro, tmp_path):
    """sample.py paints it, evaluate.py measures it against its original."""
    common = ["--num_inference_steps", 4, "--device", "cpu", "--output_dir"]
    for name, policy in (("aligned", ["--lora", full_run]), ("plain", [])):
        words = "a sun", "--model", micro, *policy, "--seeds", 0
        code, _, err = command("sample.py", *words, *common, tmp_path / name)
        assert code == 0, err
    pictures = [Image.open(tmp_path / f / "000_seed0.png") for f in ("aligned", "plain")]
    assert (np.array(pictures[0]) != np.array(pictures[1])).any()
    words = full_run, "--images_per_prompt", 2, "--judges", "taste", "--metrics", "rmse"
    code, out, err = command("evaluate.py", *words, *common, tmp_path / "e")
    assert code == 0 and "| r |" in out and "| micro (original) |" in out, err


# --------------------------------------------------------------------------------------------------
# Kills and resumption


def a_step_a_chunk():
    """In the child: a state after every optimiser step."""
    pairs.STEPS_A_CHUNK = 1


# (signal, module, function, at which of its calls), each in a process that went on where the one
# before it died
KILLS = [
    ("KILL", "parts.pairs", "to_model", 7),  # while images are encoded
    ("KILL", "parts.pairs", "noise_log_ratio", 4),  # in the second chunk
    ("INT", "parts.pairs", "noise_log_ratio", 2),  # Ctrl-C
    ("KILL", "os", "fsync", 3),  # while a state is written
    ("KILL", "parts.common", "labelled_grid", 1),  # while an epoch's picture is made
]


@pytest.mark.parametrize("flags", ([], ["--full"]), ids=("lora", "full"))
def test_killed_anywhere_resume_ends_with_the_same_bits(pair_run, tmp_path, flags):
    whole, folder = tmp_path / "whole", tmp_path / "killed"
    flags = [*pair_run(), *flags, "--checkpointing_chunks", 1, "--output_dir"]
    change = dict(change=a_step_a_chunk)
    code, printed = Child("train.py", *flags, whole, **change).wait()
    assert code == 0, printed
    shutil.rmtree(tmp_path / "cache")
    for kill in KILLS:
        resume = ["--resume"] if (folder / "config.json").exists() else []
        code, printed = Child("train.py", *flags, folder, *resume, kill=kill, **change).wait()
        expected = 130 if kill[0] == "INT" else -getattr(signal, f"SIG{kill[0]}")
        assert code == expected, (kill, printed)
    code, printed = Child("train.py", "--resume", "--output_dir", folder, **change).wait()
    assert code == 0, printed
    name = FULL_FILE if "--full" in flags else LORA_FILE
    assert same(weights(folder, name), weights(whole, name))
    for kind in ("step", "table"):
        assert without_times(log(folder, kind)) == without_times(log(whole, kind))
    assert sorted(os.listdir(folder / "samples")) == sorted(os.listdir(whole / "samples"))


def test_a_run_stopped_in_mid_chunk_goes_on(command, pair_run, unpainted, tmp_path):
    """--max_train_steps writes the weights; the chunk is replayed to the same bits."""
    command("train.py", *pair_run(), "--output_dir", tmp_path / "whole")
    stopped = ["--max_train_steps", 2, "--output_dir", tmp_path / "r"]
    command("train.py", *pair_run(), *stopped)
    assert [step["step"] for step in log(tmp_path / "r", "step")] == [1, 2]
    again = ["--resume", "--max_train_steps", 0, "--output_dir", tmp_path / "r"]
    code, _, err = command("train.py", *again)
    assert code == 0, err
    assert same(weights(tmp_path / "r"), weights(tmp_path / "whole"))
    steps, expected = (log(tmp_path / name, "step") for name in ("r", "whole"))
    assert without_times(steps) == without_times(expected)


def test_resume_refuses_an_edited_set(command, pair_run, unpainted, pair_folder, tmp_path):
    folder, run = shutil.copytree(pair_folder, tmp_path / "set"), tmp_path / "r"
    code, _, err = command(
        "train.py", *pair_run(folder), "--max_train_steps", 1, "--output_dir", run
    )
    assert code == 0, err
    before, image = weights(run), folder / "images" / "00001_a.png"  # not a held-out pair
    Image.fromarray(np.array(Image.open(image))[::-1]).save(image)
    code, _, err = command("train.py", "--resume", "--max_train_steps", 3, "--output_dir", run)
    assert code == 2 and "were edited since this run began" in err.splitlines()[-1]
    assert same(before, weights(run))


def test_resume_takes_a_moved_set_and_refuses_other_prompts(
    command, pair_run, unpainted, pair_folder, tmp_path
):
    folder, run = shutil.copytree(pair_folder, tmp_path / "set"), ["--output_dir", tmp_path / "r"]
    own = tmp_path / "p.txt"
    own.write_text("a moon over my house\n")
    flags = ["--prompts", own, "--max_train_steps", 1, *run]
    code, _, err = command("train.py", *pair_run(folder), *flags)
    assert code == 0, err
    again = ["--resume", "--pairs", shutil.move(folder, tmp_path / "elsewhere"), *run]
    code, out, err = command("train.py", *again, "--max_train_steps", 2)
    assert code == 0 and "resumed at optimiser step 0" in out, err
    own.write_text("another moon\n")
    code, _, err = command("train.py", *again, "--max_train_steps", 3)
    assert code == 2 and "were edited since this run began" in err.splitlines()[-1], err


def test_two_ranks_are_one(pair_run, tmp_path):
    """Every other pair to each rank, one rank with an odd one less: the log but for rounding."""
    one, two = tmp_path / "one", tmp_path / "two"
    change = dict(change=paint_nothing)
    code, printed = Child("train.py", *pair_run(), "--output_dir", one, **change).wait()
    assert code == 0, printed
    flags = [*pair_run(), "--gradient_accumulation_steps", 1, "--output_dir", two]
    for code, printed in ranks("train.py", *flags, **change):
        assert code == 0, printed
    for a, b in zip(log(one, "step"), log(two, "step"), strict=True):
        for key in ("loss", "margin", "X_w", "X_l", "grad_norm", "accuracy", "pairs"):
            assert a[key] == pytest.approx(b[key], rel=1e-2, abs=1e-5), key


# --------------------------------------------------------------------------------------------------
# Bad input: one line, exit code 2, no run begun (what a set may be: test_pairs.py)


def refused(command, tmp_path, *flags):
    """The line that train.py prints."""
    code, _, err = command("train.py", *flags, "--output_dir", tmp_path / "r")
    lines = [line for line in err.splitlines() if line.startswith("train.py: ")]
    assert code == 2 and len(lines) == 1 and "Traceback" not in err, err
    assert not (tmp_path / "r").exists()
    return lines[0]


def test_bad_pairs_are_one_line(command, pair_run, unpainted, pair_folder, tmp_path):
    folder = shutil.copytree(pair_folder, tmp_path / "set")
    os.remove(folder / "images" / "00007_a.png")
    line = refused(command, tmp_path, *pair_run(folder))
    assert f"too large: 1 (row 8 of {folder / 'pairs.csv'}): mend them, or --skip_bad" in line
    assert "No such file" in refused(command, tmp_path, *pair_run(tmp_path / "nowhere"))
    flags = ["--skip_bad", "--max_train_steps", 1, "--output_dir", tmp_path / "r"]
    code, out, err = command("train.py", *pair_run(folder), *flags)
    assert code == 0 and "left out, pairs with no caption or images missing, damaged" in out, err


@pytest.mark.parametrize(
    "flags, message",
    (
        (["--num_children", 3], "--num_children is about sampling pairs"),
        (["--judge", "nobody"], "unknown 'nobody'"),
        (["--cache_dir", "/proc/nowhere"], "choose another --cache_dir"),
        (["--learning_rate", "0"], "--learning_rate must lie in (0, inf)"),
    ),
)
def test_bad_flags_are_one_line(command, pair_run, tmp_path, flags, message):
    assert message in refused(command, tmp_path, *pair_run(), *flags)


def test_every_caption_held_out_is_refused(command, pair_run, pair_folder, tmp_path):
    own = tmp_path / "p.txt"
    own.write_text("\n".join(captions_of(pair_folder)))
    line = refused(command, tmp_path, *pair_run(), "--prompts", own, "--num_eval_prompts", 99)
    assert "names every caption of the pairs" in line
