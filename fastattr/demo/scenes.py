"""Seeded pictures of coloured shapes with exact masks, and truthful sentences about them.

A scene is a framed picture with one to four objects, each in its own cell of a 3x3 grid, so that
"reading order" and place words are unambiguous. Everything follows from the seed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageDraw

from fastattr.errors import InputError

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (214, 38, 38),
    "green": (44, 150, 52),
    "blue": (38, 76, 214),
    "yellow": (244, 214, 46),
    "orange": (247, 134, 22),
    "purple": (132, 52, 170),
    "cyan": (48, 204, 214),
    "pink": (250, 138, 190),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (240, 240, 238),
    "grey": (150, 150, 152),
    "black": (28, 28, 32),
    "brown": (116, 84, 60),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "diamond", "heart")
SIZES: dict[str, tuple[float, float]] = {"small": (0.080, 0.098), "large": (0.138, 0.168)}
PLACES: dict[str, tuple[float, float]] = {  # centre (x, y) as a share of width and height
    "top left": (0.22, 0.22),
    "top": (0.5, 0.22),
    "top right": (0.78, 0.22),
    "left": (0.22, 0.5),
    "center": (0.5, 0.5),
    "right": (0.78, 0.5),
    "bottom left": (0.22, 0.78),
    "bottom": (0.5, 0.78),
    "bottom right": (0.78, 0.78),
}
NUMBERS = ("no", "one", "two", "three", "four")
TEXTURES = ("plain", "gradient", "noise", "stripes")

HELD_OUT = 10_000_000  # seeds from here on are never trained on

_PLACE_JITTER = 0.045
_SUPERSAMPLE = 4


@dataclass(frozen=True)
class SceneObject:
    """One object; `center` and `radius` are shares of the picture's shorter side and its extent."""

    color: str
    shape: str
    size: str
    place: str
    center: tuple[float, float]
    radius: float
    rgb: tuple[int, int, int]

    @property
    def name(self) -> str:
        return f"{self.color} {self.shape}"

    @property
    def full_name(self) -> str:
        return f"{self.size} {self.color} {self.shape}"

    @property
    def where(self) -> str:
        return f"in the {self.place}" if self.place == "center" else f"at the {self.place}"


@dataclass(frozen=True)
class Scene:
    """A picture and what is true of it. Objects are in reading order."""

    seed: int
    image: Image.Image
    masks: np.ndarray  # bool [object h w]
    objects: tuple[SceneObject, ...]
    background: str
    n_asked: int | None  # of objects, as in `make_scene`


@dataclass(frozen=True)
class Exchange:
    """One question and its true answer."""

    prompt: str
    response: str


def make_scene(seed: int, height: int = 192, width: int | None = None, *, n_objects: int | None = None) -> Scene:
    """Draw the scene of `seed`.

    Args:
        seed: decides everything; equal seeds and sizes give equal scenes.
        height, width: size in pixels; `width` defaults to `height`.
        n_objects: one to four; drawn at random when None.
    """
    return _draw(seed, height, height if width is None else width, n_objects)


def erase(scene: Scene, k: int) -> Scene:
    """The scene without object `k`: the same picture, pixel for pixel, as if that object had never been drawn.

    Raises:
        InputError: there is no object `k`.
    """
    if not 0 <= k < len(scene.objects):
        raise InputError(f"there is no object {k} to erase; the scene has {len(scene.objects)}, counted from 0")
    width, height = scene.image.size
    return _draw(scene.seed, height, width, scene.n_asked, (*scene.objects[:k], *scene.objects[k + 1 :]))


def make_clip(seed: int, n_frames: int, size: int = 192) -> list[Scene]:
    """A clip of one object that moves from left to right through the middle, a scene a frame, all else still.

    Args:
        seed: decides object and background, as in `make_scene`.

    Raises:
        InputError: a clip has at least two frames.
    """
    if n_frames < 2:
        raise InputError(f"n_frames is {n_frames}, expected at least 2: a clip moves")
    item = make_scene(seed, size, n_objects=1).objects[0]
    start, stop = PLACES["left"][0], PLACES["right"][0]
    ways = [start + (stop - start) * k / (n_frames - 1) for k in range(n_frames)]
    places = [min(("left", "center", "right"), key=lambda place: abs(PLACES[place][0] - x)) for x in ways]
    return [
        _draw(seed, size, size, 1, (replace(item, center=(x, 0.5), place=place),))
        for x, place in zip(ways, places, strict=True)
    ]


def _draw(
    seed: int, height: int, width: int, n_asked: int | None, drawn: tuple[SceneObject, ...] | None = None
) -> Scene:
    """The scene of `seed`, with `drawn` on its background instead of its own objects unless None."""
    rng = np.random.default_rng(seed)
    background = str(rng.choice(list(BACKGROUNDS)))
    placed = _place_objects(rng, height, width, n_asked)  # what follows depends on these draws, whatever is drawn
    objects = placed if drawn is None else drawn
    canvas = _background(rng, height, width, background)
    masks = np.zeros((len(objects), height, width), dtype=bool)
    for index, item in enumerate(objects):
        coverage, (top, left) = _coverage(item, height, width)
        rows, columns = slice(top, top + coverage.shape[0]), slice(left, left + coverage.shape[1])
        alpha = coverage[..., None]
        canvas[rows, columns] = canvas[rows, columns] * (1 - alpha) + np.array(item.rgb, np.float32) * alpha
        masks[index, rows, columns] = coverage >= 0.5
    canvas += 2.0 * rng.standard_normal(canvas.shape, dtype=np.float32)
    picture = Image.fromarray(np.clip(canvas + 0.5, 0, 255).astype(np.uint8), "RGB")
    return Scene(seed, picture, masks, objects, background, n_asked)


def _place_objects(rng: np.random.Generator, height: int, width: int, n_objects: int | None) -> tuple[SceneObject, ...]:
    count = int(rng.integers(1, 5)) if n_objects is None else n_objects
    cells = sorted(rng.choice(len(PLACES), size=count, replace=False).tolist())
    taken: set[tuple[str, str]] = set()
    placed: list[SceneObject] = []
    for cell in cells:
        place = list(PLACES)[cell]
        while True:
            color, shape = str(rng.choice(list(COLORS))), str(rng.choice(SHAPES))
            if (color, shape) not in taken:
                break
        taken.add((color, shape))
        size = str(rng.choice(list(SIZES)))
        radius = float(rng.uniform(*SIZES[size]))
        x, y = PLACES[place]
        for _ in range(200):
            center = (x + rng.uniform(-1, 1) * _PLACE_JITTER, y + rng.uniform(-1, 1) * _PLACE_JITTER)
            if all(_gap(center, other, height, width) > radius + other.radius + 0.01 for other in placed):
                break
            radius = max(SIZES[size][0], radius * 0.995)
        else:
            continue  # two large neighbours that cannot be kept apart: the scene has one object fewer
        jitter = rng.integers(-14, 15, size=3)
        rgb = tuple(int(v) for v in np.clip(np.array(COLORS[color]) + jitter, 0, 255))
        placed.append(SceneObject(color, shape, size, place, center, radius, rgb))  # type: ignore[arg-type]
    return tuple(placed)


def _gap(center: tuple[float, float], other: SceneObject, height: int, width: int) -> float:
    """Distance between two centres, in shares of the shorter side."""
    side = min(height, width)
    return math.hypot((center[0] - other.center[0]) * width, (center[1] - other.center[1]) * height) / side


def _background(rng: np.random.Generator, height: int, width: int, name: str) -> np.ndarray:
    base = np.array(BACKGROUNDS[name], np.float32) + rng.integers(-8, 9, size=3)
    canvas = np.broadcast_to(base, (height, width, 3)).astype(np.float32).copy()
    texture = str(rng.choice(TEXTURES))
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    angle = rng.uniform(0, math.tau)
    along = x * math.cos(angle) / width + y * math.sin(angle) / height
    if texture == "gradient":
        canvas += (along[..., None] - along.mean()) * 36.0
    elif texture == "stripes":
        canvas += (np.sin(along * rng.uniform(30, 80)) * 7.0)[..., None]
    elif texture == "noise":
        grain = max(1, min(height, width) // 24)
        coarse = rng.normal(0, 9.0, (height // grain + 1, width // grain + 1)).astype(np.float32)
        canvas += coarse.repeat(grain, 0).repeat(grain, 1)[:height, :width, None]
    thickness = max(2, round(0.025 * min(height, width)))
    frame = np.array((222, 206, 160) if name in ("black", "brown") else (60, 46, 34), np.float32)
    canvas[:thickness] = canvas[-thickness:] = frame
    canvas[:, :thickness] = canvas[:, -thickness:] = frame
    return canvas


def _coverage(item: SceneObject, height: int, width: int) -> tuple[np.ndarray, tuple[int, int]]:
    """Anti-aliased coverage in [0, 1] of the object's bounding box, and the box's top-left pixel."""
    radius = item.radius * min(height, width)
    center_x, center_y = item.center[0] * width, item.center[1] * height
    left, top = math.floor(center_x - radius) - 1, math.floor(center_y - radius) - 1
    side = math.ceil(2 * radius) + 3
    mask = Image.new("L", (side * _SUPERSAMPLE, side * _SUPERSAMPLE), 0)
    _draw_shape(
        ImageDraw.Draw(mask),
        item.shape,
        (center_x - left) * _SUPERSAMPLE,
        (center_y - top) * _SUPERSAMPLE,
        radius * _SUPERSAMPLE,
    )
    coverage = np.asarray(mask.reduce(_SUPERSAMPLE), np.float32) / 255.0
    inside_y, inside_x = slice(max(0, -top), height - top), slice(max(0, -left), width - left)
    return coverage[inside_y, inside_x], (max(0, top), max(0, left))


def _draw_shape(draw: ImageDraw.ImageDraw, shape: str, x: float, y: float, r: float) -> None:
    def ring(radius: float, fill: int) -> None:
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)

    def polygon(points: list[tuple[float, float]]) -> None:
        draw.polygon([(x + px * r, y + py * r) for px, py in points], fill=255)

    if shape == "circle":
        ring(r * 0.95, 255)
    elif shape == "ring":
        ring(r, 255)
        ring(r * 0.52, 0)
    elif shape == "square":
        polygon([(-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)])
    elif shape == "diamond":
        polygon([(0, -1), (0.72, 0), (0, 1), (-0.72, 0)])
    elif shape == "triangle":
        polygon([(0, -0.95), (0.95, 0.8), (-0.95, 0.8)])
    elif shape == "cross":
        a = 0.32
        arms = [(-a, -1), (a, -1), (a, -a), (1, -a), (1, a), (a, a), (a, 1), (-a, 1), (-a, a), (-1, a), (-1, -a)]
        polygon([*arms, (-a, -a)])
    elif shape == "star":
        tips = [(math.sin(k * math.pi / 5), -math.cos(k * math.pi / 5)) for k in range(10)]
        polygon(
            [
                (px * (1.0 if k % 2 == 0 else 0.42), py * (1.0 if k % 2 == 0 else 0.42))
                for k, (px, py) in enumerate(tips)
            ]
        )
    elif shape == "heart":
        angles = [k * math.tau / 60 for k in range(60)]
        polygon(
            [
                (
                    16 * math.sin(t) ** 3 / 17,
                    -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t) + 2) / 17,
                )
                for t in angles
            ]
        )
    else:
        raise ValueError(f"unknown shape {shape!r}; known: {', '.join(SHAPES)}")


# --- what can be said about a scene ---------------------------------------------------------------


def _count(n: int) -> str:
    return f"{NUMBERS[n]} object" if n == 1 else f"{NUMBERS[n]} objects"


def describe(scene: Scene) -> Exchange:
    """Every object with size, colour, shape and place."""
    sentences = [f"A {item.full_name} is {item.where}." for item in scene.objects]
    return Exchange("Describe the image.", " ".join(sentences))


def describe_in_detail(scene: Scene) -> Exchange:
    """A longer description, with the count and the background."""
    verb = "is" if len(scene.objects) == 1 else "are"
    sentences = [f"There {verb} {_count(len(scene.objects))} on a {scene.background} background."]
    openers = ("First,", "Next,", "Then", "Finally,")
    for opener, item in zip(openers, scene.objects, strict=False):
        sentences.append(
            f"{opener} {item.where} of the picture, we see a {item.color} {item.shape}. It is {item.size}."
        )
    return Exchange("Describe the image in detail.", " ".join(sentences))


def list_objects(scene: Scene) -> Exchange:
    """The names alone."""
    return Exchange("List the objects.", ", ".join(f"a {item.name}" for item in scene.objects) + ".")


def questions(scene: Scene, rng: np.random.Generator) -> list[Exchange]:
    """Every kind of question that has one true answer in this scene, in random order."""
    objects = scene.objects
    item = objects[int(rng.integers(len(objects)))]
    n = len(objects)
    asked = [
        Exchange("How many objects are there?", f"There {'is' if n == 1 else 'are'} {_count(n)}."),
        Exchange("What color is the background?", f"The background is {scene.background}."),
        Exchange(f"Where is the {item.name}?", f"The {item.name} is {item.where}."),
        Exchange(f"How big is the {item.name}?", f"The {item.name} is {item.size}."),
        Exchange(f"Is there a {item.name}?", f"Yes, there is a {item.name} {item.where}."),
    ]
    place = str(rng.choice(list(PLACES)))
    found = next((other for other in objects if other.place == place), None)
    where = f"in the {place}" if place == "center" else f"at the {place}"
    asked.append(Exchange(f"What is {where}?", f"A {found.full_name} is {where}." if found else f"Nothing is {where}."))
    absent = f"{rng.choice(list(COLORS))} {rng.choice(SHAPES)}"
    if all(other.name != absent for other in objects):
        asked.append(Exchange(f"Is there a {absent}?", f"No, there is no {absent}."))
    if sum(other.shape == item.shape for other in objects) == 1:
        asked.append(Exchange(f"What color is the {item.shape}?", f"The {item.shape} is {item.color}."))
    if sum(other.color == item.color for other in objects) == 1:
        asked.append(Exchange(f"What shape is the {item.color} object?", f"The {item.color} object is a {item.shape}."))
    return [asked[k] for k in rng.permutation(len(asked))]


def exchanges(scene: Scene, rng: np.random.Generator) -> list[Exchange]:
    """All that can be said: the three descriptions, then the questions."""
    return [describe(scene), describe_in_detail(scene), list_objects(scene), *questions(scene, rng)]


CONTENT_WORDS: dict[str, frozenset[str]] = {
    "color": frozenset(COLORS) | frozenset(BACKGROUNDS),
    "shape": frozenset(SHAPES),
    "size": frozenset(SIZES),
    "place": frozenset(word for place in PLACES for word in place.split()),
}
