"""What every command shares: one line for bad input, files left whole, prompts, pictures."""

import json
import math
import os
import subprocess
import sys
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT
from matplotlib.figure import Figure
from PIL import Image
from safetensors.torch import load_file

from parts import common
from parts.common import (
    Parser,
    UserError,
    hold_out,
    labelled_grid,
    make_folder,
    peak_gb,
    pick_device,
    progress_bar,
    read_prompts,
    run_cli,
    save_figure,
    to_pil,
    write_file,
    write_png,
)

# --------------------------------------------------------------------------------------------------
# One error boundary


def damaged_safetensors(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"\xff" * 20)
    load_file(path)


def raise_user_error(tmp_path):
    raise UserError("a wrong flag:\n  say which")


def raise_os_error(tmp_path):
    open(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "main, words",
    [
        (raise_user_error, "a wrong flag: say which"),
        (raise_os_error, "No such file or directory"),
        (damaged_safetensors, "header"),
        (lambda tmp_path: Parser().parse_args(["--no_such"]), "--no_such; --help lists the flags"),
    ],
    ids=["UserError", "OSError", "SafetensorError", "Parser"],
)
def test_bad_input_is_one_line_and_exit_code_2(main, words, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["/some/where/tool.py"])
    with pytest.raises(SystemExit) as stop:
        run_cli(lambda: main(tmp_path))
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == ""
    assert err.startswith("tool.py: ") and words in err and err.count("\n") == 1


@pytest.mark.parametrize("said", ["", "to go on: python x.py"])
def test_ctrl_c_is_one_line_and_exit_code_130(said, capsys):
    def main():
        raise KeyboardInterrupt(said)

    with pytest.raises(SystemExit) as stop:
        run_cli(main)
    err = capsys.readouterr().err
    assert stop.value.code == 130
    assert (said or "the same command begins again") in err and err.strip().count("\n") == 0


def test_faults_of_our_own_keep_their_traceback():
    with pytest.raises(ZeroDivisionError):
        run_cli(lambda: 1 / 0)


# --------------------------------------------------------------------------------------------------
# Devices and progress


def test_devices(monkeypatch):
    assert pick_device("cpu") == "cpu"
    with pytest.raises(UserError, match="unknown device 'abacus'"):
        pick_device("abacus")
    with pytest.raises(UserError, match="unknown device 'meta'"):
        pick_device("meta")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert pick_device("auto") == "cpu"
    with pytest.raises(UserError, match="torch sees 0 GPUs: use --device cpu"):
        pick_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device("auto") == "cuda" and pick_device("cuda:1") == "cuda:1"
    with pytest.raises(UserError, match="torch sees 2 GPUs"):
        pick_device("cuda:2")


def test_peak_memory_sees_what_was_held():
    before = peak_gb("cpu")
    torch.ones(50_000_000)  # 0.2 GB, touched and let go
    assert 0.05 < before and peak_gb("cpu") >= max(before, 0.2)


def test_fractions_of_a_unit_add_up_on_the_bar_without_a_warning(capsys):
    """In floats 20 x 0.8 is more than 16, at which tqdm would warn."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with progress_bar(total=16, unit="images") as bar:
            for _ in range(20):
                bar.update(16 / 20)
    assert bar.n > 16 and bar.n == pytest.approx(16)
    last = capsys.readouterr().err.split("\r")[-1]
    assert "100%" in last and "16/16 images" in last
    assert not caught


# --------------------------------------------------------------------------------------------------
# Files


@pytest.mark.parametrize("data", [b"\x00new", "new \u00e9", lambda file: file.write(b"new")])
def test_write_file_takes_bytes_text_or_a_writer(tmp_path, data):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    write_file(str(path), data)
    expected = {bytes: b"\x00new", str: "new \u00e9".encode()}.get(type(data), b"new")
    assert path.read_bytes() == expected and os.listdir(tmp_path) == ["file"]


def write_tensors(file):
    torch.save({"a": torch.randn(10_000)}, file)


@pytest.mark.parametrize("data", [write_tensors, b"x" * 10_000], ids=["state", "bytes"])
def test_a_disk_that_fills_up_leaves_the_old_file_whole(small_files, tmp_path, data):
    """torch.save says RuntimeError for what the disk says."""
    path = tmp_path / "state.pt"
    path.write_bytes(b"old")
    with pytest.raises(UserError, match="File too large.*free some space"):
        write_file(str(path), data)
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["state.pt"]


def test_what_is_no_fault_of_the_disk_is_not_blamed_on_it(tmp_path):
    def broken(file):
        raise RuntimeError("CUDA error")

    with pytest.raises(RuntimeError, match="CUDA error"):
        write_file(str(tmp_path / "state.pt"), broken)
    assert os.listdir(tmp_path) == []


def test_a_kill_before_the_rename_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def kill(*names):
        (temporary,) = tmp_path.glob("*.tmp")
        assert temporary.read_bytes() == b"new"  # whole, before the rename
        raise SystemExit

    monkeypatch.setattr(os, "replace", kill)
    with pytest.raises(SystemExit):
        write_file(str(path), b"new")
    assert path.read_bytes() == b"old"


def test_make_folder_makes_it_or_names_the_flag(tmp_path):
    make_folder(str(tmp_path / "a" / "b"))
    make_folder(str(tmp_path / "a" / "b"))  # there already
    assert (tmp_path / "a" / "b").is_dir()
    (tmp_path / "file").write_text("I am a file")
    with pytest.raises(UserError, match="choose another --output_dir"):
        make_folder(str(tmp_path / "file" / "b"))
    with pytest.raises(UserError, match="choose another --cache_dir"):
        make_folder(str(tmp_path / "file"), "--cache_dir")


# --------------------------------------------------------------------------------------------------
# Prompts


@pytest.mark.parametrize(
    "name, content",
    [
        ("p.txt", "\ufeffa sun\r\n\r\n  a \t moon \n"),
        ("p.json", '["a sun", "a moon"]'),
        ("p.json", '[{"caption": "a sun", "prompt": "no"}, {"prompt": "a  moon"}]'),
        ("p.jsonl", '{"prompt": "a sun", "id": 1}\n\n"a  moon"\n'),
        ("p.csv", 'id,caption\n1,a sun\n2,"a moon"\n'),
        ("p.CSV", 'prompt\na sun\n"a\nmoon"\n'),
    ],
)
def test_prompts_of_every_format(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content.encode())
    assert read_prompts(str(path)) == ["a sun", "a moon"]


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("p.txt", b"", "is empty"),
        ("p.txt", b"\n  \n", "is empty"),
        ("p.txt", b"\xff\xfe\x00binary", "cannot read prompts file"),
        ("p.txt", b"a\0b", "cannot read prompts file"),
        ("p.json", b'{"caption": 1', "with caption or prompt"),
        ("p.json", b"[3]", "with caption or prompt"),
        ("p.json", b'"a sun"', "with caption or prompt"),
        ("p.json", b'[{"caption": null}]', "with caption or prompt"),
        ("p.json", b'{"a sun": 1, "a moon": 2}', "with caption or prompt"),
        ("p.json", b'[{"words": "a"}]', "with caption or prompt"),
        ("p.jsonl", b'{"prompt": "a sun"\n', "with caption or prompt"),
        ("p.csv", b"words\na sun\n", "with caption or prompt"),
        ("p.csv", b"id,caption\n1\n", "with caption or prompt"),
    ],
)
def test_bad_prompts_files_are_named(tmp_path, name, content, words):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=words) as error:
        read_prompts(str(path))
    assert name in str(error.value)


def test_a_prompts_file_that_is_not_there():
    with pytest.raises(UserError, match="cannot read prompts file 'nowhere.txt'"):
        read_prompts("nowhere.txt")


@pytest.mark.parametrize("n, count", [(81, 32), (4000, 32), (10, 32), (10, 3), (3, 1), (2, 5)])
def test_held_out_prompts_are_no_training_prompts_and_lie_evenly(n, count):
    prompts = [f"prompt {i}" for i in range(n)]
    training, held = hold_out(prompts, count)
    assert len(held) == min(count, n // 2)
    assert sorted(training + held) == sorted(prompts)  # each once, on one side
    places = [prompts.index(prompt) for prompt in held] + [n]  # n: the list's end
    gaps = {b - a for a, b in zip(places, places[1:])}
    assert places[0] == 0 and gaps <= {n // len(held), math.ceil(n / len(held))}
    assert hold_out(prompts + prompts[:5], count) == (training, held)  # given twice is once


def test_one_prompt_is_on_both_sides_aloud(capsys):
    assert hold_out(["a sun", "a sun"], 32) == (["a sun"], ["a sun"])
    assert "none is held out" in capsys.readouterr().out


# --------------------------------------------------------------------------------------------------
# Pictures


def test_to_pil_rounds_and_clips():
    image = torch.tensor([-0.1, 0.0, 0.4 / 255, 0.6 / 255, 1.0, 1.2]).expand(3, 1, 6)
    for dtype in (torch.float32, torch.float64):
        pixels = np.asarray(to_pil(image.to(dtype)))
        assert pixels.shape == (1, 6, 3)
        assert pixels[0, :, 0].tolist() == [0, 0, 0, 1, 255, 255]


def test_a_png_holds_the_same_pixels(tmp_path):
    pixels = torch.randint(0, 256, (3, 5, 7), generator=torch.Generator().manual_seed(0))
    write_png(to_pil(pixels / 255), str(tmp_path / "x.png"))
    saved = np.asarray(Image.open(tmp_path / "x.png"))
    assert (saved.transpose(2, 0, 1) == pixels.numpy()).all()


@pytest.mark.parametrize("size, cell", [((6, 8), 32), ((60, 80), 32)])
def test_a_grid_shows_every_image_under_its_label(tmp_path, size, cell):
    """Pictures of one red each: no resampling changes it, and no letter has its colour."""
    height = round(cell * size[0] / size[1])
    reds = torch.tensor([50, 100, 150, 200, 250])
    images = torch.zeros(5, 3, *size)
    images[:, 0] = reds.view(5, 1, 1) / 255
    labelled_grid([("a", images[:3]), ("b", images[3:])], str(tmp_path / "g.png"), cell)
    sheet = np.asarray(Image.open(tmp_path / "g.png")).astype(int)
    corners = []
    for red in reds.tolist():
        rows, columns = np.where((sheet == [red, 0, 0]).all(2))
        assert len(rows) == height * cell
        top, left = rows.min(), columns.min()
        assert rows.max() - top == height - 1 and columns.max() - left == cell - 1
        corners.append((top, left))
    tops, lefts = zip(*corners)
    assert tops[0] == tops[1] == tops[2] < tops[3] == tops[4]
    assert lefts[0] == lefts[3] < lefts[1] == lefts[4] < lefts[2]
    for top, above in ((tops[0], 0), (tops[3], tops[0] + height)):
        assert sheet[above:top].max() == 255 and sheet[above:top].min() < 100  # letters on white


def test_a_figure_is_saved(tmp_path):
    save_figure(Figure((2, 1)), str(tmp_path / "f.png"))
    assert Image.open(tmp_path / "f.png").size == (260, 130)


def test_prompt_of_prefers_the_caption_as_spos_file_has_it():
    item = json.loads('{"caption": "a", "prompt": "b"}')
    assert common.prompt_of(item) == "a"


TABLES = {
    "prompts.tsv": "Prompt\tCategory\na sun, red\tWorld\na moon\tArts\n",
    "prompts.csv": 'index, Prompts \n1,"a sun, red"\n2, a moon\n',
    "prompts.jsonl": '{"TEXT": "a sun, red"}\n{"text": " a moon "}\n',
    "prompts.json": '[{"Caption": "a sun, red"}, "a moon"]',
    "prompts.txt": "a sun, red\r\na moon",
}


@pytest.mark.parametrize("name", TABLES)
def test_prompts_as_they_come(tmp_path, name):
    """cases.md 5 and 13: tabs, columns of any case, cells with spaces around them."""
    (tmp_path / name).write_text(TABLES[name], newline="")
    assert read_prompts(str(tmp_path / name)) == ["a sun, red", "a moon"]


def test_prompts_of_a_parquet_file(tmp_path):
    pd.DataFrame({"Prompt": ["a sun, red", "a moon"]}).to_parquet(tmp_path / "p.parquet")
    assert read_prompts(str(tmp_path / "p.parquet")) == ["a sun, red", "a moon"]


def test_lines_end_at_newlines_alone(tmp_path):
    """datasets#3729: with str.splitlines image P would be scored under another prompt."""
    odd = ["a\u2028sun", "a\x0bmoon", "a\x85sea", "snow"]
    (tmp_path / "p.txt").write_text("\n".join(odd) + "\n", encoding="utf-8", newline="")
    assert read_prompts(str(tmp_path / "p.txt")) == ["a sun", "a moon", "a sea", "snow"]


def test_a_blank_line_is_refused_where_lines_are_numbers(tmp_path):
    (tmp_path / "p.txt").write_text("a sun\n\na moon\n\n")
    assert read_prompts(str(tmp_path / "p.txt")) == ["a sun", "a moon"]
    with pytest.raises(UserError, match="prompt 2 is blank"):
        read_prompts(str(tmp_path / "p.txt"), numbered=True)


def test_the_columns_found_are_shown(tmp_path):
    (tmp_path / "p.csv").write_text("id,words\n1,a sun\n")
    with pytest.raises(UserError, match="its columns are id, words"):
        read_prompts(str(tmp_path / "p.csv"))
    (tmp_path / "p.csv").write_text("caption\na sun, red\n")  # a comma that is not quoted
    with pytest.raises(UserError, match="line 2: no column for .' red'.: quote"):
        read_prompts(str(tmp_path / "p.csv"))
    (tmp_path / "p.json").write_text('["a \\ud800 sun"]')
    with pytest.raises(UserError, match="cannot read prompts file"):
        read_prompts(str(tmp_path / "p.json"))


def test_a_closed_pipe_ends_quietly_and_odd_letters_stop_nothing(tmp_path):
    """cases.md 15: `| head`, and a stdout that is not UTF-8."""
    code = "from parts.common import run_cli; run_cli(lambda: print('sun \\u2600\\n' * 50_000))"
    run = f'{sys.executable} -c "{code}"'
    options = dict(shell=True, capture_output=True, cwd=ROOT, executable="/bin/bash")
    done = subprocess.run(f"set -o pipefail; {run} | head -1", **options)
    assert done.returncode == 141 and done.stderr == b""
    done = subprocess.run(f"PYTHONIOENCODING=ascii {run}", **options)
    assert done.returncode == 0 and done.stdout.startswith(b"sun \\u2600") and done.stderr == b""
