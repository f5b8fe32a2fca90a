"""SD1.5 at its published size on a CPU, with random weights: does a machine hold it, how long?

A folder is written as the hub has it, train.py trains on it for one chunk of two denoising steps,
and plain diffusers opens the LoRA that it leaves.
"""

import math
import os
import resource
import subprocess
import sys
import time

import random_models
import torch
from safetensors.torch import load_file

from parts.common import UserError
from parts.judges_clip import StepAware
from parts.model import LORA_FILE, load_pipeline, load_policy
from parts.run import read_log

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PROMPTS = ("a yellow sun over hills", "a white moon over a sea")


def measure(folder, config=StepAware.CONFIG, make=random_models.sd15):
    """Prints a table. config, make: of the judge and the pipeline, as of random_models.save."""
    start, run = time.time(), f"{folder}/run"
    random_models.save(folder, config, make)
    model, prompts = f"{folder}/sd15", f"{folder}/two.txt"
    with open(prompts, "w") as file:
        file.write("\n".join(PROMPTS))
    parts = {"models written": time.time() - start}

    flags = ["--model", model, "--weights", f"{folder}/weights", "--judge", "step_aware"]
    flags += ["--prompts", prompts, "--num_eval_prompts", 1, "--images_per_prompt", 2]
    flags += ["--num_epochs", 1, "--num_inference_steps", 2, "--first_step", 0, "--threshold", 0]
    flags += ["--num_children", 2, "--train_batch_size", 1, "--gradient_accumulation_steps", 2]
    command = ["train.py", "--div", "js", *flags, "--device", "cpu", "--output_dir", run]
    start = time.time()
    run_script(command)
    end = time.time()
    peak_gb = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20

    loaded, painted = (os.path.getmtime(f"{run}/{name}") for name in STAGES)
    parts["train.py: imports, models read"] = loaded - start
    parts["the fixed prompt's pictures, 6 images of 2 steps"] = painted - loaded
    rollout, steps = read_log(run, "rollout")[0], read_log(run, "step")
    parts[f"rollout, {rollout['pairs']} pairs of 1 prompt"] = rollout["seconds"]
    parts[f"{len(steps)} optimiser step(s)"] = sum(step["seconds"] for step in steps)
    parts["pictures and table after training, 10 images"] = (
        end - painted - sum(list(parts.values())[-2:])
    )
    print("\n| part | seconds |\n|---|---|")
    for name, seconds in parts.items():
        print(f"| {name} | {seconds:.1f} |")
    print(f"| train.py in all, its peak memory {peak_gb:.1f} GB | {end - start:.1f} |")
    compare_lora(model, run)


def run_script(words):
    subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, check=True)


STAGES = ("config.json", "samples/epoch_000.png")  # when the models are read, and painted


def compare_lora(model, run):
    """One prediction of the UNet: plain diffusers with the file, and load_policy."""
    from diffusers import StableDiffusionPipeline

    with torch.no_grad():
        ours = load_pipeline(model)
        size, width = ours.unet.config.sample_size, ours.unet.config.cross_attention_dim
        inputs = torch.randn(1, 4, size, size), torch.tensor(500), torch.randn(1, 77, width)
        reference = ours.unet(*inputs).sample
        load_policy(ours.unet, run)
        with_lora = ours.unet(*inputs).sample
        del ours
        theirs = StableDiffusionPipeline.from_pretrained(model, dtype=torch.float32)
        theirs.load_lora_weights(run)
        layers = [name for name, _ in theirs.unet.named_modules() if name.endswith("lora_B")]
        gap = (theirs.unet(*inputs).sample - with_lora).abs().max().item()
    moved = (with_lora - reference).abs().max().item()
    tensors = load_file(f"{run}/{LORA_FILE}")
    print(
        f"LoRA of {len(tensors)} tensors opened in plain diffusers: {len(layers)} layers; its ",
        end="",
    )
    print(f"prediction differs by {gap:.1e}, where the LoRA moves it by {moved:.1e}")
    if not (0 < moved < math.inf and gap < 1e-2 * moved and len(tensors) == 2 * len(layers)):
        raise UserError("plain diffusers does not read what train.py wrote")
