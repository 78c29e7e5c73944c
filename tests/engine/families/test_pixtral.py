"""Models with a Pixtral tower: pictures of any form, one token a patch or a merged square of them."""

from __future__ import annotations

import pytest

import fastattr
from tests.engine.families.other_ways import prove_other_ways
from tests.engine.families.proof import Row, prove, read, wrap
from tests.engine.families.tiny_llava import captured
from tests.engine.family_models import llava_pixtral, mistral3, picture

# a picture of 67 x 91 with patches of 8: at most 64 pixels long, 48 x 64; merged two by two, rounded up, 80 x 96
ROWS = [
    Row("llava", llava_pixtral, [(6, 8)], (1, 6, 8)),
    Row("mistral3", mistral3, [(5, 6)], (1, 5, 6)),
]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.make.__name__)
def test_family(row: Row) -> None:
    prove(row)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.make.__name__)
def test_a_batch_and_a_decoder_read_what_a_replay_reads(row: Row) -> None:
    prove_other_ways(wrap(row), [picture(), picture(120, 40), picture(67, 91, seed=3)])


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.make.__name__)
def test_pictures_of_several_forms_need_no_sizes_to_be_captured(row: Row) -> None:
    """Their sizes are among the inputs; the padding that makes them one tensor is not looked at."""
    model = wrap(row)
    pictures = [picture(64, 30), picture(30, 64)]
    grids = [group.grid for group in read(model, pictures)[0].groups]
    assert grids[0][1] > grids[0][2] and grids[1][1:] == grids[0][:0:-1]
    states, out = captured(model, pictures)
    why: fastattr.Attribution = states.attribute(out)
    assert list(why.grids[0]) == grids
