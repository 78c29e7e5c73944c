"""LightOnOCR: a Pixtral tower, merged two by two, without row breaks."""

from __future__ import annotations

from fastattr.adapters.families.family import Family, merged_patch
from fastattr.adapters.families.pixtral import longest_edge, look

LIGHTON_OCR = Family("LightOnOCR", look, merged_patch, longest_edge, joint=True)

FAMILIES = {"lighton_ocr": LIGHTON_OCR}
