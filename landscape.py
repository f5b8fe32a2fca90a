"""The paper's analysis as pictures: Figure 2, theorems 3 and 4, and where real training walks.

    python landscape.py                                   every divergence, 10 seconds on a CPU
    python landscape.py --runs out/toy-js out/toy-rkl     and the paths of these runs
    python landscape.py --div js rkl --beta 1             some divergences, another beta

It writes to --output_dir (out/landscape), the numbers of each picture beside it as .csv:

    figure2      the surface of eq. 6 over (X_1, X_2) = (X_w, X_l), seen from two sides, and its
                 gradient (theorem 3) in the plane Z = 5 beta, which is the paper's Z = 50
    theorem4     the gradient ratio f''(X_1) / f''(X_2) of eq. 7; the theorem's inequalities are
                 checked on a grid, and the count is printed
    smoothness   no picture, a table: the largest gradient norm and the largest eigenvalue of the
                 Hessian of each surface. Is Jensen-Shannon the smoothest, as the paper says?
    runs         with --runs: the path of each run on the contours of its own surface

A divergence of your own, a line in divergences.TABLE, appears everywhere by its name. All
numbers are float64.
"""

import argparse
import csv
import io
import json
import math
from pathlib import Path

import torch
from torch.nn.functional import avg_pool1d

from divergences import TABLE, get_divergence
from loss import gradient_ratio, surface, surface_gradient
from parts.common import Parser, UserError, make_folder, run_cli, save_figure, write_file

PAPER = ("rkl", "alpha", "fkl", "js")  # the rows of the paper's tables
ALPHAS = (0.2, 0.4, 0.6, 0.8)  # its values of alpha
# Theorem 4: for X_2 < X_1 the gradient ratios grow from left to right.
CHAINS = ("fkl < alpha0.8 < alpha0.6 < alpha0.4 < alpha0.2 < rkl < 1", "fkl < js < rkl < 1")
# Squares in (X_1, X_2) for the table: SPO's clamp, a factor of 2, a factor of 10.
REGIONS = ((0.9, 1.1), (0.5, 2.0), (0.1, 10.0))
MEASURES = (
    "at divergence gradient_0.9_to_1.1 eigenvalue_0.9_to_1.1 gradient_0.5_to_2 eigenvalue_0.5_to_2 "
    "gradient_0.1_to_10 eigenvalue_0.1_to_10"
)
PAGE = 7.2  # inches, the width of every picture, so that its 7 point letters stay so in print


def main():
    args = parse_arguments()
    divs = choose_divergences(args.div)
    runs = [read_run(folder) for folder in args.runs]
    make_folder(args.output_dir)
    import matplotlib.pyplot as plt

    plt.switch_backend("Agg")  # no window, even where there is a screen
    with plt.rc_context({"font.size": 7}):
        draw_figure2(divs, args.beta, args.output_dir)
        draw_theorem4(divs, args.output_dir)
        if runs:
            draw_runs(runs, args.output_dir)
    print(smoothness(divs, args.beta, args.output_dir))
    print(check_theorem4())
    print(f"In {args.output_dir}: the pictures as .png, the numbers behind them as .csv")


def parse_arguments():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    alphas = f"default: all; alpha stands for {ALPHAS}"
    parser.add_argument("--div", nargs="+", choices=TABLE, default=TABLE, help=alphas)
    parser.add_argument("--beta", type=float, default=10.0, help="default: 10; runs have their own")
    parser.add_argument("--runs", nargs="+", default=[], help="folders that train.py wrote")
    parser.add_argument("--output_dir", default="out/landscape")
    args = parser.parse_args()
    if not 0 < args.beta < math.inf:
        raise UserError(f"--beta must be positive and finite, got {args.beta}: the paper uses 10")
    return args


def choose_divergences(names):
    """The rows of TABLE called `names`, in that order, once each; alpha with each of ALPHAS."""
    divs = []
    for name in dict.fromkeys(names):
        alphas = ALPHAS if name == "alpha" else (None,)
        divs += [get_divergence(name, alpha) for alpha in alphas]
    return divs


# --------------------------------------------------------------------------------------------------
# Figure 2 and theorem 3


def draw_figure2(divs, beta, folder):
    """Each surface from two sides, all on one scale, and its gradient in a plane above it."""
    import matplotlib.pyplot as plt

    top = max(5 * beta, 2.0)  # where beta is small all of the surface lies near ln 2
    steps = torch.linspace(0.08, 1, 31, dtype=torch.float64)
    x = 3 * steps**2  # close points where the surfaces are steep
    spots = 3 * steps[::4]  # of the arrows, evenly
    n_rows = math.ceil(len(divs) / 2)
    figure = plt.figure(figsize=(PAGE, 1.75 * n_rows + 0.6), layout="constrained")
    surface_rows, gradient_rows = [], []
    for div in divs:
        loss = surface(x, x[:, None], div, beta)  # (31, 31): rows X_2, columns X_1
        gradient = surface_gradient(spots, spots[:, None], div, beta)  # two of (8, 8)
        surface_rows += rows_of(div.name, x, x[:, None], loss)
        gradient_rows += rows_of(div.name, spots, spots[:, None], *gradient)
        arrows = arrow_lines(spots, spots[:, None], *gradient, beta)
        # From the wall of pairs in the wrong order, X_w < X_l, and from behind it.
        for title, azimuth in ((div.name, -55), (f"{div.name} from behind", 125)):
            place = len(figure.axes) + 1
            ax = figure.add_subplot(n_rows, 4, place, projection="3d", computed_zorder=False)
            # What is higher than the plane of the arrows is cut off there.
            low = loss.clamp(max=top)
            ax.plot_surface(x, x[:, None], low, cmap="YlGnBu", vmax=top, ec="#0005", lw=0.15)
            ax.plot([0, 3, 3, 0, 0], [0, 0, 3, 3, 0], top, color="black", linewidth=0.4)
            ax.plot(*arrows, top, color="black", linewidth=0.6)
            ax.view_init(30, azimuth)
            ax.set_box_aspect(None, zoom=1.15)
            ax.set_xlabel("$X_1$", labelpad=-9)
            ax.set_ylabel("$X_2$", labelpad=-9)
            ax.tick_params(pad=-3)
            ax.set(title=title, zlim=(0, top))
    caption = (
        rf"Height: the loss of eq. 6 at $\beta$ = {beta:g}. Arrows in the plane Z = {top:g}: its "
        r"gradient (theorem 3), $|\nabla L| / (|\nabla L| + \beta)$ long."
    )
    figure.supxlabel(caption)
    save(folder, "figure2", "divergence X_1 X_2 loss", surface_rows, figure)
    save(folder, "figure2_gradient", "divergence X_1 X_2 dL_dX_1 dL_dX_2", gradient_rows)


def arrow_lines(x1, x2, d1, d2, beta):
    """Arrows along (d1, d2), centred on the points: two coordinates for ax.plot.

    matplotlib's 3d quiver stands its arrowheads upright, and so hides them in a flat plane. The
    norms span decades: an arrow is 0.45 |d| / (|d| + beta) long.
    """
    arrow = 0.45 * torch.stack([d1, d2]) / (torch.hypot(d1, d2) + beta)  # (2, ...), as all below
    tip = torch.stack(torch.broadcast_tensors(x1, x2)) + arrow / 2
    neck = tip - 0.35 * arrow
    barb = 0.2 * torch.stack([-arrow[1], arrow[0]])
    corners = [tip - arrow, tip, neck + barb, tip, neck - barb, tip * math.nan]  # NaN lifts the pen
    return torch.stack(corners, dim=-1).flatten(1)


# --------------------------------------------------------------------------------------------------
# Theorem 4


def draw_theorem4(divs, folder):
    """The ratio of eq. 7 over r = X_2 / X_1 at one X_1, and over X_1 at one r."""
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(PAGE, 3), sharey=True, layout="constrained")
    r, x1 = log_line(0.005, 0.995, 201), log_line(0.01, 100, 201)
    ones = torch.ones_like(r)
    rows = []
    for div in divs:
        over_r = gradient_ratio(ones, r, div)
        over_x1 = gradient_ratio(x1, x1 / 2, div)  # constant where f'' is a power of X
        rows += rows_of(div.name, ones, r, over_r) + rows_of(div.name, x1, ones / 2, over_x1)
        left.plot(r, over_r, label=div.name)
        right.semilogx(x1, over_x1)
    left.set(xlabel="$r = X_2 / X_1$, at $X_1$ = 1", ylabel="$f''(X_1) / f''(X_2)$")
    right.set(xlabel="$X_1$, at $r$ = 1/2")
    figure.legend(loc="outside lower center", ncols=6)
    save(folder, "theorem4", "divergence X_1 r ratio", rows, figure)


def check_theorem4():
    """How many inequalities of each chain hold on a million points, and by how much: text."""
    x1 = log_line(0.001, 1000, 1000)[:, None]
    x2 = x1 * log_line(0.001, 0.999, 1000)  # (1000, 1000)
    ratio = {div.name: gradient_ratio(x1, x2, div) for div in choose_divergences(PAPER)}
    ratio["1"] = torch.ones_like(x2)
    lines = []
    for chain in CHAINS:
        names = chain.split(" < ")
        steps = [ratio[upper] / ratio[lower] for lower, upper in zip(names, names[1:])]
        margins = torch.stack(steps) - 1
        held = (margins > 0).sum()
        count = f"{held:,} of {margins.numel():,} hold, the closest by {margins.min():.1g}"
        lines.append(f"Theorem 4, {chain}: {count}")
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------------
# Smoothness


def smoothness(divs, beta, folder):
    """The largest slopes and bends of eq. 6's surfaces, and whether js has the least: text, CSV.

    First all at beta, then each at beta / f''(1), where all are equally steep at (1, 1).
    """
    rows, verdicts = [], []
    for setting in ("beta", "beta/f''(1)"):
        found = {}
        for div in divs:
            scale = 1.0 if setting == "beta" else div.curvature
            numbers = measure_smoothness(div, beta / scale)
            found[div.name] = numbers
            rows.append((setting, div.name, *numbers))
        if "js" in found:
            verdicts.append(f"At {setting} {verdict(found)}")
    save(folder, "smoothness", MEASURES, rows)
    return "\n".join([markdown(MEASURES.split(), rows), *verdicts])


def measure_smoothness(div, beta):
    """For each of REGIONS the largest gradient norm and Hessian eigenvalue, all in one list."""
    return [
        largest(function, region, div, beta)
        for region in REGIONS
        for function in (gradient_norm, largest_eigenvalue)
    ]


def gradient_norm(x1, x2, div, beta):
    return torch.hypot(*surface_gradient(x1, x2, div, beta))


def largest_eigenvalue(x1, x2, div, beta):
    """Of the Hessian, the symmetric matrix [[a, c], [c, b]]; elementwise."""
    a, b, c = surface_hessian(x1, x2, div, beta)
    return (a + b) / 2 + torch.hypot((a - b) / 2, c)


def surface_hessian(x1, x2, div, beta):
    """Second derivatives of eq. 6: (d2L/dX_1^2, d2L/dX_2^2, d2L/dX_1dX_2).

    The loss is l(m) = -log sigmoid(m) of m = beta (f'(X_1) - f'(X_2)), so that by the chain rule
    L_ij = l'' m_i m_j + l' m_ij with l' = -sigmoid(-m), l'' = sigmoid(m) sigmoid(-m), m_12 = 0.
    """
    m = beta * (div.df(x1) - div.df(x2))
    first = -torch.sigmoid(-m)
    second = -first * torch.sigmoid(m)
    m1, m2 = beta * div.d2f(x1), -beta * div.d2f(x2)
    m11, m22 = beta * third_derivative(x1, div), -beta * third_derivative(x2, div)
    return second * m1**2 + first * m11, second * m2**2 + first * m22, second * m1 * m2


def third_derivative(x, div):
    """f'''(X), elementwise, by autograd of f'': a divergence of your own need not state it."""
    x = x.detach().requires_grad_()
    slope = div.d2f(x) + 0 * x  # 0 * x: an f'' that is constant has a gradient too
    return torch.autograd.grad(slope.sum(), x)[0]


def largest(function, region, div, beta):
    """The maximum of function(x1, x2, div, beta) over the square region.

    On a grid, then on finer ones around the best point so far; all are even in log X, the scale
    on which these functions vary.
    """
    x1 = x2 = log_line(*region, 201)
    for _ in range(4):
        values = function(x1, x2[:, None], div, beta)  # rows X_2, columns X_1
        row, column = divmod(values.argmax().item(), 201)
        x1, x2 = zoom(x1, column), zoom(x2, row)
    return values.max().item()


def zoom(x, i):
    """As many points as x has, from two places before number i to two after it."""
    near = x[max(i - 2, 0) : i + 3]
    return log_line(near[0], near[-1], len(x))


def verdict(found):
    """found: {divergence: its numbers}. In how many of them js is least among the paper's rows."""
    paper = [found[div.name] for div in choose_divergences(PAPER) if div.name in found]
    least = [min(column) for column in zip(*paper)]
    wins = sum(number == best for number, best in zip(found["js"], least))
    return f"Jensen-Shannon is the smoothest of the paper's rows in {wins} of {len(least)} columns"


# --------------------------------------------------------------------------------------------------
# Real runs


def read_run(folder):
    """A folder of train.py -> (folder, divergence, beta, path). Raises UserError.

    path (2, steps): X_w and X_l, each the geometric mean over the pairs of a step.
    """
    path = Path(folder, "config.json")
    try:
        args = json.loads(path.read_text("utf-8"))["args"]
        div = get_divergence(args["div"], args["alpha"])
        beta = args["beta"] / (div.curvature if args["match_curvature"] else 1)
        path = Path(folder, "metrics.jsonl")
        entries = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        steps = [entry for entry in entries if entry["kind"] == "step"]
        logs = [(step["log_X_w"], step["log_X_l"]) for step in steps]
        logs = torch.tensor(logs, dtype=torch.float64)
        if not steps or not logs.isfinite().all():
            raise ValueError("no optimiser step yet, or one that is not finite")
        return folder, div, beta, logs.exp().T
    except (OSError, ValueError, TypeError, KeyError) as error:
        why = f"cannot use {path} ({type(error).__name__}: {error})"
        fix = "--runs takes folders that train.py wrote; its --resume mends a log that was cut"
        raise UserError(f"{why}: {fix}") from error


def draw_runs(runs, folder):
    """Each run's path on the contours of its surface."""
    import matplotlib.pyplot as plt

    n_rows = math.ceil(len(runs) / 2)
    figure = plt.figure(figsize=(PAGE, PAGE / 2 * n_rows), layout="constrained")
    path_rows, surface_rows = [], []
    for run, div, beta, path in runs:
        # A running mean of 9 steps, of fewer at the ends.
        smooth = avg_pool1d(path, 9, stride=1, padding=4, count_include_pad=False)
        # As far as the path goes, within limits: without a clamp a run may leave any page.
        reach = (1.15 * (smooth - 1)).abs().max().clamp(0.001, 4.0)
        x = log_line(max(1 - reach, 0.001), 1 + reach, 101)
        loss = surface(x, x[:, None], div, beta)  # rows X_l, columns X_w
        ax = figure.add_subplot(n_rows, 2, len(figure.axes) + 1, aspect="equal")
        # As many grid points between two lines everywhere: the loss may span decades.
        levels = loss.flatten().sort().values[400::1000].clamp(1e-9).unique()
        ax.clabel(ax.contour(x, x, loss, levels), fmt="%.4g")
        ax.plot(*smooth, color="crimson", marker="o", markevery=[-1])
        title = rf"{Path(run).name}: {div.name}, $\beta$ = {beta:g}; the dot is the end"
        ax.set(title=title, xlabel="$X_w$", ylabel="$X_l$")
        ax.locator_params(nbins=5)
        path_rows += rows_of(run, *path)
        surface_rows += rows_of(run, x, x[:, None], loss)
    save(folder, "runs", "run X_w X_l", path_rows, figure)
    save(folder, "runs_surface", "run X_w X_l loss", surface_rows)


# --------------------------------------------------------------------------------------------------
# Grids and tables


def log_line(low, high, n):
    """n points from low to high, in equal steps of log X."""
    return torch.linspace(math.log(low), math.log(high), n, dtype=torch.float64).exp()


def rows_of(name, *columns):
    """A row for each element of the tensors, which broadcast, with `name` in front."""
    flat = [column.flatten().tolist() for column in torch.broadcast_tensors(*columns)]
    return [(name, *values) for values in zip(*flat)]


def save(folder, name, header, rows, figure=None):
    """name.csv, and name.png where there is a figure. header: the columns' names, one string."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header.split(), *rows])
    write_file(Path(folder, f"{name}.csv"), text.getvalue())
    if figure:
        save_figure(figure, Path(folder, f"{name}.png"))


def markdown(header, rows):
    lines = [header, ["---"] * len(header)]
    for row in rows:
        lines.append([cell if isinstance(cell, str) else f"{cell:.4g}" for cell in row])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    run_cli(main)
