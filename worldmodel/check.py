"""The contract of a world model, as a function that raises AssertionError with a line that says what is broken."""

from __future__ import annotations

import numpy as np
import torch

from worldmodel.interface import Context, Features, Obs, Suggestion, WorldModel, to_tensor


def check_world_model(model: WorldModel, obs: Obs, tolerance: float = 1e-3) -> None:
    """A model gives what planners rely on; obs is one observation of its environment, pixels [h, w, 3] and proprio [S].

    Shapes are those of `worldmodel.interface`, from one frame of context and from two, for one problem and for two; "privileged/*" is
    not read; nothing is drawn from a global generator; what is imagined of a plan depends neither on its later actions nor on the plans,
    or problems, beside it.
    """
    before = torch.get_rng_state()
    now = model.encode(obs)
    assert isinstance(now, Features), f"encode(...) returned {type(now).__name__}: expected worldmodel.interface.Features"
    assert now.patches.dim() == 2, f"patches of one picture are {list(now.patches.shape)}: expected [P, D]"
    many = model.encode({key: np.stack([obs[key]] * 2) for key in ("pixels", "proprio") if key in obs})
    assert many.patches.shape == (2, *now.patches.shape), f"patches of two pictures are {list(many.patches.shape)}: keep leading axes"
    try:
        alone = model.encode({"pixels": obs["pixels"]})
    except KeyError as error:
        raise AssertionError(f"encode(...) needs {error}: goals may be pictures alone, whose proprio is None, or read off them") from error
    assert torch.equal(alone.patches, now.patches), "encode(...) of a picture alone, as goals are, gives other patches"
    if now.proprio is not None and "proprio" in obs:
        known = [tuple(x.shape) for x in (now.proprio, alone.proprio) if x is not None]
        assert set(known) == {np.shape(obs["proprio"])}, f"proprio of one picture has shapes {known}: expected [S] = {list(np.shape(obs['proprio']))}, or None"
    secret = model.encode({**obs, "privileged/object_pos": np.full(3, 1e9, np.float32)})
    blind = secret.proprio is None if now.proprio is None else secret.proprio is not None and torch.equal(to_tensor(secret.proprio), to_tensor(now.proprio))
    assert torch.equal(secret.patches, now.patches) and blind, "encode(...) reads privileged/*, which no model may"
    proprio = None if now.proprio is None else to_tensor(now.proprio)[None, None]
    context = Context(Features(now.patches[None, None], proprio), torch.zeros(1, 0, model.action_dim))
    rng = torch.Generator().manual_seed(0)
    actions = 2 * torch.rand(1, 3, 2, model.action_dim, generator=rng) - 1
    z = model.sample_z((1, 3, 2, 2), torch.Generator().manual_seed(1))
    assert z.shape == (1, 3, 2, 2, model.latent_dim), f"sample_z gives {list(z.shape)}: expected [..., Z] with Z = {model.latent_dim}"
    assert torch.equal(z, model.sample_z((1, 3, 2, 2), torch.Generator().manual_seed(1))), "sample_z does not follow its generator"
    mean = model.sample_z((1, 1, 1, 2), None)
    assert torch.equal(mean, model.sample_z((1, 1, 1, 2), None)), "sample_z without a generator differs from call to call: expected the prior's mean"
    told = actions.clone()
    imagined = model.rollout(context, actions, z)
    assert torch.equal(told, actions), "rollout(...) changed the actions; work on a copy"
    assert isinstance(imagined, Features), f"rollout(...) returned {type(imagined).__name__}: expected worldmodel.interface.Features"
    shape = (1, 3, 2, 2, *now.patches.shape)
    assert imagined.patches.shape == shape, f"rollout gives patches {list(imagined.patches.shape)}: expected [B, N, K, H, P, D] = {list(shape)}"
    assert all(x is None or torch.isfinite(x).all() for x in imagined), "rollout imagines NaN or infinity"
    if proprio is not None and imagined.proprio is not None:
        own = (*shape[:4], proprio.shape[-1])
        assert imagined.proprio.shape == own, f"rollout gives proprio {list(imagined.proprio.shape)}: expected [B, N, K, H, S] = {list(own)}"
    if hasattr(model, "suggest") and proprio is not None:
        way = model.suggest(now, [now], 2)
        assert way is None or isinstance(way, Suggestion), f"suggest(...) returned {type(way).__name__}: expected worldmodel.interface.Suggestion, or None"
        assert way is None or way.actions.shape == (2, model.action_dim), f"suggest(...) says actions {list(way.actions.shape)}: expected [H, A]"

    def same(part: Features, whole: Features, what: str) -> None:
        for name, one, other in zip(Features._fields, part, whole):
            if one is not None and other is not None:
                off = float((one - other).abs().max())
                assert off <= tolerance, f"{what}: {name} differ by {off:.2g}"

    same(model.rollout(context, actions[:, :, :1], z[:, :, :, :1]), imagined.map(lambda x: x[:, :, :, :1]), "the first step depends on a later action")
    same(model.rollout(context, actions[:, 1:2], z[:, 1:2]), imagined.map(lambda x: x[:, 1:2]), "a plan's future depends on the plans beside it")
    same(model.rollout(context, actions, z), imagined, "the same plan and z give another future")
    both = Context(context.features.map(lambda x: torch.cat((x, x))), torch.zeros(2, 0, model.action_dim))
    pairs = [model.rollout(both, torch.cat((first, actions)), torch.cat((z, z))) for first in (actions, -actions)]
    assert pairs[0].patches.shape == (2, *shape[1:]), f"rollout of two problems gives patches {list(pairs[0].patches.shape)}: expected B = 2 of them"
    same(pairs[1].map(lambda x: x[1:]), pairs[0].map(lambda x: x[1:]), "a problem's futures depend on the problem beside it")
    if model.max_context > 1:
        longer = Context(context.features.map(lambda x: torch.cat((x, x), 1)), torch.zeros(1, 1, model.action_dim))
        assert model.rollout(longer, actions, z).patches.shape == shape, "rollout from two frames of context gives another shape than from one"
    assert torch.equal(before, torch.get_rng_state()), "the global generator was drawn from; draw from the one that is given"
