"""How a flag of train.py gets its value, and that the values of SPO are SPO's."""

import json

import pytest

import train
from parts.common import UserError
from parts.flags import check_range, parse
from parts.weights import TOY


def parsed(*argv):
    words = [str(word) for word in argv]
    args, _ = parse(words, "", train.FLAGS, train.SECTIONS, train.FREE_ON_RESUME)
    return args


def test_defaults_are_spos():
    """The published SD1.5 settings, as the SPO paper and its code have them."""
    spo = dict(learning_rate=6e-5, adam_weight_decay=1e-4, train_batch_size=10, num_epochs=10)
    spo |= dict(beta=10, clip="ratio", clip_range=0.1, log_ratio="mean")
    spo |= dict(num_children=4, first_step=4, threshold=0.3, judge="step_aware")
    spo |= dict(num_inference_steps=20, eta=1, guidance_scale=5, sample_batch_size=10, rank=4)
    assert {name: train.FLAGS[name][0] for name in spo} == spo
    # four accumulated batches stand for SPO's four GPUs
    assert train.FLAGS["gradient_accumulation_steps"][0] == 4


def test_a_run_knows_its_files_from_anywhere(tmp_path, monkeypatch):
    """cases.md 16: a relative path is one of the folder that it was given in."""
    (tmp_path / "my.txt").write_text("a sun")
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    args = parsed("--model", "model", "--prompts", "my.txt", "--weights", "not/here")
    assert args.model == str(tmp_path / "model") and args.prompts == str(tmp_path / "my.txt")
    assert args.weights == "not/here" and args.output_dir == "out/model-js"
    (tmp_path / "toy").mkdir()  # a name, whatever lies here
    assert parsed("--model", "toy").model == "toy"
    assert parsed("--model", "some/model").model == "some/model"


@pytest.fixture
def folder(tmp_path):
    """A model's folder that brings defaults of its own."""
    own = {"learning_rate": 0.5, "num_epochs": 3, "pairs": {"beta": 7.0}, "full": {"rank": 9}}
    (tmp_path / "train.json").write_text(json.dumps(own))
    return tmp_path


def test_the_command_line_beats_the_folder_beats_the_table(folder):
    args = parsed("--model", folder, "--num_epochs", 2)
    assert (args.num_epochs, args.learning_rate, args.beta) == (2, 0.5, 10.0)
    args = parsed("--model", folder, "--pairs", "x")
    assert (args.beta, args.clip, args.judge) == (7.0, "none", "none")
    args = parsed("--model", folder, "--pairs", "x", "--beta", 10)  # typed, although the default
    assert args.beta == 10.0
    args = parsed("--model", folder, "--full")
    assert (args.rank, args.learning_rate, args.checkpointing_chunks) == (9, 2e-5, 25)


def test_the_toy_is_a_folder_like_any_other():
    with open(f"{TOY}/train.json") as file:
        own = json.load(file)
    args = parsed("--model", "toy")
    for name in ("judge", "num_epochs", "learning_rate"):
        assert getattr(args, name) == own[name]
    assert args.output_dir == "out/toy-js"
    alpha = parsed("--model", "toy", "--div", "alpha", "--alpha", 0.4, "--pairs", "x")
    assert alpha.output_dir == "out/toy-alpha0.4-pairs"


def test_an_unknown_flag_in_train_json_is_named(folder):
    (folder / "train.json").write_text('{"beta": 3, "betta": 1}')
    with pytest.raises(UserError, match="train.json: betta is no flag of train.py"):
        parsed("--model", folder)


@pytest.mark.parametrize(
    "allowed, inside, outside",
    [
        ("[1, inf)", (1, 10**9), (0, -1, float("nan"), float("inf"))),
        ("(0, 1)", (0.5, 1e-9), (0, 1, float("nan"))),
        ("[1, 500]", (1, 500), (0, 501)),
        (("a", "b"), ("a", "b", None), ("c", "")),
        (None, ("anything",), ()),
    ],
)
def test_ranges(allowed, inside, outside):
    for value in inside:
        check_range("flag", value, allowed)
    for value in outside:
        with pytest.raises(UserError, match="--flag"):
            check_range("flag", value, allowed)
