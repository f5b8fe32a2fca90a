"""Judges and the figures of a run's table, against transformers, PIL and textbook formulas."""
import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
import judges
import sample
import toy


@pytest.fixture(scope="module")
def tiny_clip(tmp_path_factory):
    """A CLIPModel folder with random weights, in PickScore's format, with the toy's tokenizer."""
    from transformers import CLIPConfig, CLIPModel
    folder = str(tmp_path_factory.mktemp("clip"))
    words = toy.tokenizer()
    torch.manual_seed(0)
    text = dict(vocab_size=len(words), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, hidden_act="gelu",
                max_position_embeddings=16, bos_token_id=words.bos_token_id, eos_token_id=words.eos_token_id, pad_token_id=words.pad_token_id)
    vision = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14, hidden_act="gelu")
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(folder, safe_serialization=True)
    words.save_pretrained(folder)
    return folder


def test_pickscore_is_clips_logit(tiny_clip):
    judge = judges.PickScore("cpu", tiny_clip, tiny_clip)
    prompts = ["a red sun over a sea", "a white moon", "a large yellow sun over hills under a pink sky"]
    images = torch.rand(3, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    text = judge.encode(prompts)
    assert text.shape == (3, 8)
    ids = judge.tokenizer(prompts, padding="max_length", max_length=16, return_tensors="pt").input_ids
    with torch.no_grad():
        want = judge.clip(input_ids=ids, pixel_values=judges.preprocess(images, 28)).logits_per_image
    torch.testing.assert_close(judge(images, text), want.diagonal(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(judge(images[:1], text[1:2]), want[:1, 1], rtol=1e-5, atol=1e-5)
    assert want.std() > 1e-3


@pytest.mark.parametrize("size", [(512, 512), (96, 128), (131, 77)])
def test_preprocessing_is_clips_own_to_a_grey_level(size):
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8))
    image = small.resize(size[::-1], Image.Resampling.BICUBIC)
    want = CLIPImageProcessorPil()(image, return_tensors="pt").pixel_values
    got = judges.preprocess(torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255, 224)
    assert got.shape == want.shape == (1, 3, 224, 224)
    assert (got - want).abs().max() < 2.5 / 255 / 0.26 and (got - want).abs().mean() < 0.5 / 255 / 0.26


def test_load_judge():
    assert judges.load_judge("taste").name == "taste"
    with pytest.raises(sample.UserError, match="choose one of taste, pickscore"):
        judges.load_judge("mother")


def picture(seed, size=(37, 41)):
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


def test_rmse_by_hand():
    a, b = picture(0), picture(1)
    per_channel = [np.sqrt(np.mean((a[..., c].astype(float) - b[..., c]) ** 2)) for c in range(3)]
    assert evaluate.rmse(a, b, 255) == pytest.approx(np.mean(per_channel) / 255, rel=1e-12)
    assert evaluate.rmse(a, b) == pytest.approx(evaluate.rmse(a, b, 255) * 255 / 4095, rel=1e-12) and evaluate.rmse(a, a) == 0
    with pytest.raises(ValueError, match="different sizes"):
        evaluate.rmse(a, picture(1, (41, 37)))


def test_entropy_is_of_pils_gray():
    a = picture(2)
    counts = np.array([c for c in Image.fromarray(a).convert("L").histogram() if c])
    p = torch.tensor(counts / counts.sum())
    assert evaluate.entropy_1d(a) == pytest.approx(torch.distributions.Categorical(p).entropy().item() / np.log(2), rel=1e-6)
    assert evaluate.entropy_1d(np.full((8, 8, 3), 7, np.uint8)) == 0
    assert evaluate.entropy_1d(np.repeat(np.arange(256, dtype=np.uint8).reshape(16, 16, 1), 3, 2)) == pytest.approx(8)


def test_table_is_of_paired_differences():
    before = {"x": torch.tensor([1., 2., 3., float("nan")])}
    after = {"x": torch.tensor([2., 3., 5., 1.])}
    table, figures = evaluate.before_after(before, after, 4)
    d = np.array([1, 1, 2])
    assert figures["x"]["change"] == pytest.approx(d.mean()) and figures["x"]["se"] == pytest.approx(d.std(ddof=1) / np.sqrt(3))
    assert f"+{d.mean():.3f} +- {d.std(ddof=1) / np.sqrt(3):.3f}" in table
