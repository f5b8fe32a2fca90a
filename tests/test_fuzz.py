"""Damaged files, a test a kind that tests/fuzz.py found; and a short run of it."""

import json
import logging
import shutil
import zipfile

import numpy as np
import pytest
import torch
from child import Child
from PIL import Image
from safetensors.torch import load_file, save_file

import evaluate
import study
from parts import common, run
from parts.images import read_image
from parts.model import load_pipeline


def import_fuzz():
    import fuzz  # noqa: F401


def test_some_random_damages():
    child = Child("fuzz.py", "--trials", 4, "--seed", 1, change=import_fuzz)
    code, printed = child.wait()
    assert code == 0, printed


def flip(path, place):
    data = bytearray(path.read_bytes())
    data[place] ^= 4
    path.write_bytes(data)


def test_a_key_that_a_json_file_lacks(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"args": {"beta": 1}}')
    settings = common.read_json(path, "mend it")
    assert settings["args"]["beta"] == 1 and "qeta" not in settings
    with pytest.raises(common.UserError, match="config.json lacks 'div': mend it"):
        settings["args"]["div"]
    path.write_text("[1]")
    with pytest.raises(common.UserError, match="no object"):
        common.read_json(path, "mend it")


def test_a_picture_whose_checksum_differs(tmp_path):
    path = tmp_path / "0_0.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)).save(path)
    read_image(path)
    flip(path, -20)  # the checksum of the pixels, which Pillow does not come to
    with pytest.raises(common.UserError, match="0_0.png is not a whole image"):
        read_image(path)


def test_a_state_whose_checksum_differs(tmp_path):
    config = {"args": {"resume": False}}
    this = run.Run(str(tmp_path), config)
    torch.save({"policy": torch.arange(1000.0)}, this.state_path)
    with zipfile.ZipFile(this.state_path) as file:
        place = max(file.infolist(), key=lambda part: part.file_size).header_offset
    flip(tmp_path / "state.pt", place + 2000)
    torch.load(this.state_path)  # sees nothing
    with pytest.raises(common.UserError, match="state.pt is damaged"):
        this.load(None, None, None)


def test_scores_that_are_damaged_are_made_again(tmp_path):
    path, stamp = tmp_path / "rmse.csv", "# of images 0\n"
    table = common.csv_text(["prompt_index", "images", "rmse"], [(0, "0 1", 0.25)])
    path.write_text(f"{stamp}# checksum {evaluate.digest([], table)}\n{table}")
    assert evaluate.read_scores(path, stamp)["rmse"] == ["0.25"]
    flip(path, -3)
    assert evaluate.read_scores(path, stamp) == {}


def test_a_painted_image_that_is_empty(tmp_path):
    path = tmp_path / "00000_0.png"
    path.touch()
    assert evaluate.digest([path], []) != evaluate.digest([], [])  # and read_image refuses it


def test_a_runs_csv_that_is_not_whole(tmp_path):
    rows = [["published", "original", "", "0", "taste", str(p), "1", "a"] for p in range(2)]
    rows += [["published", "js", "0", "3", "taste", str(p), "2", "a"] for p in range(2)]
    path = tmp_path / "runs.csv"
    header = ",".join(study.Row._fields)

    def read(lines, header=header):
        path.write_text("\n".join([header, *map(",".join, lines)]))
        return study.read_table(path)

    assert len(read(rows)) == 4
    damages = [rows[:-1], rows[1:], [*rows[:-1], rows[-1][:5]]]
    damages += [[*rows[:-1], [*rows[-1][:6], "2*5", "a"]]]
    for lines in damages:
        with pytest.raises(common.UserError, match="runs.csv"):
            read(lines)
    with pytest.raises(common.UserError, match="its columns are"):
        read(rows, header.replace("metric", "qetric"))


@pytest.fixture
def model(micro, tmp_path):
    return shutil.copytree(micro, tmp_path / "m")


def edit(path, before, after):
    text = path.read_text()
    assert before in text
    path.write_text(text.replace(before, after, 1))


def test_a_flipped_exponent_in_a_weight(model):
    path = model / "unet" / "diffusion_pytorch_model.safetensors"
    state = load_file(path)
    state["conv_in.bias"][0] = 1e37  # finite, its pictures are not
    save_file(state, path)
    with pytest.raises(common.UserError, match="unet: conv_in.bias is not finite, or beyond"):
        load_pipeline(str(model))


@pytest.mark.parametrize("part", ("vae/config", "scheduler/scheduler_config"))
def test_an_unknown_key_is_said(model, caplog, monkeypatch, part):
    key = "scaling_factor" if "vae" in part else "beta_start"
    edit(model / f"{part}.json", key, f"q{key}")
    caplog.set_level(logging.WARNING, "diffusers")  # random_models.py makes it quiet
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)
    load_pipeline(str(model))
    assert f"'q{key}'" in caplog.text and "will be ignored" in caplog.text


@pytest.mark.parametrize("end", ("1.5", "NaN"))
def test_betas_that_are_none(model, end):
    edit(model / "scheduler/scheduler_config.json", '"beta_end": 0.012', f'"beta_end": {end}')
    with pytest.raises(common.UserError, match="scheduler_config.json: its betas"):
        load_pipeline(str(model))


def test_a_tokenizer_with_more_words_than_the_text_encoder(model):
    edit(model / "tokenizer/tokenizer_config.json", "<|endoftext|>", "<|endoftexu|>")
    with pytest.raises(common.UserError, match="tokenizer of .* words, text_encoder of"):
        load_pipeline(str(model))


def test_a_key_that_a_line_of_the_log_lacks(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"kind": "step"}\n{"qind": "step"}\n')
    with pytest.raises(common.UserError, match="metrics.jsonl lacks 'kind': delete that file"):
        run.read_log(tmp_path, "step")


def test_a_wrong_value_in_a_runs_config(command, small_run, unpainted, tmp_path):
    out = ["--output_dir", tmp_path / "r"]
    command("train.py", *small_run, "--max_train_steps", 1, *out)
    for before, after in (('"judge": "taste"', '"judge": "qaste"'), ('"js"', '"ks"')):
        edit(tmp_path / "r/config.json", before, after)
        code, _, err = command("train.py", "--resume", *out)
        assert code == 2 and "config.json): unknown" in err and err.count("\n") == 1, err
        edit(tmp_path / "r/config.json", after, before)


def test_a_folder_that_got_a_run_while_this_one_loaded(tmp_path):
    """Two processes that started together, of which one was done before the other began."""
    this = run.Run(str(tmp_path), {"args": {"resume": False}})
    (tmp_path / "config.json").write_text(json.dumps({}))
    with pytest.raises(common.UserError, match="already holds a run"):
        this.lock_folder()
    resumed = run.Run(str(tmp_path), {"args": {"resume": True}})
    this.lock.release()
    resumed.lock_folder()
