"""Log-ratios, the loss and its gradient field, against torch.distributions, diffusers' scheduler and autograd."""
import math

import pytest
import torch
from diffusers import DDIMScheduler

from divergences import NAMES, get_divergence
from loss import (CLIPS, alignment_loss, gradient_ratio, step_log_ratio, step_log_ratios, surface, surface_gradient)
from sample import ddim_mean_std

F64 = dict(dtype=torch.float64)
DIVS = [get_divergence(n, 0.4 if n == "alpha" else None) for n in NAMES]
by_name = pytest.mark.parametrize("div", DIVS, ids=lambda d: d.name)


@pytest.fixture
def scheduler():
    s = DDIMScheduler(beta_start=.00085, beta_end=.012, beta_schedule="scaled_linear", steps_offset=1,
                      set_alpha_to_one=False, clip_sample=False)
    s.alphas_cumprod = s.alphas_cumprod.double()
    s.final_alpha_cumprod = s.final_alpha_cumprod.double()
    return s


def latents(n, seed, scale=1.0):
    return torch.randn(n, 4, 8, 8, generator=torch.Generator().manual_seed(seed), **F64) * scale


@pytest.mark.parametrize("eta", (1.0, 0.3, 0.0))
@pytest.mark.parametrize("num_steps", (20, 50, 7))
def test_ddim_mean_and_std_are_diffusers(scheduler, eta, num_steps):
    scheduler.set_timesteps(num_steps)
    t = scheduler.timesteps
    x, eps = latents(len(t), 0), latents(len(t), 1)
    mean, std, x0 = ddim_mean_std(eps, x, t, scheduler.alphas_cumprod, num_steps, eta)  # mixed timesteps in one call
    for i, ti in enumerate(t):
        step = lambda noise: scheduler.step(eps[i:i + 1], ti, x[i:i + 1], eta=eta, variance_noise=torch.full_like(x[:1], noise))
        torch.testing.assert_close(mean[i:i + 1], step(0.).prev_sample, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(x0[i:i + 1], step(0.).pred_original_sample, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close((mean + std)[i:i + 1], step(1.).prev_sample, rtol=1e-10, atol=1e-10)
    if eta:
        assert (std > 0).all()  # the last step included


@pytest.mark.parametrize("reduce", ("mean", "sum"))
def test_step_log_ratio_is_the_difference_of_log_probabilities(reduce):
    mean, ref, x = latents(6, 0), latents(6, 1), latents(6, 2)
    std = torch.linspace(.1, 2, 6, **F64).view(-1, 1, 1, 1)
    want = torch.distributions.Normal(mean, std).log_prob(x) - torch.distributions.Normal(ref, std).log_prob(x)
    torch.testing.assert_close(step_log_ratio(x, mean, ref, std, reduce), getattr(want.flatten(1), reduce)(1), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("reduce", ("mean", "sum"))
@pytest.mark.parametrize("eta", (1.0, 0.5))
def test_fused_log_ratios_with_gradient(scheduler, reduce, eta):
    """Both children from one prediction each, a batch of mixed timesteps: value and gradient against Normal.log_prob."""
    scheduler.set_timesteps(20)
    t = scheduler.timesteps
    n = len(t)
    x_t, x_w, x_l, eps_ref = (latents(n, s) for s in range(4))
    eps = (eps_ref + latents(n, 5, 0.1)).requires_grad_()
    got = step_log_ratios(eps, eps_ref, x_t, x_w, x_l, t, scheduler.alphas_cumprod, 20, eta, reduce)
    mean, std, _ = ddim_mean_std(eps, x_t, t, scheduler.alphas_cumprod, 20, eta)
    ref, _, _ = ddim_mean_std(eps_ref, x_t, t, scheduler.alphas_cumprod, 20, eta)
    want = [getattr((torch.distributions.Normal(mean, std).log_prob(x) - torch.distributions.Normal(ref, std).log_prob(x)).flatten(1),
                    reduce)(1) for x in (x_w, x_l)]
    for g, w in zip(got, want):
        torch.testing.assert_close(g, w, rtol=1e-10, atol=1e-10)
        dg, dw = (torch.autograd.grad(v.sum(), eps, retain_graph=True)[0] for v in (g, w))
        torch.testing.assert_close(dg, dw, rtol=1e-10, atol=1e-10)


def test_factored_form_keeps_digits_in_fp32(scheduler):
    """A policy 1e-4 away from its reference, at every step: fp32 against float64."""
    scheduler.set_timesteps(20)
    t, table = scheduler.timesteps, scheduler.alphas_cumprod
    x_t, x_w, x_l, eps_ref = (latents(20, s) for s in range(4))
    mean, std, _ = ddim_mean_std(eps_ref, x_t, t, table, 20)
    x_w, x_l = mean + std * x_w, mean + std * x_l
    wide = [eps_ref + latents(20, 5, 1e-4), eps_ref, x_t, x_w, x_l]
    narrow = [v.float() for v in wide]
    want = step_log_ratios(*[v.double() for v in narrow], t, table, 20)
    got = step_log_ratios(*narrow, t, table.float(), 20)
    for g, w in zip(got, want):
        assert g.dtype == torch.float32
        assert ((g - w).abs() / w.abs().max()).max() < 2e-3


def test_half_precision_predictions_are_widened(scheduler):
    scheduler.set_timesteps(20)
    a = [latents(20, s).to(torch.bfloat16) for s in range(5)]
    u_w, u_l = step_log_ratios(*a, scheduler.timesteps, scheduler.alphas_cumprod.float(), 20)
    assert u_w.dtype == u_l.dtype == torch.float32 and u_w.isfinite().all()


def test_unknown_reduce_is_refused():
    with pytest.raises(ValueError, match="mean, sum"):
        step_log_ratio(latents(1, 0), latents(1, 1), latents(1, 2), torch.ones(1, 1, 1, 1), "max")


# ---- the loss

U = dict(u_w=torch.tensor([.02, -.3, .5, 0., .05], **F64), u_l=torch.tensor([-.03, .4, -.4, 0., .06], **F64))


def test_reverse_kl_with_spos_clamp_is_spos_loss():
    """Independent: X clamped, -log sigmoid(beta log X_w - beta log X_l); value and gradient."""
    u_w, u_l = (v.clone().requires_grad_() for v in U.values())
    loss, _ = alignment_loss(u_w, u_l, get_divergence("rkl"), 10.0, 0.1)
    got = torch.autograd.grad(loss, (u_w, u_l))
    X_w, X_l = (torch.clamp(u.exp(), 0.9, 1.1) for u in (u_w, u_l))
    want = -torch.log(torch.sigmoid(10 * torch.log(X_w) - 10 * torch.log(X_l))).mean()
    torch.testing.assert_close(loss, want, rtol=1e-12, atol=1e-12)
    for g, w in zip(got, torch.autograd.grad(want, (u_w, u_l))):
        torch.testing.assert_close(g, w, rtol=1e-12, atol=1e-12)


@by_name
def test_loss_is_the_formula_on_ratios(div):
    loss, stats = alignment_loss(**U, div=div, beta=3.0, clip="none")
    want = -torch.log(torch.sigmoid(3 * div.df(U["u_w"].exp()) - 3 * div.df(U["u_l"].exp())))
    torch.testing.assert_close(loss, want.mean(), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(stats["loss"], want, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(want.mean(), surface(U["u_w"].exp(), U["u_l"].exp(), div, 3.0).mean(), rtol=1e-10, atol=1e-10)


@by_name
def test_loss_is_ln2_where_the_policy_is_the_reference(div):
    loss, stats = alignment_loss(torch.zeros(7), torch.zeros(7), div, 10.0)
    assert abs(loss.item() - math.log(2)) < 1e-7
    assert (stats["accuracy"] == 0.5).all() and (stats["X_w"] == 1).all() and (stats["clip_fraction"] == 0).all()


def test_clips_and_who_keeps_a_gradient():
    """Rows: winner above, winner below, loser above, loser below the clip range."""
    u_w, u_l = torch.tensor([.5, -.5, 0., 0.], **F64), torch.tensor([0., 0., .5, -.5], **F64)
    lost = {"ratio": [True, True, True, True], "onesided": [True, False, False, True], "none": [False] * 4}
    assert set(lost) == set(CLIPS)
    for clip, expected in lost.items():
        w, l = u_w.clone().requires_grad_(), u_l.clone().requires_grad_()
        loss, stats = alignment_loss(w, l, get_divergence("js"), 5.0, 0.1, clip)
        gw, gl = torch.autograd.grad(loss, (w, l))
        outside = torch.stack([gw[0], gw[1], gl[2], gl[3]])
        assert [bool(g == 0) for g in outside] == expected, clip
        assert stats["clip_fraction"].tolist() == [0.5 * e for e in expected]
        assert (gw <= 0).all() and (gl >= 0).all()  # a step raises winners and lowers losers, under every clip


def test_stats_are_per_pair_detached_and_right():
    u_w = U["u_w"].clone().requires_grad_()
    _, s = alignment_loss(u_w, U["u_l"], get_divergence("rkl"), 2.0, 0.1)
    assert all(v.shape == (5,) and not v.requires_grad for v in s.values())
    assert s["accuracy"].tolist() == [1, 0, 1, 0.5, 0]
    assert s["clip_fraction"].tolist() == [0, 1, 1, 0, 0]
    torch.testing.assert_close(s["X_l"], U["u_l"].exp())
    torch.testing.assert_close(s["margin"][0], torch.tensor(2 * 0.05, **F64))


def test_no_overflow_far_out():
    loss, _ = alignment_loss(torch.tensor([-60.]), torch.tensor([60.]), get_divergence("rkl"), 10.0, clip="none")
    assert loss.item() == pytest.approx(1200)


@pytest.mark.parametrize("kw, words", [(dict(clip="both"), "ratio, onesided, none"), (dict(clip_range=0.), "clip_range"),
                                       (dict(clip_range=1.), "clip_range")])
def test_wrong_clips(kw, words):
    with pytest.raises(ValueError, match=words):
        alignment_loss(**U, div=get_divergence("js"), beta=1.0, **kw)


def test_an_empty_batch_is_refused():
    with pytest.raises(ValueError, match="at least one pair"):
        alignment_loss(torch.zeros(0), torch.zeros(0), get_divergence("js"), 1.0)


# ---- theorem 3 and eq. 7

@by_name
def test_theorem_3_is_autograd(div):
    g = torch.Generator().manual_seed(0)
    x1, x2 = (torch.exp(torch.empty(2000, **F64).uniform_(-3, 3, generator=g)).requires_grad_() for _ in range(2))
    want = torch.autograd.grad(surface(x1, x2, div, 10.0).sum(), (x1, x2))
    got = surface_gradient(x1.detach(), x2.detach(), div, 10.0)
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    ratio = gradient_ratio(x1.detach(), x2.detach(), div)
    seen = want[1].abs() > 1e-200
    torch.testing.assert_close(ratio[seen], (want[0].abs() / want[1].abs())[seen], rtol=1e-9, atol=0)
