"""Judges against transformers, Pillow and their references' own code (golden/*.json).

Each oracle is written out here or comes from a package; none reads how the judge was set up.
"""

import math
import pickle
import shutil
import textwrap

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from weights import fill, flant5_state, golden, ids, noise, step_aware_state

from parts import judges, judges_clip
from parts.common import UserError, to_pil
from parts.judges import JUDGES, load_judge
from parts.weights import WeightsMissing

PROMPTS = ["a red sun over a sea", "a white moon", "a large yellow sun over hills under a pink sky"]
WITH_WEIGHTS = ["step_aware", "clipscore", "pickscore", "hps", "aesthetic"]
WITH_WEIGHTS += ["imagereward", "vqascore"]
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)


def images(*shape, seed=0):
    """8-bit pixels, as floats in [0, 1]."""
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed)) / 255


def by_pillow(x, size, crop):
    """CLIP's preprocessing of 8-bit pictures, by Pillow alone. crop: of half a pixel of margin."""
    short = min(x.shape[-2:])
    rows = []
    for image in x:
        levels = (image.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
        width, height = int(size * x.shape[-1] / short), int(size * x.shape[-2] / short)
        small = Image.fromarray(levels).resize((width, height), Image.Resampling.BICUBIC)
        left, top = int(crop((width - size) / 2)), int(crop((height - size) / 2))
        square = small.crop((left, top, left + size, top + size))
        rows.append(torch.from_numpy(np.array(square)).permute(2, 0, 1))
    return (torch.stack(rows) / 255 - MEAN) / STD


def by_torch(x, size):
    """The same of float tensors, as torchvision's Resize and CenterCrop shrink those."""
    short = min(x.shape[-2:])
    height, width = (int(size * n / short) for n in x.shape[-2:])
    small = F.interpolate(x, size=(height, width), mode="bicubic", antialias=True)
    top, left = round((height - size) / 2), round((width - size) / 2)
    return (small[..., top : top + size, left : left + size] - MEAN) / STD


# --------------------------------------------------------------------------------------------------
# Preprocessing


@pytest.mark.parametrize("size", [(512, 512), (427, 640), (96, 128), (131, 77), (224, 224)])
def test_preprocessing_is_transformers(size):
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    x = images(1, 3, *size)
    want = CLIPImageProcessorPil()(to_pil(x[0]), return_tensors="pt").pixel_values
    got = judges_clip.preprocess(x, 224, crop=math.floor)
    assert got.shape == want.shape and (got - want).abs().max() < 1e-6


PREPROCESSED = golden("open_clip.json")["preprocessing"]


@pytest.mark.parametrize("result", PREPROCESSED["results"], ids=lambda r: f"{r['H']}x{r['W']}")
def test_preprocessing_is_torchvisions_in_both_conventions(result):
    shape = result["H"], result["W"], 3
    levels = np.random.RandomState(5).randint(0, 256, shape).astype(np.uint8)
    assert int(levels.sum()) == result["source_sum"]
    x = torch.from_numpy(levels).permute(2, 0, 1)[None] / 255
    for resize, name in (("pillow", "open_clip_pil"), ("tensor", "hpsv2_tensor")):
        got, want = judges_clip.preprocess(x, 224, resize)[0].double(), result[name]
        samples = [got[tuple(place)].item() for place in PREPROCESSED["sample_points_cyx"]]
        assert samples == pytest.approx(want["samples"], abs=2e-6)
        assert got.abs().sum().item() == pytest.approx(want["sum_abs"], rel=1e-6)
        assert got.mean().item() == pytest.approx(want["mean"], abs=1e-6)


# --------------------------------------------------------------------------------------------------
# CLIP's family, against transformers' own CLIPModel

CLIP_H = "CLIP-ViT-H-14-laion2B-s32B-b79K"


def read_clip(weights, folder):
    from transformers import CLIPModel

    return CLIPModel.from_pretrained(f"{weights}/{folder}").eval()


def clip_oracle(model, weights, pixels, dtype=torch.float32):
    """(cosines of every image with every prompt, the image embeddings)."""
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(f"{weights}/{CLIP_H}")
    tokens = tokenizer(PROMPTS, padding="max_length", max_length=16, return_tensors="pt").input_ids
    with torch.no_grad():
        out = model.to(dtype)(input_ids=tokens, pixel_values=pixels.to(dtype))
    return out.image_embeds @ out.text_embeds.T, out.image_embeds


@pytest.mark.parametrize("name", ["clipscore", "pickscore", "hps"])
def test_clip_scores_are_transformers(tiny_judges, name):
    """With each one's published weights, resize, crop and scale; hps's are clipscore's, renamed."""
    x = images(3, 3, 40, 50)  # 28 x 35 when shrunk: a margin of 3.5 pixels
    folder = "PickScore_v1" if name == "pickscore" else CLIP_H
    pixels = by_pillow(x, 28, np.floor) if name == "pickscore" else by_torch(x, 28)
    model = read_clip(tiny_judges, folder)
    cosine, embedding = clip_oracle(model, tiny_judges, pixels)
    scale = {"clipscore": 1, "pickscore": model.logit_scale.exp().item(), "hps": 100}[name]
    judge = load_judge(name, "cpu", tiny_judges)
    text = judge.encode(PROMPTS)
    assert text.shape == (3, 8)
    want = scale * cosine
    torch.testing.assert_close(judge(x, text), want.diagonal(), rtol=1e-4, atol=1e-6 * scale)
    torch.testing.assert_close(judge(x[:1], text[1:2]), want[:1, 1], rtol=1e-4, atol=1e-6 * scale)
    torch.testing.assert_close(judge.embed(x), embedding, rtol=1e-4, atol=1e-6)
    others = by_torch(x, 28), by_pillow(x, 28, np.floor), by_pillow(x, 28, np.round)
    wrong = [clip_oracle(model, tiny_judges, other)[1] for other in others]
    differences = sorted((other - embedding).abs().max().item() for other in wrong)
    assert differences[0] == 0 and differences[1] > 1e-4  # a wrong resize or crop would be seen


def test_scores_can_be_had_in_float64(tiny_judges):
    x, text = images(3, 3, 40, 50).double(), {}
    mean, std = MEAN.double(), STD.double()
    small = F.interpolate(x, size=(28, 35), mode="bicubic", antialias=True)[..., 4:32]
    model = read_clip(tiny_judges, CLIP_H)
    want, _ = clip_oracle(model, tiny_judges, (small - mean) / std, torch.float64)
    judge = JUDGES["clipscore"]("cpu", tiny_judges, dtype=torch.float64)
    got = judge(x, judge.encode(PROMPTS))
    torch.testing.assert_close(got, want.diagonal(), rtol=0, atol=1e-7)  # CLIP_MEAN is of 8 digits
    for name in WITH_WEIGHTS:
        judge = JUDGES[name]("cpu", tiny_judges, dtype=torch.float64)
        text[name] = judge.encode(PROMPTS)
        assert judge(x, text[name]).dtype == torch.float64


def test_aesthetic_is_of_normalised_embeddings(tiny_judges):
    x = images(3, 3, 40, 50)
    model = read_clip(tiny_judges, "clip-vit-large-patch14")
    assert model.config.vision_config.hidden_act == "quick_gelu"
    state = torch.load(f"{tiny_judges}/sac+logos+ava1-l14-linearMSE.pth", weights_only=True)
    with torch.no_grad():
        score = model.get_image_features(by_pillow(x, 28, np.round)).pooler_output
    score = score / score.norm(dim=-1, keepdim=True)
    for i in (0, 2, 4, 6, 7):
        score = score @ state[f"layers.{i}.weight"].T + state[f"layers.{i}.bias"]
    judge = load_judge("aesthetic", "cpu", tiny_judges)
    got = judge(x, judge.encode(PROMPTS))
    torch.testing.assert_close(got, score[:, 0], rtol=1e-4, atol=1e-5)


def test_text_is_cut_with_its_end_token_kept(tiny_judges):
    judge = load_judge("clipscore", "cpu", tiny_judges)
    words = "a red sun over a sea under a pink sky and a large white moon over hills".split()
    texts = judge.encode([" ".join(words[:count]) for count in (18, 12, 11)])
    torch.testing.assert_close(texts[0], texts[1])
    assert (texts[0] - texts[2]).abs().max() > 1e-3


# --------------------------------------------------------------------------------------------------
# The step-aware preference model, against its formula written out in float64


def step_aware_by_hand(state, config, pixels, t):
    """(N, D) image features, not normalised, from the checkpoint's tensors alone."""
    state = {k.removeprefix("model."): v.double() for k, v in state.items()}

    def linear(x, name):
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(x, name):
        variance = x.var(-1, unbiased=False, keepdim=True)
        x = (x - x.mean(-1, keepdim=True)) / (variance + 1e-5).sqrt()
        return x * state[f"{name}.weight"] + state[f"{name}.bias"]

    def silu(x):
        return x * torch.sigmoid(x)

    def gelu(x):
        return x * (1 + torch.erf(x / 2**0.5)) / 2

    def attention(x, name):
        heads = config["num_attention_heads"]
        q, k, v = (linear(x, f"{name}.{letter}_proj") for letter in "qkv")
        q, k, v = (y.unflatten(-1, (heads, -1)).transpose(1, 2) for y in (q, k, v))
        weight = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
        return linear((weight @ v).transpose(1, 2).flatten(2), f"{name}.out_proj")

    frequencies = torch.tensor([10000 ** (-i / 128) for i in range(128)], dtype=torch.float64)
    angle = t.double()[:, None] * frequencies
    time = torch.cat([angle.cos(), angle.sin()], 1)
    time = linear(silu(linear(time, "t_embedder.mlp.0")), "t_embedder.mlp.2")

    embeddings, patch = "vision_model.embeddings.", config["patch_size"]
    patches = pixels.double().unfold(2, patch, patch).unfold(3, patch, patch)  # (N, 3, h, w, P, P)
    kernel = state[f"{embeddings}patch_embedding.weight"]
    x = torch.einsum("nchwij,dcij->nhwd", patches, kernel).flatten(1, 2)
    first = state[f"{embeddings}class_embedding"].expand(len(x), 1, -1)
    x = torch.cat([first, x], 1) + state[f"{embeddings}position_embedding.weight"]
    x = norm(x, "vision_model.pre_layrnorm")
    for i in range(config["num_hidden_layers"]):
        layer = f"vision_model.encoder.layers.{i}."
        six = linear(silu(time), f"{layer}adaLN_modulation.1")[:, None].chunk(6, -1)
        shift, scale, gate, shift2, scale2, gate2 = six
        y = norm(x, f"{layer}layer_norm1") * (1 + scale) + shift
        x = x + gate * attention(y, f"{layer}self_attn")
        y = norm(x, f"{layer}layer_norm2") * (1 + scale2) + shift2
        x = x + gate2 * linear(gelu(linear(y, f"{layer}mlp.fc1")), f"{layer}mlp.fc2")
    shift, scale = linear(silu(time), "vision_model.adaLN_modulation.1").chunk(2, 1)
    x = norm(x[:, 0], "vision_model.post_layernorm") * (1 + scale) + shift
    return x @ state["visual_projection.weight"].T


STEP_AWARE = "Step-Aware_Preference_Models/sd-v1-5_step-aware_preference_model.bin"
TINY_VISION = dict(num_attention_heads=2, patch_size=14, num_hidden_layers=2)


def test_step_aware_is_its_formula(tiny_judges):
    state = torch.load(f"{tiny_judges}/{STEP_AWARE}", weights_only=True)
    pixels, t = noise("pixels", (4, 3, 28, 28)), torch.tensor([951, 401, 1, 0])
    want = step_aware_by_hand(state, TINY_VISION, pixels, t)
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-4)):
        judge = JUDGES["step_aware"]("cpu", tiny_judges, dtype=dtype)
        got = judge.features(pixels, t)
        torch.testing.assert_close(got, want.to(dtype), rtol=tolerance, atol=tolerance)
    other_time = step_aware_by_hand(state, TINY_VISION, pixels[:1], t[3:])
    assert (want[2] - want[3]).abs().max() > 1e-4 and (want[0] - other_time).abs().max() > 1e-2


def test_step_aware_score(tiny_judges):
    """exp(logit_scale) * cosine, and t None is 0. Images come as the VAE leaves them."""
    judge, x = load_judge("step_aware", "cpu", tiny_judges), 1.4 * images(3, 3, 40, 61) - 0.2
    text, t = judge.encode(PROMPTS), torch.tensor([951, 501, 1])
    # SPO's order: the VAE's own output in [-1, 1] and beyond is resized first and clamped last;
    # 61 * 28 / 40 = 42.7 is rounded to 43, and 7.5 pixels of margin to 8
    resized = F.interpolate(2 * x - 1, size=(28, 43), mode="bicubic")[..., 8:36]
    pixels = ((resized / 2 + 0.5).clamp(0, 1) - MEAN) / STD
    state = torch.load(f"{tiny_judges}/{STEP_AWARE}", weights_only=True)
    features = step_aware_by_hand(state, TINY_VISION, pixels, t).float()
    want = state["model.logit_scale"].exp() * F.cosine_similarity(features, text)
    torch.testing.assert_close(judge(x, text, t), want, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(judge(x, text), judge(x, text, torch.zeros(3)))
    assert (judge(x, text, t) - judge(x, text)).abs().max() > 1e-2


def test_step_aware_clamps_after_it_has_resized(tiny_judges):
    unclamped = [name for name in JUDGES if getattr(JUDGES[name], "unclamped", False)]
    assert unclamped == ["step_aware"]
    judge, x = load_judge("step_aware", "cpu", tiny_judges), 1.4 * images(3, 3, 40, 61) - 0.2
    resized = F.interpolate(x, size=(28, 43), mode="bicubic")[..., 8:36]
    first = F.interpolate(x.clamp(0, 1), size=(28, 43), mode="bicubic")[..., 8:36].clamp(0, 1)
    got = judges_clip.preprocess(x, judge.size, judge.resize, judge.crop)
    torch.testing.assert_close(got, (resized.clamp(0, 1) - MEAN) / STD)
    assert (got - (first - MEAN) / STD).abs().max() > 0.1


def test_step_aware_with_idle_gates_is_plain_clip(tiny_judges, tmp_path):
    clip = read_clip(tiny_judges, "PickScore_v1")
    folder = shutil.copytree(tiny_judges, tmp_path / "weights")
    torch.save(step_aware_state(clip, plain=True), folder / STEP_AWARE)
    judge, pixels = load_judge("step_aware", "cpu", str(folder)), noise("pixels", (3, 3, 28, 28))
    with torch.no_grad():
        want = clip.get_image_features(pixels).pooler_output
    got = judge.features(pixels, torch.tensor([951, 401, 1]))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def vit_h():
    """CLIP ViT-H-14 on "meta": shapes alone."""
    from transformers import CLIPConfig, CLIPModel

    with torch.device("meta"):
        return CLIPModel(CLIPConfig(**judges_clip.VIT_H))


def assert_fits(module, state):
    mine = {k: v.shape for k, v in module.state_dict().items()}
    assert {k: v.shape for k, v in state.items()} == mine


def test_step_aware_full_size():
    """1,306 M parameters, 320 M of them for time: 318 in adaLN, 2 in the timestep's MLP."""

    def millions(model):
        return round(sum(p.numel() for p in model.parameters()) / 1e6)

    step_aware = object.__new__(judges.StepAware)  # its __init__ reads a checkpoint
    with torch.device("meta"):
        model = step_aware.extend(vit_h())
        state = step_aware_state(vit_h(), plain=True)
    assert millions(model) == 1306 and millions(model) - millions(vit_h()) == 320
    assert_fits(model, step_aware.rename(state))


# --------------------------------------------------------------------------------------------------
# Against the references' own code, run with the same tiny weights, and their full-size checkpoints'
# names and shapes


def expand(templates):
    """{name with {i}: [shape, layers]} -> {name: meta tensor}."""
    state = {}
    for name, (shape, layers) in templates.items():
        for i in range(layers):
            state[name.replace("{i}", str(i))] = torch.empty(shape, device="meta")
    return state


def tiny_open_clip(weights, folder, monkeypatch, activation="gelu"):
    """An hps judge of the weights that open_clip was run with."""
    both = dict(num_hidden_layers=3, hidden_act=activation)
    text = dict(vocab_size=600, hidden_size=48, intermediate_size=192, num_attention_heads=6)
    vision = dict(hidden_size=32, intermediate_size=128, num_attention_heads=4)
    text |= both | dict(eos_token_id=599)
    vision |= both | dict(image_size=28, patch_size=14)
    config = dict(projection_dim=24, text_config=text, vision_config=vision)
    monkeypatch.setattr(JUDGES["hps"], "CONFIG", config)
    folder = shutil.copytree(weights, folder)
    shapes = golden("open_clip.json")["tiny_keys"]
    state = {name: fill(name, shape) for name, shape in shapes.items()}
    torch.save(state, folder / "HPSv2/HPS_v2_compressed.pt")
    return JUDGES["hps"]("cpu", str(folder), dtype=torch.float64)


def test_hps_is_open_clips_cosine(tiny_judges, tmp_path, monkeypatch):
    want, pixels = golden("open_clip.json")["output"], noise("pixels", (3, 3, 28, 28))
    tokens = ids("ids", (3, 77), 598)
    for row, end in zip(tokens, (10, 30, 76)):
        row[end] = 599
        row[end + 1 :] = 0
    judge = tiny_open_clip(tiny_judges, tmp_path / "a", monkeypatch)
    image, text = F.normalize(judge.features(pixels), dim=-1), judge.encode_ids(tokens)
    cosine = torch.tensor(want["cosine_float64"], dtype=torch.float64)
    torch.testing.assert_close(image @ text.T, cosine, rtol=0, atol=1e-9)
    for got, name in ((image, "image"), (text, "text")):
        first5 = torch.tensor(want[f"{name}_features_normalised_first5"])
        torch.testing.assert_close(got[:, :5].float(), first5, rtol=0, atol=1e-6)
    # a wrong activation gives a plausible, wrong number
    judge = tiny_open_clip(tiny_judges, tmp_path / "b", monkeypatch, "quick_gelu")
    image, text = F.normalize(judge.features(pixels), dim=-1), judge.encode_ids(tokens)
    assert (image @ text.T - cosine).abs().max() > 1e-4


def test_hps_full_size_names_and_shapes():
    want = golden("open_clip.json")
    state = expand(want["full_keys"])
    assert len(state) == want["full_key_count"] == 686
    hps = object.__new__(judges.HPS)  # its __init__ reads a checkpoint
    assert_fits(vit_h(), hps.rename(state))


def test_imagereward_is_the_packages(tiny_judges):
    tokens, mask = ids("ids", (3, 35), 118, low=2), torch.zeros(3, 35, dtype=torch.long)
    for row, length in enumerate((35, 12, 5)):
        mask[row, :length] = 1
        tokens[row, length:] = 0
    judge = load_judge("imagereward", "cpu", tiny_judges)
    got = judge.reward(noise("pixels", (3, 3, 32, 32)), torch.stack([tokens, mask], 1))
    assert got.tolist() == pytest.approx(golden("imagereward.json")["rewards"], abs=2e-6)


def test_imagereward_of_images_and_prompts(tiny_judges):
    from transformers import BertTokenizer

    x, prompts = images(3, 3, 40, 49), [*PROMPTS[:2], " ".join(PROMPTS * 3)]  # one is too long
    tokenizer = BertTokenizer.from_pretrained(f"{tiny_judges}/bert-base-uncased")
    rows = [tokenizer(prompt).input_ids for prompt in prompts]
    tokens, mask = torch.zeros(3, 35, dtype=torch.long), torch.zeros(3, 35, dtype=torch.long)
    for i, row in enumerate(rows):
        row = row if len(row) <= 35 else row[:34] + [tokenizer.sep_token_id]
        tokens[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = 1
    judge = load_judge("imagereward", "cpu", tiny_judges)
    want = judge.reward(by_pillow(x, 32, np.round), torch.stack([tokens, mask], 1))
    torch.testing.assert_close(judge(x, judge.encode(prompts)), want, rtol=1e-4, atol=1e-5)
    assert len(rows[2]) > 35
    for other in (by_torch(x, 32), by_pillow(x, 32, np.floor)):  # a wrong resize or crop is seen
        wrong = judge.reward(other, torch.stack([tokens, mask], 1))
        assert (wrong - want).abs().max() > 1e-3


def test_imagereward_full_size_names_and_shapes():
    from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

    want = golden("imagereward.json")
    state = expand(want["full_keys"])
    assert len(state) == want["full_key_count"]
    parts, config = judges.ImageReward.split(state), judges.ImageReward.CONFIG
    text = BlipTextConfig(**config["text"], is_decoder=True)
    with torch.device("meta"):
        assert_fits(BlipVisionModel(BlipVisionConfig(**config["vision"])), parts[0])
        assert_fits(BlipTextModel(text, add_pooling_layer=False), parts[1])
        assert_fits(judges_clip.linear_head(768), parts[2])


@pytest.fixture
def vqascore(tiny_judges):
    judge = load_judge("vqascore", "cpu", tiny_judges)
    judge.yes, judge.words = [67, 1], 120  # the oracle's vocabulary: 120 words of 128 logits
    return judge


def vqa_inputs():
    end = torch.tensor([1])
    before = torch.cat([ids("chunk1", (9,), 118), end])
    after = [torch.cat([ids(f"chunk2-{k}", (n,), 118), end]) for k, n in enumerate((12, 7, 20))]
    masks = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in after], True)
    after = torch.nn.utils.rnn.pad_sequence(after, batch_first=True)
    return noise("pixels", (3, 3, 28, 28)), before, torch.stack([after, masks], 1)


def test_vqascore_is_the_packages(vqascore):
    got = vqascore.probability(*vqa_inputs())
    assert got.tolist() == pytest.approx(golden("vqascore.json")["scores"], rel=1e-5)


def test_vqascore_is_yes_and_its_end(vqascore):
    """sqrt(P(Yes) P(end | Yes)), from the two logits; P(Yes) alone is another number."""
    logits = []
    vqascore.t5.lm_head.register_forward_hook(lambda module, args, out: logits.append(out))
    score = vqascore.probability(*vqa_inputs())
    p = logits[0][..., :120].softmax(-1)
    torch.testing.assert_close(score, (p[:, 0, 67] * p[:, 1, 1]).sqrt())
    assert (score - p[:, 0, 67]).abs().min() > 1e-4


QUESTION = (  # t2v_metrics' words
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions. USER: <image>\nDoes this "
    'figure show "{}"? Please answer yes or no. ASSISTANT: '
)


def test_vqascore_asks_the_papers_question(tiny_judges):
    """Of a picture that is not square, on CLIP's mean colour; the text cut at <image>."""
    from transformers import AutoTokenizer

    x = images(3, 3, 20, 41)
    square = torch.empty(3, 3, 41, 41)
    square[:] = torch.tensor([122.0, 116.0, 104.0]).view(3, 1, 1) / 255
    square[..., 10:30, :] = x
    tokenizer = AutoTokenizer.from_pretrained(f"{tiny_judges}/flan-t5-xl")
    before, _ = QUESTION.split("<image>")
    before = torch.tensor(tokenizer(before).input_ids)
    after = [QUESTION.format(prompt).split("<image>")[1] for prompt in PROMPTS]
    after = [torch.tensor(tokenizer(text).input_ids) for text in after]
    judge = load_judge("vqascore", "cpu", tiny_judges)
    got = judge(x, judge.encode(PROMPTS))
    pixels = by_pillow(square, 28, np.floor)
    for i in range(3):
        alone = torch.stack([after[i], torch.ones_like(after[i])])[None]
        want = judge.probability(pixels[i : i + 1], before, alone)
        torch.testing.assert_close(got[i : i + 1], want, rtol=1e-4, atol=0)
    unknown = tokenizer.unk_token_id
    assert sum(token == unknown for token in after[0].tolist()) == 0  # every letter counts
    assert (before == unknown).sum() == 0


def test_t5s_output_matrix_is_its_own_and_unscaled(vqascore):
    """transformers 5 ties lm_head to shared in silence, and scales the decoder's output if so."""
    state, t5 = flant5_state(), vqascore.t5
    assert (t5.lm_head.weight == state["lm_head.weight"]).all()
    assert (t5.shared.weight == state["shared.weight"]).all()
    assert t5.encoder.embed_tokens is t5.shared and t5.decoder.embed_tokens is t5.shared
    hidden, logits = [], []
    t5.decoder.register_forward_hook(lambda module, args, out: hidden.append(out[0]))
    t5.lm_head.register_forward_hook(lambda module, args, out: logits.append(out))
    vqascore.probability(*vqa_inputs())
    want = hidden[0] @ state["lm_head.weight"].T
    torch.testing.assert_close(logits[0], want, rtol=1e-4, atol=1e-4)


def test_vqascore_full_size_names_and_shapes():
    from transformers import CLIPVisionConfig, CLIPVisionModel, T5Config, T5ForConditionalGeneration

    want = golden("vqascore.json")
    state = expand(want["full_keys"])
    assert len(state) == want["full_key_count"]
    t5, vision, projector = judges.VQAScore.split(state)
    sizes = dict(vocab_size=32128, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64)
    config = T5Config(**sizes, feed_forward_proj="gated-gelu", tie_word_embeddings=False)
    with torch.device("meta"):
        model = T5ForConditionalGeneration(config)
        del model.encoder.embed_tokens, model.decoder.embed_tokens  # the shared ones
        assert_fits(model, t5)
        assert_fits(CLIPVisionModel(CLIPVisionConfig(**judges.VQAScore.CONFIG)), vision)
        assert_fits(judges_clip.two_layers(1024, 4096), projector)


# What no shape tells, as the published configurations say it: (heads, activation, epsilon)
UNSEEN = {
    "CLIP ViT-H-14, text": (16, "gelu", 1e-5),
    "CLIP ViT-H-14, vision": (16, "gelu", 1e-5),
    "ImageReward, text": (12, "gelu", 1e-12),
    "ImageReward, vision": (16, "gelu", 1e-6),
    "VQAScore, vision": (16, "quick_gelu", 1e-5),
}


def test_what_no_shape_tells():
    from transformers import BlipTextConfig, BlipVisionConfig, CLIPVisionConfig

    configs = {
        "CLIP ViT-H-14, text": vit_h().config.text_config,
        "CLIP ViT-H-14, vision": vit_h().config.vision_config,
        "ImageReward, text": BlipTextConfig(**judges.ImageReward.CONFIG["text"]),
        "ImageReward, vision": BlipVisionConfig(**judges.ImageReward.CONFIG["vision"]),
        "VQAScore, vision": CLIPVisionConfig(**judges.VQAScore.CONFIG),
    }
    for name, config in configs.items():
        got = config.num_attention_heads, config.hidden_act, config.layer_norm_eps
        assert got == UNSEEN[name], name
    for name in ("hps", "step_aware"):
        assert JUDGES[name].CONFIG is judges_clip.VIT_H


# --------------------------------------------------------------------------------------------------
# What holds for all


def test_load_judge(tiny_judges):
    with pytest.raises(UserError, match="choose one of .*taste, step_aware"):
        load_judge("mother")
    with pytest.raises(UserError, match="nowhere/HPSv2/HPS_v2_compressed.pt is not there"):
        load_judge("hps", "cpu", "nowhere")
    for name in JUDGES:  # one row of text per prompt, whatever the batch it is asked in
        judge = load_judge(name, "cpu", tiny_judges)
        text, x = judge.encode(PROMPTS), images(3, 3, 40, 40)
        assert len(text) == 3 and judge.name == name
        torch.testing.assert_close(judge(x, text)[2:], judge(x[2:], text[2:]), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", WITH_WEIGHTS)
def test_who_reads_the_prompt_says_so(tiny_judges, name):
    judge, x = load_judge(name, "cpu", tiny_judges), images(3, 3, 40, 40)
    difference = judge(x, judge.encode(PROMPTS)) - judge(x, judge.encode(PROMPTS[::-1]))
    assert (difference.abs().max() > 0) == getattr(JUDGES[name], "reads_prompt", True)


def test_the_judge_in_the_head_of_the_file(monkeypatch):
    start = judges.__doc__.index("    import torch")
    example = judges.__doc__[start : judges.__doc__.index("and a line in JUDGES")]
    assert example.split("class Bright:")[1].count("\n") < 11
    names = {}
    exec(textwrap.dedent(example), names)
    monkeypatch.setitem(JUDGES, "bright", names["Bright"])
    judge, x = load_judge("bright"), images(3, 3, 8, 8)
    torch.testing.assert_close(judge(x, judge.encode(PROMPTS)), 10 * x.mean((1, 2, 3)))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA here")
@pytest.mark.parametrize("name", JUDGES)
def test_judges_on_cuda_agree_with_the_cpu(tiny_judges, name):
    x, scores = images(3, 3, 40, 50), []
    for device in ("cpu", "cuda"):
        judge = load_judge(name, device, tiny_judges)
        text = judge.encode(PROMPTS).to(device)
        scores.append(judge(x.to(device), text).cpu())
    # fp16 and bf16 where the reference uses them
    torch.testing.assert_close(*scores, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("name", ("step_aware", "clipscore", "pickscore", "hps", "aesthetic"))
def test_a_compiled_judge_scores_alike(tiny_judges, monkeypatch, name):
    """--compile: five images through a tower compiled for two at a time."""
    compile_, graphs = torch.compile, []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda f, **kw: compile_(f, backend=backend, **kw))
    judge, x = load_judge(name, "cpu", tiny_judges), images(5, 3, 40, 60)
    t, text = torch.tensor([951, 501, 1, 0, 301]), judge.encode((PROMPTS * 2)[:5])
    want = judge(x, text, t)
    judge.compile(2)
    torch.testing.assert_close(judge(x, text, t), want, rtol=1e-4, atol=1e-4)
    assert len(graphs) == 1
    torch._dynamo.reset()


# --------------------------------------------------------------------------------------------------
# Checkpoints that are not what they should be

HPS_FILE = "HPSv2/HPS_v2_compressed.pt"
SHARD = "clip-flant5-xxl/pytorch_model-00001-of-00002.bin"
SHARD2 = "clip-flant5-xxl/pytorch_model-00002-of-00002.bin"
REWARD_FILE = "ImageReward/ImageReward.pt"


def without(name):
    return lambda state: state.pop(name)


def with_more(**tensors):
    return lambda state: state.update(tensors)


CHECKPOINTS = [
    ("hps", HPS_FILE, without("visual.proj"), "lacks visual_projection.weight"),
    ("hps", HPS_FILE, with_more(extra=torch.zeros(1)), "has a surplus extra"),
    (
        "hps",
        HPS_FILE,
        with_more(**{"ln_final.bias": torch.zeros(3)}),
        "has text_model.final_layer_norm.bias of shape",
    ),
    (
        "step_aware",
        STEP_AWARE,
        without("model.t_embedder.mlp.0.bias"),
        "lacks t_embedder.mlp.0.bias",
    ),
    ("imagereward", REWARD_FILE, without("mlp.layers.4.bias"), "lacks 4.bias"),
    ("imagereward", REWARD_FILE, with_more(mystery=torch.zeros(1)), "has a surplus mystery"),
    ("vqascore", SHARD2, without("lm_head.weight"), "lacks lm_head.weight"),
    ("vqascore", SHARD, without("shared.weight"), "lacks .*shared.weight|lacks .*embed_tokens"),
    ("vqascore", SHARD, with_more(**{"shared.weight": torch.zeros(128, 4)}), "of shape"),
    (
        "aesthetic",
        "sac+logos+ava1-l14-linearMSE.pth",
        without("layers.0.weight"),
        "lacks 0.weight",
    ),
]


def spoil(path, change):
    state = torch.load(path, weights_only=True)
    change(state.get("state_dict", state))
    torch.save(state, path)


@pytest.mark.parametrize(
    "name, file, change, words", CHECKPOINTS, ids=[f"{c[0]} {c[3]}" for c in CHECKPOINTS]
)
def test_wrong_checkpoints_are_named(tiny_judges, tmp_path, name, file, change, words):
    folder = shutil.copytree(tiny_judges, tmp_path / "weights")
    spoil(folder / file, change)
    with pytest.raises(UserError, match=words) as error:
        load_judge(name, "cpu", str(folder))
    # exit 2, not a cell "not run"
    assert not isinstance(error.value, WeightsMissing)
    message = str(error.value)
    assert file.split("/")[0] in message and "\n" not in message


class Evil:
    def __reduce__(self):
        return print, ("this code ran",)


EVIL_FILES = {
    "pickle": pickle.dumps(Evil()),
    "text": b"not a checkpoint",
    "empty": b"",
    "evil zip": {"state_dict": {"x": torch.zeros(1)}, "run": Evil()},
    "list": [torch.zeros(1)],
}


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("kind", EVIL_FILES)
def test_nothing_is_unpickled(tiny_judges, tmp_path, capsys, kind):
    folder = shutil.copytree(tiny_judges, tmp_path / "weights")
    content = EVIL_FILES[kind]
    if isinstance(content, bytes):
        (folder / HPS_FILE).write_bytes(content)
    else:
        torch.save(content, folder / HPS_FILE)
    capsys.readouterr()
    with pytest.raises(UserError, match="is damaged|not a checkpoint") as error:
        load_judge("hps", "cpu", str(folder))
    assert "HPS_v2_compressed.pt" in str(error.value)
    assert "this code ran" not in capsys.readouterr().out
