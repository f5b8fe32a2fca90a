"""landscape.py: the Hessian against autograd, theorem 4 on random points, the numbers in the CSVs against loss.py, runs, bad input."""
import contextlib
import io
import json
import math
import sys
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import divergences
import landscape
from divergences import Divergence, get_divergence
from loss import gradient_ratio, surface, surface_gradient

F64 = dict(dtype=torch.float64)
DIVS = landscape.choose(None)
BY_NAME = {d.name: d for d in DIVS}
by_name = pytest.mark.parametrize("div", DIVS, ids=lambda d: d.name)
FIGURES = ("figure2", "theorem4", "near_one", "runs")


def points(n, seed=0, reach=1.5):
    g = torch.Generator().manual_seed(seed)
    return [torch.exp(torch.empty(n, **F64).uniform_(-reach, reach, generator=g)) for _ in range(2)]


def mixed():
    """The docstring's example of a divergence of one's own."""
    return Divergence("mixed", f=lambda x: (x - 0.1) * x.log(), df=lambda x: x.log() + 1 - 0.1 / x, d2f=lambda x: 1 / x + 0.1 / x ** 2,
                      reward=lambda u: u - 0.1 * torch.expm1(-u), curvature=1.1)


def write_run(folder, rollouts=True, steps=12, **args):
    """A run's folder as train.py leaves it, with the keys that count."""
    folder.mkdir()
    args = {"div": "js", "alpha": None, "beta": 10.0, "match_curvature": False} | args
    (folder / "config.json").write_text(json.dumps({"args": args}))
    lines = [{"kind": "rollout", "step": s, "judge_final": 3 + s / 4} for s in range(0, steps, 4)] if rollouts else []
    lines += [{"kind": "step", "step": s, "loss": .69, "margin": .01 * s, "accuracy": .5 + .01 * s, "log_X_w": .004 * s, "log_X_l": -.002 * s,
               "clip_fraction": .02 * s, "log_X_w_q1": None} for s in range(1, steps + 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines))
    return folder


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """Everything, once: all of TABLE and a row of the user's, two runs of which one never sampled. (folder, stdout)"""
    folder = tmp_path_factory.mktemp("landscape")
    runs = [write_run(folder / "one", div="alpha", alpha=.4), write_run(folder / "two", rollouts=False, match_curvature=True)]
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setitem(divergences.TABLE, "mixed", mixed)
        patch.setattr(sys, "argv", ["landscape.py", "--runs", *map(str, runs), "--output_dir", str(folder / "out")])
        landscape.main()
    return folder / "out", printed.getvalue()


# ---- the mathematics

@by_name
@pytest.mark.parametrize("beta", (1.0, 10.0))
def test_gradient_and_hessian_are_autograds(div, beta):
    for x1, x2 in zip(*points(60)):
        want = torch.autograd.functional.hessian(lambda a, b: surface(a, b, div, beta), (x1, x2))
        slope = torch.autograd.functional.jacobian(lambda a, b: surface(a, b, div, beta), (x1, x2))
        a, b, c = landscape.surface_hessian(x1, x2, div, beta)
        torch.testing.assert_close(torch.stack([a, c, c, b]), torch.stack([*want[0], *want[1]]), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(torch.stack(landscape.surface_gradient(x1, x2, div, beta)), torch.stack(slope), rtol=1e-10, atol=1e-10)
        eigenvalue = torch.linalg.eigvalsh(torch.stack([a, c, c, b]).view(2, 2))[-1]
        torch.testing.assert_close(landscape.largest_eigenvalue(a, b, c), eigenvalue, rtol=1e-10, atol=1e-10)


def test_a_constant_second_derivative_has_a_third():
    flat = Divergence("chi2", f=lambda x: (x - 1) ** 2 / 2, df=lambda x: x - 1, d2f=torch.ones_like, reward=torch.expm1, curvature=1.0)
    assert landscape.third_derivative(torch.ones(3, **F64), flat).tolist() == [0, 0, 0]


def test_theorem_4_on_a_million_random_points():
    """From the formulas of Table 1, by hand, and from f''; X over four decades, X_2 < X_1."""
    g = torch.Generator().manual_seed(1)
    x1 = torch.exp(torch.empty(10 ** 6, **F64).uniform_(-4.6, 4.6, generator=g))
    r = torch.empty(10 ** 6, **F64).uniform_(1e-3, 1 - 1e-6, generator=g)
    x2 = r * x1
    ratio = {name: gradient_ratio(x1, x2, div) for name, div in BY_NAME.items()}
    by_hand = {"rkl": r, "fkl": r ** 2, "js": r * (1 + x2) / (1 + x1)} | {f"alpha{a:g}": r ** (1 + a) for a in landscape.ALPHAS}
    assert set(by_hand) == set(landscape.PAPER)
    for name, want in by_hand.items():
        torch.testing.assert_close(ratio[name], want, rtol=1e-12, atol=0)
    chain = [ratio[name] for name in ("fkl", "alpha0.8", "alpha0.6", "alpha0.4", "alpha0.2", "rkl")] + [torch.ones_like(r)]
    assert all((lower < upper).all() for lower, upper in zip(chain, chain[1:]))
    assert (ratio["fkl"] < ratio["js"]).all() and (ratio["js"] < ratio["rkl"]).all()
    for name in ratio:  # and no uniform order of js with any alpha: both signs occur
        if name.startswith("alpha"):
            assert (ratio["js"] < ratio[name]).any() and (ratio["js"] > ratio[name]).any()


def test_the_check_sees_a_violation(monkeypatch):
    checked, violated, margin = landscape.check_chain(50)
    assert (checked, violated) == (8 * 50 * 50, 0) and margin > 0
    wrong = replace(BY_NAME["js"], d2f=BY_NAME["chi2kl"].d2f)  # above rkl: not what the theorem says of js
    monkeypatch.setitem(divergences.TABLE, "js", lambda: wrong)
    assert landscape.check_chain(50)[1] == 50 * 50


def test_largest_finds_a_narrow_ridge():
    peak = lambda x1, x2: 1 / (1 + 4000 * ((x1 / 1.7 - 1) ** 2 + (x2 / .6 - 1) ** 2))
    assert landscape.largest(peak, .1, 10) == pytest.approx(1, abs=1e-6)


@by_name
def test_smoothness_against_random_search(div, drawn):
    """No random point beats the table's maxima, and some come near (the gradient's lie in corners, hence 20,000 points)."""
    table = pd.read_csv(drawn[0] / "smoothness.csv").query("divergence == @div.name and setting == 'beta'")
    for _, row in table.iterrows():
        g = torch.Generator().manual_seed(0)
        u1, u2 = torch.empty(2, 20000, **F64).uniform_(math.log(row.low), math.log(row.high), generator=g)
        u2[::2] = (u1 + .01 * (u2 - u1))[::2]  # half of them near the diagonal
        x1, x2 = u1.exp(), u2.exp()
        values = (torch.hypot(*surface_gradient(x1, x2, div, 10.)) if row.measure == "gradient norm"
                  else landscape.largest_eigenvalue(*landscape.surface_hessian(x1, x2, div, 10.)))
        assert .9 * row.largest < values.max().item() <= row.largest * (1 + 1e-9), dict(row)


# ---- what the command writes

def test_every_figure_has_a_png_and_a_pdf(drawn):
    for name in FIGURES:
        with Image.open(drawn[0] / f"{name}.png") as image:
            pixels = np.asarray(image.convert("L"))
        assert pixels.shape[1] == 1404 and pixels.std() > 10 and len(np.unique(pixels)) > 50
        assert (drawn[0] / f"{name}.pdf").read_bytes().startswith(b"%PDF")
    assert not list(drawn[0].glob("*.tmp"))


def test_every_divergence_is_in_every_table_by_its_name(drawn):
    names = {"rkl", "fkl", "alpha0.2", "alpha0.4", "alpha0.6", "alpha0.8", "js", "jeffreys", "chi2kl", "mixed"}
    for name in ("figure2_surface", "figure2_field", "theorem4", "near_one", "smoothness", "effective_beta"):
        assert set(pd.read_csv(drawn[0] / f"{name}.csv")["divergence"]) == names, name
    assert all(f"| {name} |" in drawn[1] for name in names)


def test_the_csvs_hold_what_loss_says(drawn):
    column = lambda table, name: torch.tensor(table[name].tolist(), **F64)
    read = lambda name: pd.read_csv(drawn[0] / name).groupby("divergence")
    divs = BY_NAME | {"mixed": mixed()}
    for name, t in read("figure2_surface.csv"):
        z = surface(column(t, "X_1"), column(t, "X_2"), divs[name], 10.)
        torch.testing.assert_close(column(t, "loss"), z, rtol=1e-12, atol=1e-12)
        assert z.max() <= 50 + 1e-6 and t["X_1"].max() == 3 and t["X_2"].min() == .02
        edge = t.groupby("X_2")["loss"].max()  # a wall that is cut is cut AT 50
        assert ((edge > 50 - 1e-6) | (t.groupby("X_2")["X_1"].min() < .02 + 1e-6)).all()
    for name, t in read("figure2_field.csv"):
        for got, want in zip(("dL_dX_1", "dL_dX_2"), surface_gradient(column(t, "X_1"), column(t, "X_2"), divs[name], 10.)):
            torch.testing.assert_close(column(t, got), want, rtol=1e-12, atol=1e-300)
    for name, t in read("theorem4.csv"):
        x1, r = column(t, "X_1"), column(t, "r")
        torch.testing.assert_close(column(t, "ratio"), gradient_ratio(x1, r * x1, divs[name]), rtol=1e-12, atol=0)
        torch.testing.assert_close(r ** column(t, "exponent"), column(t, "ratio"), rtol=1e-10, atol=0)
    for name, t in read("near_one.csv"):
        want = divs[name].reward(column(t, "X").log())  # f'(X) - f'(1) in log space: written apart from df
        want = want / torch.tensor([divs[name].curvature if s == "matched" else 1 for s in t["setting"]], **F64)
        torch.testing.assert_close(column(t, "reward"), want, rtol=1e-9, atol=1e-12)


def test_near_one_js_is_rkl_at_half_beta(drawn):
    t = pd.read_csv(drawn[0] / "effective_beta.csv").set_index("divergence")
    assert t.loc["js", "effective beta"] == 5 and t.loc["rkl", "effective beta"] == 10
    inside, matched = "largest margin in [0.9, 1.1]", "the same at beta / f''(1)"
    assert t.loc["js", inside] == pytest.approx(t.loc["rkl", inside] / 2, rel=.01)
    assert t.loc["rkl", inside] == pytest.approx(10 * math.log(1.1 / .9))
    assert t[matched].max() / t[matched].min() < 1.01
    assert t.loc["js", "bend -f'''(1)/f''(1)"] == 1.5 and t.loc["alpha0.4", "bend -f'''(1)/f''(1)"] == pytest.approx(1.4)


def test_the_verdict_follows_the_numbers(drawn):
    table = pd.read_csv(drawn[0] / "smoothness.csv")
    said = [line for line in drawn[1].splitlines() if line.startswith("Jensen-Shannon the smoothest")]
    for setting, line in zip(("beta", "beta / f''(1)"), said, strict=True):
        t = table[(table.setting == setting) & table.divergence.isin(landscape.PAPER)]
        first = t.loc[t.groupby(["low", "high", "measure"])["largest"].idxmin(), "divergence"]
        assert f"at {setting}: {(first == 'js').sum()} of {len(first)}:" in line
    flipped = {("beta", (.5, 2.), "eigenvalue"): {"js": 2., "rkl": 1., "chi2kl": .5}}
    assert "0 of 1: eigenvalue [0.5, 2] no (rkl; js is no. 2 of 2)" in landscape.verdict(flipped)
    assert "8000000 inequalities checked on the grid, 0 violated" in drawn[1]


def test_runs_in_numbers(drawn):
    runs = pd.read_csv(drawn[0] / "runs.csv")
    one, two = runs[runs.run == "one"], runs[runs.run == "two"]
    assert one["judge_final"].dropna().tolist() == [3, 4, 5] and two["judge_final"].isna().all()
    assert two["log_X_w"].tolist() == pytest.approx([.004 * s for s in range(1, 13)]) and two["step"].tolist() == list(range(1, 13))
    t = pd.read_csv(drawn[0] / "runs_surface.csv")
    for name, div, beta in (("one", get_divergence("alpha", .4), 10.), ("two", get_divergence("js"), 20.)):  # two matched its curvature
        part = t[t.run == name]
        w, l = (torch.tensor(part[k].to_numpy(), **F64) for k in ("X_w", "X_l"))
        torch.testing.assert_close(torch.tensor(part["loss"].to_numpy(), **F64), surface(w, l, div, beta), rtol=1e-12, atol=1e-12)
        assert w.min() < 1 < w.max()


@pytest.mark.parametrize("n, flags", [(1, ["--beta", .01]), (5, ["--beta", 300])])
def test_any_number_of_runs_and_any_beta(command, tmp_path, monkeypatch, n, flags):
    """One step, one run; five runs of one name; and surfaces far flatter and steeper than the paper's."""
    for untouched in ("draw_theorem4", "draw_near_one"):  # they see neither runs nor, but for its printing, beta
        monkeypatch.setattr(landscape, untouched, lambda *args: None)
    runs = []
    for i in range(n):
        (tmp_path / str(i)).mkdir()
        runs.append(write_run(tmp_path / str(i) / "run", rollouts=i > 0, steps=1 + i, div="rkl"))
    code, out, err = command("landscape.py", "--div", "js", "rkl", "js", *flags, "--runs", *runs, "--output_dir", tmp_path / "out")
    assert code == 0 and "nan" not in out, err
    assert pd.read_csv(tmp_path / "out" / "runs.csv")["run"].nunique() == n
    assert len(pd.read_csv(tmp_path / "out" / "effective_beta.csv")) == 2
    assert np.isfinite(pd.read_csv(tmp_path / "out" / "figure2_surface.csv")["loss"]).all()


# ---- bad input

def refused(result, words):
    code, out, err = result
    assert code == 2 and words in err and err.count("\n") == 1 and "Traceback" not in err, err


@pytest.mark.parametrize("flags, words", [
    (["--div", "kl"], "choose one of rkl, fkl, alpha"), (["--div"], "expected at least one"), (["--beta", 0], "--beta must be positive"),
    (["--beta", -1], "--beta must be positive"), (["--beta", "nan"], "--beta must be positive"), (["--beta", "inf"], "finite"),
    (["--beta", "ten"], "invalid float"), (["--runs", "nowhere"], "--runs takes the folders train.py writes"), (["--no_such_flag"], "unrecognized")])
def test_flags(command, tmp_path, flags, words):
    refused(command("landscape.py", *flags, "--output_dir", tmp_path / "out"), words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name, content, words", [
    ("metrics.jsonl", None, "cannot read"), ("metrics.jsonl", "", "no optimiser step"), ("metrics.jsonl", b"\xff\xfe", "cannot read"),
    ("metrics.jsonl", '{"kind": "rollout", "step": 0, "judge_final": 3.0}\n', "no optimiser step"),
    ("metrics.jsonl", '{"kind": "step", "step": 1}\n', "line 1 of"), ("metrics.jsonl", "7\n", "line 1 of"),
    ("metrics.jsonl", '{"kind": "step", "step": 1, "log_X_w": NaN, "log_X_l": 0, "margin": 0, "accuracy": 1, "clip_fraction": 0}\n', "not finite"),
    ("config.json", None, "cannot read"), ("config.json", "{", "is not the config.json of a run"), ("config.json", "[]", "is not the config.json"),
    ("config.json", '{"args": {"div": "kl", "beta": 1}}', "unknown divergence 'kl'"), ("config.json", '{"args": {"div": "js", "beta": 0}}', "beta")])
def test_damaged_runs(command, tmp_path, name, content, words):
    run = write_run(tmp_path / "run")
    (run / name).unlink()
    if content is not None:
        (run / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    refused(command("landscape.py", "--runs", run, "--output_dir", tmp_path / "out"), words)
    assert not (tmp_path / "out").exists()


def test_a_log_cut_in_mid_line(command, tmp_path):
    log = write_run(tmp_path / "run") / "metrics.jsonl"
    log.write_text(log.read_text()[:-20])
    refused(command("landscape.py", "--runs", tmp_path / "run", "--output_dir", tmp_path / "out"), "line 15 of")


def test_an_output_that_cannot_be_written(command, tmp_path):
    (tmp_path / "file").write_text("in the way")
    refused(command("landscape.py", "--output_dir", tmp_path / "file"), "choose another --output_dir")
