"""Qwen-VL, GLM-V and their kin: grids of patches, merged two by two, and true videos."""

from __future__ import annotations

import pytest

from tests.engine.families.proof import Row, prove
from tests.engine.families.tiny_qwen import (
    glm4v,
    glm4v_moe,
    glm46v,
    glm_ocr,
    qwen2_5_vl,
    qwen2_vl,
    qwen3_5,
    qwen3_5_moe,
    qwen3_vl,
    qwen3_vl_moe,
    qwen4_exp,
)

ROWS = [  # 67 x 91 pixels in cells of 16: 4.2 x 5.7
    Row(make.__name__, make, [(4, 6)], (1, 4, 6), video=True)
    for make in (
        qwen2_vl,
        qwen2_5_vl,
        qwen3_vl,
        qwen3_vl_moe,
        qwen3_5,
        qwen3_5_moe,
        qwen4_exp,
        glm4v,
        glm4v_moe,
        glm46v,
        glm_ocr,
    )
]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.model_type)
def test_family(row: Row) -> None:
    prove(row)
