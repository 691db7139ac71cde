"""Predictor, z and model: causality, cache, batch invariance, save and load, and the targets of the training loss."""

import copy
from dataclasses import replace

import pytest
import torch

from worldmodel.checkpoint import save_tensors
from worldmodel.encoder import EncoderConfig, VideoEncoder
from worldmodel.imaginer import Imaginer, pack
from worldmodel.interface import Context, Features
from worldmodel.latent import Codes, Gaussian, divergence, information_loss
from worldmodel.model import LatentModel, load
from worldmodel.predictor import Predictor, PredictorConfig, expand, merged, repeated, unmerged
from worldmodel.probe import AttentiveProbe
from worldmodel.train import TrainConfig, prediction_losses, price_of

ENCODER = EncoderConfig(image_size=32, patch_size=8, embed_dim=48, depth=1, num_heads=2)
SIZES = PredictorConfig(feature_dim=48, grid=(4, 4), embed_dim=48, depth=2, num_heads=2, latent_dim=3, window=3)


def noisy(module):
    """Random weights everywhere, so that zero-initialised heads do not hide anything."""
    with torch.no_grad():
        for i, p in enumerate(module.parameters()):
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    return module


@pytest.fixture(params=["openvino", "torch"])
def model(request):
    torch.manual_seed(0)
    made = LatentModel(noisy(VideoEncoder(ENCODER)), noisy(Predictor(SIZES)), AttentiveProbe(16, 48, 7), {"made": "here"})
    made.compiled = request.param == "openvino"
    if made.imagined_by != request.param:
        pytest.skip("OpenVINO is not installed (the extra `fast`)")
    return made


def context_of(model, b=2, t=2, seed=0):
    g = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (b, t, 32, 32, 3), dtype=torch.uint8, generator=g)
    proprio = torch.randn(b, t, 7, generator=g)
    features = model.encode({"pixels": pixels.numpy(), "proprio": proprio.numpy()})
    return Context(features, torch.rand(b, t - 1, 4, generator=g) * 2 - 1)


def actions_of(b=2, n=3, h=4, seed=1):
    return torch.rand(b, n, h, 4, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def close(a, b):
    torch.testing.assert_close(a, b, atol=5e-2, rtol=5e-2)  # bfloat16


def test_rollout_shapes_and_prefix(model):
    context, actions = context_of(model), actions_of()
    z = model.sample_z((2, 3, 2, 4), torch.Generator().manual_seed(0))
    whole = model.rollout(context, actions, z)
    assert whole.patches.shape == (2, 3, 2, 4, 16, 48) and whole.proprio.shape == (2, 3, 2, 4, 7)
    part = model.rollout(context, actions[:, :, :2], z[:, :, :, :2])
    assert torch.equal(whole.patches[:, :, :, :2], part.patches)


def test_candidates_do_not_see_each_other(model):
    context, actions = context_of(model), actions_of()
    z = model.sample_z((2, 3, 1, 4), None)
    whole = model.rollout(context, actions, z)
    alone = model.rollout(context, actions[:, 1:2], z[:, 1:2])
    close(whole.patches[:, 1], alone.patches[:, 0])


@torch.no_grad()
def test_a_packed_predictor_is_the_same_one():
    plain = noisy(Predictor(SIZES)).eval()
    packed = copy.deepcopy(plain)
    pack(packed)
    g = torch.Generator().manual_seed(3)
    now = Features(torch.randn(2, 3, 16, 48, generator=g), torch.randn(2, 3, 7, generator=g))
    inputs = now, torch.rand(2, 3, 4, generator=g), torch.randn(2, 3, 3, generator=g)
    for a, b in zip(plain(*inputs)[0], packed(*inputs)[0]):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize(("past", "sizes"), [
    (0, {}), (1, {"codes": True}), (2, {}), (2, {"merge": 1}), (2, {"merge": 4}), (0, {"window": 1}), (2, {"gated": True}),
    (1, {"hidden": 20, "gated": True}), (1, {"pooled": True}),
])  # fmt: skip
def test_an_imaginer_imagines_what_its_predictor_does(past, sizes):
    plain = noisy(Predictor(replace(SIZES, **sizes))).eval()
    g = torch.Generator().manual_seed(3)
    seen = Features(torch.randn(2, past + 1, 16, 48, generator=g), torch.randn(2, past + 1, 7, generator=g))
    actions, noise = torch.rand(2, 3, 5, 4, generator=g), torch.randn(2, 3, 5, 3, generator=g)
    before = Features(*(x[:, :past] for x in seen)), torch.rand(2, past, 4, generator=g), torch.randn(2, past, 3, generator=g)
    now, cache = Features(*(x[:, past] for x in seen)), plain(*before)[1] if past else None
    imaginer = Imaginer(plain, torch.float32)
    fast = imaginer.rollout(now, imaginer.predictor(*before)[1] if past else None, past, actions, noise)
    assert not any(x.is_inference() for x in fast)  # heads are trained on what is imagined
    now, cache = Features(*(repeated(x[:, None], 3) for x in now)), expand(cache, 3) if cache else None
    for h in range(5):  # longer than the window
        action, drawn = actions.flatten(0, 1)[:, h : h + 1], noise.flatten(0, 1)[:, h : h + 1]
        now, cache = plain(now, action, plain.prior_of(now, action).sample(drawn), cache, past + h)
        for a, b in zip(fast, now):
            torch.testing.assert_close(a[:, :, h].flatten(0, 1), b[:, 0], atol=1e-4, rtol=1e-4)


def test_a_model_imagines_with_the_weights_that_it_has(model):
    context, actions, z = context_of(model), actions_of(), model.sample_z((2, 3, 1, 4), None)
    seen = model.rollout(context, actions, z).patches
    other = {name: value + 0.1 for name, value in model.predictor.state_dict().items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):  # which is not for what has its own dtype
        assert torch.equal(model.rollout(context, actions, z).patches, seen)
    model.predictor.load_state_dict(other, assign=True)
    changed = model.rollout(context, actions, z).patches
    assert not torch.allclose(changed, seen, atol=0.1) and torch.equal(copy.deepcopy(model).rollout(context, actions, z).patches, changed)
    first = model._imaginer()
    model.predictor.double()
    assert model._imaginer() is not first
    model.predictor.float()
    with torch.no_grad():
        model.predictor.place.add_(1.0)
    assert model._imaginer() is not first and model._imaginer() is model._imaginer()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_in_half_precision_imagines(model, dtype):
    context, actions, z = context_of(model), actions_of(), model.sample_z((2, 3, 1, 4), None)
    seen = model.rollout(context, actions, z).patches
    model.predictor.to(dtype)
    model.predictor.proprio_mean, model.predictor.proprio_std = model.predictor.proprio_mean.float(), model.predictor.proprio_std.float()
    torch.testing.assert_close(model.rollout(context, actions, z).patches, seen, atol=0.3, rtol=0.1)


def test_a_model_that_has_imagined_can_be_copied(model):
    context, actions, z = context_of(model), actions_of(), model.sample_z((2, 3, 1, 4), None)
    seen = model.rollout(context, actions, z).patches
    assert torch.equal(copy.deepcopy(model).rollout(context, actions, z).patches, seen)


def test_cached_steps_agree_with_the_whole_window():
    predictor = noisy(Predictor(SIZES)).eval()
    g = torch.Generator().manual_seed(3)
    now = Features(torch.randn(2, 5, 16, 48, generator=g), torch.randn(2, 5, 7, generator=g))
    actions, z = torch.randn(2, 5, 4, generator=g), torch.randn(2, 5, 3, generator=g)
    whole, _ = predictor(now, actions, z)
    cache = None
    for t in range(5):
        step = Features(now.patches[:, t : t + 1], now.proprio[:, t : t + 1])
        guess, cache = predictor(step, actions[:, t : t + 1], z[:, t : t + 1], cache, t)
        torch.testing.assert_close(guess.patches[:, 0], whole.patches[:, t], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(guess.proprio[:, 0], whole.proprio[:, t], atol=1e-4, rtol=1e-4)


def test_merging_patches_is_exact_and_keeps_neighbours_together():
    x = torch.randn(2, 3, 16, 48)
    tokens = merged(x, (4, 4), 2)
    assert tokens.shape == (2, 3, 4, 192) and torch.equal(unmerged(tokens, (4, 4), 2), x)
    assert torch.equal(tokens[0, 0, 1], x[0, 0, [2, 3, 6, 7]].flatten())


def test_time_is_causal():
    predictor = noisy(Predictor(SIZES)).eval()
    now = Features(torch.randn(1, 4, 16, 48), torch.randn(1, 4, 7))
    actions, z = torch.randn(1, 4, 4), torch.randn(1, 4, 3)
    before, _ = predictor(now, actions, z)
    actions[:, 2] += 1
    after, _ = predictor(now, actions, z)
    assert torch.equal(before.patches[:, :2], after.patches[:, :2])
    assert not torch.allclose(before.patches[:, 2], after.patches[:, 2])


def test_actions_and_z_change_predictions(model):
    context, actions = context_of(model), actions_of(h=1)
    z = model.sample_z((2, 3, 1, 1), None)
    base = model.rollout(context, actions, z).patches
    assert not torch.allclose(base, model.rollout(context, -actions, z).patches)
    assert not torch.allclose(base, model.rollout(context, actions, z + 1).patches)


def test_privileged_keys_are_never_read(model):
    pixels = torch.zeros(32, 32, 3, dtype=torch.uint8).numpy()
    plain = model.encode({"pixels": pixels})
    told = model.encode({"pixels": pixels, "privileged/object_pos": "not even an array"})
    assert torch.equal(plain.patches, told.patches) and torch.equal(plain.proprio, told.proprio)


def test_proprioception_is_read_off_a_picture_alone(model):
    pixels = torch.zeros(2, 32, 32, 3, dtype=torch.uint8).numpy()
    assert model.encode({"pixels": pixels}).proprio.shape == (2, 7)
    assert model.encode({"pixels": pixels[0]}).proprio.shape == (7,)
    told = model.encode({"pixels": pixels, "proprio": torch.ones(2, 7).numpy()})
    assert torch.equal(told.proprio, torch.ones(2, 7))
    blind = LatentModel(model.encoder, model.predictor)
    assert blind.encode({"pixels": pixels}).proprio is None


def test_save_then_load_is_exact(model, tmp_path):
    model.save(tmp_path / "model.safetensors")
    again = load(tmp_path / "model.safetensors")
    again.compiled = model.compiled
    assert again.about == model.about and again.predictor.config == model.predictor.config
    context, actions, z = context_of(model), actions_of(), model.sample_z((2, 3, 1, 4), None)
    assert torch.equal(model.rollout(context, actions, z).patches, again.rollout(context, actions, z).patches)


def test_wrong_files_are_refused(model, tmp_path):
    path = tmp_path / "model.safetensors"
    with pytest.raises(FileNotFoundError, match="model"):
        load(path)
    model.save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        load(path)
    path.write_bytes(b"weights")
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        load(path)
    save_tensors(path, "encoder", {"a": torch.zeros(1)}, {})
    with pytest.raises(ValueError, match="holds 'encoder', expected 'model'"):
        load(path)
    other = {"encoder": model.encoder.metadata() | {"embed_dim": 96}, "predictor": {"feature_dim": 96, "grid": [4, 4]}}
    save_tensors(path, "model", model.state_dict(), other)
    with pytest.raises(ValueError, match="another architecture"):
        load(path)


def test_wrong_shapes_and_nan_are_refused(model):
    context, actions, z = context_of(model), actions_of(), model.sample_z((2, 3, 1, 4), None)
    with pytest.raises(ValueError, match="expected actions of shape"):
        model.rollout(context, actions[..., :3], z)
    with pytest.raises(ValueError, match="no proprioception"):
        model.rollout(Context(Features(context.features.patches), context.actions), actions, z)
    with pytest.raises(ValueError, match="NaN"):
        model.encode({"pixels": torch.zeros(32, 32, 3, dtype=torch.uint8).numpy(), "proprio": torch.full((7,), torch.nan).numpy()})


def test_divergence_is_that_of_torch():
    q, p = Gaussian(torch.randn(5, 3), torch.randn(5, 3)), Gaussian(torch.randn(5, 3), torch.randn(5, 3))
    normal = lambda g: torch.distributions.Normal(g.mean, g.log_std.exp())  # noqa: E731
    torch.testing.assert_close(divergence(q, p), torch.distributions.kl_divergence(normal(q), normal(p)).sum(-1))
    loss, nats = information_loss(p, p, free_nats=0.5)
    assert float(nats) == 0 and float(loss) == 0.5


def test_codes_are_drawn_as_often_as_they_are_likely():
    logits = torch.tensor([2.0, 0.0, -1.0])
    drawn = Codes(logits).sample(torch.randn(20_000, 3, generator=torch.Generator().manual_seed(0)))
    torch.testing.assert_close(drawn.mean(0), logits.softmax(0), atol=0.01, rtol=0)
    assert set(drawn.sum(-1).tolist()) == {1.0} and torch.equal(Codes(logits).sample(torch.zeros(3)), Codes(logits).mean)
    for code in torch.eye(3):
        assert torch.equal(Codes(logits).sample(Codes(logits).noise_of(code)), code)
    q, p = Codes(torch.randn(5, 3)), Codes(torch.randn(5, 3))
    categorical = lambda c: torch.distributions.Categorical(logits=c.logits)  # noqa: E731
    torch.testing.assert_close(divergence(q, p), torch.distributions.kl_divergence(categorical(q), categorical(p)))


@pytest.mark.parametrize(("sizes", "free_nats", "free_share"), [
    ({}, 0.0, 0.3), ({"codes": True}, 0.5, 0.0), ({"pooled": True}, 0.0, 0.0), ({"pooled": True, "codes": True}, 0.5, 0.0),
])  # fmt: skip
def test_z_tells_which_of_two_outcomes_came(sizes, free_nats, free_share):
    """Steps that end in one of two ways by chance, where a prior's mean can show but one: samples of it show both."""
    torch.manual_seed(0)
    steps, rng = 400, torch.Generator().manual_seed(1)
    predictor = Predictor(PredictorConfig(24, (2, 2), 3, 2, embed_dim=48, depth=1, num_heads=2, latent_dim=2, merge=1, **sizes))
    config = TrainConfig(rollout=1, transitions=1, free_nats=free_nats, free_share=free_share, information_weight=0.02, steps=steps)
    optimizer = torch.optim.Adam(predictor.parameters(), 3e-3)
    start, *ends = torch.nn.functional.layer_norm(torch.randn(3, 4, 24, generator=rng), (24,))

    def clips(count: int) -> Features:
        came = torch.stack(ends)[torch.randint(2, (count,), generator=rng)]
        return Features(torch.stack((start.expand(count, -1, -1), came), 1), torch.zeros(count, 2, 3))

    for step in range(steps):
        noise, by_prior = torch.randn(16, 1, 2, generator=rng), torch.zeros(16, dtype=torch.bool)
        price = price_of(step, config)
        loss = prediction_losses(predictor, clips(16), torch.zeros(16, 1, 2), noise, by_prior, config, price)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    clip = clips(32)
    now, after, still = Features(clip.patches[:, :1], clip.proprio[:, :1]), clip.patches[:, 1:], torch.zeros(32, 1, 2)
    with torch.no_grad():
        prior = predictor.prior_of(now, still)
        z = [prior.mean, *(prior.sample(torch.randn(32, 1, 2, generator=rng)) for _ in range(16))]
        errors = torch.stack([(predictor(now, still, value)[0].patches - after).abs().mean((1, 2, 3)) for value in z])
    assert errors[1:].min(0).values.mean() < 0.5 * errors[0].mean()


def test_spread_is_what_a_sample_changes_in_clips_that_have_the_priors_mean():
    torch.manual_seed(0)
    predictor = noisy(Predictor(PredictorConfig(24, (2, 2), 3, 2, embed_dim=48, depth=1, num_heads=2, latent_dim=2, merge=1)))
    clip, actions, noise = Features(torch.randn(4, 3, 4, 24), torch.randn(4, 3, 3)), torch.randn(4, 2, 2), torch.randn(4, 2, 2)
    now, by_prior = Features(clip.patches[:, :-1], clip.proprio[:, :-1]), torch.tensor([True, False, True, False])
    prior = predictor.prior_of(now, actions)
    apart = predictor(now, actions, prior.sample(noise))[0].patches - predictor(now, actions, prior.mean)[0].patches
    plain = prediction_losses(predictor, clip, actions, noise, by_prior, TrainConfig())
    told = prediction_losses(predictor, clip, actions, noise, by_prior, TrainConfig(spread_weight=0.5))
    torch.testing.assert_close(told["spread"], apart[[0, 2]].abs().mean() / 2)
    torch.testing.assert_close(told["loss"], plain["loss"] + 0.5 * told["spread"])
    assert told["spread"] > 0.01 and "spread" not in plain


def test_information_costs_nothing_at_first_and_all_in_the_end():
    config = TrainConfig(steps=100, free_share=0.3)
    assert [price_of(step, config) for step in (0, 30, 45, 60, 99)] == [0.0, 0.0, 0.5, 1.0, 1.0]
    assert price_of(0, TrainConfig()) == 1.0


def test_targets_of_every_round_are_the_frames_they_predict():
    """A predictor that adds 1 to every frame is perfect on clips that count up, and off by one anywhere else."""

    class Counter(Predictor):
        def forward(self, now, actions, z, cache=None, start=0):
            return Features(now.patches + 1, now.proprio + 1), []

    predictor, config = Counter(SIZES), TrainConfig(rollout=3, transitions=4)
    count = torch.arange(5.0)
    clip = Features(count[None, :, None, None].expand(2, 5, 16, 48), count[None, :, None].expand(2, 5, 7))
    losses = prediction_losses(predictor, clip, torch.zeros(2, 4, 4), torch.zeros(2, 4, 3), torch.tensor([True, False]), config)
    for r in (1, 2, 3):
        assert float(losses[f"patches_{r}"]) == 0 and float(losses[f"proprio_{r}"]) == 0
    late = Features(clip.patches.clone(), clip.proprio)
    late.patches[:, -1] += 1
    losses = prediction_losses(predictor, late, torch.zeros(2, 4, 4), torch.zeros(2, 4, 3), torch.tensor([True, False]), config)
    assert float(losses["patches_1"]) == pytest.approx(1 / 4)
    assert float(losses["patches_3"]) == pytest.approx(1 / 2)
