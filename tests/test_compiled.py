"""Imagination by OpenVINO: the numbers of torch's."""

import copy
import os
import subprocess
import sys
import threading
from dataclasses import replace

import pytest
import torch

from worldmodel.compiled import CompiledImaginer, library
from worldmodel.imaginer import Imaginer
from worldmodel.interface import Context, Features
from worldmodel.model import LatentModel, load
from worldmodel.predictor import Predictor, PredictorConfig

pytestmark = pytest.mark.skipif(library() is None, reason="OpenVINO is not installed (the extra `fast`)")

SIZES = PredictorConfig(feature_dim=48, grid=(4, 4), latent_dim=3, embed_dim=48, depth=2, num_heads=2)


def noisy(predictor: Predictor) -> Predictor:
    """All weights are drawn, those that begin as zeros too."""
    g = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in predictor.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * 0.1)
    predictor.proprio_mean.fill_(0.3)
    predictor.proprio_std.fill_(0.2)
    return predictor.eval()


def problem(predictor: Predictor, b: int, m: int, horizon: int, past: int, own: Predictor | None = None) -> tuple:
    """What `rollout` takes, with a cache of `own`'s."""
    g, config = torch.Generator().manual_seed(3), predictor.config
    patches = torch.nn.functional.layer_norm(torch.randn(b, past + 1, predictor.patches, config.feature_dim, generator=g), (config.feature_dim,))
    seen = Features(patches, torch.randn(b, past + 1, 7, generator=g))
    actions, noise = torch.rand(b, m, horizon, 4, generator=g), torch.randn(b, m, horizon, config.latent_dim, generator=g)
    before = seen.map(lambda x: x[:, :past]), torch.rand(b, past, 4, generator=g), torch.randn(b, past, config.latent_dim, generator=g)
    cache = (own or predictor)(*before)[1] if past else None
    return seen.map(lambda x: x[:, past]), cache, past, actions, noise


def compiled(predictor: Predictor, dtype: torch.dtype, now: Features, cache, *others) -> Features:
    imaginer = CompiledImaginer(predictor, dtype)
    return imaginer.rollout(now, imaginer.laid(cache), *others)


@torch.no_grad()
@pytest.mark.parametrize(("b", "m", "horizon", "past", "sizes"), [
    (1, 3, 5, 0, {}), (1, 3, 5, 1, {}), (1, 1, 1, 2, {}), (1, 65, 2, 2, {}), (2, 3, 5, 2, {}), (3, 1, 2, 1, {}),
    (1, 3, 5, 2, {"merge": 1}), (2, 3, 2, 2, {"merge": 4}), (1, 3, 4, 0, {"window": 1}), (2, 2, 4, 1, {"window": 2}), (1, 2, 3, 2, {"grid": (4, 8)}),
])  # fmt: skip
def test_what_is_compiled_imagines_the_same(b, m, horizon, past, sizes):
    predictor = noisy(Predictor(replace(SIZES, **sizes)))
    asked = problem(predictor, b, m, horizon, past)
    for name, ours, wanted in zip(Features._fields, compiled(predictor, torch.float32, *asked), Imaginer(predictor, torch.float32).rollout(*asked)):
        assert ours.shape == wanted.shape and not ours.is_inference()
        torch.testing.assert_close(ours, wanted, atol=2e-4, rtol=2e-4, msg=lambda text, name=name: f"{name}: {text}")


@torch.no_grad()
def test_in_bfloat16_it_is_off_no_further_than_torch():
    predictor = noisy(Predictor(SIZES))
    exact, rough = Imaginer(predictor, torch.float32), Imaginer(predictor, torch.bfloat16)
    truth = exact.rollout(*problem(predictor, 1, 8, 3, 2))
    asked = problem(predictor, 1, 8, 3, 2, rough.predictor)
    for ours, torchs, true in zip(compiled(predictor, torch.bfloat16, *asked), rough.rollout(*asked), truth):
        assert float((ours - true).abs().mean()) < 1.5 * float((torchs - true).abs().mean()) + 1e-6


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_knows_neither_later_ones_nor_other_plans(dtype):
    predictor = noisy(Predictor(SIZES))
    now, cache, start, actions, noise = problem(predictor, 1, 5, 4, 2)
    whole = compiled(predictor, dtype, now, cache, start, actions, noise)
    part = compiled(predictor, dtype, now, cache, start, actions[:, 1:3, :2], noise[:, 1:3, :2])
    for a, b in zip(whole, part):
        torch.testing.assert_close(a[:, 1:3, :2], b, atol=1e-3, rtol=0)


@torch.no_grad()
def test_the_same_twice_and_in_several_threads():
    predictor = noisy(Predictor(SIZES))
    now, cache, *others = problem(predictor, 1, 4, 2, 2)
    imaginer, seen = CompiledImaginer(predictor, torch.float32), []
    past = imaginer.laid(cache)
    first = imaginer.rollout(now, past, *others)
    kept = first.map(torch.clone)
    asking = [threading.Thread(target=lambda: seen.append(imaginer.rollout(now, past, *others))) for _ in range(4)]
    for thread in asking:
        thread.start()
    for thread in asking:
        thread.join()
    imaginer.rollout(now, past, others[0], -others[1], others[2])
    for one in (first, *seen):  # nor does a later call write over what an earlier one gave
        assert all(torch.equal(a, b) for a, b in zip(one, kept))
    assert len(seen) == 4


def test_who_it_is_for():
    plain = Predictor(SIZES)
    assert CompiledImaginer.fits(plain)
    assert not CompiledImaginer.fits(Predictor(replace(SIZES, codes=True)))
    assert not CompiledImaginer.fits(copy.deepcopy(plain).half())
    assert not CompiledImaginer.fits(torch.nn.Linear(1, 1))


def test_a_model_says_whether_it_may():
    model = load()
    context, actions, z = asked_of(model)
    assert isinstance(model._imaginer(), CompiledImaginer)
    ours = model.rollout(context, actions, z)
    model.compiled = False
    assert isinstance(model._imaginer(), Imaginer)
    for a, b in zip(ours, model.rollout(context, actions, z)):
        assert float((a - b).abs().mean()) < 0.1  # in bfloat16, where the processor has it


def asked_of(model: LatentModel) -> tuple[Context, torch.Tensor, torch.Tensor]:
    """A context of three frames and what to imagine of it."""
    g, config = torch.Generator().manual_seed(3), model.predictor.config
    patches = torch.randn(1, 3, model.predictor.patches, config.feature_dim, generator=g)
    features = Features(torch.nn.functional.layer_norm(patches, patches.shape[-1:]), torch.randn(1, 3, config.proprio_dim, generator=g))
    context = Context(features, torch.rand(1, 2, config.action_dim, generator=g))
    return context, torch.rand(1, 3, 2, config.action_dim, generator=g), model.sample_z((1, 3, 1, 2), None)


def test_it_keeps_to_the_instructions_that_torch_keeps_to():
    code = "import os, worldmodel.compiled as c; c.library(); print(os.environ.get('ONEDNN_MAX_CPU_ISA'))"
    for asked, told in (("avx2", "AVX2"), ("default", "None")):
        env = {name: value for name, value in os.environ.items() if name != "ONEDNN_MAX_CPU_ISA"} | {"ATEN_CPU_CAPABILITY": asked}
        out = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout.strip()
        assert out == told
