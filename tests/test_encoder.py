"""The encoder: layout, rotary positions, single frames, and what it refuses."""

from dataclasses import replace

import pytest
import torch

from worldmodel.encoder import EncoderConfig, VideoEncoder, normalised, patchify, positions, rotate, rotation, scaled, take

SMALL = EncoderConfig(image_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=2)


def pixels(*shape, seed=0):
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def test_the_matrix_product_is_the_convolution():
    encoder = VideoEncoder(SMALL)
    clips = pixels(2, 4, 32, 32, 3)
    video = scaled(clips).permute(0, 4, 1, 2, 3)
    wanted = encoder.patch_embed.proj(video).flatten(2).transpose(1, 2)
    found = encoder.patch_embed(scaled(patchify(clips, SMALL)))
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("stem", "conv"), [(0, 0), (20, 0), (20, 4)])
def test_a_single_frame_fills_its_tubelet(stem, conv):
    encoder = VideoEncoder(replace(SMALL, stem=stem, conv=conv))
    frame = pixels(2, 1, 32, 32, 3)
    torch.testing.assert_close(
        encoder(patchify(frame, SMALL)), encoder(patchify(frame.expand(-1, 2, -1, -1, -1), SMALL)), atol=1e-4, rtol=1e-4
    )


def test_rotary_attention_depends_on_relative_positions_only():
    q, k = torch.randn(2, 1, 1, 1, 24).unbind(0)
    for shift in (0.0, 5.0):
        here, there = torch.tensor([[[1.0, 2.0, 3.0]]]) + shift, torch.tensor([[[2.0, 0.0, 5.0]]]) + shift
        score = (rotate(q, rotation(here, 24, 100.0)) * rotate(k, rotation(there, 24, 100.0))).sum()
        if shift:
            torch.testing.assert_close(score, first)
        first = score
    plain = (q * k).sum()
    assert not torch.isclose(plain, first)


def test_module_names_follow_vjepa2():
    names = VideoEncoder(SMALL).state_dict().keys()
    for name in ("patch_embed.proj.weight", "blocks.0.norm1.weight", "blocks.1.attn.qkv.bias", "blocks.0.mlp.fc2.weight", "norm.bias"):
        assert name in names


def test_encode_keeps_leading_axes_and_does_not_mix_frames():
    encoder = VideoEncoder(SMALL).eval()
    frames = pixels(2, 3, 32, 32, 3)
    features = encoder.encode(frames)
    assert features.shape == (2, 3, 16, 48) and features.dtype == torch.float32
    torch.testing.assert_close(features[1, 2], encoder.encode(frames[1, 2]), atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(features.std(-1, correction=0), torch.ones(2, 3, 16), atol=1e-3, rtol=1e-3)


def test_convolutions_go_over_whole_pictures_and_see_nothing_of_hidden_patches():
    config = replace(SMALL, views=2, stem=20, conv=4)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        encoder = VideoEncoder(config).eval()
    clips = pixels(2, 4, 32, 64, 3)
    patches, visible = patchify(clips, config), torch.tensor([[0, 5, 40], [31, 32, 63]])
    told = encoder(patches, visible)
    other = patchify(pixels(2, 4, 32, 64, 3, seed=1), config)
    for i, seen in enumerate(visible):
        other[i, seen] = patches[i, seen]
    torch.testing.assert_close(encoder(other, visible), told, atol=1e-5, rtol=1e-5)
    x = scaled(clips).permute(0, 1, 4, 2, 3).flatten(0, 1)
    for layer in encoder.patch_embed.halve:
        x = torch.nn.functional.gelu(layer(x))
    x = torch.nn.functional.gelu(encoder.patch_embed.proj(x + torch.nn.functional.gelu(encoder.patch_embed.mix(x))))  # [8, 20, 4, 8]
    x = x.unflatten(0, (2, 2, 2)).permute(0, 1, 4, 5, 2, 3)  # [B, t, rows, columns, times, stem]
    torch.testing.assert_close(encoder.patch_embed(normalised(patches, config)), encoder.patch_embed.out(x.flatten(4).flatten(1, 3)), atol=1e-4, rtol=1e-4)
    for wrong in ({"conv": 4}, {"conv": -1}, {"conv": 4, "stem": 8, "patch_size": 2}):
        with pytest.raises(ValueError, match="conv"):
            replace(SMALL, **wrong)


@pytest.mark.parametrize("conv", [0, 4])
def test_visible_tokens_are_encoded_at_their_places(conv):
    encoder = VideoEncoder(replace(SMALL, stem=20, conv=conv)).eval()
    patches = patchify(pixels(2, 4, 32, 32, 3), SMALL)
    every = torch.arange(32).expand(2, -1)
    torch.testing.assert_close(encoder(patches, every), encoder(patches), atol=1e-4, rtol=1e-4)
    some = torch.tensor([[0, 5, 31], [3, 4, 20]])
    assert encoder(patches, some).shape == (2, 3, 48)


def test_take_and_positions():
    x = torch.arange(24.0).reshape(2, 4, 3)
    assert take(x, torch.tensor([[1, 0], [3, 3]])).tolist() == [[[3, 4, 5], [0, 1, 2]], [[21, 22, 23], [21, 22, 23]]]
    assert positions(2, (2, 3))[7].tolist() == [1, 0, 1]


@pytest.mark.parametrize(
    ("frames", "words"),
    [
        (pixels(1, 2, 40, 40, 3), "expected clips"),
        (pixels(1, 3, 32, 32, 3), "multiple of tubelet_size"),
        (torch.zeros(1, 2, 32, 32, 3), "uint8"),
    ],
)
def test_wrong_clips_are_refused(frames, words):
    with pytest.raises(ValueError, match=words):
        patchify(frames, SMALL)


def test_wrong_sizes_are_refused():
    with pytest.raises(ValueError, match="patch_size"):
        EncoderConfig(image_size=50, patch_size=12)
    with pytest.raises(ValueError, match="heads"):
        EncoderConfig(embed_dim=50, num_heads=4)
