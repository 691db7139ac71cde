"""What frozen features know: probes from single frames to gripper and object position and object yaw.

The attentive probe is V-JEPA's (arXiv 2404.08471, section 4): one learned query cross-attends over the patches, then
an MLP and a linear head. With one query, its keys fold into a score vector per head. Whatever the encoder, patches get
a learned position, so that it is judged by what it sees. The ridge probe is linear in all patches.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from scipy.spatial.transform import Rotation
from torch import Tensor, nn
from tqdm import tqdm

from worldmodel.encoder import EncoderConfig, patchify, scaled
from worldmodel.interface import Encoder
from worldmodel.training import gather


@dataclass(frozen=True)
class Labels:
    """What to read out of M frames; metres and radians."""

    gripper: np.ndarray  # float [M, 3]
    object: np.ndarray  # float [M, 3]
    yaw: np.ndarray  # float [M]
    symmetry: np.ndarray  # int [M]: turns of 1 / symmetry look the same; 0: all turns do, yaw is not judged

    def targets(self) -> Tensor:
        """float32 [M, 8]: gripper, object, cosine and sine of symmetry * yaw."""
        turn = self.symmetry * self.yaw
        return torch.from_numpy(np.column_stack((self.gripper, self.object, np.cos(turn), np.sin(turn)))).float()

    def errors(self, guess: np.ndarray) -> dict:
        """Errors of guess [M, 8]: root mean squared and median in millimetres per axis, and degrees modulo the symmetry."""
        places = {"gripper": guess[:, :3] - self.gripper, "object": guess[:, 3:6] - self.object}  # m
        in_mm = lambda metres: [round(float(v), 2) for v in 1e3 * metres]  # noqa: E731
        turns = self.symmetry > 0
        fold = np.maximum(self.symmetry, 1)[turns]
        off = np.arctan2(guess[turns, 7], guess[turns, 6]) - fold * self.yaw[turns]
        off = np.degrees((off + np.pi) % (2 * np.pi) - np.pi) / fold
        return {
            **{f"{name}_rmse_mm": in_mm(np.sqrt(np.mean(wrong**2, 0))) for name, wrong in places.items()},
            **{f"{name}_median_mm": in_mm(np.median(abs(wrong), 0)) for name, wrong in places.items()},
            "object_yaw_rmse_deg": round(float(np.sqrt(np.mean(off**2))), 2) if turns.any() else None,
        }


def yaw_of_cube(quat: np.ndarray) -> np.ndarray:
    """Turn about z, modulo a quarter turn, of a cube on whichever of its faces: quat [M, 4] (wxyz) -> radians [M].

    Of a tilted one, after the least turn that has its uppermost axis upright.
    """
    axes = Rotation.from_quat(quat[:, [1, 2, 3, 0]]).as_matrix().transpose(0, 2, 1)  # [M, 3, xyz]
    rows, upright = np.arange(len(axes)), abs(axes[..., 2]).argmax(1)
    up, side = axes[rows, upright], axes[rows, (upright + 1) % 3]
    up = up * np.sign(up[:, 2:])
    side = side[:, :2] - up[:, :2] * (side[:, 2:] / (1 + up[:, 2:]))
    return np.arctan2(side[:, 1], side[:, 0])


class AttentiveProbe(nn.Module):
    """One learned query over P patches of D features, to `out` numbers in their own units."""

    def __init__(self, patches: int, features: int, out: int, heads: int = 12) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(out))
        self.register_buffer("std", torch.ones(out))
        self.heads, width = heads, 16 * heads
        self.register_buffer("centre", torch.zeros(features))  # features are standardised, not layer-normed: size may matter
        self.register_buffer("scale", torch.ones(features))
        self.place = nn.Parameter(0.02 * torch.randn(patches, features))
        self.score = nn.Linear(features, heads)
        self.value = nn.Parameter(torch.randn(heads, features, 16) * features**-0.5)
        self.mlp = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, out))

    def fitted(self, features: Tensor | np.ndarray) -> AttentiveProbe:
        """Itself, knowing the mean and deviation of features [M, P, D], from about 2,000 of them."""
        some = gather(features, slice(None, None, max(1, len(features) // 2000)), self.centre.device).flatten(0, 1)
        self.centre.copy_(some.mean(0))
        self.scale.copy_(some.std(0).clamp_min(1e-3))
        return self

    def forward(self, features: Tensor) -> Tensor:
        """features [B, P, D] -> [B, out]."""
        # x = (features - centre) / scale + place, without making it: features, the one large tensor, are read twice
        score, away = self.score.weight / self.scale, self.place - self.centre / self.scale
        weight = (F.linear(features, score) + self.score(away)).softmax(1).transpose(1, 2)  # [B, heads, P]
        pooled = torch.bmm(weight, features) / self.scale + weight @ away  # [B, heads, D]
        y = torch.bmm(pooled.transpose(0, 1), self.value).transpose(0, 1).flatten(1)
        return self.head(y + self.mlp(y)) * self.std + self.mean


def fit(features: Tensor | np.ndarray, targets: Tensor, weight: Tensor, epochs: int, seed: int = 0) -> AttentiveProbe:
    """An attentive probe trained on features float16 [M, P, D] and targets [M, out]; weight [M, out] masks targets.

    The loss is L1: the few frames where a thing is hidden would rule a squared one, and hold up the others for long. The probe
    is on the device of a tensor of features.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        probe = AttentiveProbe(features.shape[1], features.shape[2], targets.shape[1]).fitted(features)
    device = features.device if isinstance(features, Tensor) else torch.device("cpu")
    probe, targets, weight = (x.to(device) for x in (probe, targets, weight))
    probe.mean.copy_(targets.mean(0))
    probe.std.copy_(targets.std(0).clamp_min(1e-4))
    rate, batch = 3e-3, 128
    steps = epochs * max(1, len(features) // batch)
    optimizer = torch.optim.AdamW(probe.parameters(), lr=rate, weight_decay=0.05, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    rng = np.random.default_rng(seed)
    for _ in tqdm(range(steps), desc="attentive probe", unit="step", delay=2):
        index = rng.integers(len(features), size=batch)
        guess = probe(gather(features, index))
        error = ((guess - gather(targets, index)) / probe.std).abs()
        optimizer.zero_grad(set_to_none=True)
        (error * gather(weight, index)).mean().backward()
        optimizer.step()
        schedule.step()
    return probe.requires_grad_(False).eval()


def attentive(train: Tensor, targets: Tensor, test: Tensor, weight: Tensor, epochs: int, seed: int = 0) -> np.ndarray:
    """Train on features float16 [M, P, D] and targets [M, 8], predict for `test`; weight [M, 8] masks targets."""
    probe = fit(train, targets, weight, epochs, seed)
    return torch.cat([probe(part.float()) for part in test.split(512)]).double().numpy()


def ridge(train: Tensor, targets: Tensor, test: Tensor) -> np.ndarray:
    """Linear regression from all patches [M, P * D]; the strength is chosen on the last tenth of the frames."""
    x, mean = train.flatten(1), targets.mean(0)
    centre = x[:: max(1, len(x) // 2000)].float().mean(0)
    fit, check = slice(0, int(0.9 * len(x))), slice(int(0.9 * len(x)), None)
    gram, moment = 0.0, 0.0
    for part, y in zip(x[fit].split(2048), (targets[fit] - mean).split(2048)):
        part = part.float() - centre
        gram, moment = gram + part.T @ part, moment + part.T @ y
    best, solution = np.inf, None
    scale = gram.diagonal().mean()
    for strength in (0.01, 0.1, 1.0, 10.0):
        weights = torch.linalg.solve(gram + strength * scale * torch.eye(len(gram)), moment)
        left = float((((x[check].float() - centre) @ weights + mean - targets[check]) / targets.std(0).clamp_min(1e-6)).square().mean())
        if left < best:
            best, solution = left, weights
    return torch.cat([(p.float() - centre) @ solution + mean for p in test.flatten(1).split(2048)]).double().numpy()


def features_of(encoder: Encoder, pixels: np.ndarray) -> Tensor:
    """Features float16 [M, P, D] of frames uint8 [M, h, w, 3]."""
    parts = np.array_split(pixels, max(1, len(pixels) // 512))
    return torch.cat([encoder.encode(torch.from_numpy(p)).half() for p in tqdm(parts, desc="encode", delay=2)])


def pixels_of(config: EncoderConfig, pixels: np.ndarray) -> Tensor:
    """The patches' own pixels float16 [M, P, 3 * patch^2], for comparison."""
    single = EncoderConfig(config.image_size, config.views, config.patch_size, tubelet_size=1)
    parts = np.array_split(pixels, max(1, len(pixels) // 512))
    return torch.cat([scaled(patchify(torch.from_numpy(p)[:, None], single)).half() for p in parts])


def coarse(pixels: np.ndarray) -> Tensor:
    """Frames at half the resolution, float16 [M, 1, (h / 2) * (w / 2) * 3]: what a ridge probe on pixels can carry."""
    small = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    return torch.cat([F.avg_pool2d(p.float() / 64 - 2, 2).half() for p in small.split(512)]).flatten(1)[:, None]


def judge(train: Tensor, test: Tensor, labels: tuple[Labels, Labels], epochs: int, kinds: tuple[str, ...]) -> dict:
    """Errors of the probes named by `kinds`, trained on the first and tested on the second."""
    targets = labels[0].targets()
    weight = torch.ones_like(targets)
    weight[:, 6:] = torch.from_numpy(labels[0].symmetry > 0)[:, None].float()
    out = {}
    if "attentive" in kinds:
        out["attentive"] = labels[1].errors(attentive(train, targets, test, weight, epochs))
    if "ridge" in kinds:
        out["ridge"] = labels[1].errors(ridge(train, targets, test))
    return out
