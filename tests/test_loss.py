"""Log-ratios, the loss and its gradients, against torch.distributions, diffusers and autograd."""

import math

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler
from torch.distributions import Normal

from divergences import NAMES, get_divergence
from loss import (
    CLIPS,
    alignment_loss,
    ddim_mean_std,
    gradient_ratio,
    noise_log_ratio,
    step_log_ratio,
    step_log_ratios,
    surface,
    surface_gradient,
)

F64 = dict(dtype=torch.float64)
RKL = get_divergence("rkl")
DIVERGENCES = [get_divergence(name, 0.4 if name == "alpha" else None) for name in NAMES]
every_row = pytest.mark.parametrize("div", DIVERGENCES, ids=lambda div: div.name)
both_reductions = pytest.mark.parametrize("reduce", ("mean", "sum"))


@pytest.fixture
def scheduler():
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        set_alpha_to_one=False,
        clip_sample=False,
    )
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.final_alpha_cumprod = scheduler.final_alpha_cumprod.double()
    return scheduler


def latents(n, seed, scale=1.0):
    return scale * torch.randn(n, 4, 8, 8, generator=torch.Generator().manual_seed(seed), **F64)


def log_ratio_of_normals(x, mean, mean_ref, std, reduce):
    """log p(x) / p_ref(x), (N,), by torch.distributions."""
    difference = Normal(mean, std).log_prob(x) - Normal(mean_ref, std).log_prob(x)
    return getattr(difference.flatten(1), reduce)(1)


# --------------------------------------------------------------------------------------------------
# log X of a denoising step


@pytest.mark.parametrize("eta", (1.0, 0.3, 0.0))
@pytest.mark.parametrize("num_steps", (20, 50, 7))
def test_ddim_mean_and_std_are_diffusers(scheduler, eta, num_steps):
    scheduler.set_timesteps(num_steps)
    t = scheduler.timesteps  # all of them in one call
    x, eps = latents(len(t), 0), latents(len(t), 1)
    mean, std, x0 = ddim_mean_std(eps, x, t, scheduler.alphas_cumprod, num_steps, eta)
    assert mean.shape == x0.shape == x.shape and std.shape == (len(t), 1, 1, 1)

    def step(i, noise):
        row = slice(i, i + 1)
        z = torch.full_like(x[row], noise)
        return scheduler.step(eps[row], t[i], x[row], eta=eta, variance_noise=z)

    for i in range(len(t)):
        silent, loud = step(i, 0.0), step(i, 1.0)
        torch.testing.assert_close(mean[i : i + 1], silent.prev_sample, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(x0[i : i + 1], silent.pred_original_sample, rtol=0, atol=1e-10)
        torch.testing.assert_close((mean + std)[i : i + 1], loud.prev_sample, rtol=0, atol=1e-10)
    if eta > 0:
        assert (std > 0).all()  # the last step included


@both_reductions
def test_step_log_ratio_is_the_difference_of_log_probabilities(reduce):
    x, mean, mean_ref = latents(6, 0), latents(6, 1), latents(6, 2)
    std = torch.linspace(0.1, 2, 6, **F64).view(-1, 1, 1, 1)
    u = step_log_ratio(x, mean, mean_ref, std, reduce)
    expected = log_ratio_of_normals(x, mean, mean_ref, std, reduce)
    torch.testing.assert_close(u, expected, rtol=1e-10, atol=1e-10)


@both_reductions
@pytest.mark.parametrize("eta", (1.0, 0.5))
def test_one_prediction_serves_both_children_in_value_and_gradient(scheduler, reduce, eta):
    scheduler.set_timesteps(20)
    t, alphas_cumprod = scheduler.timesteps, scheduler.alphas_cumprod
    x_t, x_w, x_l, eps_ref = (latents(20, seed) for seed in range(4))
    eps = (eps_ref + latents(20, 5, 0.1)).requires_grad_()
    u = step_log_ratios(eps, eps_ref, x_t, x_w, x_l, t, alphas_cumprod, 20, eta, reduce)
    mean, std, _ = ddim_mean_std(eps, x_t, t, alphas_cumprod, 20, eta)
    mean_ref, _, _ = ddim_mean_std(eps_ref, x_t, t, alphas_cumprod, 20, eta)
    for ours, child in zip(u, (x_w, x_l)):
        expected = log_ratio_of_normals(child, mean, mean_ref, std, reduce)
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)
        (gradient,) = torch.autograd.grad(ours.sum(), eps, retain_graph=True)
        (expected,) = torch.autograd.grad(expected.sum(), eps, retain_graph=True)
        torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-10)


def test_factored_form_keeps_its_digits_in_fp32(scheduler):
    """A policy 1e-4 away from its reference, at every step: fp32 against float64."""
    scheduler.set_timesteps(20)
    t, alphas_cumprod = scheduler.timesteps, scheduler.alphas_cumprod
    x_t, noise_w, noise_l, eps_ref = (latents(20, seed) for seed in range(4))
    mean, std, _ = ddim_mean_std(eps_ref, x_t, t, alphas_cumprod, 20)
    exact = [eps_ref + latents(20, 5, 1e-4), eps_ref, x_t, mean + std * noise_w]
    exact.append(mean + std * noise_l)
    narrow = [x.float() for x in exact]
    exact = [x.double() for x in narrow]  # the same inputs, rounded alike
    in_fp32 = step_log_ratios(*narrow, t, alphas_cumprod.float(), 20)
    in_fp64 = step_log_ratios(*exact, t, alphas_cumprod, 20)
    for u, expected in zip(in_fp32, in_fp64):
        assert u.dtype == torch.float32 and expected.dtype == torch.float64
        error = (u - expected).abs() / expected.abs().max()
        assert error.max() < 2e-3


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_half_precision_is_widened_before_the_difference(scheduler, dtype):
    scheduler.set_timesteps(20)
    t, alphas_cumprod = scheduler.timesteps, scheduler.alphas_cumprod.float()
    half = [latents(20, seed).to(dtype) for seed in range(5)]
    wide = [x.float() for x in half]
    ours = step_log_ratios(*half, t, alphas_cumprod, 20)
    for u, expected in zip(ours, step_log_ratios(*wide, t, alphas_cumprod, 20)):
        assert u.dtype == torch.float32
        assert torch.equal(u, expected)


def test_unknown_reduce_is_refused():
    std = torch.ones(1, 1, 1, 1)
    with pytest.raises(ValueError, match="mean, sum"):
        step_log_ratio(latents(1, 0), latents(1, 1), latents(1, 2), std, "max")


# --------------------------------------------------------------------------------------------------
# What reduce="mean" is: X the D-th root of the step's ratio


@pytest.fixture
def mean_and_sum():
    """{reduce: (u_w, u_l)} of one step of 16 pairs; D = 4 x 8 x 8 = 256, a power of two."""
    x_w, x_l, mean, mean_ref = (latents(16, seed, 0.3) for seed in range(4))
    std = torch.ones(16, 1, 1, 1, **F64)
    log_ratios = {}
    for reduce in ("mean", "sum"):
        children = [step_log_ratio(x, mean, mean_ref, std, reduce) for x in (x_w, x_l)]
        log_ratios[reduce] = children
    return log_ratios


def test_with_mean_X_is_the_256th_root(mean_and_sum):
    for u_mean, u_sum in zip(mean_and_sum["mean"], mean_and_sum["sum"]):
        torch.testing.assert_close(u_mean.exp() ** 256, u_sum.exp(), rtol=1e-10, atol=0)


def test_for_reverse_kl_mean_is_sum_at_beta_over_D(mean_and_sum):
    """Exactly, in value and in gradient: dividing by a power of two rounds nothing."""
    results = {}
    for reduce, beta in (("mean", 10.0), ("sum", 10.0 / 256)):
        u_w, u_l = (u.clone().requires_grad_() for u in mean_and_sum[reduce])
        loss, _ = alignment_loss(u_w, u_l, RKL, beta, clip="none")
        gradient = torch.autograd.grad(loss, (u_w, u_l))
        scale = 256 if reduce == "sum" else 1  # d u_mean = d u_sum / 256
        results[reduce] = [loss, *(scale * g for g in gradient)]
    for a, b in zip(results["mean"], results["sum"]):
        assert torch.equal(a, b)


@every_row
def test_for_every_other_row_mean_is_no_factor_in_beta(mean_and_sum, div):
    """One factor in beta would be one ratio of the two margins, the same for all 16 pairs."""
    margins = {}
    for reduce, (u_w, u_l) in mean_and_sum.items():
        _, stats = alignment_loss(u_w, u_l, div, 1.0, clip="none")
        margins[reduce] = stats["margin"]
    factor = margins["sum"] / margins["mean"]
    if div.name == "rkl":
        torch.testing.assert_close(factor, torch.full((16,), 256.0, **F64))
    else:
        assert factor.max() > 1.5 * factor.min()


# --------------------------------------------------------------------------------------------------
# log X of a finished image


def test_noise_log_ratio_with_reverse_kl_is_diffusion_dpo():
    """Its eq. 14 as its code has it: a difference of mean squared errors, -0.5 * 5000."""
    eps_w, eps_l, noise_w, noise_l, ref_w, ref_l = (latents(6, seed, 0.02) for seed in range(6))
    hat_w, hat_l = ((noise_w + eps_w).requires_grad_(), (noise_l + eps_l).requires_grad_())
    ref_w, ref_l = noise_w + ref_w, noise_l + ref_l

    def error(prediction, noise):
        return (prediction - noise).pow(2).mean((1, 2, 3))

    difference = error(hat_w, noise_w) - error(hat_l, noise_l)
    difference_ref = error(ref_w, noise_w) - error(ref_l, noise_l)
    theirs = -F.logsigmoid(-0.5 * 5000 * (difference - difference_ref)).mean()
    u_w = noise_log_ratio(hat_w, ref_w, noise_w)
    u_l = noise_log_ratio(hat_l, ref_l, noise_l)
    ours, _ = alignment_loss(u_w, u_l, RKL, 5.0, clip="none")
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    gradients = torch.autograd.grad(ours, (hat_w, hat_l), retain_graph=True)
    for a, b in zip(gradients, torch.autograd.grad(theirs, (hat_w, hat_l))):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-14)


@both_reductions
def test_noise_log_ratio_keeps_its_digits_in_fp32(reduce):
    noise = latents(8, 0).float()
    eps_ref = noise + latents(8, 1, 0.1).float()
    eps_hat = eps_ref + latents(8, 2, 1e-5).float()
    u = noise_log_ratio(eps_hat, eps_ref, noise, reduce=reduce)
    exact = [x.double() for x in (eps_hat, eps_ref, noise)]
    squares = (exact[0] - exact[2]) ** 2 - (exact[1] - exact[2]) ** 2
    expected = getattr((-500 * squares).flatten(1), reduce)(1)
    assert u.dtype == torch.float32
    torch.testing.assert_close(u.double(), expected, rtol=1e-4, atol=0)


def jensen_excess(div, tries=100_000):
    """(tries,): how far the loss at a midpoint lies above the mean of the losses at both ends, for
    random ends (u_w, u_l) in [-3, 3]^2. A convex loss has no positive one."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.empty(2, tries, 2, **F64).uniform_(-3, 3, generator=generator)

    def losses(u):
        _, stats = alignment_loss(u[:, 0], u[:, 1], div, 1.0, clip="none")
        return stats["loss"]

    return losses((a + b) / 2) - (losses(a) + losses(b)) / 2


@every_row
def test_jensens_bound_holds_for_reverse_kl_alone(div):
    """So the mean loss over timesteps bounds the loss of the mean log-ratio for rkl alone."""
    excess = jensen_excess(div).max()
    if div.name == "rkl":
        assert excess < 1e-12
    else:
        assert excess > 0.1  # js, alpha and fkl, and the two rows that are not the paper's


# --------------------------------------------------------------------------------------------------
# The loss

U_W = torch.tensor([0.02, -0.3, 0.5, 0.0, 0.05], **F64)
U_L = torch.tensor([-0.03, 0.4, -0.4, 0.0, 0.06], **F64)


def test_reverse_kl_with_spos_clamp_is_spos_loss():
    """X clamped, -log sigmoid(beta log X_w - beta log X_l): value and gradient."""
    u_w, u_l = U_W.clone().requires_grad_(), U_L.clone().requires_grad_()
    ours, _ = alignment_loss(u_w, u_l, RKL, 10.0, 0.1)
    X_w, X_l = (torch.clamp(u.exp(), 0.9, 1.1) for u in (u_w, u_l))
    theirs = -torch.log(torch.sigmoid(10 * torch.log(X_w) - 10 * torch.log(X_l))).mean()
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    gradients = torch.autograd.grad(ours, (u_w, u_l))
    for a, b in zip(gradients, torch.autograd.grad(theirs, (u_w, u_l))):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@every_row
def test_loss_is_eq_5_on_ratios_and_eq_6(div):
    loss, stats = alignment_loss(U_W, U_L, div, 3.0, clip="none")
    X_w, X_l = U_W.exp(), U_L.exp()
    expected = -torch.log(torch.sigmoid(3 * div.df(X_w) - 3 * div.df(X_l)))
    torch.testing.assert_close(stats["loss"], expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(loss, expected.mean(), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(surface(X_w, X_l, div, 3.0), expected, rtol=1e-10, atol=1e-10)


@every_row
def test_loss_is_ln2_where_the_policy_is_the_reference(div):
    loss, stats = alignment_loss(torch.zeros(7), torch.zeros(7), div, 10.0)
    assert abs(loss.item() - math.log(2)) < 1e-7
    assert (stats["accuracy"] == 0.5).all()
    assert (stats["X_w"] == 1).all() and (stats["X_l"] == 1).all()
    assert (stats["clip_fraction"] == 0).all()


def test_each_pair_counts_by_its_weight():
    weight = torch.tensor([1.0, 0.0, 0.5, 1.0, 0.25], **F64)
    loss, stats = alignment_loss(U_W, U_L, RKL, 3.0, weight=weight)
    torch.testing.assert_close(loss, (weight * stats["loss"]).sum() / 5)
    equal, _ = alignment_loss(U_W, U_L, RKL, 3.0, weight=torch.ones(5, **F64))
    torch.testing.assert_close(equal, stats["loss"].mean())


def test_which_clip_lets_whom_keep_a_gradient():
    """Pairs: winner above, winner below, loser above, loser below the clip's range."""
    u_w = torch.tensor([0.5, -0.5, 0.0, 0.0], **F64)
    u_l = torch.tensor([0.0, 0.0, 0.5, -0.5], **F64)
    lost = {"ratio": [True, True, True, True], "onesided": [True, False, False, True]}
    lost["none"] = [False, False, False, False]
    assert set(lost) == set(CLIPS)
    for clip, expected in lost.items():
        w, l = u_w.clone().requires_grad_(), u_l.clone().requires_grad_()
        loss, stats = alignment_loss(w, l, get_divergence("js"), 5.0, 0.1, clip)
        grad_w, grad_l = torch.autograd.grad(loss, (w, l))
        outside = torch.stack([grad_w[0], grad_w[1], grad_l[2], grad_l[3]])
        assert (outside == 0).tolist() == expected, clip
        assert stats["clip_fraction"].tolist() == [0.5 * clipped for clipped in expected]
        # under every clip a step raises winners and lowers losers
        assert (grad_w <= 0).all() and (grad_l >= 0).all()


def test_stats_are_per_pair_detached_and_right():
    u_w = U_W.clone().requires_grad_()
    _, stats = alignment_loss(u_w, U_L, RKL, 2.0, 0.1)
    assert all(value.shape == (5,) and not value.requires_grad for value in stats.values())
    assert stats["accuracy"].tolist() == [1, 0, 1, 0.5, 0]
    assert stats["clip_fraction"].tolist() == [0, 1, 1, 0, 0]
    torch.testing.assert_close(stats["log_X_w"], U_W)
    torch.testing.assert_close(stats["log_X_l"], U_L)
    torch.testing.assert_close(stats["X_w"], U_W.exp())
    torch.testing.assert_close(stats["X_l"], U_L.exp())
    margin = torch.tensor([0.1, 2 * math.log(0.9 / 1.1), 2 * math.log(1.1 / 0.9), 0, -0.02], **F64)
    torch.testing.assert_close(stats["margin"], margin)


def test_accuracy_and_ratios_are_those_before_the_clamp():
    """Both log-ratios above the clamp, where X_w and X_l are 1.1 alike: still the winner leads."""
    u_w, u_l = torch.tensor([0.5], **F64), torch.tensor([0.3], **F64)
    _, stats = alignment_loss(u_w, u_l, RKL, 10.0, clip_range=0.1)
    assert stats["accuracy"].tolist() == [1.0]
    assert stats["margin"].tolist() == [0.0]
    assert stats["clip_fraction"].tolist() == [1.0]
    assert stats["X_w"].item() == pytest.approx(math.exp(0.5))
    assert stats["X_l"].item() == pytest.approx(math.exp(0.3))


def test_nothing_overflows_far_out():
    u_w, u_l = torch.tensor([-60.0, 500.0]), torch.tensor([60.0, -500.0])
    loss, stats = alignment_loss(u_w, u_l, RKL, 10.0, clip="none")
    assert stats["loss"].tolist() == [pytest.approx(1200), 0]
    assert loss.item() == pytest.approx(600)
    assert all(value.isfinite().all() for value in stats.values())


@pytest.mark.parametrize(
    "wrong, words",
    [
        (dict(clip="both"), "ratio, onesided, none"),
        (dict(clip_range=0.0), "clip_range"),
        (dict(clip_range=1.0), "clip_range"),
    ],
)
def test_wrong_clips_are_refused(wrong, words):
    with pytest.raises(ValueError, match=words):
        alignment_loss(U_W, U_L, RKL, 1.0, **wrong)


def test_an_empty_batch_is_refused():
    with pytest.raises(ValueError, match="at least one pair"):
        alignment_loss(torch.zeros(0), torch.zeros(0), RKL, 1.0)


# --------------------------------------------------------------------------------------------------
# The loss as a surface


@every_row
def test_theorem_3_and_eq_7_are_autograd(div):
    generator = torch.Generator().manual_seed(0)
    u = torch.empty(2, 2000, **F64).uniform_(-3, 3, generator=generator)
    x1, x2 = u.exp()
    x1.requires_grad_(), x2.requires_grad_()
    expected = torch.autograd.grad(surface(x1, x2, div, 10.0).sum(), (x1, x2))
    x1, x2 = x1.detach(), x2.detach()
    for ours, theirs in zip(surface_gradient(x1, x2, div, 10.0), expected):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    grad_1, grad_2 = (gradient.abs() for gradient in expected)
    representable = grad_2 > 1e-200
    ratio = gradient_ratio(x1, x2, div)[representable]
    torch.testing.assert_close(ratio, (grad_1 / grad_2)[representable], rtol=1e-9, atol=0)
