"""SPO's pool of pairs, against a naive rollout and log-probabilities of Normals."""

import copy
import inspect

import pytest
import torch
from conftest import overshoot, shake
from torch.distributions import Normal

import sample
from loss import ddim_mean_std
from parts.model import Policy, decode, encode_prompts, predict_noise
from sample import (
    Pairs,
    clear_pairs,
    collect_pairs,
    generate,
    join_pairs,
)

PROMPTS = ["a red sun", "a white moon over snow", "a yellow sun under a blue sky"]


def seeded(seed):
    return torch.Generator().manual_seed(seed)


# --------------------------------------------------------------------------------------------------
# Which children make a pair


@pytest.mark.parametrize("gap, clear", [(0.61, False), (0.618, False), (0.62, True), (3.0, True)])
def test_a_pair_is_clear_where_softmax_differs_by_more_than_the_threshold(gap, clear):
    """0.3 of softmax([best, worst]) is a gap of 0.619 in scores: facts of SPO's code."""
    best, worst = torch.softmax(torch.tensor([1 + gap, 1.0]), 0)
    assert (best - worst > 0.3).item() == clear
    parent, children = torch.randn(1, 4, 2, 2), torch.randn(3, 4, 2, 2)
    scores = torch.tensor([[1 + gap / 2, 1.0, 1 + gap]])
    x_t, x_w, x_l, t, prompt = clear_pairs(parent, children, 51, scores, 0.3)
    assert len(x_t) == len(t) == len(prompt) == int(clear)
    if clear:
        assert torch.equal(x_t, parent) and t.tolist() == [51] and prompt.tolist() == [0]
        assert torch.equal(x_w[0], children[2]) and torch.equal(x_l[0], children[1])


def test_each_prompt_chooses_among_its_own_children():
    parent, children = torch.randn(3, 4, 2, 2), torch.randn(6, 4, 2, 2)
    scores = torch.tensor([[0.0, 9.0], [5.0, 5.0], [2.0, -2.0]])  # the second is a tie
    x_t, x_w, x_l, t, prompt = clear_pairs(parent, children, 1, scores, 0.3)
    assert prompt.tolist() == [0, 2]
    assert torch.equal(x_t, parent[[0, 2]])
    assert torch.equal(x_w, children[[1, 4]])
    assert torch.equal(x_l, children[[0, 5]])


@pytest.mark.parametrize("bad", (float("nan"), float("inf"), -float("inf")))
def test_a_score_that_is_not_finite_makes_its_pair_invalid(bad):
    parent, children = torch.randn(2, 4, 2, 2), torch.randn(6, 4, 2, 2)
    scores = torch.tensor([[0.0, bad, 9.0], [0.0, 1.0, 9.0]])
    _, _, _, _, prompt = clear_pairs(parent, children, 1, scores, 0.3)
    assert prompt.tolist() == [1]


# --------------------------------------------------------------------------------------------------
# The rollout


class Brightness:
    """A judge that writes down what it is asked; its score is the mean brightness, scaled."""

    name = "brightness"
    reads_prompt = False

    def __init__(self, scale=1000.0, unclamped=False):
        self.scale, self.unclamped = scale, unclamped
        self.images, self.text, self.times = [], [], []
        self.encoded = 0

    def encode(self, prompts):
        self.encoded += 1
        return torch.arange(len(prompts)).float()[:, None]

    def __call__(self, images, text, t=None):
        self.images.append(images)
        self.text.append(text.flatten().tolist())
        self.times.append(t.tolist())
        return images.mean((1, 2, 3)) * self.scale


def test_defaults_are_spos():
    """facts of the SPO paper and code: K = 4 from step 4 of 20, threshold 0.3, eta 1, guidance 5;
    evaluated with 20 steps, guidance 5, eta 0."""
    defaults = {}
    for function in (collect_pairs, generate):
        parameters = inspect.signature(function).parameters.values()
        defaults[function] = {parameter.name: parameter.default for parameter in parameters}
    rollout = dict(num_children=4, first_step=4, threshold=0.3, num_steps=20, eta=1, guidance=5)
    assert rollout.items() <= defaults[collect_pairs].items()
    assert dict(num_steps=20, guidance=5, eta=0).items() <= defaults[generate].items()


def naive_pairs(pipe, prompt, seed, K, first_step, threshold, num_steps, guidance):
    """SPO's pool for ONE prompt, with two predictions wherever the fused version reuses one."""
    generator = seeded(seed)
    text, null = encode_prompts(pipe, [prompt]), encode_prompts(pipe, [""])
    pipe.scheduler.set_timesteps(num_steps)
    timesteps = pipe.scheduler.timesteps.tolist()

    def step(x, t):
        t = torch.tensor([t])
        eps = predict_noise(pipe.unet, x, t, text, null, guidance)
        return ddim_mean_std(eps, x, t, pipe.scheduler.alphas_cumprod, num_steps)

    x, pairs = torch.randn(1, 4, 12, 12, generator=generator), []
    for i, t in enumerate(timesteps):
        mean, std, _ = step(x, t)
        if i < first_step:
            x = mean + std * torch.randn(1, 4, 12, 12, generator=generator)
            continue
        noise = torch.randn(K, 4, 12, 12, generator=generator)
        children = [mean + std * z for z in noise[:, None]]
        is_last = i + 1 == num_steps
        scores = []
        for child in children:
            x0 = child if is_last else step(child, timesteps[i + 1])[2]
            scores.append(decode(pipe, x0).clamp(0, 1).mean() * 3e4)
        best, worst = max(scores), min(scores)
        p = torch.softmax(torch.stack([best, worst]), 0)
        if p[0] - p[1] > threshold:
            x_w, x_l = children[scores.index(best)], children[scores.index(worst)]
            pairs.append((t, x, x_w, x_l))
        if not is_last:
            x = children[int(torch.randint(K, (1,), generator=generator))]
    return pairs


@pytest.mark.parametrize("K, first_step, guidance", [(3, 1, 5.0), (2, 0, 1.0), (4, 3, 0.0)])
def test_collect_pairs_is_spos_pool(pipe, K, first_step, guidance):
    settings = (K, first_step, 0.3, 5)
    judge = Brightness(3e4)
    pairs = collect_pairs(pipe, judge, PROMPTS[:1], seeded(4), *settings, guidance=guidance)
    with torch.no_grad():
        naive = naive_pairs(pipe, PROMPTS[0], 4, *settings, guidance)
    assert pairs.scores.shape == (5 - first_step, 1, K)
    assert 0 < len(pairs.t) == len(naive)
    for i, (t, x_t, x_w, x_l) in enumerate(naive):
        assert pairs.t[i] == t
        for ours, theirs in ((pairs.x_t, x_t), (pairs.x_w, x_w), (pairs.x_l, x_l)):
            torch.testing.assert_close(ours[i], theirs[0], rtol=0, atol=1e-4)


def test_a_child_is_judged_at_its_own_timestep_and_the_last_ones_at_0(pipe):
    judge = Brightness()
    pairs = collect_pairs(pipe, judge, PROMPTS[:2], seeded(0), 3, 1, 0.0, 5)
    timesteps = [801, 601, 401, 201, 1]
    assert judge.times == [[t] * 6 for t in (401, 201, 1, 0)]  # the children's: 2 x 3 of them
    assert sorted(set(pairs.t.tolist()), reverse=True) == timesteps[1:]  # their parents'


def test_the_last_children_are_decoded_as_they_are(pipe, monkeypatch):
    judge, decoded = Brightness(), []

    def recording(pipe, latents, vae=None):
        decoded.append(latents)
        return decode(pipe, latents, vae)

    monkeypatch.setattr(sample.model, "decode", recording)
    pairs = collect_pairs(pipe, judge, PROMPTS[:1], seeded(0), 2, 1, 0.0, 4)
    last = {tuple(x.flatten().tolist()) for x in decoded[-1]}
    pair = {tuple(x.flatten().tolist()) for x in (pairs.x_w[-1], pairs.x_l[-1])}
    assert last == pair


def test_a_random_child_goes_on_and_not_the_judges_choice(pipe):
    """Two judges of opposite taste, the same generator: the same trajectories x_t."""
    likes = collect_pairs(pipe, Brightness(1000), PROMPTS, seeded(0), 3, 1, 0.0, 6)
    dislikes = collect_pairs(pipe, Brightness(-1000), PROMPTS, seeded(0), 3, 1, 0.0, 6)
    assert len(likes.t) == 3 * 5
    assert torch.equal(likes.x_t, dislikes.x_t)
    assert torch.equal(likes.x_w, dislikes.x_l) and torch.equal(likes.x_l, dislikes.x_w)


def test_rows_of_many_prompts_do_not_mix(pipe):
    judge = Brightness()
    pairs = collect_pairs(pipe, judge, PROMPTS, seeded(0), 2, 1, 0.0, 4)
    assert judge.encoded == 1
    assert judge.text == [[0, 0, 1, 1, 2, 2]] * 3
    assert len(pairs.t) == 9 and pairs.prompt.tolist() == [0, 1, 2] * 3
    # both children are plausible draws of their own parent, prompt and step: |z| is about 1
    text = pairs.text[pairs.prompt]
    with torch.no_grad():
        eps = predict_noise(pipe.unet, pairs.x_t, pairs.t, text, pairs.null, 5.0)
        mean, std, _ = ddim_mean_std(eps, pairs.x_t, pairs.t, pairs.alphas_cumprod, 4)
    for child in (pairs.x_w, pairs.x_l):
        z = ((child - mean) / std).flatten(1)
        assert (z.std(1) - 1).abs().max() < 0.12
        assert z.mean(1).abs().max() < 0.12


@pytest.mark.parametrize("scale", (float("nan"), 0.0))
def test_a_judge_of_nan_makes_no_pair_and_ties_make_none(pipe, scale):
    pairs = collect_pairs(pipe, Brightness(scale), PROMPTS[:1], seeded(0), 2, 1, 0.0, 3)
    assert len(pairs.t) == 0 and pairs.x_w.shape == (0, 4, 12, 12)
    assert pairs.scores.shape == (2, 1, 2)


def test_images_are_clamped_for_every_judge_but_one_that_says_unclamped(pipe, monkeypatch):
    """The step-aware judge clamps after its own resize, as its checkpoint was used."""
    raw = overshoot(pipe, monkeypatch)
    for unclamped in (False, True):
        raw.clear()
        judge = Brightness(unclamped=unclamped)
        collect_pairs(pipe, judge, PROMPTS[:2], seeded(0), 2, 1, 0.0, 4)
        assert len(judge.images) == len(raw) == 3
        for seen, decoded in zip(judge.images, raw):
            expected = decoded / 2 + 0.5
            assert expected.min() < 0 or expected.max() > 1
            if not unclamped:
                expected = torch.clamp(expected, 0, 1)
            torch.testing.assert_close(seen, expected)


def test_a_judge_of_ones_own_need_not_know_the_word_unclamped(pipe, monkeypatch):
    overshoot(pipe, monkeypatch)
    judge = Brightness()
    del judge.unclamped
    collect_pairs(pipe, judge, PROMPTS[:1], seeded(0), 2, 1, 0.0, 3)
    assert all(0 <= images.min() and images.max() <= 1 for images in judge.images)


def test_a_preview_decoder_paints_for_the_judge_alone(pipe):
    """With the VAE itself as the preview nothing changes; a brighter one changes scores, not x_t.

    (VAE + 0.2) / 2 is 0.1 brighter, 100 in the scores.
    """

    def collect(preview):
        judge = Brightness(1000, unclamped=True)
        return collect_pairs(pipe, judge, PROMPTS, seeded(0), 3, 1, 0.0, 4, preview=preview)

    plain, same = collect(None), collect(pipe.vae)
    assert torch.equal(plain.scores, same.scores) and torch.equal(plain.x_w, same.x_w)
    brighter = copy.deepcopy(pipe.vae)
    brighter.decoder.conv_out.bias += 0.2
    moved = collect(brighter)
    torch.testing.assert_close(moved.scores, plain.scores + 100, rtol=0, atol=1e-2)
    assert torch.equal(moved.x_t, plain.x_t)


@pytest.mark.parametrize("impossible", [dict(num_children=1), dict(first_step=3), dict(eta=0.0)])
def test_impossible_rollouts_are_refused(pipe, impossible):
    settings = {"num_steps": 3, "first_step": 1} | impossible
    with pytest.raises(ValueError, match="pairs need num_children >= 2"):
        collect_pairs(pipe, Brightness(), PROMPTS[:1], seeded(0), **settings)


def test_a_rollout_costs_130_unet_rows_a_prompt_and_ticks_every_step(pipe):
    rows, ticks = [], []
    hook = pipe.unet.register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0])))
    pairs = collect_pairs(
        pipe, Brightness(), PROMPTS[:2], seeded(0), progress=lambda: ticks.append(1)
    )
    hook.remove()
    assert sum(rows) == 2 * 130 and set(rows) == {2 * 2}  # one size alone: for --compile
    assert len(ticks) == 20
    assert pairs.advance == 2 and pairs.scores.shape == (16, 2, 4)


# --------------------------------------------------------------------------------------------------
# Pairs


@pytest.mark.parametrize("full", (False, True), ids=("lora", "full"))
@pytest.mark.parametrize("reduce", ("mean", "sum"))
def test_log_ratios_are_those_of_two_separate_unets(pipe, full, reduce):
    """In float64: Normals' log-probabilities by the policy's UNet and by a copy of its base."""
    pairs = collect_pairs(pipe, Brightness(), PROMPTS[:2], seeded(0), 2, 1, 0.0, 4, eta=0.7)
    for name, value in vars(pairs).items():
        if torch.is_tensor(value) and value.is_floating_point():
            setattr(pairs, name, value.double())
    reference = copy.deepcopy(pipe.unet).double()
    policy = Policy(pipe.unet, full=full)
    shake(policy, scale=0.02)
    policy.unet.double()
    if full:
        policy.frozen = [tensor.double() for tensor in policy.frozen]
    index = torch.tensor([4, 0, 3])
    u = pairs.log_ratios(policy, index, reduce)

    x_t, t, text = pairs.x_t[index], pairs.t[index], pairs.text[pairs.prompt[index]]

    def log_probability(unet, child):
        eps = predict_noise(unet, x_t, t, text, pairs.null, 5.0)
        mean, std, _ = ddim_mean_std(eps, x_t, t, pairs.alphas_cumprod, 4, 0.7)
        return getattr(Normal(mean, std).log_prob(child[index]).flatten(1), reduce)(1)

    for ours, child in zip(u, (pairs.x_w, pairs.x_l)):
        theirs = log_probability(policy.unet, child) - log_probability(reference, child)
        assert ours.dtype == torch.float64 and ours.abs().max() > 1e-5
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-11)
        options = dict(retain_graph=True, allow_unused=True, materialize_grads=True)
        both = [torch.autograd.grad(x.sum(), policy.parameters, **options) for x in (ours, theirs)]
        for a, b in zip(*both):
            torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


def test_joined_pairs_keep_their_own_prompts_and_scores(pipe):
    first = collect_pairs(pipe, Brightness(), PROMPTS[:2], seeded(0), 2, 1, 0.0, 4)
    second = collect_pairs(pipe, Brightness(), PROMPTS[2:], seeded(1), 2, 1, 0.0, 4)
    texts = [part.text[part.prompt] for part in (first, second)]
    scores = [first.scores, second.scores]
    children = [first.x_w, second.x_w]
    joined = join_pairs([first, second])
    assert joined.advance == 3
    assert torch.equal(joined.text[joined.prompt], torch.cat(texts))
    assert torch.equal(joined.x_w, torch.cat(children))
    assert torch.equal(joined.scores, torch.cat(scores, 1))
    assert joined.weight.tolist() == [1] * len(joined.t) == [1] * 9


def test_pairs_move_whole(pipe):
    pairs = collect_pairs(pipe, Brightness(), PROMPTS[:1], seeded(0), 2, 1, 0.0, 3)
    moved = pairs.to("meta")
    assert isinstance(moved, Pairs)
    for name, value in vars(pairs).items():
        if torch.is_tensor(value):
            assert getattr(moved, name).is_meta and not value.is_meta
        else:
            assert getattr(moved, name) == value
