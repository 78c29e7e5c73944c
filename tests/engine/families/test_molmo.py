"""Molmo2: a square and overlapping crops, pooled."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import fastattr
from fastattr import adapters
from fastattr.images import read_visuals
from tests.engine.families.other_ways import prove_other_ways
from tests.engine.families.proof import Row, embeddings_at_image_tokens, inside, prove
from tests.engine.families.tiny_molmo import molmo2
from tests.engine.family_models import PROMPT, Tiny, picture

STOOD_IN = "resizing in the image and video processors: it needs torchvision"


def odd() -> Tiny:
    """Pools of two that reach over the border of five patches."""
    return molmo2(edge=5)


ROWS = [  # 67 x 91 pixels in 2 x 3 crops: 10 x 14 patches of crops of 6, 8 x 11 of crops of 5
    Row("molmo2", molmo2, [(3, 3), (5, 7)], (1, 5, 7), scales=(1.0,), video=True, stood_in=STOOD_IN),
    Row("molmo2", odd, [(3, 3), (4, 6)], (1, 4, 6), scales=(1.0,), video=True, stood_in=STOOD_IN),
]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.make.__name__)
def test_family(row: Row) -> None:
    prove(row)


def wrapped(held: Tiny) -> fastattr.Model:
    return fastattr.wrap(held.hf_model, held.processor)


def encoded(model: fastattr.Model, pictures: Any) -> adapters.EncodedExample:
    return adapters.encode(model, read_visuals(pictures), PROMPT)


def film(n: int) -> list[Image.Image]:
    return [picture(48, 64, seed) for seed in range(n)]


def test_pools_reach_over_the_border() -> None:
    """Patches are padded on both sides, one more below and to the right."""
    (group,) = encoded(wrapped(odd()), picture()).groups
    assert [view.box for view in group.views] == [(0, 0, 6 / 5, 6 / 5), (0, 0, 12 / 11, 1)]
    assert group.extent == (0, 0, 1, 1)
    (group,) = encoded(wrapped(molmo2(edge=7)), [film(2)]).groups  # frames of 7 patches in pools of 3
    assert [view.box for view in group.views] == [(-1 / 7, -1 / 7, 8 / 7, 8 / 7)]
    assert group.grid[0] == 2 and group.extent == (0, 0, 1, 1)


def test_a_patch_in_a_padded_frame_moves_its_token() -> None:
    model = wrapped(molmo2(edge=7))
    plain = [np.asarray(frame) // 4 + 96 for frame in film(3)]
    before, group = embeddings_at_image_tokens(model, [[Image.fromarray(frame) for frame in plain]])
    (view,) = group.views
    assert view.grid == (3, 3)
    # the middle token holds patches 2 to 4 of 7 a side, the first one 0 and 1, the last one 5 and 6
    first, middle, last = (0, 2), (2, 5), (5, 7)
    for frame, row, column, rows, columns in (
        (0, 0, 2, first, last),
        (1, 1, 1, middle, middle),
        (2, 2, 0, last, first),
    ):
        changed = [each.copy() for each in plain]
        changed[frame][inside(48, *_share(rows), 0, 1), inside(64, *_share(columns), 0, 1)] = (255, 0, 255)
        after, _ = embeddings_at_image_tokens(model, [[Image.fromarray(each) for each in changed]])
        moved = (after - before).norm(dim=1).view(3, 3, 3)
        found = np.unravel_index(int(moved.argmax()), moved.shape)
        assert tuple(int(each) for each in found) == (frame, row, column)


def _share(patches: tuple[int, int]) -> tuple[float, float]:
    return patches[0] / 7, patches[1] / 7


def test_several_pictures_are_cut_each_in_its_way() -> None:
    model = wrapped(molmo2())
    pictures = [picture(48, 160), picture(160, 48), picture(40, 40)]
    together = encoded(model, pictures)
    apart = [encoded(model, each).groups[0] for each in pictures]
    assert [group.grid for group in together.groups] == [group.grid for group in apart]
    wide, tall, _ = (group.views[1].grid for group in together.groups)
    assert wide == tall[::-1] and wide[1] > 2 * wide[0]
    everything = [position for group in together.groups for position in group.positions]
    assert everything == sorted(everything)
    patches = (together.input_ids == model.image_token_id).nonzero().flatten().tolist()
    assert everything == patches
    plain = [np.asarray(each) // 4 + 96 for each in pictures]
    for index, group in enumerate(together.groups):  # a changed picture moves tokens of its own alone
        changed = [each.copy() for each in plain]
        changed[index][10:20, 10:20] = (255, 0, 255)
        moved = (_given(model, changed) - _given(model, plain)).norm(dim=1)
        others = [position for each in together.groups if each is not group for position in each.positions]
        assert moved[list(group.positions)].max() > 1
        assert moved[others].max() == 0


def _given(model: fastattr.Model, pictures: list[np.ndarray]) -> torch.Tensor:
    """What the decoder is given, `[seq dim]`."""
    example = encoded(model, [Image.fromarray(each) for each in pictures])
    given: list[torch.Tensor] = []
    decoder = model.hf_model.get_decoder()
    handle = decoder.register_forward_pre_hook(
        lambda _module, _args, kwargs: given.append(kwargs["inputs_embeds"][0]), with_kwargs=True
    )
    try:
        adapters.replay(model, example, adapters.encode_response(model, "a blue square"))
    finally:
        handle.remove()
    return given[0]


def test_a_batch_and_a_decoder_read_what_a_replay_reads() -> None:
    """Indices into the patches of one example are never joined with those of another."""
    prove_other_ways(wrapped(molmo2()), [picture(), picture(91, 67), picture(), [film(2)], [film(3)]])


def test_a_captured_generate_tells_everything() -> None:
    """The model's inputs say how patches were pooled, so nothing has to be passed."""
    model = wrapped(odd())
    for shown, grid in ((picture(), (1, 4, 6)), ([film(3)], (3, 2, 2))):
        example = encoded(model, shown)
        inputs = {**example.model_inputs, "input_ids": example.input_ids[None]}
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        with fastattr.capture(model) as states:
            out = model.hf_model.generate(**inputs, do_sample=False, max_new_tokens=4)
        why = states.attribute(out)
        again = fastattr.attribute(model, shown, PROMPT, why.token_ids, scales=(1.0,), evidence=False)
        assert why.source == "capture"
        assert why.grids[0][0] == again.grids[0][0] == grid
        torch.testing.assert_close(why.log_prob, again.log_prob, rtol=1e-3, atol=1e-3)


def test_every_frame_is_shown() -> None:
    held = molmo2()
    (group,) = encoded(wrapped(held), [film(5)]).groups
    assert group.grid == (5, 2, 2)
    assert held.processor.video_processor.calls == [False]


def test_images_beside_a_video_are_refused() -> None:
    with pytest.raises(fastattr.InputError, match="one placeholder for images and for videos"):
        encoded(wrapped(molmo2()), [picture(), film(2)])


def test_a_pool_that_the_processor_does_not_know_is_refused() -> None:
    held = molmo2()
    model = wrapped(held)
    example = encoded(model, picture())
    inputs = {**example.model_inputs, "input_ids": example.input_ids[None]}
    held.processor.image_processor.pooling_size = (2, 3)
    with fastattr.capture(model) as states:
        out = model.hf_model.generate(**inputs, do_sample=False, max_new_tokens=2)
    with pytest.raises(
        fastattr.TokenLayoutError, match="pools 4 patches to a token, but its processor is set to 2 x 3"
    ):
        states.attribute(out)
