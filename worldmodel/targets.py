"""What pretraining has the features tell beside the pixels: blurred pictures, and which way edges lie (HOG: MaskFeat, arXiv 2112.09133).

Pictures are uint8 clips [B, T, h, w, 3]; what is told of them has a row for each token, in the order of `encoder.positions`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from worldmodel.encoder import EncoderConfig, scaled

DIRECTIONS = 8  # of edges, in half a turn
SMOOTH = 2  # times a picture is smoothed before: edges drawn without antialiasing are stairs, which lead along pixels alone
FAINT = 0.3  # an edge histogram of this size counts half


def cells_of(config: EncoderConfig) -> int:
    """Cells along a patch's side in a blurred picture."""
    return next(n for n in (3, 4, 2, 1) if config.patch_size % n == 0)


def edge_cells(config: EncoderConfig) -> int:
    """Cells along a patch's side that have an edge histogram each."""
    return 2 if config.patch_size % 2 == 0 else 1


def edge_numbers(config: EncoderConfig) -> int:
    """Numbers in a patch's histograms."""
    return 3 * DIRECTIONS * edge_cells(config) ** 2


def channels_of(with_edges: bool) -> int:
    """Channels of a blurred picture: colours, and edges of each by direction."""
    return 3 * (1 + DIRECTIONS * with_edges)


def edges(pictures: Tensor, smooth: int = SMOOTH) -> Tensor:
    """How strong each colour's edges in pictures [N, 3, h, n * h] of n views are, by direction: [N, 3 * DIRECTIONS, h, n * h].

    An edge between two of the directions counts for both by its nearness.
    """
    count, height = len(pictures), pictures.shape[2]
    x = pictures.unflatten(3, (-1, height)).permute(0, 3, 1, 2, 4).flatten(0, 1)  # a view's border is no edge
    for _ in range(smooth):
        x = F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
    x = F.pad(x, (1, 1, 1, 1), mode="replicate")
    across, down = x[:, :, 1:-1, 2:] - x[:, :, 1:-1, :-2], x[:, :, 2:, 1:-1] - x[:, :, :-2, 1:-1]
    across, down = across[:, :, None], down[:, :, None]
    turn = torch.atan2(down, across) * (DIRECTIONS / torch.pi) - torch.arange(DIRECTIONS, device=x.device)[:, None, None]
    off = (turn + DIRECTIONS / 2) % DIRECTIONS - DIRECTIONS / 2  # from each direction, in steps of them
    x = (torch.hypot(across, down) * (1 - off.abs()).clamp_min(0)).flatten(1, 2)
    return x.unflatten(0, (count, -1)).permute(0, 2, 3, 1, 4).flatten(3)


def histograms(clips: Tensor, config: EncoderConfig) -> Tensor:
    """Edges by colour and direction in the cells of each patch of clips uint8 [B, T, h, w, 3]: float32 [B, L, 3 * DIRECTIONS * cells^2], normed."""
    cells = edge_cells(config)
    x = F.avg_pool2d(edges(scaled(clips).flatten(0, 1).permute(0, 3, 1, 2)), config.patch_size // cells)
    x = in_tubelets(x, clips, cells, config)
    return x / (x.norm(dim=-1, keepdim=True) + FAINT)


def blurred(clips: Tensor, config: EncoderConfig, with_edges: bool = False) -> Tensor:
    """Clips uint8 [B, T, h, w, 3] as coarse, blurred pictures of their tubelets: float32 [B, L, channels * cells^2]."""
    cells = cells_of(config)
    sharp = scaled(clips).flatten(0, 1).permute(0, 3, 1, 2)  # [B * T, 3, h, w]
    size = config.patch_size // cells  # of a cell
    x = F.avg_pool2d(sharp, size)
    if with_edges:  # of half as large a picture, where that goes, which takes a quarter of the time
        less = 2 if size % 2 == 0 else 1
        x = torch.cat((x, F.avg_pool2d(edges(F.avg_pool2d(sharp, less), SMOOTH // less), size // less)), 1)
    for _ in range(2):
        x = F.avg_pool2d(x, 5, 1, 2, count_include_pad=False)
    return in_tubelets(x, clips, cells, config)


def in_tubelets(x: Tensor, clips: Tensor, cells: int, config: EncoderConfig) -> Tensor:
    """Pictures [B * T, channels, rows * cells, columns * cells] of clips [B, T, ...] by tubelets, their mean: [B, L, channels * cells^2]."""
    x = x.unflatten(3, (-1, cells)).unflatten(2, (-1, cells)).permute(0, 2, 4, 1, 3, 5)  # [B * T, rows, columns, channels, ...]
    x = x.flatten(3).flatten(1, 2).unflatten(0, clips.shape[:2])  # [B, T, P, channels * cells^2]
    tube = min(clips.shape[1], config.tubelet_size)
    return x.unflatten(1, (-1, tube)).mean(2).flatten(1, 2)
