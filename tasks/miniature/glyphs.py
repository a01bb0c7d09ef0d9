"""Shapes of the miniature web: pen strokes and printed glyphs as coverage masks, 32 x 32, values in [0, 1].

Handwriting is drawn from single-stroke skeletons (several variants a digit, as people write them), bent by
random control points, lean, aspect and wobble, and inked by a round pen: coverage is a soft threshold on the
distance to the nearest stroke. Print comes from font files through a signed distance field, so that a weight
can be made heavier or lighter than its file. Every random choice is drawn from the Generator that is passed.
"""

import functools
import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from scipy.ndimage import distance_transform_edt, map_coordinates

Array = NDArray[np.float32]
Rng = np.random.Generator

SIZE = 32
PEN = {"thin": (1.2, 1.8), "regular": (2.3, 3.0), "bold": (3.7, 4.7)}
"""Pen width in pixels of a 32 px image; the ranges do not touch, so a weight can be read."""

# Strokes are split by "/", points are x,y in percent of the box (y down); "!" ends a smooth run: a corner.
SKELETONS: dict[str, tuple[str, ...]] = {
    "0": (
        "50,0 24,16 14,50 24,84 50,100 76,84 86,50 76,16 50,0",
        "56,3 30,8 16,40 22,80 46,100 72,88 84,55 76,18 48,2",
        "62,0 34,18 22,56 32,92 52,98 72,76 80,38 68,8 58,2",
        "40,4 18,28 14,62 34,96 64,96 86,66 82,26 56,2 36,8",
    ),
    "1": (
        "50,0 50,100",
        "52,0 48,50 50,100",
        "32,20 54,0! 54,100",
        "50,0 50,50 49,100",
        "34,22 53,0! 53,100 / 30,100 76,100",
    ),
    "2": (
        "12,24 26,5 52,0 78,12 80,34 60,62 12,100! 90,98",
        "14,22 32,4 60,2 80,18 75,42 52,72 24,98 10,92 18,78 38,82 62,98 92,92",
        "16,16 44,0 76,8 82,32 62,60 34,84 14,97! 52,92 90,100",
        "12,30 20,8 48,0 74,14 70,42 44,74 18,96 8,90 20,82 50,96 88,94",
    ),
    "3": (
        "15,12 40,0 72,8 78,28 60,44 36,48! 66,52 84,72 70,94 40,100 10,88",
        "16,3 80,3! 44,40! 72,48 84,70 68,94 38,100 10,88",
        "20,8 52,0 76,16 66,38 42,47! 74,56 78,84 48,100 14,94",
        "14,18 34,2 64,4 74,24 58,42 40,46 62,48 82,66 76,90 46,100 16,92",
    ),
    "4": (
        "22,0 16,50! 86,48 / 72,6 66,100",
        "66,100 68,0! 10,66! 92,64",
        "26,2 16,38 28,54 52,52 78,44 / 80,2 74,50 70,100",
        "18,4 20,44 38,56 76,48! 80,4! 76,100",
        "60,0 12,62! 88,58 / 64,30 62,100",
    ),
    "5": (
        "80,2 28,2! 22,42! 50,36 80,52 78,80 50,100 12,92",
        "30,2 22,42! 52,38 82,58 74,88 44,100 10,90 / 30,2 88,0",
        "82,4 52,2 28,12 26,32 52,46 78,62 74,88 44,100 12,92",
        "86,4 34,6! 26,44 58,44 78,64 66,92 36,100 12,88",
    ),
    "6": (
        "72,0 38,22 16,58 22,90 50,100 78,86 76,62 52,52 28,66 20,82",
        "60,0 32,30 18,68 32,97 62,98 78,76 62,58 36,64 22,80",
        "80,8 50,4 24,30 14,66 30,98 64,98 84,76 66,54 36,58 18,76",
        "48,0 26,34 18,72 38,100 70,92 76,66 52,56 26,74",
    ),
    "7": (
        "10,4 88,4! 60,45 40,100",
        "10,4 86,4! 58,48 42,100 / 30,52 78,50",
        "12,20 14,4! 85,6! 52,50 38,100",
        "8,12 30,2 60,8 90,2! 56,55 44,100",
        "14,8 50,4 84,8 82,24 60,60 46,100",
    ),
    "8": (
        "72,12 46,0 24,14 30,34 58,50 80,72 70,95 42,100 18,84 28,60 60,42 78,22 66,5",
        "50,48 24,30 28,6 50,0 74,8 76,30 50,48 20,72 24,94 50,100 76,92 80,70 50,48",
        "80,8 50,2 28,18 40,40 66,58 70,84 44,100 24,84 38,58 66,38 82,10",
        "56,46 32,30 36,6 62,2 74,22 56,46 26,68 24,92 50,100 72,86 70,62 54,46",
    ),
    "9": (
        "80,18 55,2 24,12 16,34 34,52 62,46 80,20! 78,60 68,100",
        "78,14 50,0 22,16 20,42 48,52 76,30 80,6! 80,100",
        "80,20 52,0 22,14 20,40 48,52 78,26! 82,60 70,92 42,100 18,90",
        "70,10 38,4 20,28 36,50 66,40 76,8! 64,56 50,100",
    ),
    "A": ("8,100 50,0! 92,100 / 24,62 78,62", "10,100 46,2 54,2 90,100 / 26,60 76,60"),
    "B": ("20,0 20,100 / 20,2 62,4 74,24 58,44 20,48! 70,54 82,76 64,98 20,100",),
    "C": ("86,18 56,0 22,18 12,50 22,84 56,100 88,84",),
    "D": ("18,0 18,100 / 18,2 58,6 86,34 86,68 58,96 18,100",),
    "E": ("82,2 20,2! 20,100! 84,100 / 20,50 70,48",),
    "F": ("84,2 20,2! 20,100 / 20,48 70,46",),
    "G": ("86,18 54,0 20,20 12,52 26,88 60,100 86,82! 86,54! 56,54",),
    "H": ("16,0 16,100 / 84,0 84,100 / 16,50 84,48",),
    "I": ("50,0 50,100 / 22,0 78,0 / 22,100 78,100",),
    "J": ("36,2 84,2 / 64,2 64,70 52,96 26,98 12,76",),
    "K": ("18,0 18,100 / 84,0 20,56! 86,100",),
    "L": ("20,0 20,100! 86,98",),
    "M": ("8,100 16,0! 50,66! 84,0! 92,100",),
    "N": ("14,100 14,0! 86,100! 86,0",),
    "O": ("50,0 14,12 -2,50 14,88 50,100 86,88 102,50 86,12 50,0",),
    "P": ("20,0 20,100 / 20,2 66,4 82,28 62,52 20,54",),
    "Q": ("50,0 12,14 -2,50 14,86 50,100 88,86 102,50 86,12 50,0 / 60,66 100,106",),
    "R": ("20,0 20,100 / 20,2 66,4 80,26 60,48 20,52! 86,100",),
    "S": ("84,14 54,0 20,12 24,38 54,50 84,66 76,92 44,100 10,86",),
    "T": ("6,2 94,2 / 50,2 50,100",),
    "U": ("14,0 14,66 34,98 64,98 86,66 86,0",),
    "V": ("8,0 50,100! 92,0",),
    "W": ("2,0 26,100! 50,30! 74,100! 98,0",),
    "X": ("12,0 88,100 / 88,0 12,100",),
    "Y": ("10,0 50,48! 90,0 / 50,48 50,100",),
    "Z": ("12,2 88,2! 12,98! 90,98 / 30,50 70,50", "14,4 86,4! 14,96! 88,96 / 30,50 72,50"),
}

PIPS: dict[int, tuple[tuple[float, float], ...]] = {
    0: (),
    1: ((0.5, 0.5),),
    2: ((0.24, 0.24), (0.76, 0.76)),
    3: ((0.22, 0.22), (0.5, 0.5), (0.78, 0.78)),
    4: ((0.25, 0.25), (0.75, 0.25), (0.25, 0.75), (0.75, 0.75)),
    5: ((0.23, 0.23), (0.77, 0.23), (0.5, 0.5), (0.23, 0.77), (0.77, 0.77)),
    6: tuple((x, y) for x in (0.25, 0.75) for y in (0.2, 0.5, 0.8)),
    7: (*((x, y) for x in (0.22, 0.78) for y in (0.2, 0.5, 0.8)), (0.5, 0.5)),
    8: tuple((x, y) for x in (0.2, 0.5, 0.8) for y in (0.2, 0.5, 0.8) if (x, y) != (0.5, 0.5)),
    9: tuple((x, y) for x in (0.2, 0.5, 0.8) for y in (0.2, 0.5, 0.8)),
}


@dataclass(frozen=True)
class Strokes:
    """Capsules: starts and ends [n, 2] in any unit, and each one's width as a factor of the pen's."""

    a: Array
    b: Array
    factor: Array

    @classmethod
    def join(cls, parts: "list[Strokes]") -> "Strokes":
        """All capsules of all parts."""
        return cls(*(np.concatenate([getattr(p, f) for p in parts]) for f in ("a", "b", "factor")))

    def moved(self, matrix: Array, shift: Array) -> "Strokes":
        """Points under p -> matrix p + shift."""
        return Strokes(self.a @ matrix.T + shift, self.b @ matrix.T + shift, self.factor)


def polyline(points: Array, factor: float = 1.0) -> Strokes:
    """One capsule for each step of points [n, 2]."""
    ends = points if len(points) > 1 else np.repeat(points, 2, 0)
    return Strokes(ends[:-1], ends[1:], np.full(len(ends) - 1, factor, np.float32))


def smooth(points: Array, per_step: int = 5) -> Array:
    """Catmull-Rom curve through points [n, 2]; two points stay a line."""
    if len(points) < 3:
        return points
    p = np.concatenate([2 * points[:1] - points[1:2], points, 2 * points[-1:] - points[-2:-1]])
    t = np.linspace(0, 1, per_step, endpoint=False, dtype=np.float32)[None, :, None]
    p0, p1, p2, p3 = (p[i : len(p) - 3 + i, None] for i in range(4))
    curve = p1 + 0.5 * t * (p2 - p0 + t * (2 * p0 - 5 * p1 + 4 * p2 - p3 + t * (3 * (p1 - p2) + p3 - p0)))
    return np.concatenate([curve.reshape(-1, 2), points[-1:]]).astype(np.float32)


def _runs(skeleton: str) -> list[list[Array]]:
    """Strokes of a skeleton, each as its smooth runs between corners, in unit coordinates."""
    strokes = []
    for stroke in skeleton.split("/"):
        points = [(p.rstrip("!"), p.endswith("!")) for p in stroke.split()]
        runs: list[list[list[float]]] = [[]]
        for text, corner in points:
            xy = [float(v) / 100 for v in text.split(",")]
            runs[-1].append(xy)
            if corner:
                runs.append([xy])
        strokes.append([np.array(run, np.float32) for run in runs if len(run) > 1])
    return strokes


def pen(skeleton: str, rng: Rng, jitter: float = 0.03) -> Strokes:
    """One hand's version of a skeleton, in unit coordinates: bent points, wobble, uneven pressure."""
    parts = []
    for runs in _runs(skeleton):
        corner = rng.normal(0, jitter, 2)
        for run in runs:
            bend = rng.normal(0, jitter, run.shape)
            bend[0] = corner
            corner = bend[-1]
            parts.append(polyline(smooth((run + bend).astype(np.float32)), float(rng.uniform(0.9, 1.1))))
    drawn = Strokes.join(parts)
    amplitude, frequency, phase = rng.uniform(0, 0.02, 2), rng.uniform(0.5, 2, 2), rng.uniform(0, 6.28, 2)

    def wobble(p: Array) -> Array:
        return (p + amplitude * np.sin(frequency * 6.28 * p[:, ::-1] + phase)).astype(np.float32)

    return Strokes(wobble(drawn.a), wobble(drawn.b), drawn.factor)


def ink(strokes: Strokes, width: float, edge: float) -> Array:
    """Coverage of a round pen of ``width`` px with an ``edge`` px soft rim: [32, 32] in [0, 1]."""
    grid = (np.indices((SIZE, SIZE), dtype=np.float32)[::-1].reshape(2, -1).T + 0.5)[None]
    along = (strokes.b - strokes.a)[:, None]
    length = np.maximum((along**2).sum(-1), 1e-6)
    t = np.clip((((grid - strokes.a[:, None]) * along).sum(-1)) / length, 0, 1)
    nearest = strokes.a[:, None] + t[..., None] * along - grid
    depth = width * strokes.factor[:, None] / 2 - np.sqrt((nearest**2).sum(-1))
    return np.clip(depth.max(0) / edge + 0.5, 0, 1).reshape(SIZE, SIZE).astype(np.float32)


def lean(rng: Rng, degrees: float, sheared: float) -> Array:
    """Matrix [2, 2] that leans a shape clockwise by ``degrees``, a share of it as shear (y points down)."""
    shear = np.array([[1, -np.tan(np.radians(degrees * sheared))], [0, 1]], np.float32)
    turn = np.radians(degrees * (1 - sheared))
    return np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]], np.float32) @ shear


def degrees_of(pose: str, rng: Rng, spread: tuple[float, float] = (20, 34)) -> float:
    """Clockwise angle of a pose: within 6 degrees of upright, or clearly tilted."""
    if pose == "upright":
        return float(rng.uniform(-6, 6))
    return float(rng.uniform(*spread)) * (1 if pose == "tilted right" else -1)


def _place(strokes: Strokes, matrix: Array, height: float, limit: float, rng: Rng) -> Strokes:
    """Lean, scale to ``height`` px (at most ``limit`` wide or high once leaned), centre with jitter."""
    points = np.concatenate([strokes.a, strokes.b])
    centre = (points.min(0) + points.max(0)) / 2
    tall = max(float(np.ptp(points[:, 1])), 0.3)
    extent = float(np.ptp((points - centre) @ matrix.T, axis=0).max()) * height / tall
    scaled = matrix * (height / tall) * min(1.0, limit / max(extent, 1e-3))
    moved = strokes.moved(scaled, -scaled @ centre)
    ends = np.concatenate([moved.a, moved.b])
    middle = (ends.min(0) + ends.max(0)) / 2
    return moved.moved(np.eye(2, dtype=np.float32), SIZE / 2 - middle + rng.normal(0, 0.8, 2).clip(-2, 2))


def handwritten(text: str, weight: str, pose: str, rng: Rng) -> Array:
    """Capital letters or digits written by hand. Coverage [32, 32]."""
    parts, x = [], 0.0
    for letter in text:
        variants = SKELETONS[letter]
        drawn = pen(variants[rng.integers(len(variants))], rng, 0.03 if len(text) == 1 else 0.01)
        aspect = rng.uniform(*((0.9, 1.1) if letter == "O" else (0.55, 1.05))) if len(text) == 1 else 0.6
        parts.append(drawn.moved(np.diag([aspect, 1.0]).astype(np.float32), np.array([x, 0.0], np.float32)))
        x += aspect * 1.05 + 0.08
    matrix = lean(rng, degrees_of(pose, rng, (19, 36)), rng.uniform(0.3, 1.0) if len(text) == 1 else 0.0)
    width = rng.uniform(*PEN[weight]) * (1.0 if len(text) == 1 else 0.42)
    height = rng.uniform(17, 22)
    placed = _place(Strokes.join(parts), matrix, height, 27.0 - width, rng)
    return ink(placed, width, rng.uniform(0.9, 1.6))


def roman(text: str, weight: str, pose: str, rng: Rng) -> Array:
    """A Roman numeral by hand, between the two bars that set it apart from letters. Coverage [32, 32]."""
    parts, x = [], 0.0
    for letter in text:
        skeleton = "50,0 50,100" if letter == "I" else SKELETONS[letter][0]
        wide = 0.24 if letter == "I" else 0.62
        parts.append(
            pen(skeleton, rng, 0.015).moved(
                np.diag([wide, 1.0]).astype(np.float32), np.array([x, 0], np.float32)
            )
        )
        x += wide
    for y in (0.0, 1.0):
        bar = np.array([[-0.14, y], [x + 0.14, y]], np.float32) + rng.normal(0, 0.015, (2, 2)).astype(
            np.float32
        )
        parts.append(polyline(bar))
    width = rng.uniform(*PEN[weight]) * 0.7
    placed = _place(
        Strokes.join(parts), lean(rng, degrees_of(pose, rng), 0.0), rng.uniform(15, 19), 27 - width, rng
    )
    return ink(placed, width, rng.uniform(0.8, 1.2))


def die(number: int, weight: str, pose: str, rng: Rng, shaky: bool) -> Array:
    """A die's or domino's face: an outline and its pips, by ruler or by a shaky hand. Coverage [32, 32]."""
    frame = "10,0 90,0 100,10 100,90 90,100 10,100 0,90 0,10 10,0"
    jitter = 0.05 if shaky else 0.0
    outline = pen(frame.replace(" ", "! "), rng, jitter) if shaky else polyline(_runs(frame)[0][0])
    dots = [
        polyline(np.array([[x, y]], np.float32) + rng.normal(0, jitter, (1, 2)).astype(np.float32), dot)
        for x, y in PIPS[number]
        for dot in [{"thin": 2.3, "regular": 1.75, "bold": 1.45}[weight]]
    ]
    width = rng.uniform(*PEN[weight]) * 0.72
    matrix = lean(rng, degrees_of(pose, rng, (19, 28)), 0.0)
    placed = _place(Strokes.join([outline, *dots]), matrix, rng.uniform(20, 23), 29 - width, rng)
    return ink(placed, width, rng.uniform(0.8, 1.2))


def tally(number: int, weight: str, pose: str, rng: Rng, shaky: bool) -> Array:
    """Tally marks in groups of five, counted from the left of a ruled line. Coverage [32, 32]."""
    jitter, parts, x = (0.035 if shaky else 0.0), [], 0.1
    for group in range((number + 4) // 5):
        inside = min(5, number - 5 * group)
        for i in range(min(inside, 4)):
            line = np.array([[x + 0.14 * i, 0.08], [x + 0.14 * i, 0.8]], np.float32)
            parts.append(polyline(line + rng.normal(0, jitter, (2, 2)).astype(np.float32)))
        if inside == 5:
            slash = np.array([[x - 0.06, 0.68], [x + 0.48, 0.2]], np.float32)
            parts.append(polyline(slash + rng.normal(0, jitter, (2, 2)).astype(np.float32)))
        x += 0.62
    rule = np.array([[0.0, 1.0], [1.28, 1.0]], np.float32) + rng.normal(0, jitter, (2, 2)).astype(np.float32)
    width = rng.uniform(*PEN[weight]) * 0.55
    placed = _place(
        Strokes.join([*parts, polyline(rule)]),
        lean(rng, degrees_of(pose, rng, (19, 30)), 0.0),
        19.0,
        28 - width,
        rng,
    )
    return ink(placed, width, rng.uniform(0.7, 1.1))


# ----------------------------------------------------------------------------------------- print

FONTS: dict[str, dict[str, tuple[str, ...]]] = {
    "sans-serif": {
        "thin": ("Roboto-Light", "Lato-Light", "SourceSansPro-Light", "OpenSans-Light", "HankenGrotesk-Light"),
        "regular": ("Roboto-Regular", "Lato-Regular", "SourceSansPro-Regular", "OpenSans-Regular", "DejaVuSans",
                    "Manrope-Medium"),
        "bold": ("Roboto-Black", "Lato-Black", "SourceSansPro-Black", "OpenSans-ExtraBold", "DejaVuSans-Bold",
                 "Manrope-ExtraBold", "HankenGrotesk-Bold"),
    },
    "serif": {
        "thin": ("SourceSerifPro-Light", "SourceSerifPro-ExtraLight", "cmr10", "STIXGeneral"),
        "regular": ("SourceSerifPro-Regular", "DejaVuSerif", "Caladea-Regular", "SourceSerifPro-Semibold"),
        "bold": ("SourceSerifPro-Black", "DejaVuSerif-Bold", "Caladea-Bold", "STIXGeneralBol"),
    },
}  # fmt: skip
HELD_OUT = frozenset(
    {"OpenSans-Light", "OpenSans-Regular", "OpenSans-ExtraBold", "Caladea-Regular", "Caladea-Bold"}
)
"""Fonts that only the judge's corpus draws with, beside the others."""

GROWTH = {"thin": -0.008, "regular": 0.0, "bold": 0.012}
"""Growth of the outline in em by weight: families differ in what they call light, a weight is to be seen."""
SPREAD = {"SourceSerifPro-ExtraLight": 0.008, "cmr10": -0.004, "STIXGeneral": -0.006}
"""Further growth where a file's weight differs from its row's."""

PACKAGES = (
    "matplotlib", "font_caladea", "font_hanken_grotesk", "font_lato", "font_manrope", "font_roboto",
    "font_source_sans_pro", "font_source_serif_pro", "ttf_opensans",
)  # fmt: skip


@functools.cache
def font_files() -> dict[str, Path]:
    """Font files by stem, from the installed font packages.

    Raises:
        ValueError: a font package is missing; names it and the extra that installs it.
    """
    files: dict[str, Path] = {}
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise ValueError(f"font package {package!r} is not installed; run: pip install '.[pretrain]'")
        root = Path(spec.submodule_search_locations[0])
        found = sorted(p for p in root.rglob("*") if re.fullmatch(r"\.(ttf|otf)", p.suffix))
        files |= {p.stem: p for p in found if p.stem not in files}
    return files


@functools.lru_cache(maxsize=4096)
def _field(font: str, text: str, weight: str) -> Array:
    """Signed distance field of a text, positive inside, in pixels of a 96 px em; cropped with a margin."""
    face = ImageFont.truetype(str(font_files()[font]), 96)
    left, top, right, bottom = face.getbbox(text)
    canvas = Image.new("L", (int(right - left) + 24, int(bottom - top) + 24), 0)
    ImageDraw.Draw(canvas).text((12 - left, 12 - top), text, fill=255, font=face)
    inside = np.asarray(canvas) > 127
    grow = GROWTH[weight] + SPREAD.get(font, 0.0)
    return (distance_transform_edt(inside) - distance_transform_edt(~inside) + 96 * grow).astype(np.float32)


def fonts_of(style: str, weight: str, held_out: bool) -> tuple[str, ...]:
    """Fonts to choose from: the held-out ones only where ``held_out`` is asked for."""
    return tuple(f for f in FONTS[style][weight] if held_out or f not in HELD_OUT)


def printed(
    text: str, style: str, weight: str, pose: str, rng: Rng, bars: bool = False, held_out: bool = False
) -> Array:
    """A text set in a font of the style and weight, ``bars`` above and below it if asked. Coverage [32, 32]."""
    fonts = fonts_of(style, weight, held_out)
    field = _field(fonts[rng.integers(len(fonts))], text, weight)
    if bars:
        field = _with_bars(field, {"thin": 3.0, "regular": 5.0, "bold": 8.0}[weight])
    tall, wide = field.shape[0] - 24, field.shape[1] - 24
    matrix = lean(rng, degrees_of(pose, rng), 0.0)
    box = np.abs(matrix) @ np.array([wide, tall])
    scale = min(rng.uniform(17, 23) / tall, 28.0 / box.max())
    inverse = np.linalg.inv(matrix @ np.diag([rng.uniform(0.9, 1.1), 1.0]) * scale)
    grid = np.indices((SIZE * 2, SIZE * 2))[::-1].reshape(2, -1) / 2 + 0.25
    shift = SIZE / 2 + rng.normal(0, 0.8, 2).clip(-2, 2)
    x, y = inverse @ (grid - shift[:, None]) + np.array([field.shape[1], field.shape[0]])[:, None] / 2
    depth = map_coordinates(field, [y, x], order=1, mode="constant", cval=-99.0) * scale
    fine = np.clip(depth / 0.5 + 0.5, 0, 1).reshape(SIZE, 2, SIZE, 2)
    return fine.mean((1, 3)).astype(np.float32)


def _with_bars(field: Array, thick: float) -> Array:
    padded = np.pad(field, ((10, 10), (4, 4)), constant_values=-30.0)
    rows = np.arange(len(padded), dtype=np.float32)[:, None]
    cols = np.arange(padded.shape[1], dtype=np.float32)[None]
    across = np.minimum(cols - 6, padded.shape[1] - 6 - cols)
    for at in (20.0, len(padded) - 20.0):
        padded = np.maximum(padded, np.minimum(thick - np.abs(rows - at), across))
    return padded
