"""Bad input is one line on stderr that names the fix, exit code 2; nothing is written or lost."""

import os
import resource
import shutil
import signal

import pytest
import torch
from PIL import Image
from test_train import same, weights

import train
from parts import common, pairs
from parts import weights as store
from parts.model import load_pipeline

FLAGS = [
    (["--div", "kl"], "choose one of rkl"),
    (["--div", "alpha"], "needs --alpha"),
    (["--div", "alpha", "--alpha", 0], "--alpha must lie in (0, 1)"),
    (["--div", "alpha", "--alpha", 1], "--alpha must lie in (0, 1)"),
    (["--div", "alpha", "--alpha", "nan"], "--alpha must lie in (0, 1)"),
    (["--div", "alpha", "--alpha", "x"], "invalid float"),
    (["--div", "js", "--alpha", 0.4], "drop it"),
    (["--judge", "mother"], "unknown 'mother': choose one of"),
    (["--judge", "none"], "goes with --pairs"),
    (["--clip", "both"], "unknown 'both': choose one of ratio"),
    (["--first_step", 4], "--first_step must be below"),
    (["--no_such_flag"], "unrecognized"),
    (["--device", "abacus"], "unknown device"),
    (["--device", "meta"], "unknown device"),
    (["--model", "nowhere/at/all"], "no model folder"),
    (["--model", "./nowhere"], "no model folder"),
    (["--model", "someone/some-model"], "the hub is out of reach"),
    (["--judge", "pickscore"], "the hub is out of reach"),
    (["--prompts", "nowhere.txt"], "cannot read prompts file"),
    (["--resume"], "nothing to resume"),
]
OUT_OF_RANGE = [
    ("beta", -1),
    ("beta", 0),
    ("beta", "nan"),
    ("beta", "inf"),
    ("guidance_scale", "nan"),
]
OUT_OF_RANGE += [
    ("adam_weight_decay", -1),
    ("num_inference_steps", 0),
    ("num_inference_steps", 501),
]
OUT_OF_RANGE += [("clip_range", 0), ("clip_range", 1), ("num_children", 1), ("first_step", -1)]
OUT_OF_RANGE += [("eta", 0), ("threshold", 1), ("learning_rate", 0), ("max_grad_norm", -1)]
OUT_OF_RANGE += [("max_train_steps", -1)]
for name, (_, allowed, _) in train.FLAGS.items():
    if allowed == "[1, inf)":
        OUT_OF_RANGE.append((name, 0))
FLAGS += [([f"--{name}", value], f"--{name} must lie in") for name, value in OUT_OF_RANGE]


@pytest.mark.parametrize("flags, words", FLAGS, ids=[" ".join(map(str, f)) for f, _ in FLAGS])
def test_flags(command, small_run, tmp_path, flags, words):
    out = tmp_path / "r"
    code, _, err = command("train.py", *small_run, *flags, "--output_dir", out)
    assert code == 2 and words in err and err.strip().count("\n") == 0, err
    assert not out.exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA here")
def test_cuda_asked_for_where_there_is_none(command, small_run, tmp_path):
    flags = ["--device", "cuda", "--output_dir", tmp_path / "r"]
    code, _, err = command("train.py", *small_run, *flags)
    assert code == 2 and "torch sees 0 GPUs" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "change, words", [({"bata": 1}, "bata is no flag"), ("{", "train.json as JSON")]
)
def test_a_models_train_json(command, micro, tmp_path, change, words):
    """A typing error in a model folder's defaults is not ignored."""
    import json

    folder = shutil.copytree(micro, tmp_path / "m")
    (folder / "train.json").write_text(change if isinstance(change, str) else json.dumps(change))
    code, _, err = command("train.py", "--model", folder, "--output_dir", tmp_path / "r")
    assert code == 2 and words in err and err.count("\n") == 1


EMPTY = [
    (b"", "is empty"),
    (b"\n  \n", "is empty"),
    (b"\xff\xfe\x00binary", "cannot read prompts file"),
]


@pytest.mark.parametrize("content, words", [*EMPTY, (b"a\0b", "cannot read prompts file")])
def test_prompts_files(command, small_run, tmp_path, content, words):
    path = tmp_path / "p.txt"
    path.write_bytes(content)
    flags = ["--prompts", path, "--output_dir", tmp_path / "r"]
    code, _, err = command("train.py", *small_run, *flags)
    assert code == 2 and words in err and err.count("\n") == 1
    assert not (tmp_path / "r").exists()


GOOD = [
    ("p.json", '["a sun", "a moon"]'),
    ("p.json", '[{"caption": "a sun"}, {"prompt": "a moon"}]'),
    ("p.jsonl", '{"prompt": "a sun", "id": 1}\n\n"a  moon"\n'),
    ("p.csv", 'id,caption\n1,a sun\n2,"a moon"\n'),
    ("p.CSV", 'prompt\na sun\n"a\nmoon"\n'),
]
WRONG = [("p.json", text) for text in ('{"caption": 1', "[3]", '"a sun"', '[{"caption": null}]')]
WRONG += [("p.json", '{"a sun": 1, "a moon": 2}'), ("p.json", '[{"words": "a"}]')]
WRONG += [("p.jsonl", '{"prompt": "a sun"\n'), ("p.csv", "words\na sun\n")]
WRONG += [("p.csv", "id,caption\n1\n")]
# Attend-and-Excite's prompts: their lines would be taken for prompts
WRONG += [("p.txt", '{"animals": ["a cat", "a dog"]}'), ("p.txt", '[\n  "a cat",\n  "a dog"\n]')]


@pytest.mark.parametrize("name, content", GOOD)
def test_prompts_in_json_and_csv(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    assert common.read_prompts(str(tmp_path / name)) == ["a sun", "a moon"]


@pytest.mark.parametrize("name, content", WRONG)
def test_wrong_json_and_csv_is_named(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    with pytest.raises(common.UserError, match="with caption or prompt") as error:
        common.read_prompts(str(tmp_path / name))
    assert name in str(error.value)


def test_spo_prompts_may_lie_among_the_weights(tmp_path):
    path = tmp_path / "4k_training_prompts.json"
    sd15 = store.SD15, None, str(tmp_path)
    with pytest.raises(common.UserError, match="4k_training_prompts.json is not there: curl"):
        store.find_training_prompts(*sd15)
    path.write_text('[{"caption": "a sun"}]')
    assert common.read_prompts(store.find_training_prompts(*sd15)) == ["a sun"]


def test_a_model_that_needs_prompts_says_so(command, micro, tmp_path):
    flags = ["--judge", "taste", "--output_dir", tmp_path / "r"]
    code, _, err = command("train.py", "--model", micro, *flags)
    assert code == 2 and "needs --prompts FILE" in err


PARTS = ("unet/config.json", "vae", "text_encoder", "tokenizer", "scheduler", "model_index.json")
PARTS += ("unet/diffusion_pytorch_model.safetensors",)


@pytest.mark.parametrize("part", PARTS)
def test_a_model_folder_that_lacks_a_part(command, small_run, micro, tmp_path, part):
    folder = shutil.copytree(micro, tmp_path / "m")
    if (folder / part).is_dir():
        shutil.rmtree(folder / part)
    else:
        os.remove(folder / part)
    flags = ["--model", folder, "--output_dir", tmp_path / "r"]
    code, _, err = command("train.py", *small_run, *flags)
    assert code == 2 and part.split("/")[0] in err and err.count("\n") == 1, err
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("part", ("unet", "vae"))
def test_a_truncated_safetensors_file(command, small_run, micro, tmp_path, part):
    folder = shutil.copytree(micro, tmp_path / "m")
    path = folder / part / "diffusion_pytorch_model.safetensors"
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size - 100)
    flags = ["--model", folder, "--output_dir", tmp_path / "r"]
    code, _, err = command("train.py", *small_run, *flags)
    words = f"{part}/diffusion_pytorch_model.safetensors is damaged"
    assert code == 2 and words in err and err.count("\n") == 1


def test_an_output_folder_that_cannot_be_written(command, small_run, tmp_path):
    (tmp_path / "file").write_text("I am a file")
    code, _, err = command("train.py", *small_run, "--output_dir", tmp_path / "file" / "r")
    assert code == 2 and "choose another --output_dir" in err and err.count("\n") == 1


@pytest.fixture
def finished(command, small_run, unpainted, tmp_path):
    flags = ["--div", "js", "--max_train_steps", 1, "--output_dir", tmp_path / "r"]
    code, _, err = command("train.py", *small_run, *flags)
    assert code == 0, err
    return tmp_path / "r"


def snapshot(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}


def test_an_output_folder_that_holds_another_run(command, small_run, finished):
    before = snapshot(finished)
    code, _, err = command("train.py", *small_run, "--output_dir", finished)
    assert code == 2 and "already holds a run" in err and "--resume" in err
    assert err.count("\n") == 1 and snapshot(finished) == before


def test_resume_with_different_settings(command, finished):
    before = snapshot(finished)
    flags = ["--div", "rkl", "--beta", 3, "--output_dir", finished]
    code, _, err = command("train.py", "--resume", *flags)
    assert code == 2 and "div was js, now rkl" in err and "beta was 10.0, now 3.0" in err
    assert err.count("\n") == 1 and snapshot(finished) == before


def test_resume_after_the_prompts_were_edited(command, small_run, prompts_file, tmp_path):
    mine, folder = tmp_path / "mine.txt", tmp_path / "r"
    shutil.copy(prompts_file, mine)
    flags = ["--prompts", mine, "--max_train_steps", 1, "--output_dir", folder]
    command("train.py", *small_run, *flags)
    before = snapshot(folder)
    mine.write_text(mine.read_text() + "a blue moon\n")
    code, _, err = command("train.py", "--resume", "--output_dir", folder)
    assert code == 2 and "were edited" in err and err.count("\n") == 1
    assert snapshot(folder) == before


def test_a_state_that_is_gone(command, finished):
    command("train.py", "--resume", "--max_train_steps", 2, "--output_dir", finished)
    os.remove(finished / "state.pt")
    before = snapshot(finished)
    code, _, err = command("train.py", "--resume", "--output_dir", finished)
    assert code == 2 and "state.pt is gone" in err and snapshot(finished) == before


def test_a_damaged_state_or_config(command, finished):
    (finished / "state.pt").write_bytes((finished / "state.pt").read_bytes()[:300])
    code, _, err = command("train.py", "--resume", "--output_dir", finished)
    assert code == 2 and "state.pt is damaged" in err and err.count("\n") == 1
    (finished / "config.json").write_text('{"args": ')
    code, _, err = command("train.py", "--resume", "--output_dir", finished)
    assert code == 2 and "nothing to resume" in err


def test_a_run_of_another_version_is_not_resumed(command, finished):
    config = (finished / "config.json").read_text().replace("checkpointing_chunks", "old_name")
    (finished / "config.json").write_text(config)
    code, _, err = command("train.py", "--resume", "--output_dir", finished)
    assert code == 2 and "another version of this code" in err and err.count("\n") == 1


class Mine:
    def __reduce__(self):
        return (os.system, ("touch was_run",))


def test_state_is_never_unpickled(command, finished, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    torch.save({"lora": Mine()}, finished / "state.pt")
    code, _, err = command("train.py", "--resume", "--output_dir", finished)
    assert code == 2 and "damaged" in err and not (tmp_path / "was_run").exists()


@pytest.fixture
def small_files():
    """small_files(n): no file may grow beyond n bytes; to the process, a disk that fills up."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda n: resource.setrlimit(resource.RLIMIT_FSIZE, (n or soft, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    signal.signal(signal.SIGXFSZ, old)


def test_a_full_disk_while_saving(command, finished, small_files):
    """In the middle of a run: the checkpoint before it survives whole, and the run goes on."""
    lora, state = weights(finished), (finished / "state.pt").read_bytes()
    again = ["--resume", "--max_train_steps", 0, "--output_dir", finished]
    small_files(2000)
    code, _, err = command("train.py", *again)
    small_files(None)
    last = err.strip().splitlines()[-1]
    assert code == 2 and "cannot write" in last and "free some space" in last
    assert "Traceback" not in err
    assert same(weights(finished), lora) and (finished / "state.pt").read_bytes() == state
    assert not list(finished.glob("*.tmp"))
    code, _, err = command("train.py", *again)  # space again
    assert code == 0 and not same(weights(finished), lora)


def save_state(file):
    torch.save({"a": torch.randn(10000)}, file)


@pytest.mark.parametrize("data", (save_state, b"x" * 10000), ids=("state", "bytes"))
def test_the_disk_fills_up_in_mid_file(small_files, tmp_path, data):
    """The old file stays, nothing else does; torch.save wraps the disk's error in another."""
    path = tmp_path / "state.pt"
    path.write_bytes(b"old")
    small_files(5000)
    with pytest.raises(common.UserError, match="File too large"):
        common.write_file(str(path), data)
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["state.pt"]


def test_what_is_no_fault_of_the_disk_is_not_blamed_on_it(tmp_path):
    def broken(file):
        raise RuntimeError("CUDA error")

    with pytest.raises(RuntimeError, match="CUDA error"):
        common.write_file(str(tmp_path / "state.pt"), broken)
    assert os.listdir(tmp_path) == []


def test_the_disk_fills_up_while_images_are_encoded(small_files, micro, tmp_path):
    """No latent is left that looks whole: a later run makes it."""
    pipe, image = load_pipeline(micro), tmp_path / "image.png"
    Image.new("RGB", (48, 48)).save(image)
    small_files(500)
    with pytest.raises(OSError, match="File too large"):
        pairs.encode_once(image, pipe, tmp_path)
    small_files(None)
    key = pairs.encode_once(image, pipe, tmp_path)
    assert (tmp_path / key).stat().st_size == 4 * 4 * 12 * 12
