"""What commands print and write. Nothing that came from a model or a user reaches the terminal as a control character."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import fastattr
from fastattr.errors import InputError, SaveError

if TYPE_CHECKING:
    from torch import Tensor

    from fastattr.config import ConfigChanges

Json = Annotated[bool, typer.Option("--json", help="Print machine-readable JSON.")]
SCALES_HELP = (
    "Image sizes relative to the model's own, comma-separated, or 'own' for the model's default; by default those of "
    "the method."
)


def printable(text: str, *, lines: bool = True) -> str:
    """`text` with control characters as escapes: a terminal obeys them. Line breaks and tabs stay if `lines`."""
    kept = "\n\t" if lines else ""
    return "".join(c if c.isprintable() or c in kept else ascii(c)[1:-1] for c in text)


def print_table(names: Sequence[str], rows: Sequence[Sequence[object]], *, widest: int = 48) -> None:
    """Columns under their names; numbers to the right, long texts cut."""
    names = [printable(name, lines=False) for name in names]  # those of a pivoted table are values
    shown = [[_cell(value, widest) for value in row] for row in rows]
    columns = list(zip(*shown, strict=True)) if shown else [()] * len(names)
    sides = [str.rjust if any(column) and all(map(_is_number, column)) else str.ljust for column in columns]
    widths = [max(len(cell) for cell in (name, *column)) for name, column in zip(names, columns, strict=True)]
    for row in [names, *shown]:
        print("  ".join(side(cell, width) for side, cell, width in zip(sides, row, widths, strict=True)).rstrip())


def _is_number(cell: str) -> bool:
    try:
        float(cell or 0)
    except ValueError:
        return False
    return True


def _cell(value: object, widest: int) -> str:
    if value is None:
        return ""
    text = f"{value:.4g}" if isinstance(value, float) else printable(str(value), lines=False)
    return text if len(text) <= widest else text[: widest - 1] + "…"


def write(explained: list[fastattr.Attribution], out: Path) -> None:
    """Write attributions of one response in the format of the suffix, see `check_output`."""
    from fastattr.storage import whole_file

    first, *others = explained
    if out.suffix.lower() == ".html":
        first.to_html(out, others=others)
    elif out.suffix.lower() == ".safetensors":
        first.save(out)
    elif out.suffix.lower() == ".png":
        first.to_png(out)
    else:
        with whole_file(out) as file:
            file.write(json.dumps(as_dict(first, maps=True)).encode())


def check_output(out: Path, n_methods: int = 1) -> None:
    """Raises `SaveError` or `InputError` where `write` could not write attributions by so many methods to `out`."""
    from fastattr.storage import check_writable

    if out.suffix.lower() not in (".html", ".safetensors", ".png", ".json"):
        raise SaveError(f"{str(out)!r} ends in {out.suffix!r}, expected .html, .safetensors, .png or .json")
    if n_methods > 1 and out.suffix.lower() != ".html":
        raise InputError(f"{str(out)!r} holds one method; got {n_methods}. Only .html shows several")
    check_writable(out)


def as_dict(why: fastattr.Attribution, *, maps: bool) -> dict[str, Any]:
    """Plain values for JSON; maps as nested lists `[target][t][h][w]` for each image if wanted."""
    from fastattr.config import name_of

    evidence = None if why.evidence is None else why.evidence.tolist()
    descriptors = why.descriptors
    tokens = [
        {
            "token": token,
            "id": why.token_ids[i],
            "span": why.spans[i],
            "log_prob": round(float(why.log_prob[i]), 4),
            "evidence": None if evidence is None else round(evidence[i], 4),
            "agreement": [round(value, 4) for value in why.agreement[i].tolist()],
            "degenerate": bool(why.degenerate[i]),
            **{name: round(float(values[i]), 4) for name, values in vars(descriptors).items()},
        }
        for i, token in enumerate(why.tokens)
    ]
    result: dict[str, Any] = {
        "response": why.response,
        "prompt": why.prompt,
        "model": why.model,
        "configuration": name_of(why.config),
        "method": why.config.method,
        "scales": why.config.scales,
        "backend": why.backend,
        "grids": [list(m.shape[1:]) for m in why.image],
        "tokens": tokens,
        "notes": why.notes,
    }
    if maps:
        result["image"] = [
            [[[[round(v, 4) for v in row] for row in frame] for frame in target] for target in m.tolist()]
            for m in why.image
        ]
        result["context_tokens"] = why.context_tokens
        result["context"] = [[round(v, 4) for v in row] for row in why.context.tolist()]
    return result


def print_attributions(explained: list[fastattr.Attribution], out: Path | None, as_json: bool) -> None:
    why = explained[0]
    if as_json:
        print(json.dumps({**as_dict(why, maps=False), "out": None if out is None else str(out)}))
        return
    print(printable(why.response))
    print(f"\n{shown_by([each.config for each in explained])}")
    print(f"{'token':<14}{'evidence':>10}  {'probability':>13}  where")
    low = set() if why.evidence is None else {target for word in why.low_evidence for target in word.targets[0]}
    for i, token in enumerate(why.tokens):
        evidence = signed(None if why.evidence is None else float(why.evidence[i]))
        mark = "?" if i in low else ""
        print(
            f"{printable(repr(token.strip())):<14}{evidence:>10} {mark:<1}{float(why.log_prob[i].exp()):>13.3f}  {where([maps[i] for maps in why.image])}"
        )
    if low and why.calibration is not None:
        print(f"? {why.calibration}")
    for note in why.notes:
        print(f"note: {printable(note)}")
    if out is not None:
        print(f"\n{out.resolve()}")


def shown_by(configs: Sequence[fastattr.AttributionConfig]) -> str:
    """A line that names the configuration that is printed, and the others in the report."""
    from fastattr.config import name_of

    first, *others = (name_of(config) for config in configs)
    return f"method: {first}" + (f"; also in the report: {', '.join(others)}" if others else "")


def signed(nats: float | None) -> str:
    """Evidence in nats with two decimals; +0.00 rather than -0.00, and empty for None."""
    return "" if nats is None else f"{round(nats, 2) + 0.0:+.2f}"


def where(image: Sequence[Tensor]) -> str:
    """The strongest place of one token's maps, `[t h w]` for each image, in words."""
    strongest = max(range(len(image)), key=lambda i: float(image[i].max()))
    maps = image[strongest]
    if float(maps.max()) < 0.005:  # would be printed as 0.00
        return "nowhere"
    t, h, w = maps.shape
    frame, rest = divmod(int(maps.argmax()), h * w)
    row, column = divmod(rest, w)
    place = f"{float(maps.max()):.2f} at row {row + 1}/{h}, column {column + 1}/{w}"
    if t > 1:
        place += f", frame {frame + 1}/{t}"
    return place + (f", image {strongest + 1}" if len(image) > 1 else "")


def chosen_config(method: str, scales: str | None, changes: ConfigChanges) -> fastattr.AttributionConfig:
    """The configuration that `--method` and `--scales` describe.

    Args:
        scales: as typed, `1,1.5,2` or `own`; None for those of the method.
        changes: further options.

    Raises:
        InputError: one of them cannot be read, or both name scales.
    """
    from fastattr.config import configure

    if scales is not None:
        changes = {**changes, "scales": None if scales == "own" else _parse_scales(scales)}
    return configure(method, changes)


def _parse_scales(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise InputError(
            f"--scales is {text!r}, expected numbers separated by commas, for example 1,1.5,2, or 'own'"
        ) from error
