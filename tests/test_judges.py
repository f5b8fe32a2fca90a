"""Judges against transformers, Pillow and their references' own code (golden/*.json), and what they refuse."""
import pickle
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import evaluate
import judges
import sample


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


# ---- checkpoints that are not what they should be

def spoil(path, change):
    state = torch.load(path, weights_only=True)
    change(state.get("state_dict", state))
    torch.save(state, path)


CHECKPOINTS = [
    ("hps", "HPSv2/HPS_v2_compressed.pt", lambda s: s.pop("visual.proj"), "lacks 1 of the model's keys, such as visual_projection.weight"),
    ("hps", "HPSv2/HPS_v2_compressed.pt", lambda s: s.update(extra=torch.zeros(1)), "has surplus 1 of the model's keys, such as extra"),
    ("hps", "HPSv2/HPS_v2_compressed.pt", lambda s: s.update({"ln_final.bias": torch.zeros(3)}), "has wrongly shaped 1 of the model's keys"),
    ("imagereward", "ImageReward/ImageReward.pt", lambda s: s.pop("mlp.layers.4.bias"), "lacks 1"),
    ("imagereward", "ImageReward/ImageReward.pt", lambda s: s.update(mystery=torch.zeros(1)), "such as mystery"),
    ("vqascore", "clip-flant5-xxl/pytorch_model-00001-of-00002.bin", lambda s: s.pop("lm_head.weight"), "such as lm_head.weight"),
    ("vqascore", "clip-flant5-xxl/pytorch_model-00001-of-00002.bin", lambda s: s.update({"shared.weight": torch.zeros(128, 4)}), "wrongly shaped"),
    ("aesthetic", "sac+logos+ava1-l14-linearMSE.pth", lambda s: s.pop("layers.0.weight"), "lacks 1"),
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


@pytest.mark.parametrize("content", [pickle.dumps(Evil()), b"not a checkpoint", b"", "evil zip", "list"])
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
    assert code == 2 and "lacks 1 of the model's keys" in err and err.count("\n") == 1


def test_load_judge(tiny_judges):
    assert judges.load_judge("taste").name == "taste"
    with pytest.raises(sample.UserError, match="choose one of taste, clipscore"):
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
