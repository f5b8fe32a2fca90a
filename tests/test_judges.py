"""Judges against transformers, Pillow and their references' own code (golden/*.json), and what they refuse."""
import pickle
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import evaluate
from parts import judges
from parts import weights as store
import sample
from weights import blip_state, fill, flant5_state, golden, ids, noise, step_aware_state


PROMPTS = ["a red sun over a sea", "a white moon", "a large yellow sun over hills under a pink sky"]


def images(*shape, seed=0):
    """8-bit pixels, as floats in [0, 1]."""
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed)) / 255


# ---- preprocessing, against Pillow and transformers

@pytest.mark.parametrize("size", [(512, 512), (427, 640), (300, 500), (40, 61), (1024, 768), (224, 300), (131, 77)])
def test_pil_resize_is_pillows_to_the_last_bit(size):
    a = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    short = min(size)
    h, w = (224 if n == short else int(224 * n / short) for n in size)
    want = np.asarray(Image.fromarray(a).resize((w, h), Image.Resampling.BICUBIC))
    got = judges.pil_resize(torch.from_numpy(a).permute(2, 0, 1)[None], h, w)[0].permute(1, 2, 0).numpy()
    assert (want == got).all()


@pytest.mark.parametrize("size", [(512, 512), (427, 640), (96, 128), (131, 77), (224, 224)])
def test_preprocessing_is_transformers(size):
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    x = images(1, 3, *size)
    want = CLIPImageProcessorPil()(sample.to_pil(x[0]), return_tensors="pt").pixel_values
    got = judges.preprocess(x, 224, crop="floor")
    assert got.shape == want.shape and (got - want).abs().max() < 1e-6


def test_the_tensor_convention_is_another():
    x = images(1, 3, 427, 640)
    want = F.interpolate(x, size=(224, int(224 * 640 / 427)), mode="bicubic", antialias=True)
    left = int(round((want.shape[-1] - 224) / 2))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (judges.CLIP_MEAN, judges.CLIP_STD))
    got = judges.preprocess(x, 224, "tensor")
    torch.testing.assert_close(got, (want[..., left:left + 224] - mean) / std)
    assert (got - judges.preprocess(x, 224, "pil")).abs().max() > 1e-3


# ---- the CLIP family, against transformers' own CLIPModel on the same folder

@pytest.mark.parametrize("name, folder", [("clipscore", "CLIP-ViT-H-14-laion2B-s32B-b79K"), ("pickscore", "PickScore_v1")])
def test_clip_is_transformers(tiny_judges, name, folder):
    from transformers import CLIPModel
    judge, x = judges.load_judge(name, "cpu", tiny_judges), images(3, 3, 40, 50)
    text = judge.encode(PROMPTS)
    assert text.shape == (3, 8) and judge.name == name
    model = CLIPModel.from_pretrained(f"{tiny_judges}/{folder}").eval()
    ids = judge.tokenizer(PROMPTS, padding="max_length", max_length=16, return_tensors="pt").input_ids
    pixels = judges.preprocess(x, 28, judge.how, judge.crop)
    with torch.no_grad():
        out = model(input_ids=ids, pixel_values=pixels)
    want = out.logits_per_image / (1 if name == "pickscore" else model.logit_scale.exp())
    torch.testing.assert_close(judge(x, text), want.diagonal(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(judge(x[:1], text[1:2]), want[:1, 1], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(judge.embed(x), out.image_embeds, rtol=1e-4, atol=1e-6)
    assert want.std() > 1e-3


# ---- the step-aware preference model, against its formula written out in float64

def step_aware_by_hand(state, config, pixels, t):
    """(N, D) image features, not normalised, from the checkpoint's tensors alone: SPO's time-conditioned CLIP, line by line."""
    s = {k.removeprefix("model."): v.double() for k, v in state.items()}
    linear = lambda x, name: x @ s[f"{name}.weight"].T + s[f"{name}.bias"]
    def norm(x, name):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        return x * s[f"{name}.weight"] + s[f"{name}.bias"]
    silu = lambda x: x * torch.sigmoid(x)
    gelu = lambda x: x * (1 + torch.erf(x / 2 ** .5)) / 2
    freq = torch.tensor([10000 ** (-i / 128) for i in range(128)], dtype=torch.float64)
    angle = t.double()[:, None] * freq
    c = linear(silu(linear(torch.cat([angle.cos(), angle.sin()], 1), "t_embedder.mlp.0")), "t_embedder.mlp.2")
    P, H, heads = config.patch_size, config.hidden_size, config.num_attention_heads
    patches = pixels.double().unfold(2, P, P).unfold(3, P, P)                                     # (N, 3, h, w, P, P)
    x = torch.einsum("nchwij,dcij->nhwd", patches, s["vision_model.embeddings.patch_embedding.weight"]).flatten(1, 2)
    x = torch.cat([s["vision_model.embeddings.class_embedding"].expand(len(x), 1, H), x], 1) + s["vision_model.embeddings.position_embedding.weight"]
    x = norm(x, "vision_model.pre_layrnorm")
    for i in range(config.num_hidden_layers):
        layer = f"vision_model.encoder.layers.{i}."
        shift1, scale1, gate1, shift2, scale2, gate2 = linear(silu(c), f"{layer}adaLN_modulation.1").view(-1, 6, 1, H).unbind(1)
        h = norm(x, f"{layer}layer_norm1") * (1 + scale1) + shift1
        q, k, v = (linear(h, f"{layer}self_attn.{n}_proj").unflatten(-1, (heads, -1)).transpose(1, 2) for n in "qkv")
        a = (q @ k.mT / (H // heads) ** .5).softmax(-1) @ v
        x = x + gate1 * linear(a.transpose(1, 2).flatten(2), f"{layer}self_attn.out_proj")
        h = norm(x, f"{layer}layer_norm2") * (1 + scale2) + shift2
        x = x + gate2 * linear(gelu(linear(h, f"{layer}mlp.fc1")), f"{layer}mlp.fc2")
    shift, scale = linear(silu(c), "vision_model.adaLN_modulation.1").chunk(2, 1)
    return (norm(x[:, 0], "vision_model.post_layernorm") * (1 + scale) + shift) @ s["visual_projection.weight"].T


def test_step_aware_is_its_formula(tiny_judges):
    judge = judges.load_judge("step_aware", "cpu", tiny_judges)
    state = torch.load(f"{tiny_judges}/Step-Aware_Preference_Models/{judge.FILE}", weights_only=True)
    pixels, t = noise("pixels", (4, 3, 28, 28)), torch.tensor([951, 401, 1, 0])
    want = step_aware_by_hand(state, judge.clip.config.vision_config, pixels, t)
    with torch.no_grad():
        got32 = judge.embed_at(pixels, t)
        judge.clip.double()
        torch.testing.assert_close(judge.embed_at(pixels.double(), t).double(), want, rtol=0, atol=1e-6)
    torch.testing.assert_close(got32, want.float(), rtol=1e-3, atol=1e-4)
    assert (want[2] - want[3]).abs().max() > 1e-4 and (want[0] - step_aware_by_hand(state, judge.clip.config.vision_config, pixels[:1], t[3:])).abs().max() > 1e-2


def test_step_aware_score(tiny_judges):
    """exp(logit_scale) * cosine, t None is 0, and its resize is bicubic without antialias, clamped."""
    judge, x = judges.load_judge("step_aware", "cpu", tiny_judges), images(3, 3, 40, 60)
    text, t = judge.encode(PROMPTS), torch.tensor([951, 501, 1])
    resized = F.interpolate(2 * x - 1, size=(28, 42), mode="bicubic", align_corners=False)[..., 7:35]
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (judges.CLIP_MEAN, judges.CLIP_STD))
    pixels = ((resized / 2 + .5).clamp(0, 1) - mean) / std
    torch.testing.assert_close(judge.shrink(x), pixels, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        want = judge.clip.logit_scale.exp() * F.cosine_similarity(judge.embed_at(pixels, t), text)
    torch.testing.assert_close(judge(x, text, t), want, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(judge(x, text), judge(x, text, torch.zeros(3)))
    assert (judge(x, text, t) - judge(x, text)).abs().max() > 1e-2


def test_step_aware_with_idle_gates_is_plain_clip(tiny_judges, tmp_path):
    from transformers import CLIPModel
    clip = CLIPModel.from_pretrained(f"{tiny_judges}/PickScore_v1").eval()
    folder = shutil.copytree(tiny_judges, tmp_path / "w")
    torch.save(step_aware_state(clip, plain=True), folder / "Step-Aware_Preference_Models" / judges.StepAware.FILE)
    judge, pixels = judges.load_judge("step_aware", "cpu", str(folder)), noise("pixels", (3, 3, 28, 28))
    with torch.no_grad():
        want = clip.get_image_features(pixels).pooler_output
        torch.testing.assert_close(judge.embed_at(pixels, torch.tensor([951, 401, 1])), want, rtol=1e-4, atol=1e-5)


def test_step_aware_full_size():
    """1,306 M parameters, 318 M of them for time; a state of these names and shapes loads strictly."""
    from transformers import CLIPModel
    with torch.device("meta"):
        model = judges.add_time(CLIPModel(judges.vit_h()))
        plain = sum(p.numel() for p in CLIPModel(judges.vit_h()).parameters())
    total = sum(p.numel() for p in model.parameters())
    assert round(total / 1e6) == 1306 and round((total - plain) / 1e6) == 320  # 318 in adaLN, 2 in the timestep's MLP
    with torch.device("meta"):
        state = {k.removeprefix("model."): v for k, v in step_aware_state(CLIPModel(judges.vit_h()), plain=True).items() if "position_ids" not in k}
    assert_fits(model, state)


def test_aesthetic_is_of_normalised_embeddings(tiny_judges):
    from transformers import CLIPModel
    judge, x = judges.load_judge("aesthetic", "cpu", tiny_judges), images(3, 3, 40, 50)
    model = CLIPModel.from_pretrained(f"{tiny_judges}/clip-vit-large-patch14").eval()
    assert model.config.vision_config.hidden_act == "quick_gelu"
    state = torch.load(f"{tiny_judges}/sac+logos+ava1-l14-linearMSE.pth", weights_only=True)
    with torch.no_grad():
        e = model.get_image_features(judges.preprocess(x, 28)).pooler_output
        e = e / e.norm(dim=-1, keepdim=True)
        for i in (0, 2, 4, 6, 7):
            e = e @ state[f"layers.{i}.weight"].T + state[f"layers.{i}.bias"]
    torch.testing.assert_close(judge(x, judge.encode(PROMPTS)), e[:, 0], rtol=1e-4, atol=1e-5)


def test_text_is_cut_with_its_end_token_kept(tiny_judges):
    judge = judges.load_judge("clipscore", "cpu", tiny_judges)
    words = "a red sun over a sea under a pink sky and a large white moon over hills and snow".split()
    same = judge.encode([" ".join(words), " ".join(words[:12]), " ".join(words[:11])])
    torch.testing.assert_close(same[0], same[1])
    assert (same[0] - same[2]).abs().max() > 1e-3


# ---- against the references' own code, run with the same tiny weights (golden/*.json), and their full-size checkpoints' names

def expand(templates):
    """{name with {i}: [shape, layers]} -> {name: meta tensor}."""
    return {k.replace("{i}", str(i)): torch.empty(shape, device="meta") for k, (shape, n) in templates.items() for i in range(n)}


def assert_fits(module, state):
    mine = {k: v.shape for k, v in module.state_dict().items()}
    assert {k: v.shape for k, v in state.items()} == mine


@pytest.fixture(scope="module")
def open_clip():
    return golden("open_clip.json")


def test_hps_is_open_clips_cosine(open_clip):
    from transformers import CLIPConfig, CLIPModel
    text = dict(vocab_size=600, hidden_size=48, intermediate_size=192, num_hidden_layers=3, num_attention_heads=6, hidden_act="gelu", eos_token_id=599)
    vision = dict(hidden_size=32, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4, image_size=28, patch_size=14, hidden_act="gelu")
    config = CLIPConfig(projection_dim=24, text_config=text, vision_config=vision)
    state = judges.from_open_clip({k: fill(k, shape) for k, shape in open_clip["tiny_keys"].items()})
    judge = object.__new__(judges.CLIP)
    judge.clip = store.build(lambda: CLIPModel(config), state, "tiny", "cpu")
    tokens = ids("ids", (3, 77), 598)
    for row, end in zip(tokens, (10, 30, 76)):
        row[end], row[end + 1:] = 599, 0
    image, text = judge.embed_pixels(noise("pixels", (3, 3, 28, 28))), judge.encode_ids(tokens)
    want = open_clip["output"]
    torch.testing.assert_close(image @ text.T, torch.tensor(want["cosine"]), rtol=0, atol=1e-6)
    torch.testing.assert_close(image[:, :5], torch.tensor(want["image_features_normalised_first5"]), rtol=0, atol=1e-6)
    torch.testing.assert_close(text[:, :5], torch.tensor(want["text_features_normalised_first5"]), rtol=0, atol=1e-6)
    # a wrong activation gives a plausible, wrong number
    config.vision_config.hidden_act = config.text_config.hidden_act = "quick_gelu"
    judge.clip = store.build(lambda: CLIPModel(config), state, "tiny", "cpu")
    assert (judge.embed_pixels(noise("pixels", (3, 3, 28, 28))) @ judge.encode_ids(tokens).T - torch.tensor(want["cosine"])).abs().max() > 1e-4


def test_hps_full_size_names_and_shapes(open_clip):
    from transformers import CLIPModel
    state = expand(open_clip["full_keys"])
    assert len(state) == open_clip["full_key_count"] == 686
    with torch.device("meta"):
        assert_fits(CLIPModel(judges.vit_h()), judges.from_open_clip(state))


@pytest.mark.parametrize("result", golden("open_clip.json")["preprocessing"]["results"], ids=lambda r: f"{r['H']}x{r['W']}")
def test_preprocessing_is_torchvisions_in_both_conventions(open_clip, result):
    a = np.random.RandomState(5).randint(0, 256, (result["H"], result["W"], 3)).astype(np.uint8)
    assert int(a.sum()) == result["source_sum"]
    x = torch.from_numpy(a).permute(2, 0, 1)[None] / 255
    for how, name in (("pil", "open_clip_pil"), ("tensor", "hpsv2_tensor")):
        got, want = judges.preprocess(x, 224, how)[0].double(), result[name]
        assert [got[tuple(at)].item() for at in open_clip["preprocessing"]["sample_points_cyx"]] == pytest.approx(want["samples"], abs=2e-6)
        assert got.abs().sum().item() == pytest.approx(want["sum_abs"], rel=1e-6) and got.mean().item() == pytest.approx(want["mean"], abs=1e-6)


def test_imagereward_is_the_packages(tiny_judges):
    judge, want = judges.load_judge("imagereward", "cpu", tiny_judges), golden("imagereward.json")
    names = {k: list(v.shape) for k, v in blip_state().items() if "_proj." not in k}
    assert names == want["tiny_keys"]  # the tiny checkpoint is the package's own, in names and shapes
    tokens, mask = ids("ids", (3, 35), 118, low=2), torch.zeros(3, 35, dtype=torch.long)
    for r, n in enumerate((35, 12, 5)):
        mask[r, :n], tokens[r, n:] = 1, 0
    got = judge.reward(noise("pixels", (3, 3, 32, 32)), torch.stack([tokens, mask], 1))
    assert got.tolist() == pytest.approx(want["rewards"], abs=2e-6)


def test_imagereward_full_size_names_and_shapes():
    from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel
    want = golden("imagereward.json")
    state = expand(want["full_keys"])
    assert len(state) == want["full_key_count"]
    with torch.device("meta"):
        parts = judges.ImageReward.split(state)
        sizes = judges.ImageReward.SIZES
        models = (BlipVisionModel(BlipVisionConfig(**sizes["vision"])),
                  BlipTextModel(BlipTextConfig(**sizes["text"], is_decoder=True), add_pooling_layer=False), judges.linear_head(768))
        for model, part in zip(models, parts):
            assert_fits(model, part)


@pytest.fixture
def vqascore(tiny_judges):
    judge = judges.load_judge("vqascore", "cpu", tiny_judges)
    judge.yes, judge.words = [67, 1], 120  # the oracle's vocabulary: 120 words of 128 logits
    return judge


def vqa_inputs():
    before = torch.cat([ids("chunk1", (9,), 118), torch.tensor([1])])
    after = [torch.cat([ids(f"chunk2-{k}", (n,), 118), torch.tensor([1])]) for k, n in enumerate((12, 7, 20))]
    return noise("pixels", (3, 3, 28, 28)), before, torch.nn.utils.rnn.pad_sequence(after, batch_first=True, padding_value=-1)


def test_vqascore_is_the_packages(vqascore):
    want = golden("vqascore.json")
    assert {k: list(v.shape) for k, v in flant5_state().items()} == want["tiny_keys"]
    assert vqascore.probability(*vqa_inputs()).tolist() == pytest.approx(want["scores"], rel=1e-5)


def test_vqascore_is_yes_and_its_end(vqascore):
    """sqrt(P(Yes) P(end | Yes)), from the two logits; P(Yes) alone is another number."""
    pixels, before, after = vqa_inputs()
    seen = []
    vqascore.t5.lm_head.register_forward_hook(lambda m, i, out: seen.append(out))
    score = vqascore.probability(pixels, before, after)
    p = seen[0][..., :120].softmax(-1)
    torch.testing.assert_close(score, (p[:, 0, 67] * p[:, 1, 1]).sqrt())
    assert (score - p[:, 0, 67]).abs().min() > 1e-4


def test_t5s_output_matrix_is_its_own_and_unscaled(vqascore):
    """transformers 5 ties lm_head to shared, in silence, and scales the decoder's output if it believes in the tie."""
    state = flant5_state()
    assert (vqascore.t5.lm_head.weight == state["lm_head.weight"]).all() and (vqascore.t5.shared.weight == state["shared.weight"]).all()
    assert vqascore.t5.encoder.embed_tokens is vqascore.t5.shared and vqascore.t5.decoder.embed_tokens is vqascore.t5.shared
    hidden, out = [], []
    vqascore.t5.decoder.register_forward_hook(lambda m, i, o: hidden.append(o[0]))
    vqascore.t5.lm_head.register_forward_hook(lambda m, i, o: out.append(o))
    vqascore.probability(*vqa_inputs())
    torch.testing.assert_close(out[0], hidden[0] @ state["lm_head.weight"].T, rtol=1e-4, atol=1e-4)


def test_vqascore_full_size_names_and_shapes():
    from transformers import CLIPVisionConfig, CLIPVisionModel, T5Config, T5ForConditionalGeneration
    want = golden("vqascore.json")
    state = expand(want["full_keys"])
    assert len(state) == want["full_key_count"]
    t5, eye, projector = judges.VQAScore.split(state)
    with torch.device("meta"):
        assert_fits(CLIPVisionModel(CLIPVisionConfig(**judges.VQAScore.VISION)), eye)
        assert_fits(T5ForConditionalGeneration(T5Config(vocab_size=32128, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64,
                                                        feed_forward_proj="gated-gelu", tie_word_embeddings=False)), t5)
        assert_fits(torch.nn.Sequential(torch.nn.Linear(1024, 4096), torch.nn.GELU(), torch.nn.Linear(4096, 4096)), projector)


def test_vqascore_pads_to_a_square_in_clips_mean(vqascore, monkeypatch):
    seen = []
    monkeypatch.setattr(vqascore, "probability", lambda pixels, *a: seen.append(pixels))
    x = images(1, 3, 20, 40)
    vqascore(x, None)
    want = torch.empty(1, 3, 40, 40)
    want[:] = torch.tensor([122., 116., 104.]).view(3, 1, 1) / 255
    want[..., 10:30, :] = x
    torch.testing.assert_close(seen[0], judges.preprocess(want, 28))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA here")
@pytest.mark.parametrize("name", judges.JUDGES)
def test_judges_on_cuda_agree_with_the_cpu(tiny_judges, name):
    x, scores = images(3, 3, 40, 50), []
    for device in ("cpu", "cuda"):
        judge = judges.load_judge(name, device, tiny_judges)
        scores.append(judge(x.to(device), judge.encode(PROMPTS).to(device)).cpu())
    torch.testing.assert_close(*scores, rtol=.05, atol=.05)  # fp16 and bf16 where the reference uses them


# ---- checkpoints that are not what they should be

def spoil(path, change):
    state = torch.load(path, weights_only=True)
    change(state.get("state_dict", state))
    torch.save(state, path)


CHECKPOINTS = [
    ("hps", "HPSv2/HPS_v2_compressed.pt", lambda s: s.pop("visual.proj"), "lacks visual_projection.weight"),
    ("hps", "HPSv2/HPS_v2_compressed.pt", lambda s: s.update(extra=torch.zeros(1)), "has a surplus extra"),
    ("hps", "HPSv2/HPS_v2_compressed.pt", lambda s: s.update({"ln_final.bias": torch.zeros(3)}), "has text_model.final_layer_norm.bias of shape"),
    ("step_aware", "Step-Aware_Preference_Models/sd-v1-5_step-aware_preference_model.bin", lambda s: s.pop("model.t_embedder.mlp.0.bias"), "lacks t_embedder.mlp.0.bias"),
    ("imagereward", "ImageReward/ImageReward.pt", lambda s: s.pop("mlp.layers.4.bias"), "lacks 4.bias"),
    ("imagereward", "ImageReward/ImageReward.pt", lambda s: s.update(mystery=torch.zeros(1)), "has a surplus mystery"),
    ("vqascore", "clip-flant5-xxl/pytorch_model-00001-of-00002.bin", lambda s: s.pop("lm_head.weight"), "lacks lm_head.weight"),
    ("vqascore", "clip-flant5-xxl/pytorch_model-00001-of-00002.bin", lambda s: s.update({"shared.weight": torch.zeros(128, 4)}), "of shape"),
    ("aesthetic", "sac+logos+ava1-l14-linearMSE.pth", lambda s: s.pop("layers.0.weight"), "lacks 0.weight"),
]


@pytest.mark.parametrize("name, file, change, words", CHECKPOINTS, ids=lambda v: v if isinstance(v, str) else "")
def test_wrong_checkpoints_are_named(tiny_judges, tmp_path, command, name, file, change, words):
    folder = shutil.copytree(tiny_judges, tmp_path / "w")
    spoil(folder / file, change)
    with pytest.raises(sample.UserError, match=words) as e:
        judges.load_judge(name, "cpu", str(folder))
    assert not isinstance(e.value, judges.WeightsMissing) and file.split("/")[0] in str(e.value)  # exit 2, not a cell "not run"


class Evil:
    def __reduce__(self):
        return print, ("this code ran",)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("content", [pickle.dumps(Evil()), b"not a checkpoint", b"", "evil zip", "list"], ids=("pickle", "text", "empty", "evil zip", "list"))
def test_nothing_is_unpickled(tiny_judges, tmp_path, capsys, content):
    folder = shutil.copytree(tiny_judges, tmp_path / "w")
    path = folder / "HPSv2/HPS_v2_compressed.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save({"evil zip": {"state_dict": {"x": torch.zeros(1)}, "run": Evil()}, "list": [torch.zeros(1)]}[content], path)
    capsys.readouterr()
    with pytest.raises(sample.UserError, match="pure weights|not a checkpoint") as e:
        judges.load_judge("hps", "cpu", str(folder))
    assert "HPS_v2_compressed.pt" in str(e.value) and "this code ran" not in capsys.readouterr().out


def test_a_wrong_checkpoint_is_one_line(tiny_judges, tmp_path, command):
    folder = shutil.copytree(tiny_judges, tmp_path / "w")
    spoil(folder / "HPSv2/HPS_v2_compressed.pt", lambda s: s.pop("visual.proj"))
    theirs = tmp_path / "m"
    theirs.mkdir()
    sample.to_pil(images(3, 32, 32)).save(theirs / "0.png")
    (theirs / "prompts.txt").write_text("a sun")
    code, _, err = command("evaluate.py", theirs, "--judges", "hps", "--metrics", "none", "--weights", folder, "--output_dir", tmp_path / "o")
    assert code == 2 and " lacks " in err and err.count("\n") == 1


def test_load_judge(tiny_judges):
    assert judges.load_judge("taste").name == "taste"
    with pytest.raises(sample.UserError, match="choose one of taste, step_aware"):
        judges.load_judge("mother")
    with pytest.raises(sample.UserError, match="no weights folder"):
        judges.load_judge("hps", "cpu", "nowhere")
    for name in judges.JUDGES:  # one row of text per prompt, whatever the batch it is asked in
        judge = judges.load_judge(name, "cpu", tiny_judges)
        text, x = judge.encode(PROMPTS), images(3, 3, 40, 40)
        assert len(text) == 3
        torch.testing.assert_close(judge(x, text)[2:], judge(x[2:], text[2:]), rtol=1e-3, atol=1e-5)


def test_table_is_of_paired_differences():
    before = {"x": torch.tensor([1., 2., 3., float("nan")])}
    after = {"x": torch.tensor([2., 3., 5., 1.])}
    table, figures = evaluate.before_after(before, after, 4)
    d = np.array([1, 1, 2])
    assert figures["x"]["change"] == pytest.approx(d.mean()) and figures["x"]["se"] == pytest.approx(d.std(ddof=1) / np.sqrt(3))
    assert f"+{d.mean():.3f} +- {d.std(ddof=1) / np.sqrt(3):.3f}" in table


@pytest.mark.parametrize("name", ("step_aware", "clipscore", "pickscore", "hps", "aesthetic"))
def test_a_compiled_judge_scores_alike(tiny_judges, monkeypatch, name):
    """--compile: five images through a tower compiled for two at a time."""
    compile_, met = torch.compile, []
    monkeypatch.setattr(torch, "compile", lambda f, **kw: compile_(f, backend=lambda gm, x: (met.append(1), gm.forward)[1], **kw))
    judge, x, t = judges.load_judge(name, "cpu", tiny_judges), images(5, 3, 40, 60), torch.tensor([951, 501, 1, 0, 301])
    text = judge.encode((PROMPTS * 2)[:5])
    want = judge(x, text, t)
    judge.compile(2)
    torch.testing.assert_close(judge(x, text, t), want, rtol=1e-4, atol=1e-4)
    assert len(met) == 1
    torch._dynamo.reset()
