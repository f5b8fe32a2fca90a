"""The objective, from noise predictions to a loss: eq. 5 to 7 and theorem 3 of the paper.

A policy p_theta is wanted that maximises E[r] - beta D_f(p_theta || p_ref), under the constraints
sum p_theta = 1 and p_theta >= 0 (eq. 2), with multipliers lambda and zeta for them (eq. 3). At its
optimum r - beta f'(X) - lambda + zeta = 0. Since f'(X) -> -inf as X -> 0, p_theta stays positive
and zeta is 0: p* = p_ref (f')^-1((r - lambda) / beta), and a policy stands for the reward
r = beta f'(X) + const (theorem 1, eq. 4). With Bradley-Terry, P(w beats l) = sigmoid(r_w - r_l),
the constant cancels (theorem 2):

    loss = -log sigmoid( beta f'(X_w) - beta f'(X_l) ),   X = p_theta / p_ref             (eq. 5)

Two kinds of log X are here:
  1. step_log_ratios: one denoising step, a Gaussian of the same width under both policies, so that
         u = log X = (mean - mean_ref) . (x_{t-1} - (mean + mean_ref) / 2) / std^2
     reduce="sum" is the paper's X. reduce="mean", SPO's and the default of train.py, divides u by
     the latent's D dimensions: its X is the D-th root of the step's ratio (D = 16,384 for SD1.5).
     For reverse KL, whose f' is log X + 1, that is a factor in beta (and, under a clamp, in the
     width of log X's clamp). For every other row, forward KL too, it is another objective, since
     their f' is not linear in log X.
  2. noise_log_ratio: a finished image under Diffusion-DPO's bound, for preference pairs.
Nothing here knows a model: tensors in, tensors out, in fp32, or in fp64 if given fp64.
"""

import math

import torch
import torch.nn.functional as F

REDUCE = ("mean", "sum")
CLIPS = ("ratio", "onesided", "none")


def at_least_fp32(x):
    """Half precision -> fp32, since a log-ratio is a small difference; fp64 stays fp64."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def reduce_dims(x, reduce):
    """(N, ...) -> (N,): the mean or the sum over all dimensions but the first."""
    if reduce not in REDUCE:
        raise ValueError(f"unknown reduce {reduce!r}: choose one of {', '.join(REDUCE)}")
    x = x.flatten(1)
    return x.mean(1) if reduce == "mean" else x.sum(1)


# ---- log X of a denoising step -------------------------------------------------------------------


def ddim_mean_std(eps, x_t, t, alphas_cumprod, num_steps, eta=1.0):
    """One DDIM step (Song et al. 2021, eq. 12 and 16): p(x_{t-1} | x_t) = N(mean, std^2).

    eps, x_t: (N, C, H, W); t: (N,) integer timesteps, each image its own; alphas_cumprod: (T,);
    num_steps: of the sampler, whose next timestep is t - T // num_steps ("leading" spacing, which
    load_pipeline sees to), or 0 at the last step.
    Returns mean (N, C, H, W), std (N, 1, 1, 1) and x0 (N, C, H, W), the predicted clean latent.
    """
    t_prev = (t - len(alphas_cumprod) // num_steps).clamp(min=0)
    a_t = alphas_cumprod[t].view(-1, 1, 1, 1)  # alpha-bar at t, (N, 1, 1, 1)
    a_prev = alphas_cumprod[t_prev].view(-1, 1, 1, 1)
    variance = (1 - a_prev) / (1 - a_t) * (1 - a_t / a_prev)
    std = eta * variance.sqrt()
    x0 = (x_t - (1 - a_t).sqrt() * eps) / a_t.sqrt()
    mean = a_prev.sqrt() * x0 + (1 - a_prev - std**2).clamp(min=0).sqrt() * eps
    return mean, std, x0


def step_log_ratio(x_prev, mean, mean_ref, std, reduce="mean"):
    """u = log p_theta(x_prev) / p_ref(x_prev) of two Gaussians of one width. Returns (N,).

    x_prev, mean, mean_ref: (N, ...); std broadcasts against them, (N, 1, 1, 1) say. The difference
    of two squares in its factored form, so that no log-probability is ever formed. This is the
    definition; training uses the fused form below.
    """
    x_prev, mean, mean_ref, std = map(at_least_fp32, (x_prev, mean, mean_ref, std))
    return reduce_dims((mean - mean_ref) * (x_prev - (mean + mean_ref) / 2) / std**2, reduce)


def step_log_ratios(
    eps, eps_ref, x_t, x_w, x_l, t, alphas_cumprod, num_steps, eta=1.0, reduce="mean"
):
    """(u_w, u_l), each (N,): both children of x_t from ONE policy and ONE reference prediction.

    eps, eps_ref: noise predictions at x_t, guided if sampling was; x_t, x_w, x_l: latents; all
    (N, C, H, W). t, alphas_cumprod, num_steps, eta: as in ddim_mean_std.
    Winner and loser share x_t, t and prompt, so mean and std as well: the SPO reference predicts
    twice with either model and gets the same two numbers, and the same gradient.
    """
    eps, eps_ref, x_t, x_w, x_l = map(at_least_fp32, (eps, eps_ref, x_t, x_w, x_l))
    # The DDIM mean is linear in (eps, x_t), so mean - mean_ref is the mean of (eps - eps_ref, 0):
    # of two nearly equal means the difference would have lost digits that eps - eps_ref still has.
    sampler = alphas_cumprod, num_steps, eta
    difference, std, _ = ddim_mean_std(eps - eps_ref, torch.zeros_like(x_t), t, *sampler)
    midpoint, _, _ = ddim_mean_std((eps + eps_ref) / 2, x_t, t, *sampler)
    direction = difference / std**2
    u_w = reduce_dims(direction * (x_w - midpoint), reduce)
    u_l = reduce_dims(direction * (x_l - midpoint), reduce)
    return u_w, u_l


def noise_log_ratio(eps_hat, eps_ref, eps, S=1000.0, reduce="mean"):
    """u of a finished image at one timestep, Diffusion-DPO's way (arXiv 2311.12908, eq. 14):

        u = -S/2 ( |eps_hat - eps|^2 - |eps_ref - eps|^2 )

    eps_hat, eps_ref: the policy's and the reference's prediction of the noise eps in x_t; all
    (N, C, h, w). Returns (N,). S stands for the T steps of the chain. With the mean over dimensions
    and S = 1000, reverse KL at beta 5 is that paper's loss at 5000 (its code has -0.5 * 5000).

    The log X of the whole image is a mean of such u over t and noise, and the loss of that mean is
    what eq. 5 asks for. For reverse KL -log sigmoid(beta u_w - beta u_l) is convex in (u_w, u_l),
    so that the mean loss over t bounds it from above (Jensen), which Diffusion-DPO rests on. For
    other rows -log sigmoid(beta f'(e^u_w) - beta f'(e^u_l)) is not convex: there the mean over t is
    an objective of its own and no bound (tests/test_loss.py finds a violation for js).
    """
    eps_hat, eps_ref, eps = map(at_least_fp32, (eps_hat, eps_ref, eps))
    return reduce_dims(-S / 2 * (eps_hat - eps_ref) * (eps_hat + eps_ref - 2 * eps), reduce)


def alignment_loss(u_w, u_l, div, beta, clip_range=0.1, clip="ratio", weight=None):
    """Eq. 5 on a batch of pairs. u_w, u_l: log-ratios (N,). Returns (loss, stats).

    loss: the mean over the N pairs, a scalar; ln 2 where the policy is the reference. Raises
    ValueError for an empty batch, whose mean would be NaN. weight: (N,), a factor of each pair.
    clip, with c = clip_range:
      "ratio"     SPO's: X is clamped to [1-c, 1+c]. Outside the gradient is zero, also for a winner
                  that fell below 1-c or a loser that rose above 1+c: lost to training.
      "onesided"  clamps only what is already won: X_w from above, X_l from below.
      "none"      X as it is.
    stats, detached, of each pair (N,): loss; margin = beta f'(X_w) - beta f'(X_l); accuracy (1 if
    u_w > u_l, 1/2 for a tie), log_X_w, log_X_l, X_w, X_l (at most e^80, so that means are finite),
    these before any clamp; clip_fraction, the share of the two ratios that the clamp changed.
    """
    if u_w.numel() == 0:
        raise ValueError("alignment_loss needs at least one pair")
    if clip not in CLIPS:
        raise ValueError(f"unknown clip {clip!r}: choose one of {', '.join(CLIPS)}")
    v_w, v_l = u_w, u_l  # v: u after the clamp
    if clip != "none":
        if not 0 < clip_range < 1:
            raise ValueError(f"clip_range must lie strictly between 0 and 1, got {clip_range}")
        low, high = math.log1p(-clip_range), math.log1p(clip_range)  # clamping u clamps X
        v_w, v_l = u_w.clamp(max=high), u_l.clamp(min=low)
        if clip == "ratio":
            v_w, v_l = v_w.clamp(min=low), v_l.clamp(max=high)
    margin = beta * (div.reward(v_w) - div.reward(v_l))  # the divergence enters here and only here
    losses = -F.logsigmoid(margin)
    loss = losses.mean() if weight is None else (weight * losses).mean()
    stats = {
        "loss": losses,
        "margin": margin,
        "accuracy": (torch.sign(u_w - u_l) + 1) / 2,
        "log_X_w": u_w,
        "log_X_l": u_l,
        "X_w": u_w.clamp(max=80).exp(),
        "X_l": u_l.clamp(max=80).exp(),
        "clip_fraction": ((v_w != u_w).float() + (v_l != u_l).float()) / 2,
    }
    return loss, {name: value.detach() for name, value in stats.items()}


# ---- The loss as a surface over the two ratios ---------------------------------------------------


def surface(x1, x2, div, beta):
    """Eq. 6: the loss over the plane of ratios (X_1, X_2) = (X_w, X_l) > 0; elementwise.
    The same as alignment_loss without a clamp, whose reward(u) is df(X) less a constant."""
    return -F.logsigmoid(beta * (div.df(x1) - div.df(x2)))


def surface_gradient(x1, x2, div, beta):
    """Theorem 3: (dL/dX_1, dL/dX_2), elementwise; the first is never > 0, the second never < 0."""
    wrongness = torch.sigmoid(beta * (div.df(x2) - div.df(x1)))  # 1 - P(w beats l)
    return -beta * wrongness * div.d2f(x1), beta * wrongness * div.d2f(x2)


def gradient_ratio(x1, x2, div):
    """Eq. 7: |dL/dX_1| / |dL/dX_2| = f''(X_1) / f''(X_2), how far a step raises X_w per unit it
    lowers X_l. Theorem 4, where X_2 < X_1: fkl < alpha (falling in a) < rkl < 1, fkl < js < rkl.
    """
    return div.d2f(x1) / div.d2f(x2)
