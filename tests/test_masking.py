"""Masks: disjoint, of equal counts, varied, and as their names say."""

import numpy as np
import pytest

from worldmodel.masking import COUNT, KINDS, MaskConfig, draw, hide


@pytest.mark.parametrize("name", sorted(KINDS.keys() - {"open"}))
def test_masks_are_disjoint_varied_and_reproducible(name):
    steps = 1 if name == "image" else 3
    masks = draw(KINDS[name], 16, steps, (8, 8), np.random.default_rng(0))
    again = draw(KINDS[name], 16, steps, (8, 8), np.random.default_rng(0))
    assert not any(index.shape[1] % COUNT for index in masks)
    assert (masks.visible == again.visible).all() and (masks.hidden == again.hidden).all()
    for seen, hidden in zip(*masks, strict=True):
        assert not set(seen.tolist()) & set(hidden.tolist())
        assert max(*seen.tolist(), *hidden.tolist()) < steps * 64
    assert len({tuple(row) for row in masks.hidden.tolist()}) > 1


def test_full_duration_hides_a_patch_at_all_times_and_half_does_not():
    rng = np.random.default_rng(1)
    _, hidden = hide(KINDS["short"], 4, (8, 8), rng)
    assert (hidden.all(0) == hidden.any(0)).all()
    _, hidden = hide(KINDS["half"], 4, (8, 8), rng)
    assert not hidden.all(0).any() or hidden.sum() > 2 * 64


def test_future_hides_all_that_follows():
    for seed in range(5):
        seen, hidden = hide(KINDS["future"], 4, (8, 8), np.random.default_rng(seed))
        assert seen[0].all() and hidden[-1].all() and (seen ^ hidden).all()


def test_image_context_is_a_block_without_the_targets():
    seen, hidden = hide(KINDS["image"], 1, (12, 12), np.random.default_rng(2))
    assert not (seen & hidden).any() and 0 < seen.sum() < 144


def test_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="known: blocks, future, image"):
        MaskConfig(kind="tube")
