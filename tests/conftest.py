"""What the tests share: a micro model of SD1.5's classes with random weights, and commands run in this process."""
import importlib
import json
import os
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach for a network, nor wait for one
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import pytest  # noqa: E402
import torch  # noqa: E402

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # -n 2: a worker a core

import sample  # noqa: E402
from toy import make  # noqa: E402
from toy import world as toy  # noqa: E402
import train  # noqa: E402


@pytest.fixture(scope="session")
def micro(tmp_path_factory):
    """A folder with a Stable Diffusion of 0.1 M random parameters, 12x12 latents, 48x48 images: not the toy's size."""
    folder = str(tmp_path_factory.mktemp("models") / "micro")
    torch.manual_seed(1)
    pipe = make.make_pipeline(unet_channels=(16, 16), vae_channels=8, hidden=16, sample_size=12)
    pipe.save_pretrained(folder, safe_serialization=True)
    return folder


@pytest.fixture(scope="session")
def prompts_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("\n".join(toy.prompts()[:8]) + "\n")
    return str(path)


@pytest.fixture
def command(monkeypatch, capsys):
    """command("train.py", "--div", "js", ...) -> (exit code, stdout, stderr), run in this process."""
    def run(script, *argv):
        module = importlib.import_module(script.removesuffix(".py"))
        monkeypatch.setattr(sys, "argv", [script, *map(str, argv)])
        capsys.readouterr()
        try:
            sample.run_cli(module.main)
            code = 0
        except SystemExit as e:
            code = e.code
        out = capsys.readouterr()
        return code, out.out, out.err
    return run


@pytest.fixture
def small_run(micro, prompts_file):
    """Flags of a training run of some seconds: 6 training prompts, 2 rollouts an epoch, every candidate a valid pair."""
    return ["--model", micro, "--prompts", prompts_file, "--judge", "taste", "--num_epochs", 1, "--sample_batch_size", 3,
            "--num_children", 2, "--first_step", 1, "--threshold", 0, "--num_inference_steps", 4, "--train_batch_size", 2,
            "--gradient_accumulation_steps", 2, "--learning_rate", 1e-3, "--rank", 2, "--num_eval_prompts", 2,
            "--images_per_prompt", 2, "--device", "cpu", "--checkpointing_steps", 2]


@pytest.fixture(scope="session")
def weights_dir(tmp_path_factory):
    import weights
    return weights.weights_folder(str(tmp_path_factory.mktemp("weights")))


@pytest.fixture
def tiny_judges(monkeypatch, weights_dir):
    """The weights folder; the four architectures that no config.json states are shrunk to fit."""
    import weights
    from parts.judges import JUDGES

    with open(os.path.join(weights_dir, "CLIP-ViT-H-14-laion2B-s32B-b79K", "config.json")) as file:
        tiny = json.load(file)
    configs = dict(step_aware=tiny, hps=tiny, imagereward=weights.BLIP)
    configs["vqascore"] = weights.FLANT5_VISION
    for name, config in configs.items():
        monkeypatch.setattr(JUDGES[name], "CONFIG", config)
    return weights_dir
