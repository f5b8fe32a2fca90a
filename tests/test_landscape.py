"""landscape.py: derivatives against autograd, theorem 4 on random points, every CSV against
loss.py, what is drawn, runs, bad input.

A divergence that a fork adds to TABLE is tested like the others.
"""

import contextlib
import io
import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import divergences
import landscape
from divergences import Divergence, get_divergence
from loss import gradient_ratio, surface

F64 = {"dtype": torch.float64}
DIVS = {div.name: div for div in landscape.choose_divergences(divergences.TABLE)}
by_name = pytest.mark.parametrize("div", DIVS.values(), ids=DIVS)
RUN_FLAGS = {"div": "js", "alpha": None, "beta": 10.0, "match_curvature": False}


# a divergence of the user's own: reverse KL and a tenth of forward KL
OWN = Divergence(
    "own",
    f=lambda x: (x - 0.1) * x.log(),
    df=lambda x: x.log() + 1 - 0.1 / x,
    d2f=lambda x: 1 / x + 0.1 / x**2,
    reward=lambda u: u - 0.1 * torch.expm1(-u),
)


def random_points(n, low, high, seed=0):
    """(2, n): X_1 and X_2, even in log X."""
    generator = torch.Generator().manual_seed(seed)
    logs = torch.empty(2, n, **F64).uniform_(math.log(low), math.log(high), generator=generator)
    return logs.exp()


def autograd_gradient(x1, x2, div, beta):
    """(dL/dX_1, dL/dX_2) of eq. 6, by autograd alone; differentiable once more."""
    x1, x2 = x1.detach().requires_grad_(), x2.detach().requires_grad_()
    loss = surface(x1, x2, div, beta).sum()
    return (x1, x2), torch.autograd.grad(loss, (x1, x2), create_graph=True)


def write_run(folder, steps=12, **flags):
    """A run's folder as train.py leaves it, with the keys that count and lines of every kind."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"args": RUN_FLAGS | flags}))
    lines = [{"kind": "rollout", "step": 0, "judge_final": 3.0}]
    for step in range(steps):
        log_x_w, log_x_l = 0.004 * step, -0.002 * step
        lines.append({"kind": "step", "step": step + 1, "log_X_w": log_x_w, "log_X_l": log_x_l})
    lines += [{"kind": "table", "rows": []}, {"kind": "eval", "step": steps}, {"kind": "error"}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """All of TABLE, a row of the user's, two runs, drawn once. (folder, stdout, figures)"""
    folder = tmp_path_factory.mktemp("landscape")
    runs = [
        write_run(folder / "one", div="alpha", alpha=0.4),
        write_run(folder / "two", match_curvature=True),
    ]
    flags = ["--runs", *map(str, runs), "--output_dir", str(folder / "out")]
    figures, printed = {}, io.StringIO()
    save_figure = landscape.save_figure

    def save_and_keep(figure, path):
        figures[Path(path).stem] = figure
        save_figure(figure, path)

    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setitem(divergences.TABLE, "own", OWN)
        patch.setattr(landscape, "save_figure", save_and_keep)
        patch.setattr(sys, "argv", ["landscape.py", *flags])
        landscape.main()
    return folder / "out", printed.getvalue(), figures


def columns(table, *names):
    return [torch.tensor(table[name].to_numpy(), **F64) for name in names]


# ---- the mathematics


@by_name
@pytest.mark.parametrize("beta", (1.0, 10.0))
def test_gradient_and_hessian_are_autograds(div, beta):
    x1, x2 = random_points(200, 0.2, 5)
    variables, (d1, d2) = autograd_gradient(x1, x2, div, beta)
    h11, h12 = torch.autograd.grad(d1.sum(), variables, retain_graph=True)
    h21, h22 = torch.autograd.grad(d2.sum(), variables)
    close = {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(landscape.surface_gradient(x1, x2, div, beta), (d1, d2), **close)
    torch.testing.assert_close(
        landscape.surface_hessian(x1, x2, div, beta), (h11, h22, h12), **close
    )
    hessian = torch.stack([h11, h12, h21, h22], dim=1).view(-1, 2, 2)
    eigenvalue = torch.linalg.eigvalsh(hessian)[:, -1]
    found = landscape.largest_eigenvalue(x1, x2, div, beta)
    torch.testing.assert_close(found, eigenvalue, **close)
    norm = landscape.gradient_norm(x1, x2, div, beta)
    torch.testing.assert_close(norm, (d1**2 + d2**2).sqrt(), **close)


def test_the_hessian_where_the_second_derivative_is_constant():
    """f = X^2 / 2 at beta 2: where X_1 = X_2, L_ij = 1/4 m_i m_j of m = 2 (X_1 - X_2)."""
    flat, ones = replace(OWN, df=lambda x: x, d2f=torch.ones_like), torch.ones(1, **F64)
    assert torch.cat(landscape.surface_hessian(ones, ones, flat, 2.0)).tolist() == [1, 1, -1]


def test_theorem_4_on_a_million_random_points():
    """From the formulas of Table 1, by hand, and from f''; X over four decades, X_2 < X_1."""
    x1, _ = random_points(10**6, 0.01, 100)
    generator = torch.Generator().manual_seed(1)
    r = torch.empty(10**6, **F64).uniform_(1e-3, 1 - 1e-6, generator=generator)
    x2 = r * x1
    by_hand = {"rkl": r, "fkl": r**2, "js": r * (1 + x2) / (1 + x1)}
    for alpha in landscape.ALPHAS:
        by_hand[f"alpha{alpha:g}"] = r ** (1 + alpha)
    for name, want in by_hand.items():
        ratio = gradient_ratio(x1, x2, DIVS[name])
        torch.testing.assert_close(ratio, want, rtol=1e-12, atol=0)
    falling = ["rkl", "alpha0.2", "alpha0.4", "alpha0.6", "alpha0.8", "fkl"]
    for upper, lower in zip(falling, falling[1:]):
        assert (by_hand[lower] < by_hand[upper]).all()
    assert (by_hand["rkl"] < 1).all()
    assert (by_hand["fkl"] < by_hand["js"]).all() and (by_hand["js"] < by_hand["rkl"]).all()
    for name in falling[1:-1]:  # and no order of js with any alpha: both signs occur
        assert (by_hand["js"] < by_hand[name]).any() and (by_hand["js"] > by_hand[name]).any()


def test_the_chains_are_the_theorems(monkeypatch):
    """All hold; a row that is not where the theorem has it is counted."""
    chain, short = landscape.check_theorem4().splitlines()
    names = "fkl < alpha0.8 < alpha0.6 < alpha0.4 < alpha0.2 < rkl < 1"
    # rkl < 1 and neighbouring alphas are closest at r = 0.999, where r^0.2 leaves 0.0002.
    assert chain == f"Theorem 4, {names}: 6,000,000 of 6,000,000 hold, the closest by 0.0002"
    assert short.startswith("Theorem 4, fkl < js < rkl < 1: 3,000,000 of 3,000,000 hold")
    # chi2kl's ratio lies above rkl's: as js it would break js < rkl at every point, no more.
    chi2kl = get_divergence("chi2kl")
    monkeypatch.setitem(divergences.TABLE, "js", replace(chi2kl, name="js"))
    chain, short = landscape.check_theorem4().splitlines()
    assert "6,000,000 of 6,000,000" in chain and "2,000,000 of 3,000,000" in short
    assert "the closest by -" in short


def test_largest_finds_a_narrow_ridge():
    def peak(x1, x2, div, beta):
        return beta / (1 + 4000 * ((x1 / 1.7 - 1) ** 2 + (x2 / 0.6 - 1) ** 2))

    assert landscape.largest(peak, (0.1, 10), None, 2.0) == pytest.approx(2, abs=1e-6)
    assert landscape.largest(peak, (1.7, 10), None, 2.0) < 0.01  # the peak lies outside


@by_name
@pytest.mark.parametrize("setting", ("beta", "beta/f''(1)"))
def test_smoothness_against_random_search(div, setting, drawn):
    """No random point beats the table's maxima, and some come near. Gradients by autograd."""
    table = pd.read_csv(drawn[0] / "smoothness.csv")
    row = table[(table["divergence"] == div.name) & (table["at"] == setting)].iloc[0]
    beta = 10.0 if setting == "beta" else 10.0 / div.curvature
    for low, high in ((0.9, 1.1), (0.5, 2), (0.1, 10)):
        x1, x2 = random_points(20_000, low, high)
        x2[::2] = x1[::2] * (x2[::2] / x1[::2]) ** 0.01  # half of them near the diagonal
        norm = torch.hypot(*autograd_gradient(x1, x2, div, beta)[1]).max().item()
        eigenvalue = landscape.largest_eigenvalue(x1, x2, div, beta).max().item()
        for measure, best in (("gradient", norm), ("eigenvalue", eigenvalue)):
            largest = row[f"{measure}_{low}_to_{high}"]
            assert 0.9 * largest < best <= largest * (1 + 1e-9), (measure, low, high)


def test_arrows_point_up_the_gradient():
    points, gradient = torch.tensor([[[1.0], [2.0]], [[-3.0], [4.0]]], **F64)
    tail, tip, left, again, right, gap = landscape.arrow_lines(points, gradient, beta=5.0).T
    length = 0.45 * 5 / (5 + 5)
    torch.testing.assert_close(tip - tail, torch.tensor([-0.6, 0.8], **F64) * length)
    torch.testing.assert_close((tip + tail) / 2, torch.tensor([1.0, 2.0], **F64))
    for barb in (left, right):  # back from the tip, on either side
        assert (barb - tip) @ (tip - tail) < 0
    torch.testing.assert_close((left + right) / 2, tip - 0.35 * (tip - tail))
    assert (left - right) @ (tip - tail) == pytest.approx(0, abs=1e-12)
    assert (left - right).norm() == pytest.approx(0.4 * length)
    assert torch.equal(tip, again) and gap.isnan().all()


def test_divergences_are_chosen_in_the_order_asked_for():
    names = [div.name for div in landscape.choose_divergences(["js", "alpha", "js", "rkl"])]
    assert names == ["js", "alpha0.2", "alpha0.4", "alpha0.6", "alpha0.8", "rkl"]


# ---- what the command writes


@pytest.mark.parametrize("name", ("figure2", "theorem4", "optimum", "runs"))
def test_every_figure_is_a_page_wide_and_not_empty(drawn, name):
    with Image.open(drawn[0] / f"{name}.png") as image:
        pixels = np.asarray(image.convert("L"))
    assert pixels.shape[1] == 936  # 7.2 inches at 130 dpi
    assert pixels.std() > 10 and len(np.unique(pixels)) > 50
    assert not list(drawn[0].glob("*.tmp"))


def test_every_divergence_is_everywhere_by_its_name(drawn):
    names = {*DIVS, "own"}
    pictures = ("figure2", "figure2_gradient", "theorem4", "smoothness", "optimum")
    for name in (*pictures, "optimum_share", "optimum_steps"):
        assert set(pd.read_csv(drawn[0] / f"{name}.csv")["divergence"]) == names, name
    _, printed, figures = drawn
    titles = {ax.get_title() for ax in figures["figure2"].axes}
    assert titles == names | {f"{name} from behind" for name in names}
    legend = [text.get_text() for text in figures["theorem4"].legends[0].get_texts()]
    assert len(legend) == len(names) and set(legend) == names
    for name in names:
        assert f"| beta | {name} |" in printed and f"| beta/f''(1) | {name} |" in printed


def test_figure_2_has_two_sides_and_the_plane_of_the_gradient(drawn):
    for ax in drawn[2]["figure2"].axes:
        assert ax.azim == (125 if "behind" in ax.get_title() else -55)
        assert ax.get_zlim() == (0, 50)
        assert ax.zz_dataLim.max[0] == 50  # nothing stands out above the plane
        for line in ax.lines:  # the plane's edge and the arrows
            assert set(line.get_data_3d()[2]) == {50}
        x1, x2, arrows = ax.lines[-1].get_data_3d()
        assert 0 <= np.nanmin([x1, x2]) and np.nanmax([x1, x2]) <= 3
        # Uphill is to fewer winners, X_1 down, and more losers, X_2 up: six points an arrow.
        assert (np.diff(x1)[::6] <= 0).all() and (np.diff(x2)[::6] >= 0).all()


def test_theorem_4s_picture_shows_the_ratio_along_both_axes(drawn):
    left, right = drawn[2]["theorem4"].axes
    for by_r, by_x1 in zip(left.lines, right.lines, strict=True):
        div = (DIVS | {"own": OWN})[by_r.get_label()]
        r, ratio = torch.tensor(np.stack(by_r.get_data()), **F64)
        torch.testing.assert_close(ratio, gradient_ratio(torch.ones_like(r), r, div))
        x1, ratio = torch.tensor(np.stack(by_x1.get_data()), **F64)
        torch.testing.assert_close(ratio, gradient_ratio(x1, x1 / 2, div))


def test_the_csvs_hold_what_loss_and_autograd_say(drawn):
    divs = DIVS | {"own": OWN}
    close = {"rtol": 1e-12, "atol": 1e-12}
    for name, table in pd.read_csv(drawn[0] / "figure2.csv").groupby("divergence"):
        x1, x2, loss = columns(table, "X_1", "X_2", "loss")
        torch.testing.assert_close(loss, surface(x1, x2, divs[name], 10.0), **close)
        assert len(loss) == 31**2 and x1.max() == x2.max() == 3 and x1.min() < 0.02
    for name, table in pd.read_csv(drawn[0] / "figure2_gradient.csv").groupby("divergence"):
        x1, x2, d1, d2 = columns(table, "X_1", "X_2", "dL_dX_1", "dL_dX_2")
        _, (want1, want2) = autograd_gradient(x1, x2, divs[name], 10.0)
        torch.testing.assert_close((d1, d2), (want1, want2), rtol=1e-9, atol=1e-12)
    for name, table in pd.read_csv(drawn[0] / "theorem4.csv").groupby("divergence"):
        x1, r, ratio = columns(table, "X_1", "r", "ratio")
        torch.testing.assert_close(ratio, gradient_ratio(x1, r * x1, divs[name]), **close)
        assert set(r[x1 != 1].tolist()) == {0.5} and x1.max() > 99 and r.max() > 0.99


def test_the_optimum_in_numbers(drawn):
    """Reverse KL's is written out; a rare best item keeps its share where f'(inf) is finite."""
    table = pd.read_csv(drawn[0] / "optimum.csv").set_index("divergence")
    assert np.allclose(table["expected_reward"], 2)
    _, p_ref, reward = landscape.a_line_of_pictures()
    beta = table["beta"]["rkl"]
    log_z = torch.logsumexp(p_ref.log() + reward / beta, 0).item()
    assert table["KL_p_ref"]["rkl"] == pytest.approx(2 / beta - log_z, rel=1e-9)
    largest = math.exp(reward.max().item() / beta - log_z)
    assert table["largest_X"]["rkl"] == pytest.approx(largest, rel=1e-9)
    shares = pd.read_csv(drawn[0] / "optimum_share.csv")
    ends = pd.read_csv(drawn[0] / "optimum_steps.csv").groupby("divergence").last()
    for name, of_row in shares.groupby("divergence"):
        rarest = of_row.loc[of_row["p_ref"].idxmin()]
        keeps = math.isfinite((DIVS | {"own": OWN})[name].limit)
        assert rarest["p_ref"] == pytest.approx(1e-12)
        assert rarest["share"] > 0.5 if keeps else rarest["share"] < 1e-8
        # training arrives where f' does not saturate, and is far from there where it does
        arrived = ends["share"][name] / ends["optimum"][name]
        assert arrived < 0.7 if keeps else 0.9 < arrived < 1.1


def test_the_verdict_follows_the_numbers(drawn):
    table = pd.read_csv(drawn[0] / "smoothness.csv")
    paper = ["rkl", "fkl", "js", "alpha0.2", "alpha0.4", "alpha0.6", "alpha0.8"]
    said = [line for line in drawn[1].splitlines() if "Jensen-Shannon" in line]
    for setting, line in zip(("beta", "beta/f''(1)"), said, strict=True):
        rows = table[(table["at"] == setting) & table["divergence"].isin(paper)]
        first = rows.set_index("divergence").drop(columns="at").idxmin()
        assert line.startswith(f"At {setting} ")
        assert line.endswith(f"in {(first == 'js').sum()} of 6 columns")
    # chi2kl is not a row of the paper's: that it is smoother does not count.
    found = {"js": [2.0, 1.0], "rkl": [1.0, 3.0], "chi2kl": [0.5, 0.5]}
    assert landscape.verdict(found).endswith("in 1 of 2 columns")


def test_runs_in_numbers(drawn):
    out, _, figures = drawn
    expected = {"one": (get_divergence("alpha", 0.4), 10.0), "two": (get_divergence("js"), 20.0)}
    paths = pd.read_csv(out / "runs.csv")
    surfaces = pd.read_csv(out / "runs_surface.csv")
    for ax, (name, (div, beta)) in zip(figures["runs"].axes, expected.items(), strict=True):
        folder = str(out.parent / name)
        x_w, x_l = columns(paths[paths["run"] == folder], "X_w", "X_l")
        steps = torch.arange(12, **F64)
        close = {"rtol": 1e-12, "atol": 1e-15}  # float64, from the log to the CSV
        torch.testing.assert_close(x_w, (0.004 * steps).exp(), **close)
        torch.testing.assert_close(x_l, (-0.002 * steps).exp(), **close)
        around = columns(surfaces[surfaces["run"] == folder], "X_w", "X_l", "loss")
        torch.testing.assert_close(around[2], surface(*around[:2], div, beta))
        assert around[0].min() < 1 < around[0].max()
        assert ax.get_title().startswith(f"{name}: {div.name}, $\\beta$ = {beta:g};")
        contours = ax.collections[0]
        for level, path in zip(contours.levels, contours.get_paths(), strict=True):
            w, l = torch.tensor(path.vertices.T, **F64)
            assert ((surface(w, l, div, beta) - level).abs() < 1e-3).all()
        # The line is a mean of 9 steps, 5 at the ends, X_w to the right and X_l upwards.
        line_w, line_l = ax.lines[0].get_data()
        assert line_w[0] == pytest.approx(x_w[:5].mean().item())
        assert line_l[-1] == pytest.approx(x_l[-5:].mean().item())
        assert line_w[5] == pytest.approx(x_w[1:10].mean().item())


@pytest.mark.parametrize("count, beta", [(1, 0.01), (5, 300)])
def test_any_number_of_runs_and_any_beta(command, tmp_path, count, beta):
    """One step, one run; five runs of one name; surfaces far flatter and steeper than 10's."""
    runs = [write_run(tmp_path / str(i) / "run", steps=1 + i, div="rkl") for i in range(count)]
    flags = ["--div", "js", "rkl", "js", "--beta", beta, "--runs", *runs]
    code, out, err = command("landscape.py", *flags, "--output_dir", tmp_path / "out")
    assert code == 0 and "nan" not in out and "Warning" not in err, err
    assert pd.read_csv(tmp_path / "out" / "runs.csv")["run"].nunique() == count
    assert len(pd.read_csv(tmp_path / "out" / "smoothness.csv")) == 4  # two rows, two settings
    assert np.isfinite(pd.read_csv(tmp_path / "out" / "figure2.csv")["loss"]).all()


def test_without_js_there_is_no_verdict(command, tmp_path):
    code, out, err = command("landscape.py", "--div", "rkl", "--output_dir", tmp_path / "out")
    assert code == 0 and "Jensen-Shannon" not in out and "Theorem 4" in out, err


# ---- bad input


def refused(result, words):
    code, out, err = result
    assert code == 2 and words in err and err.count("\n") == 1 and "Traceback" not in err, err


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--div", "kl"], "invalid choice: 'kl'"),
        (["--div"], "expected at least one"),
        (["--beta", 0], "--beta must lie in (0, inf)"),
        (["--beta", -1], "--beta must lie in (0, inf)"),
        (["--beta", "nan"], "--beta must lie in (0, inf)"),
        (["--beta", "inf"], "--beta must lie in (0, inf)"),
        (["--beta", "ten"], "invalid float"),
        (["--runs", "nowhere"], "--runs takes folders that train.py wrote"),
        (["--no_such_flag"], "unrecognized"),
    ],
)
def test_flags(command, tmp_path, flags, words):
    refused(command("landscape.py", *flags, "--output_dir", tmp_path / "out"), words)
    assert not (tmp_path / "out").exists()


NOT_FINITE = '{"kind": "step", "step": 1, "log_X_w": NaN, "log_X_l": 0}\n'
WRONG_ROW = {"args": RUN_FLAGS | {"div": "kl"}}
WRONG_BETA = {"args": RUN_FLAGS | {"beta": "ten"}}


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("metrics.jsonl", None, "no optimiser step"),
        ("metrics.jsonl", "", "no optimiser step"),
        ("metrics.jsonl", b"\xff\xfe", "utf-8"),
        ("metrics.jsonl", '{"kind": "rollout", "step": 0}\n', "no optimiser step"),
        ("metrics.jsonl", '{"kind": "step", "step": 1}\n', "lacks 'log_X_w'"),
        ("metrics.jsonl", "7\n", "not subscriptable"),
        ("metrics.jsonl", NOT_FINITE, "not finite"),
        ("config.json", None, "No such file"),
        ("config.json", "{", "Expecting property name"),
        ("config.json", "[]", "no object in braces"),
        ("config.json", '{"args": {"div": "js", "beta": 0}}', "config.json lacks 'alpha'"),
        ("config.json", json.dumps(WRONG_ROW), "unknown divergence 'kl'"),
        ("config.json", json.dumps(WRONG_BETA), "unsupported operand"),
    ],
)
def test_damaged_runs(command, tmp_path, name, content, words):
    run = write_run(tmp_path / "run")
    (run / name).unlink()
    if content is not None:
        (run / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    result = command("landscape.py", "--runs", run, "--output_dir", tmp_path / "out")
    refused(result, words)
    assert str(run) in result[2]
    assert not (tmp_path / "out").exists()


def test_a_log_cut_in_mid_line(command, tmp_path):
    log = write_run(tmp_path / "run") / "metrics.jsonl"
    log.write_text(log.read_text()[:-10])
    flags = ["--runs", tmp_path / "run", "--output_dir", tmp_path / "out"]
    refused(command("landscape.py", *flags), "a cut end --resume mends itself")


def test_an_output_that_cannot_be_written(command, tmp_path):
    (tmp_path / "file").write_text("in the way")
    result = command("landscape.py", "--output_dir", tmp_path / "file")
    refused(result, "choose another --output_dir")
