"""The paper's analysis as pictures: Figure 2, theorems 3 and 4, and where real training walks.

    python landscape.py                                   every divergence, 13 seconds on a CPU
    python landscape.py --runs out/toy-js out/toy-rkl     and the paths of these runs
    python landscape.py --div js rkl --beta 1             some divergences, another beta

It writes to --output_dir (out/landscape), the numbers of each picture beside it as .csv:

    figure2      the surface of eq. 6 over (X_1, X_2) = (X_w, X_l), seen from two sides, and its
                 gradient (theorem 3) in the plane Z = 5 beta, which is the paper's Z = 50
    theorem4     the gradient ratio f''(X_1) / f''(X_2) of eq. 7; the theorem's inequalities are
                 checked on a grid, and the count is printed
    smoothness   no picture, a table: the largest gradient norm and the largest eigenvalue of the
                 Hessian of each surface. Is Jensen-Shannon the smoothest, as the paper says?
    optimum      theorem 1's optimum of each row: at one expected reward over a line of pictures; of
                 an item that the reference hardly knows; and what gradient steps on eq. 5 reach
    runs         with --runs: the path of each run on the contours of its own surface

A divergence of your own (divergences.py shows one) appears by its name. All numbers are float64.
"""

import itertools
import math
from pathlib import Path

import numpy as np
import torch

from divergences import TABLE, get_divergence
from loss import gradient_ratio, surface, surface_gradient
from parts import common, optimum
from parts.common import UserError, make_folder, markdown, run_cli, save_figure, write_csv
from parts.flags import build_parser, check_ranges
from parts.run import read_log, running_mean

PAPER = ("rkl", "alpha", "fkl", "js")  # the rows of the paper's tables
ALPHAS = (0.2, 0.4, 0.6, 0.8)  # its values of alpha
# Theorem 4: for X_2 < X_1 the gradient ratios grow from left to right.
CHAINS = ("fkl < alpha0.8 < alpha0.6 < alpha0.4 < alpha0.2 < rkl < 1", "fkl < js < rkl < 1")
# Squares in (X_1, X_2) for the table: SPO's clamp, a factor of 2, a factor of 10.
REGIONS = ((0.9, 1.1), (0.5, 2.0), (0.1, 10.0))
MEASURES = (
    "at divergence gradient_0.9_to_1.1 gradient_0.5_to_2 gradient_0.1_to_10 "
    "eigenvalue_0.9_to_1.1 eigenvalue_0.5_to_2 eigenvalue_0.1_to_10"
)


def main():
    args = parse_arguments()
    divs = choose_divergences(args.div)
    runs = [read_run(folder) for folder in args.runs]
    make_folder(args.output_dir)
    import matplotlib

    with matplotlib.rc_context({"font.size": 7}):
        draw_figure2(divs, args.beta, args.output_dir)
        draw_theorem4(divs, args.output_dir)
        draw_optimum(divs, args.output_dir)
        if runs:
            draw_runs(runs, args.output_dir)
    print(smoothness(divs, args.beta, args.output_dir))
    print(check_theorem4())
    print(f"In {args.output_dir}: the pictures as .png, the numbers behind them as .csv")


def parse_arguments():
    flags = {
        "beta": (10.0, "(0, inf)", "the paper's is 10; runs have their own"),
        "output_dir": ("out/landscape", None, "of pictures and numbers"),
    }
    parser = build_parser(flags, __doc__)
    alphas = f"default: all; alpha stands for {ALPHAS}"
    parser.add_argument("--div", nargs="+", choices=TABLE, default=TABLE, help=alphas)
    parser.add_argument("--runs", nargs="+", default=[], help="folders that train.py wrote")
    args = parser.parse_args()
    check_ranges(flags, args)
    return args


def choose_divergences(names):
    """The rows of TABLE called `names`, in that order, once each; alpha with each of ALPHAS."""
    divs = []
    for name in dict.fromkeys(names):
        alphas = ALPHAS if name == "alpha" else (None,)
        divs += [get_divergence(name, alpha) for alpha in alphas]
    return divs


# ---- Figure 2, theorems 3 and 4 ------------------------------------------------------------------


def draw_figure2(divs, beta, folder):
    """Each surface from two sides, all on one scale, and its gradient in a plane above it."""
    top = max(5 * beta, 2.0)  # where beta is small all of the surface lies near ln 2
    steps = torch.linspace(0.08, 1, 31, dtype=torch.float64)
    points = square(3 * steps**2)  # (2, 31, 31), close where the surfaces are steep
    spots = square(3 * steps[::4])  # (2, 8, 8), of the arrows, evenly
    n_rows = math.ceil(len(divs) / 2)
    figure = new_figure(1.75 * n_rows + 0.6)
    surface_rows, gradient_rows = [], []
    for div in divs:
        loss = surface(*points, div, beta)  # (31, 31)
        gradient = torch.stack(surface_gradient(*spots, div, beta))  # (2, 8, 8)
        surface_rows += rows_of(div.name, *points, loss)
        gradient_rows += rows_of(div.name, *spots, *gradient)
        arrows = arrow_lines(spots, gradient, beta)
        # From the wall of pairs in the wrong order, X_w < X_l, and from behind it.
        for title, azimuth in ((div.name, -55), (f"{div.name} from behind", 125)):
            place = len(figure.axes) + 1
            ax = figure.add_subplot(n_rows, 4, place, projection="3d", computed_zorder=False)
            # What is higher than the plane of the arrows is cut off there.
            low = loss.clamp(max=top)
            ax.plot_surface(*points, low, cmap="YlGnBu", vmax=top, ec="#0005", lw=0.15)
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


def arrow_lines(points, gradient, beta):
    """Arrows along the gradient, centred on the points, both (2, ...): two lines for ax.plot, since
    3d quivers hide their heads in a flat plane; 0.45 |gradient| / (|gradient| + beta) long."""
    arrow = 0.45 * gradient / (torch.hypot(*gradient) + beta)  # (2, ...), as all below
    tip = points + arrow / 2
    neck = tip - 0.35 * arrow
    barb = 0.2 * torch.stack([-arrow[1], arrow[0]])
    corners = [tip - arrow, tip, neck + barb, tip, neck - barb, tip * math.nan]  # NaN lifts the pen
    return torch.stack(corners, dim=-1).flatten(1)


def draw_theorem4(divs, folder):
    """The ratio of eq. 7 over r = X_2 / X_1 at one X_1, and over X_1 at one r."""
    figure = new_figure(3)
    left, right = figure.subplots(1, 2, sharey=True)
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
        steps = [ratio[upper] / ratio[lower] for lower, upper in itertools.pairwise(names)]
        margins = torch.stack(steps) - 1
        held = (margins > 0).sum()
        count = f"{held:,} of {margins.numel():,} hold, the closest by {margins.min():.1g}"
        lines.append(f"Theorem 4, {chain}: {count}")
    return "\n".join(lines)


# ---- Theorems 1 and 2 ----------------------------------------------------------------------------


def draw_optimum(divs, folder):
    """(a) p* over a line at E[r] = 2; (b) the best item's share of p* against its share of p_ref;
    (c) the same share under Adam on eq. 5, where p_ref gives it 1e-4."""
    figure = new_figure(2.9)
    line, share, steps = figure.subplots(1, 3)
    x, p_ref, reward = a_line_of_pictures()
    line.semilogy(x, p_ref, color="0.8", lw=4, label="reference")
    rare = np.geomspace(0.1, 1e-12, 45).tolist()
    items = eight_items(1e-4)
    criticals = [optimum.critical_beta(*items, div) for div in divs]
    beta = 0.8 * min(filter(None, criticals), default=0.5)
    figures, shares, paths = [], [], []
    for div, path in zip(divs, optimum.shares_in_training(*items, beta, divs)):
        log_x, its_beta = optimum.at_expected_reward(2.0, p_ref, reward, div)
        ratio = log_x.exp()
        p = p_ref * ratio
        sums = p @ reward, p @ log_x, -p_ref @ log_x, torch.special.entr(p).sum()
        numbers = torch.stack([*sums, *ratio.aminmax()])
        figures.append([div.name, its_beta, *numbers.tolist()])
        line.semilogy(x, p, label=div.name)
        optima = [share_of_the_best(q, beta, div) for q in rare]
        share.loglog(rare, optima)
        (curve,) = steps.semilogy(path)
        end = share_of_the_best(1e-4, beta, div)
        steps.axhline(end, color=curve.get_color(), ls=":")
        shares += rows_of(div.name, rare, optima)
        paths += [(div.name, i, s, end) for i, s in enumerate(path) if i % 20 == 0]
    line.set(title="(a) optima $p^*$, all with $E[r]$ = 2", ylim=(1e-9, 1))
    line.set(xlabel="picture $x$; its reward is 0.65 $x$", ylabel="probability")
    share.set(title="(b) in the optimum", ylabel="share of the best of 8 items")
    share.set_xlabel(rf"its share of $p_{{ref}}$; $\beta$ = {beta:.2g}")
    steps.set(title="(c) in training; dotted: optimum")
    steps.set_xlabel("Adam steps on eq. 5, from $p_{ref}$ = 1e-4")
    figure.legend(loc="outside lower center", ncols=6)
    header = "divergence beta expected_reward KL_p_ref KL_ref_p entropy least_X largest_X"
    save(folder, "optimum", header, figures, figure)
    save(folder, "optimum_share", "divergence p_ref share", shares)
    save(folder, "optimum_steps", "divergence step share optimum", paths)


def a_line_of_pictures():
    """(x, p_ref, reward), (601,): four kinds of pictures, and a reward that rises to the edge."""
    x = torch.linspace(-6, 6, 601, dtype=torch.float64)
    means = torch.tensor([-4.0, -1.5, 1.0, 3.5])
    density = torch.exp(-2 * (x[:, None] - means) ** 2).sum(1)  # standard deviation 1/2
    return x, density / density.sum(), 0.65 * x


def eight_items(rare):
    """(p_ref, reward): rewards 0 to 1 in equal steps, and p_ref of the best is `rare`."""
    p_ref = torch.full((8,), (1 - rare) / 7, dtype=torch.float64)
    p_ref[-1] = rare
    return p_ref, torch.linspace(0, 1, 8).double()


def share_of_the_best(rare, beta, div):
    log_x, _ = optimum.optimal_policy(*eight_items(rare), beta, div)
    return rare * math.exp(log_x[-1])


# ---- Smoothness ----------------------------------------------------------------------------------


def smoothness(divs, beta, folder):
    """The largest slopes and bends of eq. 6's surfaces, and whether js has the least: text, CSV.
    First all at beta, then each at beta / f''(1), where all are equally steep at (1, 1)."""
    rows, printed, verdicts = [], [MEASURES.split()], []
    cases = list(itertools.product((gradient_norm, largest_eigenvalue), REGIONS))
    for setting in ("beta", "beta/f''(1)"):
        found = {}
        for div in divs:
            scale = 1.0 if setting == "beta" else div.curvature
            numbers = [largest(*case, div, beta / scale) for case in cases]
            found[div.name] = numbers
            rows.append([setting, div.name, *numbers])
            printed.append([setting, div.name, *map("{:.4g}".format, numbers)])
        if "js" in found:
            verdicts.append(f"At {setting} {verdict(found)}")
    save(folder, "smoothness", MEASURES, rows)
    return "\n".join([markdown(printed), *verdicts])


def gradient_norm(x1, x2, div, beta):
    return torch.hypot(*surface_gradient(x1, x2, div, beta))


def largest_eigenvalue(x1, x2, div, beta):
    """Of the Hessian, the symmetric matrix [[a, c], [c, b]]; elementwise."""
    a, b, c = surface_hessian(x1, x2, div, beta)
    return (a + b) / 2 + torch.hypot((a - b) / 2, c)


def surface_hessian(x1, x2, div, beta):
    """Second derivatives of eq. 6, (d2L/dX_1^2, d2L/dX_2^2, d2L/dX_1dX_2): autograd of theorem 3's
    gradient, so that a divergence of your own need not state f'''."""
    points = [x.detach().requires_grad_() for x in torch.broadcast_tensors(x1, x2)]
    d1, d2 = surface_gradient(*points, div, beta)
    d11, d12 = torch.autograd.grad(d1.sum(), points, retain_graph=True)
    _, d22 = torch.autograd.grad(d2.sum(), points)
    return d11, d22, d12


def largest(function, region, div, beta):
    """The maximum of function(x1, x2, div, beta) over a square: on a grid, then on finer ones
    around the best point so far, all even in log X, the scale on which these functions vary."""
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
    wins = np.equal(found["js"], np.min(paper, axis=0))
    count = f"{wins.sum()} of {len(wins)}"
    return f"Jensen-Shannon is the smoothest of the paper's rows here in {count} columns"


# ---- Real runs -----------------------------------------------------------------------------------


def read_run(folder):
    """(folder, divergence, beta, path) of a run. Raises UserError. path (2, steps): X_w and X_l,
    each the geometric mean over the pairs of a step."""
    fix = "--runs takes folders that train.py wrote; its --resume mends a log that was cut"
    args = common.read_json(f"{folder}/config.json", fix)["args"]
    try:
        div = get_divergence(args["div"], args["alpha"])
        beta = args["beta"] / (div.curvature if args["match_curvature"] else 1)
        logs = [(step["log_X_w"], step["log_X_l"]) for step in read_log(folder, "step")]
        if not logs or not np.isfinite(logs).all():
            raise ValueError("no optimiser step yet, or one that is not finite")
    except UserError:  # it names the file
        raise
    except (ValueError, TypeError) as error:
        raise UserError(f"cannot use the run {folder!r} ({error}): {fix}") from error
    return folder, div, beta, np.exp(logs).T


def draw_runs(runs, folder):
    """Each run's path on the contours of its surface."""
    n_rows = math.ceil(len(runs) / 2)
    figure = new_figure(3.6 * n_rows)
    path_rows, surface_rows = [], []
    for run, div, beta, path in runs:
        smooth = np.apply_along_axis(running_mean, 1, path)  # (2, steps)
        # As far as the path goes, within limits: without a clamp a run may leave any page.
        reach = np.clip(1.15 * np.abs(smooth - 1).max(), 0.001, 4)
        points = square(log_line(max(1 - reach, 0.001), 1 + reach, 101))
        loss = surface(*points, div, beta)  # (101, 101): rows X_l, columns X_w
        ax = figure.add_subplot(n_rows, 2, len(figure.axes) + 1, aspect="equal")
        # Contours at ten quantiles of the loss, which may span decades.
        levels = loss.flatten().sort().values[400::1000].clamp(1e-9).unique()
        ax.clabel(ax.contour(*points, loss, levels), fmt="%.4g")
        ax.plot(*smooth, color="crimson", marker="o", markevery=[-1])
        title = rf"{Path(run).name}: {div.name}, $\beta$ = {beta:g}; the dot is the end"
        ax.set(title=title, xlabel="$X_w$", ylabel="$X_l$")
        ax.locator_params(nbins=5)
        path_rows += rows_of(run, *path)
        surface_rows += rows_of(run, *points, loss)
    save(folder, "runs", "run X_w X_l", path_rows, figure)
    save(folder, "runs_surface", "run X_w X_l loss", surface_rows)


# ---- Grids, figures, files -----------------------------------------------------------------------


def log_line(low, high, n):
    """n points from low to high, in equal steps of log X."""
    return torch.from_numpy(np.geomspace(low, high, n))


def square(line):
    """The points (2, n, n) of a plane: X_1 grows along its columns, X_2 along its rows."""
    return torch.stack(torch.meshgrid(line, line, indexing="xy"))


def new_figure(height):
    """As wide as a page, so that its 7 point letters stay so in print; in inches."""
    from matplotlib.figure import Figure

    return Figure((7.2, height), layout="constrained")


def rows_of(name, *columns):
    """A row for each element of the columns, all of one shape, with `name` in front."""
    values = np.stack(columns).reshape(len(columns), -1).T
    return [(name, *row) for row in values.tolist()]


def save(folder, name, header, rows, figure=None):
    """name.csv, and name.png where there is a figure. header: the columns' names, one string."""
    write_csv(f"{folder}/{name}.csv", header.split(), rows)
    if figure:
        save_figure(figure, f"{folder}/{name}.png")


if __name__ == "__main__":
    run_cli(main)
