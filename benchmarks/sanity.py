"""Are maps a property of the model, and are they stable?

    python -m benchmarks.sanity --n 40

The bundled model is made to say the true description of each scene; maps are those of the colour and shape words.
Randomisation (Adebayo et al., arXiv 1810.03292): the same maps where parts of the model are random, drawn anew for each
scene. Maps that stay do not depend on that part; what the residual stream carries past the decoder is what remains
without any decoder layer. Stability: the same maps where the picture is changed so little that nobody would describe
it otherwise.
"""

from __future__ import annotations

import argparse
import copy
import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
import numpy as np
import torch
import transformers
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from PIL import Image, ImageEnhance
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import fastattr
from benchmarks.cost import one_thread
from benchmarks.record import RESULTS, machine, write_jsonl
from fastattr.adapters import encode_response
from fastattr.demo.falsify import content_words
from fastattr.demo.scenes import HELD_OUT, describe, make_scene
from fastattr.evaluate import METHODS
from fastattr.evaluate.judging import tokens_at
from fastattr.evaluate.plots import FAINT, INK, PALETTE, STYLE
from fastattr.images import Visual
from fastattr.metrics import paired_bootstrap
from fastattr.pipeline import explain_readings, read_states
from fastattr.text import decode_tokens

Row = Mapping[str, Any]
Region = tuple[int, int, int, int]  # left, top, right, bottom in pixels, half-open

FIRST_SEED = HELD_OUT + 20_000_000  # apart from the scenes on which options of fastattr were compared
GRID = (12, 12)  # cells of the common region on which maps are compared
CROP = 0.04  # of the picture's width or height
NOISE = 4.0  # standard deviation in levels of 255
JPEG_QUALITY = 75

RANDOM, CONTROL, CHANGED = "random", "control", "changed"
HEAD = "output head"
CASCADE = {  # each on top of those before; the output head stays as trained
    "decoder layer 4": "model.language_model.layers.3",
    "and layer 3": "model.language_model.layers.2",
    "and layer 2": "model.language_model.layers.1",
    "and layer 1": "model.language_model.layers.0",
    "and the projector": "model.multi_modal_projector",
    "and the vision tower": "model.vision_tower",
}
NO_DECODER = "no decoder layers, nothing random"
OTHER_OBJECT = "nothing; a word of another object"


@dataclass(frozen=True)
class View:
    """A changed picture.

    Attributes:
        region: the part of the unchanged picture that it shows, all of it or one side short.
    """

    image: Image.Image
    region: Region


@dataclass(frozen=True, eq=False)
class Case:
    """What the model is made to say about a picture.

    Attributes:
        words: target indices of the colour and the shape word of every object, in this order.
    """

    image: Image.Image
    prompt: str
    response_ids: Tensor
    words: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, eq=False)
class Reading:
    """What one model made of one picture.

    Attributes:
        maps: by method, `[word h w]`.
        log_prob: `[word]` in nats.
        size: width and height of the picture in pixels.
    """

    maps: Mapping[str, Tensor]
    log_prob: np.ndarray
    size: tuple[int, int]


@dataclass(frozen=True, eq=False)
class Compared:
    """One method's maps of one scene before and after one change.

    Attributes:
        rho: `[word]`, see `spearman`.
        log_prob_change: `[word]` in nats, after less before; empty where one reading is compared with itself.
    """

    part: str
    change: str
    method: str
    rho: np.ndarray
    log_prob_change: np.ndarray


# --- rank correlation --------------------------------------------------------------------------------


def average_ranks(values: np.ndarray) -> np.ndarray:
    """Ranks of `[n]` values from 1 on; equal values share the mean of their ranks."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[place]


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Rank correlation of two maps of one shape, in [-1, 1]; NaN where one of them is constant and has no ranks."""
    ranks_a, ranks_b = average_ranks(a.ravel()), average_ranks(b.ravel())
    if np.ptp(ranks_a) == 0 or np.ptp(ranks_b) == 0:
        return float("nan")
    return float(np.corrcoef(ranks_a, ranks_b)[0, 1])


def on_region(maps: Tensor, size: tuple[int, int], region: Region) -> np.ndarray:
    """Maps `[word h w]` of a picture on the cells of a part of it: bilinear to pixels, then to `[word *GRID]`.

    Args:
        size: width and height of the picture in pixels.
    """
    left, top, right, bottom = region
    width, height = size
    # in double precision and back, so that equal values stay equal
    pixels = F.interpolate(maps[:, None].double(), (height, width), mode="bilinear", align_corners=False)
    cells = F.interpolate(pixels[:, :, top:bottom, left:right], GRID, mode="bilinear", align_corners=False)
    return cells[:, 0].float().numpy()


# --- random models -----------------------------------------------------------------------------------


def randomised(model: fastattr.Model, paths: Sequence[str], seed: int) -> fastattr.Model:
    """The model with some modules as if untrained; the given one stays as it is.

    Matrices and kernels are drawn from a normal distribution of their own standard deviation, the gains of norms are
    1. A new head is no longer tied to the input embeddings, which stay.

    Args:
        paths: of modules without biases, redrawn in this order.
        seed: decides the draws; a module's draw does not depend on those after it.
    """
    hf_model = copy.deepcopy(model.hf_model)
    rng = torch.Generator().manual_seed(seed)
    for path in paths:
        for module in hf_model.get_submodule(path).modules():
            for name, trained in list(module.named_parameters(recurse=False)):
                fresh = torch.ones_like(trained, requires_grad=False)
                if trained.ndim > 1:
                    fresh.normal_(0.0, trained.detach().std().item(), generator=rng)
                setattr(module, name, nn.Parameter(fresh, requires_grad=False))
    return fastattr.wrap(hf_model, model.processor)


def without_decoder(model: fastattr.Model) -> fastattr.Model:
    """The model without its decoder layers: embeddings of image and text go straight to the final norm and the head."""
    hf_model = copy.deepcopy(model.hf_model)
    hf_model.model.language_model.layers = nn.ModuleList()
    return fastattr.wrap(hf_model, model.processor)


def other_models(model: fastattr.Model, seed: int) -> Iterator[tuple[str, str, fastattr.Model]]:
    """Kind, name and model of every randomisation, and of the control; one lives at a time."""
    yield RANDOM, HEAD, randomised(model, ["lm_head"], seed)
    paths = list(CASCADE.values())
    for k, name in enumerate(CASCADE):
        yield RANDOM, name, randomised(model, paths[: k + 1], seed)
    yield CONTROL, NO_DECODER, without_decoder(model)


# --- changed pictures --------------------------------------------------------------------------------


def whole(size: tuple[int, int]) -> Region:
    """All of a picture of some width and height."""
    return (0, 0, *size)


def cropped(image: Image.Image, rng: np.random.Generator) -> View:
    """The picture without `CROP` of one side, drawn at random."""
    left, top, right, bottom = whole(image.size)
    x, y = round(CROP * right), round(CROP * bottom)
    sides = (
        (x, top, right, bottom),
        (left, y, right, bottom),
        (left, top, right - x, bottom),
        (left, top, right, bottom - y),
    )
    region = sides[rng.integers(len(sides))]
    return View(image.crop(region), region)


def brightened(image: Image.Image, factor: float) -> View:
    """Every level times `factor`, at most 255."""
    return View(ImageEnhance.Brightness(image).enhance(factor), whole(image.size))


def noisy(image: Image.Image, rng: np.random.Generator) -> View:
    """Normal noise of standard deviation `NOISE` on every channel of every pixel."""
    levels = np.asarray(image) + rng.normal(0.0, NOISE, (image.height, image.width, 3))
    return View(Image.fromarray(np.clip(np.round(levels), 0, 255).astype(np.uint8)), whole(image.size))


def compressed(image: Image.Image) -> View:
    """The picture as a JPEG of quality `JPEG_QUALITY` keeps it."""
    stored = io.BytesIO()
    image.save(stored, "JPEG", quality=JPEG_QUALITY)
    return View(Image.open(stored).convert("RGB"), whole(image.size))


CHANGES: Mapping[str, Callable[[Image.Image, np.random.Generator], View]] = {
    f"{100 * CROP:g} % cropped off a side": cropped,
    "brightness x 0.9": lambda image, _: brightened(image, 0.9),
    "brightness x 1.1": lambda image, _: brightened(image, 1.1),
    f"noise of {NOISE:g} levels": noisy,
    f"JPEG of quality {JPEG_QUALITY}": lambda image, _: compressed(image),
}


# --- one scene ---------------------------------------------------------------------------------------


def case_of(model: fastattr.Model, seed: int) -> Case:
    """The true description of the scene of `seed`."""
    scene = make_scene(seed)
    exchange = describe(scene)
    response_ids = encode_response(model, exchange.response)
    text = decode_tokens(response_ids.tolist(), model.decode)
    said = [word for word in content_words(text.text) if word.kind in ("color", "shape")]
    return Case(scene.image, exchange.prompt, response_ids, tuple(tokens_at(text, word.span) for word in said))


def read(model: fastattr.Model, case: Case, image: Image.Image) -> Reading:
    """The maps of every method and the log-probabilities of the words, from one forward a scale."""
    visual = Visual((image,))
    configs = {name: config.resolve(model.scales, model.head.vocab) for name, config in METHODS.items()}
    wanted = {(scale, config.layer) for config in configs.values() for scale in config.known_scales}
    states = {
        (scale, layer): read_states(model, [visual], case.prompt, case.response_ids, scale=scale, layer=layer)
        for scale, layer in wanted
    }
    found = {
        name: explain_readings(
            model, [visual], case.prompt, [states[scale, config.layer] for scale in config.known_scales], config
        )
        for name, config in configs.items()
    }
    maps = {
        name: torch.stack([each.image[0][list(word), 0].amax(0) for word in case.words]) for name, each in found.items()
    }
    log_prob = next(iter(found.values())).log_prob  # the model's own, whatever the method
    return Reading(maps, np.array([log_prob[list(word)].sum() for word in case.words]), image.size)


def compare(part: str, change: str, before: Reading, after: Reading, region: Region) -> Iterator[Compared]:
    """Every method's maps before and after a change.

    Args:
        region: the part of the picture before that the picture after shows.
    """
    for method in before.maps:
        old = on_region(before.maps[method], before.size, region)
        new = on_region(after.maps[method], after.size, whole(after.size))
        rho = np.array([spearman(a, b) for a, b in zip(old, new, strict=True)])
        yield Compared(part, change, method, rho, after.log_prob - before.log_prob)


def across_objects(reading: Reading) -> Iterator[Compared]:
    """The floor: every two words of different objects in one reading."""
    for method, maps in reading.maps.items():
        cells = on_region(maps, reading.size, whole(reading.size))
        pairs = [(i, j) for i, j in combinations(range(len(cells)), 2) if i // 2 != j // 2]
        rho = np.array([spearman(cells[i], cells[j]) for i, j in pairs])
        yield Compared(CONTROL, OTHER_OBJECT, method, rho, np.empty(0))


def compare_scene(model: fastattr.Model, seed: int) -> list[Compared]:
    """Every method after every change on the scene of `seed`, which also decides all draws."""
    case = case_of(model, seed)
    trained = read(model, case, case.image)
    compared = list(across_objects(trained))
    for part, name, other in other_models(model, seed):
        compared += compare(part, name, trained, read(other, case, case.image), whole(case.image.size))
    for name, change in CHANGES.items():
        view = change(case.image, np.random.default_rng(seed))
        compared += compare(CHANGED, name, trained, read(model, case, view.image), view.region)
    return compared


# --- all scenes --------------------------------------------------------------------------------------


def row(scenes: Sequence[Compared]) -> dict[str, Any]:
    """One line of the results: one change and one method in every scene.

    A map without ranks counts as a correlation of 0. The interval is that of the mean over words when scenes are drawn
    again.
    """
    first = scenes[0]
    rho = np.concatenate([scene.rho for scene in scenes])
    log_prob_change = np.concatenate([scene.log_prob_change for scene in scenes])
    sums = np.array([(np.nan_to_num(scene.rho).sum(), len(scene.rho)) for scene in scenes if len(scene.rho)])
    interval = paired_bootstrap(sums, sums * (0, 1), statistic=_mean_over_words)
    return {
        "part": first.part,
        "change": first.change,
        "method": first.method,
        "correlation": {name: round(value, 4) for name, value in asdict(interval).items()},
        "magnitude": round(float(np.abs(np.nan_to_num(rho)).mean()), 4),
        "constant": int(np.isnan(rho).sum()),
        "n": len(rho),
        "log_prob_change": round(float(log_prob_change.mean()), 4) if len(log_prob_change) else None,
    }


def _mean_over_words(sums: np.ndarray) -> np.ndarray:
    """From `[... scene 2]`, the sum over a scene's words and their number, to `[...]`."""
    total = sums.sum(axis=-2)
    return total[..., 0] / total[..., 1]


def run(n: int) -> list[dict[str, Any]]:
    """Compare `n` scenes. The first row is the header."""
    model = fastattr.load("shapes")
    with one_thread():
        scenes = [compare_scene(model, seed) for seed in tqdm(range(FIRST_SEED, FIRST_SEED + n), unit="scene")]
        header = machine(f"python -m benchmarks.sanity --n {n}")
    header |= {
        "model": "shapes",
        "transformers": transformers.__version__,
        "first_seed": FIRST_SEED,
        "scenes": n,
        "methods": {name: asdict(config) for name, config in METHODS.items()},
        "random": "normal of the trained standard deviation, drawn anew for each scene",
        "grid": GRID,
        "interval": "95 % bootstrap over scenes, 2000 resamples, seed 0",
    }
    return [header, *(row(each) for each in zip(*scenes, strict=True))]


# --- what it looks like ------------------------------------------------------------------------------


def sanity_table(header: Row, rows: Sequence[Row]) -> str:
    """Rank correlations with the maps of the trained model and the unchanged picture."""
    from fastattr.evaluate.tables import markdown

    methods = list(header["methods"])

    def lines(part: str, *, magnitude: bool) -> Iterator[tuple[str, ...]]:
        for change, found in _by_change(rows, part).items():
            yield (
                change,
                *(_interval(found[method]["correlation"]) for method in methods),
                *([_slashed(f"{found[method]['magnitude']:.2f}" for method in methods)] if magnitude else []),
                _slashed(str(found[method]["constant"]) for method in methods),
                _nats(found[methods[0]]["log_prob_change"]),
            )

    names = _slashed(methods)
    last = (f"constant maps, {names}", "log-probability")
    random = markdown(
        ("what is random", *methods, f"size, {names}", *last),
        (*lines(RANDOM, magnitude=True), *lines(CONTROL, magnitude=True)),
    )
    changed = markdown(("change of the picture", *methods, *last), lines(CHANGED, magnitude=False))
    n = next(row["n"] for row in rows if row["part"] == RANDOM)
    pairs = next(row["n"] for row in rows if row["change"] == OTHER_OBJECT)
    return (
        f"{header['model']}: {header['scenes']} held-out scenes, {n} colour and shape words, {pairs} pairs of words of "
        "different objects. Mean Spearman correlation of each word's map with that of the trained model on the "
        f"unchanged picture; intervals are {header['interval']}. A constant map has no ranks and counts as 0; "
        "log-probabilities are changes of the words' mean in nats.\n\nRandom weights; the size is the mean of the "
        f"correlation's absolute value:\n\n{random}\n\nThe trained model on a changed picture:\n\n{changed}"
    )


def _by_change(rows: Sequence[Row], part: str) -> dict[str, dict[str, Row]]:
    """From change to method to row, in the order of the rows."""
    found: dict[str, dict[str, Row]] = {}
    for row in rows:
        if row["part"] == part:
            found.setdefault(row["change"], {})[row["method"]] = row
    return found


def _interval(value: Row) -> str:
    return f"{value['mean']:+.2f} [{value['low']:+.2f}, {value['high']:+.2f}]"


def _nats(change: float | None) -> str:
    return "" if change is None else f"{change:+.3f}"


def _slashed(values: Iterable[str]) -> str:
    return " / ".join(values)


def draw(header: Row, rows: Sequence[Row], path: Path) -> Path:
    """Correlations as parts of the model become random, and as the picture changes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    random, control, changed = (_by_change(rows, part) for part in (RANDOM, CONTROL, CHANGED))
    floor = control.pop(OTHER_OBJECT)
    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(
            1, 2, figsize=(12.0, 4.8), sharey=True, width_ratios=(8, 5), constrained_layout=True
        )
        methods = list(header["methods"])
        for k, (method, color) in enumerate(zip(methods, PALETTE, strict=False)):
            shift = 0.08 * (k - (len(methods) - 1) / 2)  # side by side, or intervals would hide each other
            _points(left, method, color, [each[method] for each in (random | control).values()], shift)
            cascade = [random[name][method]["correlation"]["mean"] for name in CASCADE]
            left.plot(np.arange(1, 1 + len(cascade)) + shift, cascade, color=color, linewidth=1.8)
            left.axhline(floor[method]["correlation"]["mean"], color=color, linewidth=1.0, linestyle=":")
            _points(right, method, color, [each[method] for each in changed.values()], shift)
        for axes, names in ((left, [*random, *control]), (right, list(changed))):
            axes.axhline(0.0, color=INK, linewidth=0.8)
            axes.set_xticks(range(len(names)), [name.replace(", ", ",\n") for name in names], rotation=30, ha="right")
            axes.grid(axis="y", color=FAINT, linewidth=0.8)
            axes.set_axisbelow(True)
            axes.tick_params(length=3, color=INK)
        left.set_ylabel("rank correlation with the map as it was")
        left.set_title("random parts of the model; dotted: a word of another object")
        right.set_title("changed picture")
        right.legend(frameon=False, loc="lower right")
        figure.supxlabel(f"{header['scenes']} scenes, mean over words, 95 % intervals", fontsize=9, color=INK)
        figure.savefig(path, metadata={"Software": None})
        plt.close(figure)
    return path


def _points(axes: Axes, name: str, color: str, found: Sequence[Row], shift: float) -> None:
    mean, low, high = (np.array([row["correlation"][key] for row in found]) for key in ("mean", "low", "high"))
    axes.errorbar(
        np.arange(len(found)) + shift,
        mean,
        yerr=(mean - low, high - mean),
        color=color,
        label=name,
        marker="o",
        markersize=4,
        linestyle="none",
        linewidth=1.2,
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sanity", description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=40, help="scenes")
    parser.add_argument("--out", type=Path, default=RESULTS / "sanity.jsonl")
    parser.add_argument("--smoke", action="store_true", help="2 scenes, prints the table, writes nothing")
    args = parser.parse_args()
    header, *found = run(2 if args.smoke else args.n)
    print(sanity_table(header, found))
    if not args.smoke:
        print(write_jsonl(args.out, [header, *found]), draw(header, found, args.out.with_suffix(".png")))


if __name__ == "__main__":
    main()
