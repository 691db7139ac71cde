"""The world model that planners use: a frozen encoder and the predictor trained on its features."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from worldmodel.checkpoint import MAKERS, fill, load_tensors, read_header, save_tensors
from worldmodel.compiled import CompiledImaginer
from worldmodel.encoder import autocast, fast_in_bfloat16, keep_memory
from worldmodel.guide import Guide
from worldmodel.hazard import Hazard
from worldmodel.imaginer import Imaginer
from worldmodel.interface import Context, Encoder, Features, Obs, Suggestion, to_tensor
from worldmodel.peers import build
from worldmodel.policy import Policy
from worldmodel.predictor import Predictor, PredictorConfig, expand, repeated
from worldmodel.probe import AttentiveProbe
from worldmodel.vjepa2_ac import NAME as AC
from worldmodel.vjepa2_ac import ACConfig, ACPredictor

REMEMBERED = 4  # contexts, of as many lengths as agents that decide at once may have
SHIPPED = Path(__file__).resolve().parent.parent / "assets" / "weights"


class LatentModel(nn.Module):
    """Frozen encoder and action-conditioned predictor, behind `worldmodel.interface.WorldModel`.

    `reader` reads the robot's own proprioception off the features of a picture: it is what lets a goal that is a picture
    alone say where the hand is, which a camera sees poorly along its line of sight. `hazard` tells how likely an imagined
    step is to go wrong. `policy`, or else `guide`, suggests where a search begins; `careful`, another policy, what to do
    once a gate has worried (`detour`). `about` says how the weights were made. `compiled`, which may be
    set, says whether to imagine by OpenVINO where it is installed (extra `fast`) and the model is on the processor: fast for weights that
    stay as they are, since it compiles for each half a second.
    """

    def __init__(
        self, encoder: Encoder, predictor: Predictor | ACPredictor, reader: AttentiveProbe | None = None, about: dict | None = None,
        hazard: Hazard | None = None, guide: Guide | None = None, policy: Policy | None = None, careful: Policy | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        if predictor.config.feature_dim != encoder.config.embed_dim or predictor.config.grid != encoder.config.grid:
            raise ValueError(
                f"the predictor is for features {predictor.config.grid} x {predictor.config.feature_dim}, the encoder "
                f"gives {encoder.config.grid} x {encoder.config.embed_dim}; train a predictor for this encoder"
            )
        self.encoder, self.predictor, self.reader = encoder, predictor, reader
        self.hazard, self.guide, self.policy, self.careful = hazard, guide, policy, careful
        self.about, self.compiled = about or {}, True
        self._copy: Twin | None = None
        self._remembered: deque[tuple[Context, tuple[list | None, int]]] = deque(maxlen=REMEMBERED)
        self.requires_grad_(False).eval()
        keep_memory()

    def __getstate__(self) -> dict:
        """What a copy of it takes along: not what it has made for itself, which it makes anew."""
        return self.__dict__ | {"_copy": None, "_remembered": deque(maxlen=REMEMBERED)}

    @property
    def action_dim(self) -> int:
        """A."""
        return self.predictor.config.action_dim

    @property
    def latent_dim(self) -> int:
        """Z."""
        return self.predictor.config.latent_dim

    @property
    def max_context(self) -> int:
        """The most context frames that `rollout` uses."""
        return self.predictor.config.context

    @property
    def views(self) -> int:
        """Cameras side by side in a picture."""
        return self.encoder.config.views

    @property
    def device(self) -> torch.device:
        """Where its weights are, and so its features."""
        return next(self.predictor.parameters()).device

    @torch.no_grad()
    def encode(self, obs: Obs) -> Features:
        """Patch features of obs["pixels"], and obs["proprio"], or without it what `reader` reads; no other key is read."""
        patches = self.encoder.encode(to_tensor(np.asarray(obs["pixels"])))
        proprio = obs.get("proprio")
        if proprio is None:
            proprio = self.read(patches)
        else:
            proprio = to_tensor(proprio, torch.float32).to(self.device)
            size = self.predictor.config.proprio_dim
            if proprio.shape[-1] != size:
                raise ValueError(f"proprio of the observation has {proprio.shape[-1]} numbers, expected {size} as this model was trained with")
            if not torch.isfinite(proprio).all():
                raise ValueError("proprio of the observation holds NaN or infinity; expected finite metres and radians")
        return Features(patches, proprio)

    @torch.no_grad()
    def read(self, patches: Tensor) -> Tensor | None:
        """Proprioception [..., S] read off patches [..., P, D]; None without `reader`."""
        if self.reader is None:
            return None
        return self.reader(patches.reshape(-1, *patches.shape[-2:])).reshape(*patches.shape[:-2], -1)

    def sample_z(self, shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
        """Standard noise [*shape, Z] that `rollout` maps through the prior; zeros, its mean, without a generator."""
        if generator is None:
            return torch.zeros(*shape, self.latent_dim, device=self.device)
        return torch.randn(*shape, self.latent_dim, generator=generator, device=generator.device).to(self.device)

    @torch.no_grad()
    def rollout(self, context: Context, actions: Tensor, z: Tensor) -> Features:
        """Imagine what follows.

        context of B problems and T frames, actions [B, N, H, A], z noise [B, N, K, H, Z] -> patches
        [B, N, K, H, P, D] and proprio [B, N, K, H, S]. Raises ValueError for shapes that do not fit, or a context
        without proprioception.
        """
        self._check(context, actions, z)
        n, k, imaginer = actions.shape[1], z.shape[2], self._imaginer()
        z = z if self.latent_dim else z[:, :, :1]  # without a z all futures of a plan are one
        now = Features(context.features.patches[:, -1], context.features.proprio[:, -1])
        moves = actions[:, :, None].expand(-1, -1, z.shape[2], -1, -1).flatten(1, 2)  # [B, N * K, H, A]
        rollout = self._one_by_one if imaginer is None else imaginer.rollout
        with autocast(self.device) if imaginer is None else torch.autocast(self.device.type, enabled=False):  # it has its own dtype
            known = next((past for one, past in self._remembered if one is context), None)
            if known is None:  # a planner asks of one context many times
                cache, start = self._remember(context, self.predictor if imaginer is None else imaginer.predictor)
                known = (cache if imaginer is None else imaginer.laid(cache)), start
                self._remembered.append((context, known))
            imagined = rollout(now, *known, moves, z.flatten(1, 2))
        return Features(*(x.unflatten(1, (n, -1)).expand(-1, -1, k, *x.shape[2:]) for x in imagined))

    def _one_by_one(self, now: Features, cache: list | None, start: int, actions: Tensor, noise: Tensor) -> Features:
        """`Imaginer.rollout` with a predictor that has none."""
        (b, m, horizon), frames = actions.shape[:3], []
        now = Features(*(repeated(x[:, None], m) for x in now))  # [B * M, 1, ...]
        actions, noise, cache = actions.flatten(0, 1), noise.flatten(0, 1), expand(cache, m) if cache else None
        for h in range(horizon):
            action = actions[:, h : h + 1]
            value = self.predictor.prior_of(now, action).sample(noise[:, h : h + 1])
            now, cache = self.predictor(now, action, value, cache, start + h)
            frames.append(now)
        return Features(*(torch.cat(x, 1).unflatten(0, (b, m)) for x in zip(*frames)))

    @torch.no_grad()
    def suggest(self, now: Features, goals: Sequence[Features], horizon: int) -> Suggestion | None:
        """What `policy` would do on its way to the last of the goals ahead, or what `guide` says of the way to the next one.

        A policy that has seen whole demonstrations needs no sub-goals. Any leading axes, the same of all. None without either, or
        where proprioception is not known.
        """
        if now.proprio is None:
            return None
        if self.policy is not None:
            return self._follow(self.policy, now, goals[-1].patches, horizon)
        if self.guide is None or goals[0].proprio is None:
            return None
        return Suggestion(self.guide(now.proprio, goals[0].proprio, horizon), goals[0])

    @torch.no_grad()
    def detour(self, now: Features, goals: Sequence[Features], horizon: int) -> Suggestion | None:
        """What `careful` would do on its way to the last of the goals ahead, as `suggest` says it; None without."""
        return None if self.careful is None or now.proprio is None else self._follow(self.careful, now, goals[-1].patches, horizon)

    def _follow(self, policy: Policy, now: Features, goal: Tensor, horizon: int) -> Suggestion:
        """What a policy does step by step on the way to a goal [..., P, D], in a future that is imagined at the prior's mean."""
        axes, actions = goal.shape[:-2], []
        goal = goal.reshape(-1, *goal.shape[-2:])  # [B, P, D]
        now = Features(now.patches.reshape(goal.shape), now.proprio.reshape(len(goal), -1))
        for _ in range(horizon):
            actions.append(policy.choose(now, goal))
            context = Context(Features(*(x[:, None] for x in now)), actions[-1].new_zeros(len(goal), 0, self.action_dim))
            imagined = self.rollout(context, actions[-1][:, None, None], self.sample_z((len(goal), 1, 1, 1), None))
            now = Features(*(x[:, 0, 0, 0].float() for x in imagined))
        found = torch.stack(actions, 1), *now  # each [B, ...]
        actions, patches, proprio = (x.reshape(*axes, *x.shape[1:]) for x in found)
        return Suggestion(actions, Features(patches, proprio), True)

    def _remember(self, context: Context, predictor: Predictor | ACPredictor) -> tuple[list | None, int]:
        """The cache of all context frames but the last, at the z that explains them best, and the last one's index."""
        patches, proprio = context.features.patches, context.features.proprio
        first = max(0, patches.shape[1] - self.max_context)
        if patches.shape[1] - first == 1:
            return None, 0
        past = Features(patches[:, first:-1], proprio[:, first:-1])
        actions = context.actions[:, first:]
        z = predictor.posterior_of(past, actions, patches[:, first + 1 :]).mean
        _, cache = predictor(past, actions, z)
        return cache, patches.shape[1] - 1 - first

    @property
    def imagined_by(self) -> str:
        """The library that its predictor runs in: openvino or torch."""
        return "openvino" if self.compiled and CompiledImaginer.fits(self.predictor) else "torch"

    def _imaginer(self) -> Imaginer | CompiledImaginer | None:
        """A copy of a predictor of ours that imagines faster, in bfloat16 where products gain by that: to cast weights takes as long.

        It is made anew after all weights were exchanged, moved, cast, or any were changed in place, not where one was exchanged.
        """
        known, first = self._copy, next(self.predictor.parameters())
        compiled = self.compiled and CompiledImaginer.fits(self.predictor)
        if known is None or known.compiled != compiled or known.parameters[0] is not first or known.version != _version(known.parameters):
            own = list(self.predictor.parameters())
            dtype = torch.bfloat16 if fast_in_bfloat16(first.device) else first.dtype
            kind = CompiledImaginer if compiled else Imaginer
            imaginer = kind(self.predictor, dtype) if isinstance(self.predictor, Predictor) else None
            self._copy = known = Twin(own, _version(own), compiled, imaginer)
            self._remembered.clear()
        return known.imaginer

    def _check(self, context: Context, actions: Tensor, z: Tensor) -> None:
        config, features = self.predictor.config, context.features
        if features.proprio is None:
            raise ValueError("the context has no proprioception, which this model was trained with; give obs['proprio']")
        b, t = features.patches.shape[:2]
        for name, tensor, want in (
            ("context patches", features.patches, (b, t, self.predictor.patches, config.feature_dim)),
            ("context proprio", features.proprio, (b, t, config.proprio_dim)),
            ("context actions", context.actions, (b, t - 1, config.action_dim)),
            ("actions", actions, (b, *actions.shape[1:3], config.action_dim)),
            ("z", z, (b, actions.shape[1], z.shape[2] if z.dim() > 2 else 1, actions.shape[2], config.latent_dim)),
        ):
            if tuple(tensor.shape) != want:
                raise ValueError(f"expected {name} of shape {list(want)}, got {list(tensor.shape)}")

    def save(self, path: str | Path) -> None:
        """Write encoder and predictor as one safetensors file, with their configs and `about`."""
        config = {"encoder": asdict(self.encoder.config), "predictor": asdict(self.predictor.config), "reader": self.reader is not None}
        config["hazard"], config["guide"] = None if self.hazard is None else len(self.hazard.look.mean), self.guide is not None
        config |= {name: None if own is None else own.width for name, own in (("policy", self.policy), ("careful", self.careful))}
        save_tensors(path, "model", self.state_dict(), config, self.about)


class Twin(NamedTuple):
    """A copy of a predictor to imagine with, and of what it is one."""

    parameters: list[nn.Parameter]  # of the original; to list them takes as long as to use some
    version: tuple
    compiled: bool
    imaginer: Imaginer | CompiledImaginer | None  # of a predictor of ours


def _version(parameters: list[nn.Parameter]) -> tuple:
    """Differs after parameters have been moved, cast or changed."""
    return parameters[0].device, parameters[0].dtype, sum(p._version for p in parameters)


def load(path: str | Path | None = None) -> LatentModel:
    """A model from a file, or the shipped one.

    Raises FileNotFoundError or ValueError for a file that is missing, damaged, or of another kind or architecture.
    """
    path = shipped() if path is None else Path(path)
    tensors, config, about = load_tensors(path, "model")
    try:
        encoder, predictor = build(config["encoder"]), _predictor(config["predictor"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is of another architecture: {error}") from error
    sizes = encoder.config.patches, encoder.config.embed_dim, predictor.config.proprio_dim
    reader = AttentiveProbe(*sizes) if config.get("reader") else None
    own = predictor.config
    hazard = Hazard(AttentiveProbe(*sizes[:2], config["hazard"]), own.proprio_dim, own.action_dim) if config.get("hazard") else None
    guide = Guide(own.proprio_dim, own.action_dim) if config.get("guide") else None
    policies = (Policy(*sizes, own.action_dim, config[name]) if config.get(name) else None for name in ("policy", "careful"))
    model = LatentModel(encoder, predictor, reader, about, hazard, guide, *policies)
    kept = {value.dtype for value in tensors.values()}
    if len(kept) == 1:  # a large model in half precision stays so
        model.to(kept.pop())
    fill(model, tensors, path)
    return model


def _predictor(config: dict) -> Predictor | ACPredictor:
    """A predictor of ours or Meta's from its config as a file has it. TypeError where it is of neither kind."""
    return ACPredictor(ACConfig(**config)) if config.get("name") == AC else Predictor(PredictorConfig(**config))


def holds(path: str | Path, part: str) -> bool:
    """Whether a file holds a model with that part: hazard, reader, guide, policy, careful."""
    _, config, _ = read_header(path, *MAKERS)
    return bool(config.get(part))


def shipped() -> Path:
    """The weights that come with the project."""
    return SHIPPED / "model.safetensors"
