"""
The analysis of the paper as pictures: Figure 2, theorems 3 and 4, and where real training walks on those surfaces.

    python landscape.py                                     all divergences, about 10 seconds on a CPU
    python landscape.py --runs out/toy-js out/toy-rkl       and the paths and curves of these runs
    python landscape.py --div js rkl --beta 1               some rows, another beta

Writes to --output_dir (out/landscape), each figure as .png and .pdf, the numbers behind it as .csv:

    figure2      the surface of eq. 6 over (X_1, X_2) = (X_w, X_l) from two sides, its gradient (theorem 3) at Z = 50
                 (.csv: figure2_surface, figure2_field)
    theorem4     the gradient ratios f''(X_1)/f''(X_2); the chain of inequalities is checked on a grid, and printed
    near_one     f' inside SPO's clamp, as it is and at matched curvature, and far outside
                 (printed, and effective_beta.csv: the beta of the reverse KL that each stands for near X = 1)
    smoothness   (.csv only, and printed) largest gradient norm and Hessian eigenvalue: is Jensen-Shannon the smoothest?
    runs         with --runs: the path of (X_w, X_l), geometric means of a step, on each run's surface; reward, margin,
                 accuracy, clip fraction
                 (.csv: runs, runs_surface)

A divergence of your own, a line added to divergences.TABLE, is in every figure under its name. All of it is float64.
"""
import argparse
import csv
import io
import json
import logging
import math
import os
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image

from divergences import TABLE, get_divergence
from loss import gradient_ratio, surface, surface_gradient
from sample import Parser, UserError, make_folder, progress_bar, run_cli, write_file

ALPHAS = (0.2, 0.4, 0.6, 0.8)          # the paper's
PAPER = ("rkl", *(f"alpha{a:g}" for a in ALPHAS), "fkl", "js")
X_RANGE = (0.02, 3.0)                  # Figure 2: at beta 10 reverse KL reaches the paper's Z = 50 in this box's corner
VIEWS = ((30, -55), (30, 125))         # (elevation, azimuth): into the wall of wrongly ordered pairs, and from behind it
REGIONS = ((0.9, 1.1), (0.5, 2.0), (0.1, 10.0))  # SPO's clamp, a factor of 2, a factor of 10; squares in (X_1, X_2)
PAGE = 7.2                             # inches: the figures are drawn at the width of a page, with 7 point letters
DPI = 195                              # 1404 pixels
LINES = ("-", (0, (5, 1.5)), (0, (3, 1, 1, 1)), (0, (1, 1)), (0, (7, 2)), (0, (4, 1, 1, 1, 1, 1)))
MARKERS = "osD^vPX<>*hd"
RUN_KEYS = ("log_X_w", "log_X_l", "margin", "accuracy", "clip_fraction")  # the first two are means over a step's pairs


def wide(*values):
    return torch.tensor(values, dtype=torch.float64)


def choose(names):
    """Divergences for the figures: alpha once for each of ALPHAS. In the order of their bend at X = 1,
    -f'''(1)/f''(1): 1 for rkl, 1 + a for alpha, 3/2 for js, 2 for fkl; near (1, 1) it is theorem 4's exponent."""
    divs = []
    for name in dict.fromkeys(names or TABLE):
        try:
            divs += [get_divergence("alpha", a) for a in ALPHAS] if name == "alpha" else [get_divergence(name)]
        except ValueError as e:
            raise UserError(f"--div: {e}") from e
    return sorted(divs, key=lambda d: bend(d))


def bend(div):
    return -third_derivative(wide(1.0), div).item() / div.curvature


# ---------------------------------------------------------------------------------------------------------------
# The mathematics that loss.py does not need

def third_derivative(x, div):
    """f'''(X), elementwise, by autograd of f'': a divergence of your own need not state it."""
    x = x.detach().requires_grad_()
    return torch.autograd.grad((div.d2f(x) + 0 * x).sum(), x)[0]  # 0 * x: an f'' that is constant has a gradient too


def surface_hessian(x1, x2, div, beta):
    """The second derivatives of eq. 6, (d2L/dX_1^2, d2L/dX_2^2, d2L/dX_1dX_2); x1, x2 broadcast.

    With m = beta (f'(X_1) - f'(X_2)) the loss is l(m) = -log sigmoid(m), l' = -sigmoid(-m), l'' = sigmoid(m) sigmoid(-m),
    and the chain rule gives l'' m_i m_j + l' m_ij; m_12 = 0.
    """
    m = beta * (div.df(x1) - div.df(x2))
    first, second = -torch.sigmoid(-m), torch.sigmoid(m) * torch.sigmoid(-m)
    m1, m2 = beta * div.d2f(x1), -beta * div.d2f(x2)
    return (second * m1 ** 2 + first * beta * third_derivative(x1, div),
            second * m2 ** 2 - first * beta * third_derivative(x2, div), second * m1 * m2)


def largest_eigenvalue(a, b, c):
    """Of the symmetric matrices [[a, c], [c, b]], elementwise."""
    return (a + b) / 2 + torch.hypot((a - b) / 2, c)


def largest(function, low, high, n=201, zooms=4):
    """max of function(x1 (n, 1), x2 (1, n)) over the square [low, high]^2: a grid, then finer ones round its best point."""
    box = [(math.log(low), math.log(high))] * 2  # in log X, the scale on which all these functions vary
    best = -math.inf
    for _ in range(zooms):
        u1, u2 = (torch.linspace(*side, n, dtype=torch.float64) for side in box)
        values = function(u1.exp()[:, None], u2.exp()[None])
        i, j = divmod(values.argmax().item(), n)
        best = max(best, values[i, j].item())
        box = [(u[max(k - 2, 0)].item(), u[min(k + 2, n - 1)].item()) for u, k in ((u1, i), (u2, j))]
    return best


def check_chain(n=1000):
    """Theorem 4 on n x n points, r = X_2/X_1 in [0.001, 0.999] and X_1 in [0.001, 1000]: for X_2 < X_1

        fkl r^2 < alpha r^(1+a), falling in a < rkl r < 1,    and    fkl < js r (1+X_2)/(1+X_1) < rkl

    (js against alpha has no order: see theorem4.png.) Returns (inequalities checked, violated, the smallest margin
    upper/lower - 1)."""
    r = torch.linspace(.001, .999, n, dtype=torch.float64)[None]
    x1 = torch.logspace(-3, 3, n, dtype=torch.float64)[:, None]
    ratio = {d.name: gradient_ratio(x1, r * x1, d) for d in choose(("rkl", "fkl", "alpha", "js"))}
    ratio["one"] = torch.ones_like(ratio["rkl"])
    chain = ["fkl", *(f"alpha{a:g}" for a in reversed(ALPHAS)), "rkl", "one"]
    pairs = [*zip(chain, chain[1:]), ("fkl", "js"), ("js", "rkl")]
    margins = torch.stack([ratio[upper] / ratio[lower] - 1 for lower, upper in pairs])
    return margins.numel(), (~(margins > 0)).sum().item(), margins.min().item()


# ---------------------------------------------------------------------------------------------------------------
# Files

def write_csv(path, header, rows):
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    write_file(path, out.getvalue().encode())


def grid_rows(name, *columns):
    """A row for each element of the tensors, `name` in front."""
    flat = [c.flatten().tolist() for c in torch.broadcast_tensors(*columns)]
    return [(name, *values) for values in zip(*flat)]


def save(figure, folder, name):
    import matplotlib.pyplot as plt
    pdf, png, small = io.BytesIO(), io.BytesIO(), io.BytesIO()
    figure.savefig(pdf, format="pdf", dpi=DPI)
    figure.savefig(png, format="png", dpi=DPI)
    Image.open(png).convert("RGB").quantize(256).save(small, "PNG", optimize=True)  # a third of the size, no visible change
    write_file(os.path.join(folder, f"{name}.pdf"), pdf.getvalue())
    write_file(os.path.join(folder, f"{name}.png"), small.getvalue())
    plt.close(figure)


def line_styles(n):
    """n looks that also differ in grey: lightness, dashes and marker."""
    import matplotlib.pyplot as plt
    colors = plt.cm.viridis(np.linspace(0, .78, n))
    return [dict(color=colors[i], ls=LINES[i % len(LINES)], marker=MARKERS[i % len(MARKERS)], ms=3, lw=1.1) for i in range(n)]


# ---------------------------------------------------------------------------------------------------------------
# The figures

def draw_figure2(divs, beta, folder, bar):
    """Figure 2: two views a divergence, one scale for all. Arrows: the gradient, uphill; training goes against them."""
    import matplotlib.pyplot as plt
    from mpl_toolkits.mplot3d.art3d import Line3DCollection
    top = max(5 * beta, 2)                                         # the paper's Z = 50 at its beta of 10
    n_rows = len(divs) // 2 + 1                                    # two divergences a row, and a place for the key
    figure = plt.figure(figsize=(PAGE, 1.85 * n_rows))
    surfaces, field = [], []
    x2 = X_RANGE[0] + (X_RANGE[1] - X_RANGE[0]) * spread(37)[:, None]                   # (37, 1)
    g2, g1 = torch.meshgrid(*[torch.linspace(.2, 2.8, 8, dtype=torch.float64)] * 2, indexing="ij")  # (8, 8)
    for k, div in enumerate(divs):
        x1 = clipped_axis(x2, div, beta, top)                                              # (37, 37)
        z = surface(x1, x2, div, beta)
        surfaces += grid_rows(div.name, x1, x2, z)
        d1, d2 = surface_gradient(g1, g2, div, beta)
        field += grid_rows(div.name, g1, g2, d1, d2)
        arrows = plane_arrows(g1, g2, d1, d2, beta)
        for j, (elevation, azimuth) in enumerate(VIEWS):
            ax = figure.add_axes([(k % 2 * 2 + j) / 4, 1 - (k // 2 + .96) / n_rows, .24, .95 / n_rows], projection="3d", computed_zorder=False)
            picture = ax.plot_surface(*torch.broadcast_tensors(x1, x2, z), cmap="YlGnBu", vmin=0, vmax=top, rcount=37,
                                      ccount=37, linewidth=.15, edgecolor=(0, 0, 0, .35), rasterized=True, zorder=1)
            ax.plot(*np.array([(0, 0), (3, 0), (3, 3), (0, 3), (0, 0)]).T, top, color="black", lw=.5, zorder=2)
            ax.add_collection3d(Line3DCollection([[(*p, top) for p in line] for line in arrows], colors="black", linewidths=.55, zorder=3))
            ax.view_init(elevation, azimuth)
            ax.set(xlim=(0, 3), ylim=(0, 3), zlim=(0, top), xticks=(0, 1, 2, 3), yticks=(1, 2), zticks=(0, top / 2, top))
            for axis, label in ((ax.xaxis, "$X_1$"), (ax.yaxis, "$X_2$")):
                axis.set_rotate_label(False)
                axis.set_label_text(label)
                axis.labelpad = -10
            ax.tick_params(pad=-4, labelsize=6)
            ax.set_box_aspect((1, 1, .8), zoom=.97)
        figure.text((k % 2 * 2 + 1) / 4, 1 - (k // 2 + .05) / n_rows, div.name, ha="center", va="center", fontsize=9)
        bar.update()
    k = len(divs)
    ax = figure.add_axes([k % 2 * .5 + .08, 1 - (k // 2 + .5) / n_rows, .34, .06 / n_rows])
    figure.colorbar(picture, cax=ax, orientation="horizontal").set_label(
        f"loss $L(X_1, X_2)$ of eq. 6 at $\\beta$ = {beta:g}\n\narrows: its gradient (theorem 3), in the plane $Z$ = {top:g},\n"
        f"as long as $|\\nabla L|\\, / \\,(|\\nabla L| + \\beta)$; training goes against them")
    write_csv(os.path.join(folder, "figure2_surface.csv"), ("divergence", "X_1", "X_2", "loss"), surfaces)
    write_csv(os.path.join(folder, "figure2_field.csv"), ("divergence", "X_1", "X_2", "dL_dX_1", "dL_dX_2"), field)
    save(figure, folder, "figure2")


def plane_arrows(x1, x2, d1, d2, beta):
    """Polylines [tail, tip, barb, tip, barb] centred on the points; none for what would be a dot. Norms span decades, so
    lengths are bounded: 0.45 |d| / (|d| + beta)."""
    lines = []
    for x, y, a, b in zip(*(v.flatten().tolist() for v in (x1, x2, d1, d2))):
        norm = math.hypot(a, b)
        if norm < beta / 20:
            continue
        d = .45 / (norm + beta) * complex(a, b)
        tip = complex(x, y) + d / 2
        barbs = [tip - (.06 + .2 * abs(d)) * d / abs(d) * complex(math.cos(v), math.sin(v)) for v in (-.45, .45)]
        lines.append([(p.real, p.imag) for p in (tip - d, tip, barbs[0], tip, barbs[1])])
    return lines


def spread(n):
    """n numbers from 0 to 1, dense near 0, where all but one of the surfaces are steep."""
    return torch.linspace(0, 1, n, dtype=torch.float64) ** 2


def clipped_axis(x2, div, beta, top, n=37):
    """X_1 (rows of x2, n): from where the loss falls below `top` to the end of the range. A surface cut off along its own
    contour has a clean edge; NaN for what is too high would leave a staircase, and a clip a flat lid."""
    low, high = torch.full_like(x2, X_RANGE[0]), torch.full_like(x2, X_RANGE[1])
    start = low
    for _ in range(60):  # bisection: the loss falls in X_1, and is at most ln 2 at X_1 = high >= X_2
        over = surface(start, x2, div, beta) > top
        low, high = torch.where(over, start, low), torch.where(over, high, start)
        start = (low + high) / 2
    return high + (X_RANGE[1] - high) * spread(n)


def draw_theorem4(divs, folder):
    """Left: the ratio along r = X_2/X_1. Right: the power of r that it is, which for some rows depends on X_1."""
    import matplotlib.pyplot as plt
    figure, (left, right) = plt.subplots(1, 2, figsize=(PAGE, 3.5), constrained_layout=True)
    rows = []

    def compute(panel, div, x1, r):
        x1, r = torch.broadcast_tensors(x1, r)
        ratio = gradient_ratio(x1, r * x1, div)
        exponent = ratio.log() / r.log()
        rows.extend((panel, *row) for row in grid_rows(div.name, x1, r, ratio, exponent))
        return ratio, exponent

    r, x1 = torch.linspace(.005, .995, 199, dtype=torch.float64), torch.logspace(-2, 2, 161, dtype=torch.float64)
    for k, (div, look) in enumerate(zip(divs, line_styles(len(divs)))):
        if div.name == "js":
            left.fill_between(r, compute("band", div, wide(100), r)[0], compute("band", div, wide(.01), r)[0], color="black", alpha=.1,
                              lw=0, label="js, $X_1$ from 0.01 (top) to 100")
        left.plot(r, compute("ratio", div, wide(1), r)[0], **look, markevery=(4 + 4 * k, 45), label=div.name)
        right.plot(x1, compute("exponent", div, x1, wide(.5))[1], **look, markevery=(2 + 3 * k, 32), label=div.name)
    left.set(xlabel="$r = X_2 / X_1$", ylabel="$f''(X_1) / f''(X_2)$", title="gradient ratio (eq. 7), lines at $X_1$ = 1", xlim=(0, 1), ylim=(0, None))
    right.set(xscale="log", xlabel="$X_1$", ylabel="exponent $p$", title="the same ratio as a power $r^p$, at $r$ = 1/2")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=5)
    write_csv(os.path.join(folder, "theorem4.csv"), ("panel", "divergence", "X_1", "r", "ratio", "exponent"), rows)
    save(figure, folder, "theorem4")


def draw_near_one(divs, folder):
    """f' - f'(1), what the reward is made of: inside SPO's clamp (above) and far outside (below); as it is (left) and at
    matched curvature, divided by f''(1) (right). An additive constant cancels between winner and loser."""
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(2, 2, figsize=(PAGE, 5.8), constrained_layout=True)
    rows = []
    near, far = torch.linspace(.9, 1.1, 81, dtype=torch.float64), torch.logspace(-2, 2, 161, dtype=torch.float64)
    looks = line_styles(len(divs))
    for ax, (panel, x, matched) in zip(axes.flat, [(p, x, m) for p, x in (("near", near), ("far", far)) for m in (False, True)]):
        for k, (div, look) in enumerate(zip(divs, looks)):
            slope = div.df(x) - div.df(wide(1.0))
            if matched:
                slope = slope / div.curvature
            rows += [(panel, "matched" if matched else "as it is", *row) for row in grid_rows(div.name, x, slope)]
            ax.plot(x, slope, **look, markevery=(2 + len(x) // 27 * k, len(x) // 3), label=div.name)
        ax.set(xlabel="$X$", title=("at matched curvature" if matched else "as it is") + (": SPO's clamp" if panel == "near" else ", far outside"),
               ylabel=r"$(f'(X) - f'(1))\,/\,f''(1)$" if matched else "$f'(X) - f'(1)$", xlim=(x[0].item(), x[-1].item()))
        if panel == "far":
            ax.set(xscale="log", ylim=(-10, 8))
            ax.axvspan(.9, 1.1, color="black", alpha=.15, lw=0)
        else:
            ax.set(ylim=(-.24, .24), xticks=(.9, .95, 1, 1.05, 1.1))
            for c in {1.0} if matched else {d.curvature for d in divs}:
                ax.plot(near, c * (near - 1), color="black", lw=.5, zorder=1)
                ax.text(1.103, .1 * c, f"slope {c:g}", va="center")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    write_csv(os.path.join(folder, "near_one.csv"), ("panel", "setting", "divergence", "X", "reward"), rows)
    save(figure, folder, "near_one")


def effective_betas(divs, beta, folder):
    """Near X = 1 a divergence is its slope: beta f''(1) is the beta of the reverse KL (DPO, SPO) that it stands for there.
    Beside it the largest margin inside SPO's clamp, beta (f'(1.1) - f'(0.9)), as it is and at matched curvature."""
    header = ("divergence", "f''(1)", "effective beta", "largest margin in [0.9, 1.1]", "the same at beta / f''(1)", "bend -f'''(1)/f''(1)")
    rows = []
    for d in divs:
        margin = beta * (d.df(wide(1.1)) - d.df(wide(.9))).item()
        rows.append((d.name, d.curvature, beta * d.curvature, margin, margin / d.curvature, bend(d)))
    write_csv(os.path.join(folder, "effective_beta.csv"), header, rows)
    return markdown(header, rows)


def smoothness(divs, beta, folder, bar):
    """Table and verdict: over each region the largest |gradient| and the largest Hessian eigenvalue of eq. 6's surface."""
    found = {}  # (setting, region, measure) -> {name: value}
    for div in divs:
        for setting, b in (("beta", beta), ("beta / f''(1)", beta / div.curvature)):
            for region in REGIONS:
                norm = lambda x1, x2: torch.hypot(*surface_gradient(x1, x2, div, b))
                eigenvalue = lambda x1, x2: largest_eigenvalue(*surface_hessian(x1, x2, div, b))
                for measure, function in (("gradient norm", norm), ("eigenvalue", eigenvalue)):
                    found.setdefault((setting, region, measure), {})[div.name] = largest(function, *region)
        bar.update()
    write_csv(os.path.join(folder, "smoothness.csv"), ("divergence", "setting", "low", "high", "measure", "largest"),
              [(name, s, *region, m, v) for (s, region, m), values in found.items() for name, v in values.items()])
    text = []
    for setting in ("beta", "beta / f''(1)"):
        header = (f"at {setting}, beta = {beta:g}", *(f"{m}, [{lo:g}, {hi:g}]" for lo, hi in REGIONS for m in ("gradient norm", "eigenvalue")))
        rows = [(d.name, *(found[setting, region, m][d.name] for region in REGIONS for m in ("gradient norm", "eigenvalue"))) for d in divs]
        text.append(markdown(header, rows))
    return "\n".join(text) + verdict(found)


def verdict(found):
    """Whether "Jensen-Shannon is the smoothest", of the paper's rows that were asked for, as the numbers have it."""
    lines = []
    for setting in dict.fromkeys(s for s, _, _ in found):
        parts = []
        for (s, (low, high), measure), values in found.items():
            values = {k: v for k, v in values.items() if k in PAPER}
            if s == setting and "js" in values and len(values) > 1:
                first = min(values, key=values.get)
                rank = sorted(values.values()).index(values["js"]) + 1
                parts.append((rank == 1, f"{measure} [{low:g}, {high:g}] " + ("yes" if rank == 1 else f"no ({first}; js is no. {rank} of {len(values)})")))
        if parts:
            lines.append(f"Jensen-Shannon the smoothest of the paper's rows at {setting}: {sum(ok for ok, _ in parts)} of {len(parts)}: "
                         + ", ".join(p for _, p in parts))
    return "\n".join(lines)


def markdown(header, rows):
    cell = lambda v: v if isinstance(v, str) else f"{v:.4g}"
    return "".join("| " + " | ".join(map(cell, row)) + " |\n" for row in (header, ["---"] * len(header), *rows))


# ---------------------------------------------------------------------------------------------------------------
# Real runs

def read_run(folder):
    """config.json and metrics.jsonl of a folder of train.py. Raises UserError, naming the fix."""
    def lines(name):
        path = os.path.join(folder, name)
        try:
            with open(path, encoding="utf-8") as f:
                return path, f.read()
        except (OSError, UnicodeError) as e:
            raise UserError(f"cannot read {path} ({getattr(e, 'strerror', e)}): --runs takes the folders train.py writes") from e
    path, text = lines("config.json")
    try:
        args = json.loads(text)["args"]
        div = get_divergence(args["div"], args.get("alpha"))
        beta = float(args["beta"]) / (div.curvature if args.get("match_curvature") else 1)
        if not beta > 0:
            raise ValueError(f"beta {beta}")
    except (ValueError, TypeError, KeyError) as e:
        raise UserError(f"{path} is not the config.json of a run ({type(e).__name__}: {e}): --runs takes the folders train.py writes") from e
    path, text = lines("metrics.jsonl")
    steps, rolls = [], []
    for i, line in enumerate(text.splitlines(), 1):
        try:
            r = json.loads(line)
            if r["kind"] == "step":
                steps.append((int(r["step"]), *(float(r[k]) for k in RUN_KEYS)))
            elif r["kind"] == "rollout":
                rolls.append((int(r["step"]), float(r["judge_final"])))
            if not np.isfinite((steps or rolls)[-1:]).all() or not np.isfinite(rolls[-1:]).all():
                raise ValueError("not finite")
        except (ValueError, TypeError, KeyError) as e:
            raise UserError(f"line {i} of {path} is cut or is no log line ({type(e).__name__}: {e}): delete that line, or let the run "
                            f"finish (`python train.py --resume --output_dir {folder}`)") from e
    if not steps:
        raise UserError(f"{path} holds no optimiser step yet: train longer, or leave {folder} out of --runs")
    return SimpleNamespace(label=os.path.basename(os.path.abspath(folder)), folder=folder, div=div, beta=beta, steps=np.array(steps),
                           rolls=np.array(rolls).reshape(-1, 2))


def running_mean(v, width=9):
    """Running mean, shorter at the ends."""
    window = np.ones(min(width, len(v)))
    return np.convolve(v, window, "same") / np.convolve(np.ones(len(v)), window, "same")


def draw_runs(runs, folder):
    """Above: each run's path, smoothed, on the contours of its surface, as far as it went; below: the curves of all."""
    import matplotlib.pyplot as plt
    n = min(4, max(2, len(runs)))
    n_rows = -(-len(runs) // n)
    high = PAGE / n * .98
    figure = plt.figure(figsize=(PAGE, high * n_rows + 2.1), constrained_layout=True)
    above, below = figure.subfigures(2, 1, height_ratios=(high * n_rows, 2.1))
    axes, looks = above.subplots(n_rows, n, squeeze=False), line_styles(len(runs))
    rows = []
    for ax, run in zip(axes.flat, runs):
        path = np.exp([running_mean(run.steps[:, 1]), running_mean(run.steps[:, 2])])  # (2, steps)
        reach = min(4.0, max(1e-3, 1.15 * np.abs(path - 1).max()))                     # without a clamp a run may leave any page
        x = torch.linspace(max(1 - reach, 1e-3), 1 + reach, 101, dtype=torch.float64)
        z = surface(x[None], x[:, None], run.div, run.beta)                            # rows X_2, columns X_1
        rows += grid_rows(run.label, x[None], x[:, None], z)
        ax.contourf(x, x, z.clamp(min=1e-30).log(), levels=16, cmap="Greys", alpha=.6)  # far from (1, 1) the loss spans decades
        ax.clabel(ax.contour(x, x, z, levels=np.unique(np.quantile(z, np.linspace(.04, .96, 9))), colors="black", linewidths=.4), fontsize=5.5, fmt="%.2g")
        ax.plot([x[0], x[-1]], [x[0], x[-1]], color="black", lw=.6, ls=":")
        ax.plot(*path, color="white", lw=3)
        ax.plot(*path, color="#b2182b", lw=1.2, label="running mean of 9 steps")
        ax.plot(*path[:, 0], "o", color="white", mec="black", ms=6, label="start")
        ax.plot(*path[:, -1], "*", color="#ffd92f", mec="black", ms=10, label="end")
        ax.set(title=f"{run.label}: {run.div.name}, $\\beta$ = {run.beta:g}", xlabel="$X_w$", ylabel="$X_l$", aspect="equal",
               xlim=(x[0].item(), x[-1].item()), ylim=(x[0].item(), x[-1].item()))
        ax.locator_params(nbins=5)
    for ax in list(axes.flat)[len(runs):]:
        ax.axis("off")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    above.legend(handles, labels, loc="outside upper center", ncols=3, title="paths on the contours of the loss (eq. 6)")
    curves = below.subplots(1, 4)
    for run, look in zip(runs, looks):
        look = look | dict(marker=None)
        if len(run.rolls):
            curves[0].plot(*run.rolls.T, **look)
        for ax, column in zip(curves[1:], (3, 4, 5)):
            ax.plot(run.steps[:, 0], running_mean(run.steps[:, column]), **look, label=run.label)
    for ax, title in zip(curves, ("reward: judge, final images", "margin", "accuracy", "clip fraction")):
        ax.set(title=title, xlabel="optimiser step")
    if not any(len(run.rolls) for run in runs):
        curves[0].text(.5, .5, "no rollouts:\nfixed pairs", ha="center", va="center", transform=curves[0].transAxes)
    curves[2].axhline(.5, color="black", lw=.6, ls=":")
    curves[1].legend()
    write_csv(os.path.join(folder, "runs_surface.csv"), ("run", "X_w", "X_l", "loss"), rows)
    write_csv(os.path.join(folder, "runs.csv"), ("run", "step", *RUN_KEYS, "judge_final"),
              [(r.label, int(s[0]), *s[1:].tolist(), "") for r in runs for s in r.steps]
              + [(r.label, int(s), *[""] * len(RUN_KEYS), j) for r in runs for s, j in r.rolls.tolist()])
    save(figure, folder, "runs")


# ---------------------------------------------------------------------------------------------------------------
# Command line

def main():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--div", nargs="+", metavar="NAME", help=f"rows of TABLE, of {', '.join(TABLE)} (default: all; alpha stands for "
                        f"{', '.join(map(str, ALPHAS))})")
    parser.add_argument("--beta", type=float, default=10.0, help="of the surfaces; runs have their own (default: 10, the paper's)")
    parser.add_argument("--runs", nargs="+", metavar="FOLDER", default=[], help="folders that train.py wrote")
    parser.add_argument("--output_dir", default=os.path.join("out", "landscape"))
    args = parser.parse_args()
    if not (args.beta > 0 and math.isfinite(args.beta)):
        raise UserError(f"--beta must be positive and finite, got {args.beta}: the paper uses 10")
    divs, runs = choose(args.div), [read_run(folder) for folder in args.runs]
    for run in runs:
        if [r.label for r in runs].count(run.label) > 1:
            run.label = run.folder
    make_folder(args.output_dir)
    import matplotlib
    matplotlib.use("Agg")
    logging.getLogger("fontTools").setLevel(logging.ERROR)  # it embeds the PDFs' letters, and frowns on the dates in the fonts
    with progress_bar(total=2 * len(divs) + 2 + bool(runs), desc="landscape") as bar, matplotlib.rc_context(
            {"font.size": 7, "axes.titlesize": 7.5, "axes.grid": True, "grid.alpha": .3, "axes.axisbelow": True, "legend.framealpha": .8, "pdf.fonttype": 42}):
        draw_figure2(divs, args.beta, args.output_dir, bar)
        for draw in (lambda: draw_theorem4(divs, args.output_dir), lambda: draw_near_one(divs, args.output_dir),
                     *([lambda: draw_runs(runs, args.output_dir)] if runs else [])):
            draw()
            bar.update()
        report = smoothness(divs, args.beta, args.output_dir, bar)
    checked, violated, margin = check_chain()
    print(effective_betas(divs, args.beta, args.output_dir))
    print(report)
    print(f"theorem 4: {checked} inequalities checked on the grid, {violated} violated, smallest margin {margin:.2g} (upper/lower - 1)")
    print(f"In {args.output_dir}: figure2, theorem4, near_one{', runs' if runs else ''} as .png, .pdf and .csv; smoothness.csv, effective_beta.csv")


if __name__ == "__main__":
    run_cli(main)
