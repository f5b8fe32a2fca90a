"""Every line of bad input: one line on stderr that names the fix, exit code 2, nothing written and nothing lost."""
import hashlib
import os
import resource
import shutil
import signal

import pytest
import torch

from parts import pairs
import sample
import train
from parts import weights as store
from sample import LORA_FILE
from test_train import weights, same

FLAGS = [
    (["--div", "kl"], "choose one of rkl"), (["--div", "alpha"], "needs alpha"), (["--div", "alpha", "--alpha", 0], "strictly between"),
    (["--div", "alpha", "--alpha", 1], "strictly between"), (["--div", "alpha", "--alpha", "nan"], "strictly between"),
    (["--div", "alpha", "--alpha", "x"], "invalid float"), (["--div", "js", "--alpha", 0.4], "drop it"),
    (["--beta", -1], "--beta must be positive"), (["--beta", "nan"], "--beta must be a finite"),
    (["--guidance_scale", "nan"], "finite"), (["--adam_weight_decay", -1], "--adam_weight_decay"), (["--num_inference_steps", 1000], "1..500"),
    (["--clip_range", 0], "--clip_range"), (["--clip_range", 1], "--clip_range"), (["--clip", "both"], "invalid choice"),
    (["--num_children", 1], "at least 2"), (["--first_step", 4], "--first_step must be below"), (["--first_step", -1], "--first_step"),
    (["--eta", 0], "--eta must be positive"), (["--threshold", 1], "--threshold"), (["--learning_rate", 0], "--learning_rate"),
    (["--train_batch_size", 0], "--train_batch_size must be at least 1"), (["--rank", 0], "--rank"), (["--seed", -1], "--seed"),
    (["--no_such_flag"], "unrecognized"), (["--judge", "mother"], "unknown judge"), (["--device", "abacus"], "unknown device"), (["--device", "meta"], "not supported"),
    (["--model", "nowhere/at/all"], "no model folder"), (["--model", "./nowhere"], "no model folder"),
    (["--model", "someone/some-model"], "hub in reach"), (["--judge", "pickscore"], "the hub is out of reach"),
    (["--prompts", "nowhere.txt"], "cannot read prompts file"), (["--resume"], "nothing to resume"),
]


@pytest.mark.parametrize("flags, words", FLAGS, ids=lambda v: " ".join(map(str, v)) if isinstance(v, list) else None)
def test_flags(command, small_run, tmp_path, flags, words):
    out = tmp_path / "r"
    code, _, err = command("train.py", *small_run, *flags, "--output_dir", out)
    assert code == 2 and words in err and err.strip().count("\n") == 0, err
    assert not out.exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA here")
def test_cuda_asked_for_where_there_is_none(command, small_run, tmp_path):
    code, _, err = command("train.py", *small_run, "--device", "cuda", "--output_dir", tmp_path / "r")
    assert code == 2 and "torch sees none" in err and err.count("\n") == 1


@pytest.mark.parametrize("content, words", [(b"", "is empty"), (b"\n  \n", "is empty"), (b"\xff\xfe\x00binary", "is not text"),
                                            (b"a\0b", "is not text")])
def test_prompts_files(command, small_run, tmp_path, content, words):
    path = tmp_path / "p.txt"
    path.write_bytes(content)
    code, _, err = command("train.py", *small_run, "--prompts", path, "--output_dir", tmp_path / "r")
    assert code == 2 and words in err and err.count("\n") == 1
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("content, ok", [('["a sun", "a moon"]', True), ('[{"caption": "a sun"}, {"prompt": "a moon"}]', True),
                                         ('{"caption": 1', False), ('[3]', False), ('"a sun"', False), ('[{"caption": null}]', False), ('{"a sun": 1, "a moon": 2}', False), ('[{"text": "a"}]', False)])
def test_json_prompts(tmp_path, content, ok):
    path = tmp_path / "p.json"
    path.write_text(content)
    if ok:
        assert sample.read_prompts(str(path)) == ["a sun", "a moon"]
    else:
        with pytest.raises(sample.UserError, match="JSON list"):
            sample.read_prompts(str(path))


@pytest.mark.parametrize("name, content, ok", [
    ("p.jsonl", '{"prompt": "a sun", "id": 1}\n\n"a  moon"\n', True), ("p.csv", 'id,caption\n1,a sun\n2,"a moon"\n', True),
    ("p.CSV", 'prompt\na sun\n"a\nmoon"\n', True), ("p.jsonl", '{"prompt": "a sun"\n', False), ("p.csv", "text\na sun\n", False),
    ("p.csv", "id,caption\n1\n", False)])
def test_jsonl_and_csv_prompts(tmp_path, name, content, ok):
    path = tmp_path / name
    path.write_text(content)
    if ok:
        assert sample.read_prompts(str(path)) == ["a sun", "a moon"]
    else:
        with pytest.raises(sample.UserError, match="with caption or prompt") as e:
            sample.read_prompts(str(path))
        assert name in str(e.value)


def test_spo_prompts_are_checked(tmp_path, monkeypatch):
    path = tmp_path / "4k_training_prompts.json"
    with pytest.raises(sample.UserError, match="SPO's training prompts: .* is not there: curl"):
        store.find_spo_prompts(str(tmp_path))
    path.write_text('[{"caption": "a sun"}]')
    with pytest.raises(sample.UserError, match="checksum differs"):
        store.find_spo_prompts(str(tmp_path))
    monkeypatch.setattr(store, "SPO_PROMPTS_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    assert sample.read_prompts(store.find_spo_prompts(str(tmp_path))) == ["a sun"]


def test_a_model_that_needs_prompts_says_so(command, micro, tmp_path):
    code, _, err = command("train.py", "--model", micro, "--judge", "taste", "--output_dir", tmp_path / "r")
    assert code == 2 and "needs --prompts FILE" in err


@pytest.mark.parametrize("part", ("unet/config.json", "vae", "text_encoder", "tokenizer", "scheduler", "model_index.json",
                                  "unet/diffusion_pytorch_model.safetensors"))
def test_a_model_folder_that_lacks_a_part(command, small_run, micro, tmp_path, part):
    folder = tmp_path / "m"
    shutil.copytree(micro, folder)
    shutil.rmtree(folder / part) if (folder / part).is_dir() else os.remove(folder / part)
    code, _, err = command("train.py", *small_run, "--model", folder, "--output_dir", tmp_path / "r")
    assert code == 2 and part.split("/")[0] in err and err.count("\n") == 1, err
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("part", ("unet", "vae"))
def test_a_truncated_safetensors_file(command, small_run, micro, tmp_path, part):
    folder = tmp_path / "m"
    shutil.copytree(micro, folder)
    path = folder / part / "diffusion_pytorch_model.safetensors"
    with open(path, "r+b") as f:
        f.truncate(path.stat().st_size - 100)
    code, _, err = command("train.py", *small_run, "--model", folder, "--output_dir", tmp_path / "r")
    assert code == 2 and f"{part}/diffusion_pytorch_model.safetensors is damaged" in err and err.count("\n") == 1


def test_an_output_folder_that_cannot_be_written(command, small_run, tmp_path):
    (tmp_path / "file").write_text("I am a file")
    code, _, err = command("train.py", *small_run, "--output_dir", tmp_path / "file" / "r")
    assert code == 2 and "choose another --output_dir" in err and err.count("\n") == 1


@pytest.fixture
def finished(command, small_run, tmp_path):
    code, _, err = command("train.py", *small_run, "--div", "js", "--max_train_steps", 1, "--output_dir", tmp_path / "r")
    assert code == 0, err
    return tmp_path / "r"


def snapshot(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}


def test_an_output_folder_that_holds_another_run(command, small_run, finished):
    before = snapshot(finished)
    code, _, err = command("train.py", *small_run, "--output_dir", finished)
    assert code == 2 and "already holds a run" in err and "--resume" in err and err.count("\n") == 1
    assert snapshot(finished) == before


def test_resume_with_different_settings(command, small_run, finished):
    before = snapshot(finished)
    code, _, err = command("train.py", "--resume", "--div", "rkl", "--beta", 3, "--output_dir", finished)
    assert code == 2 and "div was js, now rkl" in err and "beta was 10.0, now 3.0" in err and err.count("\n") == 1
    assert snapshot(finished) == before


def test_resume_after_the_prompts_were_edited(command, small_run, prompts_file, tmp_path):
    mine = tmp_path / "mine.txt"
    shutil.copy(prompts_file, mine)
    command("train.py", *small_run, "--prompts", mine, "--max_train_steps", 1, "--output_dir", tmp_path / "r")
    before = snapshot(tmp_path / "r")
    mine.write_text(mine.read_text() + "a blue moon\n")
    code, _, err = command("train.py", "--resume", "--output_dir", tmp_path / "r")
    assert code == 2 and "were edited" in err and err.count("\n") == 1 and snapshot(tmp_path / "r") == before


def test_a_state_that_is_gone(command, finished):
    os.remove(finished / "state.pt")
    before = snapshot(finished)
    code, _, err = command("train.py", "--resume", "--output_dir", finished)
    assert code == 2 and "state.pt is gone" in err and snapshot(finished) == before


def test_a_damaged_state_or_config(command, finished):
    (finished / "state.pt").write_bytes((finished / "state.pt").read_bytes()[:300])
    code, _, err = command("train.py", "--resume", "--output_dir", finished)
    assert code == 2 and "state.pt is damaged" in err
    (finished / "config.json").write_text('{"args": ')
    code, _, err = command("train.py", "--resume", "--output_dir", finished)
    assert code == 2 and "nothing to resume" in err


class Mine:
    def __reduce__(self):
        return (os.system, ("touch was_run",))


def test_state_is_never_unpickled(command, finished, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    torch.save({"lora": Mine()}, finished / "state.pt")
    code, _, err = command("train.py", "--resume", "--output_dir", finished)
    assert code == 2 and "damaged" in err and not (tmp_path / "was_run").exists()


def test_a_full_disk_while_saving(command, small_run, finished):
    """The kernel refuses to let any file grow beyond 2 kB, in the middle of a run: the checkpoint before it survives whole."""
    lora, state = weights(finished), (finished / "state.pt").read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        code, _, err = command("train.py", "--resume", "--max_train_steps", 0, "--output_dir", finished)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, old)
    last = err.strip().splitlines()[-1]
    assert code == 2 and "cannot write" in last and "free some space" in last and "Traceback" not in err
    assert same(weights(finished), lora) and (finished / "state.pt").read_bytes() == state
    assert not list(finished.glob("*.tmp"))
    code, _, err = command("train.py", "--resume", "--max_train_steps", 0, "--output_dir", finished)  # space again: it goes on
    assert code == 0 and not same(weights(finished), lora)


@pytest.fixture
def small_files():
    """No file may grow beyond 5 kB: to the process, a disk that fills up while it writes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    signal.signal(signal.SIGXFSZ, old)


@pytest.mark.parametrize("how", (lambda f: torch.save({"a": torch.randn(10000)}, f), b"x" * 10000), ids=("state", "bytes"))
def test_the_disk_fills_up_in_mid_file(small_files, tmp_path, how):
    """The old file stays, nothing else does; torch.save says RuntimeError for what the disk says."""
    path = tmp_path / "state.pt"
    path.write_bytes(b"old")
    with pytest.raises(sample.UserError, match="File too large"):
        sample.write_file(str(path), how)
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["state.pt"]


def test_what_is_no_fault_of_the_disk_is_not_blamed_on_it(tmp_path):
    def broken(f):
        raise RuntimeError("CUDA error")
    with pytest.raises(RuntimeError, match="CUDA error"):
        sample.write_file(str(tmp_path / "state.pt"), broken)
    assert os.listdir(tmp_path) == []


def test_the_disk_fills_up_while_images_are_encoded(small_files, micro, tmp_path):
    latents = pairs.Latents(str(tmp_path / "cache"), sample.load_pipeline(micro))
    latents.shape = (4, 24, 24)
    with pytest.raises(sample.UserError, match="choose another --cache_dir"):
        latents.add("ab" * 32, torch.zeros(3, 128, 128))
    assert not any(files for _, _, files in os.walk(tmp_path / "cache"))
