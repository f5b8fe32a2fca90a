"""What the tests share: a micro model with random weights, and commands run in this process."""

import importlib
import json
import os
import sys

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach for a network, nor wait for one
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
with open(os.path.join(ROOT, "toy", "prompts.txt")) as prompts:
    PROMPTS = prompts.read().splitlines()

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # -n 2: a worker a core

# What imports modules of ours stands inside the fixtures: a module that is being rewritten then
# fails its own tests and no others.


@pytest.fixture(scope="session")
def micro(tmp_path_factory):
    """A folder with a Stable Diffusion of SD1.5's classes, 0.1 M random parameters.

    12 x 12 latents, 48 x 48 images: not the toy's size.
    """
    from toy import make

    folder = str(tmp_path_factory.mktemp("models") / "micro")
    torch.manual_seed(1)
    pipe = make.make_pipeline(unet_channels=(16, 16), vae_channels=8, hidden=16, sample_size=12)
    pipe.save_pretrained(folder, safe_serialization=True)
    return folder


@pytest.fixture
def pipe(micro):
    from parts.model import load_pipeline

    return load_pipeline(micro)


def shake(policy, seed=0, scale=0.1):
    """Moves a policy off its reference, as training would."""
    generator = torch.Generator().manual_seed(seed)
    moving = policy.parameters if policy.full else [m.lora_B for m in policy.layers.values()]
    for parameter in moving:
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data += (scale * noise).to(parameter)


def draw(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=dtype)


def question(pipe):
    """(x_t, t, text, null) of two images for predict_noise, in the text's dtype."""
    from parts.model import encode_prompts

    text, null = encode_prompts(pipe, PROMPTS[:2]), encode_prompts(pipe, [""])
    return draw(2, 4, 12, 12).to(text.dtype), torch.tensor([801, 51]), text, null


def overshoot(pipe, monkeypatch, factor=4):
    """The VAE's images leave [-1, 1]. Returns the list of all that it decodes, raw."""
    raw, decode_once = [], pipe.vae.decode

    def louder(latents):
        result = decode_once(latents)
        result.sample = factor * result.sample
        raw.append(result.sample)
        return result

    monkeypatch.setattr(pipe.vae, "decode", louder)
    return raw


@pytest.fixture(scope="session")
def prompts_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("\n".join(PROMPTS[:8]) + "\n")
    return str(path)


@pytest.fixture
def command(monkeypatch, capsys):
    """command("train.py", "--div", "js", ...) -> (exit code, stdout, stderr), in this process."""
    from parts.common import run_cli

    def run(script, *argv):
        module = importlib.import_module(script.removesuffix(".py"))
        monkeypatch.setattr(sys, "argv", [script, *map(str, argv)])
        capsys.readouterr()
        try:
            run_cli(module.main)
            code = 0
        except SystemExit as stop:
            code = stop.code
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


@pytest.fixture
def small_run(micro, prompts_file):
    """Flags of a training run of some seconds: 6 training prompts, 2 rollouts an epoch, and every
    x_t from the second step on gives a pair."""
    flags = ["--model", micro, "--prompts", prompts_file, "--judge", "taste", "--num_epochs", 1]
    flags += ["--sample_batch_size", 3, "--num_children", 2, "--first_step", 1, "--threshold", 0]
    flags += ["--num_inference_steps", 4, "--train_batch_size", 2]
    flags += ["--gradient_accumulation_steps", 2, "--learning_rate", 1e-3, "--rank", 2]
    return flags + ["--num_eval_prompts", 2, "--images_per_prompt", 2, "--device", "cpu"]


def paint_nothing(set_attribute=setattr):
    """Runs leave no curves, and paint no picture but the table's: two thirds of a small run's time.
    Tests about what a run leaves, test_a_run_leaves_... among them, do without this."""
    import train

    set_attribute(train, "make_show", lambda *args: lambda epoch: None)
    set_attribute(train, "draw_curves", lambda folder: None)


@pytest.fixture
def unpainted(monkeypatch):
    paint_nothing(monkeypatch.setattr)


@pytest.fixture(scope="session")
def weights_dir(tmp_path_factory):
    import weights

    return weights.weights_folder(str(tmp_path_factory.mktemp("weights")))


def shrink_judges(set_attribute, weights_dir):
    """The four architectures that no config.json states, shrunk to fit the weights folder."""
    import weights

    from parts.judges import JUDGES

    with open(os.path.join(weights_dir, "CLIP-ViT-H-14-laion2B-s32B-b79K", "config.json")) as file:
        tiny = json.load(file)
    configs = dict(step_aware=tiny, hps=tiny, imagereward=weights.BLIP)
    configs["vqascore"] = weights.FLANT5_VISION
    for name, config in configs.items():
        set_attribute(JUDGES[name], "CONFIG", config)


@pytest.fixture
def tiny_judges(monkeypatch, weights_dir):
    shrink_judges(monkeypatch.setattr, weights_dir)
    return weights_dir


@pytest.fixture
def small_files():
    """No file may grow beyond 5 kB: to the process, a disk that fills up while it writes."""
    import resource
    import signal

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    signal.signal(signal.SIGXFSZ, handler)


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch, tmp_path):
    """No test meets, or leaves, anything in the out/ of whoever runs it."""
    monkeypatch.chdir(tmp_path)
