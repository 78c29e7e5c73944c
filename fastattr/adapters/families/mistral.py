"""LightOnOCR and Mistral Large 4: a Pixtral tower whose patches are merged two by two."""

from __future__ import annotations

from fastattr.adapters.families.family import Family, merged_patch
from fastattr.adapters.families.pixtral import longest_edge, look

MISTRAL = Family("LightOnOCR, Mistral Large 4", look, merged_patch, longest_edge, joint=True, keeps_aspect=True)

FAMILIES = {"lighton_ocr": MISTRAL, "mistral_large4": MISTRAL}
