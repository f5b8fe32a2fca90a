"""
The objective, from a noise prediction to a loss: eq. 5 to 7 and theorem 3 of the paper.

    X    = p_theta(x_{t-1} | x_t, c) / p_ref(x_{t-1} | x_t, c)            one denoising step, u = log X
    loss = -log sigmoid( beta f'(X_w) - beta f'(X_l) )                    eq. 5 (over data), eq. 6 (as a surface)

Both policies step with the same Gaussian width, so the log-ratio of a step is a difference of two squares. It is
computed in its factored form and log-probabilities are never formed:

    u = [ |x - mean_ref|^2 - |x - mean|^2 ] / (2 std^2) = (mean - mean_ref) . (x - (mean + mean_ref)/2) / std^2

Nothing here knows a UNet: tensors in, tensors out. All of it is fp32 (or fp64 if given fp64), whatever the model ran in.
"""
import math

import torch
import torch.nn.functional as F

REDUCE = ("mean", "sum")
CLIPS = ("ratio", "onesided", "none")


def _wide(*tensors):
    """fp16 and bf16 -> fp32; fp64 stays, so that tests can ask for more digits."""
    return [x.float() if x.dtype in (torch.float16, torch.bfloat16) else x for x in tensors]


def ddim_mean_std(eps, x_t, t, alphas_cumprod, num_steps, eta=1.0):
    """The Gaussian of one DDIM step (Song et al. 2021, eq. 12 and 16): p(x_{t-1} | x_t) = N(mean, std^2).

    eps, x_t: (N, C, H, W); t: (N,) integer timesteps, mixed as they come; alphas_cumprod: (T,), kept in fp32 or
    wider; num_steps: of the sampler, so t_prev = t - T // num_steps, and 0 below it (a_0 at the last step).
    Returns mean (N, C, H, W), std (N, 1, 1, 1), x0 (N, C, H, W): the prediction of the clean latent.
    """
    shape = (-1,) + (1,) * (x_t.ndim - 1)
    table = alphas_cumprod.to(x_t.device)
    t = t.to(x_t.device)
    a_t = table[t].view(shape)
    a_prev = table[(t - len(table) // num_steps).clamp(min=0)].view(shape)
    var = (1 - a_prev) / (1 - a_t) * (1 - a_t / a_prev)
    std = eta * var.sqrt()
    x0 = (x_t - (1 - a_t).sqrt() * eps) / a_t.sqrt()
    mean = a_prev.sqrt() * x0 + (1 - a_prev - std ** 2).clamp(min=0).sqrt() * eps
    return mean, std, x0


def step_log_ratio(x_prev, mean, mean_ref, std, reduce="mean"):
    """u = log p_theta(x_prev) / p_ref(x_prev) of two Gaussians of one width.

    x_prev, mean, mean_ref (N, ...); std broadcasts against them, (N, 1, 1, 1) say. Returns (N,).
    reduce: "sum" over the latent's dimensions is the log-ratio of the densities; "mean" is what SPO and DDPO train
    on, 16,384 times smaller for SD1.5, which is why a beta of 10 and a clip range of 0.1 suit it.
    """
    x_prev, mean, mean_ref, std = _wide(x_prev, mean, mean_ref, std)
    per_dim = (mean - mean_ref) * (x_prev - (mean + mean_ref) / 2) / std ** 2
    return _reduce(per_dim, reduce)


def _reduce(per_dim, reduce):
    if reduce not in REDUCE:
        raise ValueError(f"unknown reduce {reduce!r}: choose one of {', '.join(REDUCE)}")
    return getattr(per_dim.flatten(1), reduce)(1)


def step_log_ratios(eps, eps_ref, x_t, x_w, x_l, t, alphas_cumprod, num_steps, eta=1.0, reduce="mean"):
    """(u_w, u_l), each (N,): both children of x_t from ONE policy and ONE reference prediction (fused).

    eps, eps_ref: noise predictions at x_t, guided if sampling was; x_t, x_w, x_l: latents; all (N, C, H, W).
    t: (N,) timesteps, mixed as they come; alphas_cumprod: (T,); num_steps, eta: the DDIM sampler's.
    Winner and loser share x_t, t and the prompt, so they share mean and std as well: the SPO reference predicts
    twice with either model and gets the same two numbers, and the same gradient.
    """
    eps, eps_ref, x_t, x_w, x_l = _wide(eps, eps_ref, x_t, x_w, x_l)
    # The DDIM mean is linear in (eps, x_t), so differences and midpoints of means are means of differences and
    # midpoints. mean - mean_ref, of two nearly equal numbers, would lose the digits that eps - eps_ref still has.
    delta, std, _ = ddim_mean_std(eps - eps_ref, torch.zeros_like(x_t), t, alphas_cumprod, num_steps, eta)
    middle, _, _ = ddim_mean_std((eps + eps_ref) / 2, x_t, t, alphas_cumprod, num_steps, eta)
    pull = delta / std ** 2
    return _reduce(pull * (x_w - middle), reduce), _reduce(pull * (x_l - middle), reduce)


def noise_log_ratio(eps_hat, eps_ref, eps, S=1000.0, reduce="mean"):
    """u = log X of a finished image under Diffusion-DPO's bound (arXiv 2311.12908, eq. 14), at one timestep:

        u = -S/2 ( |eps_hat - eps|^2 - |eps_ref - eps|^2 ) = -S/2 (eps_hat - eps_ref) . (eps_hat + eps_ref - 2 eps)

    eps_hat, eps_ref: the policy's and the reference's prediction of the noise eps in x_t; all (N, C, h, w). Returns (N,).
    S stands for the T steps of the chain. With the mean over dimensions and S = 1000, reverse KL at beta 5 is that paper's
    loss at beta 5000, whose code has -0.5 * 5000 in front of the same difference.
    """
    eps_hat, eps_ref, eps = _wide(eps_hat, eps_ref, eps)
    return _reduce(-S / 2 * (eps_hat - eps_ref) * (eps_hat + eps_ref - 2 * eps), reduce)


def alignment_loss(u_w, u_l, div, beta, clip_range=0.1, clip="ratio", weight=None):
    """Eq. 5 on a batch of pairs. u_w, u_l: log-ratios (N,). Returns (loss, stats).

    loss: the mean over the N pairs, a scalar; ln 2 where the policy is the reference. An empty batch raises
    ValueError, since its mean would be NaN. weight (N,): of each pair in the sum that is divided by N; 1 by default.
    clip, with c = clip_range:
      "ratio"     SPO's: X is clamped to [1-c, 1+c]. Outside, the gradient is zero, also for a winner that fell below
                  1-c or a loser that rose above 1+c: such a pair is lost to training.
      "onesided"  only what is already won is clamped: X_w from above, X_l from below. A pair on the wrong side keeps
                  its gradient and can recover.
      "none"      X as it is.
    stats: per pair and detached, (N,) each: loss; margin = beta f'(X_w) - beta f'(X_l), the argument of the sigmoid;
    accuracy (1 where u_w > u_l, 1/2 for a tie, before any clamp); log_X_w, log_X_l: u_w and u_l, whose means one outlier
    does not rule; X_w, X_l (before any clamp, but at most e^80, so that their means are finite); clip_fraction (the share
    of the pair's two ratios that the clamp changed).
    """
    if u_w.numel() == 0:
        raise ValueError("alignment_loss needs at least one pair")
    if clip not in CLIPS:
        raise ValueError(f"unknown clip {clip!r}: choose one of {', '.join(CLIPS)}")
    v_w, v_l = u_w, u_l
    if clip != "none":
        if not 0 < clip_range < 1:
            raise ValueError(f"clip_range must lie strictly between 0 and 1, got {clip_range}")
        low, high = math.log1p(-clip_range), math.log1p(clip_range)  # log(1-c), log(1+c): clamping u clamps X
        v_w = u_w.clamp(min=low if clip == "ratio" else None, max=high)
        v_l = u_l.clamp(min=low, max=high if clip == "ratio" else None)
    margin = beta * (div.reward(v_w) - div.reward(v_l))  # the divergence enters here and nowhere else
    losses = -F.logsigmoid(margin)                       # softplus would do, but is only y = x above 20
    total = losses if weight is None else weight * losses
    stats = {"loss": losses, "margin": margin, "accuracy": (torch.sign(u_w - u_l) + 1) / 2,
             "log_X_w": u_w, "log_X_l": u_l, "X_w": u_w.clamp(max=80).exp(), "X_l": u_l.clamp(max=80).exp(),
             "clip_fraction": ((v_w != u_w).float() + (v_l != u_l).float()) / 2}
    return total.mean(), {k: v.detach() for k, v in stats.items()}


def surface(x1, x2, div, beta):
    """Eq. 6, the loss over the plane of ratios (X_1, X_2) = (X_w, X_l) > 0; elementwise."""
    return -F.logsigmoid(beta * (div.df(x1) - div.df(x2)))


def surface_gradient(x1, x2, div, beta):
    """Theorem 3: (dL/dX_1, dL/dX_2), elementwise; the first is never positive, the second never negative."""
    weight = beta * torch.sigmoid(beta * (div.df(x2) - div.df(x1)))  # how wrong the order of the pair still is
    return -weight * div.d2f(x1), weight * div.d2f(x2)


def gradient_ratio(x1, x2, div):
    """Eq. 7: |dL/dX_1| / |dL/dX_2| = f''(X_1) / f''(X_2): how much a step raises the winner for what it lowers the loser."""
    return div.d2f(x1) / div.d2f(x2)
