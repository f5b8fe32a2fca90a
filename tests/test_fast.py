"""What is about time alone changes no number: fixed batch sizes, a preview decoder."""

import pytest
import torch
from conftest import draw, question
from diffusers import AutoencoderTiny

from parts import fast
from parts.common import UserError
from parts.model import decode, predict_noise


def test_compiled_functions_meet_their_sizes_alone(monkeypatch):
    met = []

    def compile_nothing(f, **options):
        assert options == {"dynamic": False}

        def call(x, y):
            met.append(len(x))
            return f(x, y)

        return call

    monkeypatch.setattr(torch, "compile", compile_nothing)
    product = fast.compile_at(lambda x, y: x * y, 2, 5)
    expected = {1: [2], 2: [2], 3: [2, 2], 5: [5], 6: [2, 2, 2], 9: [5, 5], 10: [5, 5]}
    for n, sizes in expected.items():
        met.clear()
        x = torch.rand(n, 3, requires_grad=True)
        y = product(x, x)
        assert met == sizes and torch.equal(y, x * x)
        (gradient,) = torch.autograd.grad(y.sum(), x)
        torch.testing.assert_close(gradient, 2 * x)  # the copies that fill up weigh nothing


def test_a_fast_pipeline_computes_what_the_slow_one_does(pipe, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda f, **options: f)
    where, latents = question(pipe), draw(3, 4, 12, 12)
    with torch.no_grad():
        eps, images = predict_noise(pipe.unet, *where, 5.0), decode(pipe, latents)

        class Judge:
            def compile(self, size):
                self.size = size

        judge = Judge()
        fast.make_fast(pipe, judge, {6}, 12)
        assert judge.size == 12
        fast_eps, fast_images = predict_noise(pipe.unet, *where, 5.0), decode(pipe, latents)
    torch.testing.assert_close(fast_eps, eps, rtol=0, atol=1e-5)
    torch.testing.assert_close(fast_images, images, rtol=0, atol=1e-5)


def tiny_decoder(folder, blocks=3):
    """An AutoencoderTiny that enlarges 2^(blocks - 1) times."""
    torch.manual_seed(0)
    vae = AutoencoderTiny(
        encoder_block_out_channels=(8,) * blocks,
        decoder_block_out_channels=(8,) * blocks,
        num_encoder_blocks=(1,) * blocks,
        num_decoder_blocks=(1,) * blocks,
        latent_channels=4,
        scaling_factor=1.0,
    )
    vae.save_pretrained(folder, safe_serialization=True)
    return str(folder)


def test_a_preview_decoder_decodes_in_the_vaes_place(pipe, tmp_path):
    preview = fast.load_preview(tiny_decoder(tmp_path / "tiny"), pipe)
    latents = draw(3, 4, 12, 12)
    with torch.no_grad():
        expected = preview.decode(latents).sample / 2 + 0.5
    torch.testing.assert_close(decode(pipe, latents, preview), expected)
    assert not any(p.requires_grad for p in preview.parameters())


def test_preview_decoders_that_do_not_fit_are_refused(pipe, tmp_path):
    with pytest.raises(UserError, match=r"images of \(1, 3, 96, 96\), not \(1, 3, 48, 48\)"):
        fast.load_preview(tiny_decoder(tmp_path / "large", 4), pipe)
    with pytest.raises(UserError, match="such as madebyollin/taesd"):
        fast.load_preview(str(tmp_path / "nowhere"), pipe)
