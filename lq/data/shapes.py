"""Renders the images of :class:`lq.data.Shapes10`: signed distance fields on clutter, in numpy, a chunk at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

# float32 throughout; numpy's stubs do not know that a Python float in an expression leaves it so.
Array = NDArray[np.floating[Any]]

SIZE = 32
# Images are drawn in chunks, each from a random stream of its own, so a shorter data set is a prefix of a longer one.
CHUNK = 100


def _polygon(u: Array, v: Array, sides: int, apothem: float) -> Array:
    """Distance to a regular polygon: fold the plane into one sector, where the border is a straight line."""
    sector = 2 * np.pi / sides
    angle = np.mod(np.arctan2(v, u) + sector / 2, sector) - sector / 2
    distance: Array = np.hypot(u, v) * np.cos(angle) - apothem
    return distance


def _disc(u: Array, v: Array) -> Array:
    distance: Array = np.hypot(u, v) - 0.85
    return distance


def _ring(u: Array, v: Array) -> Array:
    distance: Array = np.abs(np.hypot(u, v) - 0.68) - 0.22
    return distance


def _triangle(u: Array, v: Array) -> Array:
    return _polygon(u, v, sides=3, apothem=0.5)


def _square(u: Array, v: Array) -> Array:
    return _polygon(u, v, sides=4, apothem=0.7)


def _diamond(u: Array, v: Array) -> Array:
    # |u|/a + |v|/b = 1, divided by the gradient's length to make it a distance.
    return (np.abs(u) / 0.5 + np.abs(v) - 1) * 0.447


def _cross(u: Array, v: Array) -> Array:
    long, short = np.maximum(np.abs(u), np.abs(v)), np.minimum(np.abs(u), np.abs(v))
    return np.maximum(long - 0.95, short - 0.28)


def _star(u: Array, v: Array) -> Array:
    # One half of one of five points: the border runs from the tip (1, 0) to the notch at radius 0.42 and angle 36 deg.
    sector = 2 * np.pi / 5
    angle = np.abs(np.mod(np.arctan2(v, u) + sector / 2, sector) - sector / 2)
    radius = np.hypot(u, v)
    normal = np.array([0.42 * np.sin(np.pi / 5), 1 - 0.42 * np.cos(np.pi / 5)], dtype=np.float32)
    normal /= np.linalg.norm(normal)
    distance: Array = (radius * np.cos(angle) - 1) * normal[0] + radius * np.sin(angle) * normal[1]
    return distance


def _crescent(u: Array, v: Array) -> Array:
    distance: Array = np.maximum(np.hypot(u, v) - 0.92, 0.72 - np.hypot(u - 0.42, v))
    return distance


def _bars(u: Array, v: Array) -> Array:
    # Three parallel bars: the middle one, and the two outer ones folded into one.
    nearest = np.minimum(np.abs(u), np.abs(np.abs(u) - 0.68))
    distance: Array = np.maximum(nearest - 0.18, np.abs(v) - 0.85)
    return distance


def _chevron(u: Array, v: Array) -> Array:
    # A band of slope one to both sides, bent upwards at u = 0 and cut off upright.
    band = np.abs(np.abs(u) + v - 0.3) * 0.707 - 0.28
    distance: Array = np.maximum(band, np.abs(u) - 0.85)
    return distance


# Signed distance (negative inside) to each shape, which about fills the unit circle. Class indices follow this order.
SHAPES: dict[str, Callable[[Array, Array], Array]] = {
    "bars": _bars,
    "chevron": _chevron,
    "crescent": _crescent,
    "cross": _cross,
    "diamond": _diamond,
    "disc": _disc,
    "ring": _ring,
    "square": _square,
    "star": _star,
    "triangle": _triangle,
}


def generate(count: int, seed: int, stream: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Draw ``count`` images, the same ones for the same arguments.

    Args:
        count: number of images.
        seed: the data set's seed.
        stream: number of the split; different streams of one seed share no random numbers.

    Returns:
        Images ``(count, 3, 32, 32)`` and labels ``(count,)``. Every 100 consecutive images hold each class 10 times.
    """
    images = np.empty((count, 3, SIZE, SIZE), dtype=np.uint8)
    labels = np.empty(count, dtype=np.int64)
    for chunk, start in enumerate(range(0, count, CHUNK)):
        stop = min(start + CHUNK, count)
        rng = np.random.default_rng([seed, stream, chunk])
        chunk_labels = rng.permutation(np.arange(CHUNK) % len(SHAPES))
        images[start:stop] = _render(chunk_labels, rng)[: stop - start]
        labels[start:stop] = chunk_labels[: stop - start]
    return images, labels


def _render(labels: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.uint8]:
    """One image ``(3, 32, 32)`` per label: background, distractors, the shape, an occluder, light and noise."""
    n = len(labels)
    backdrop = _uniform(rng, n, 0.15, 0.45, channels=3)
    image: Array = backdrop + _texture(rng, n, 0.0, 0.1)
    for _ in range(3):
        # Scraps of other shapes, smaller than the subject, make local edges and corners ambiguous.
        scraps = rng.integers(len(SHAPES), size=n)
        scrap = backdrop + _uniform(rng, n, 0.0, 0.35, channels=3)
        image = _over(image, scrap, _shape_mask(scraps, rng, scale=(0.1, 0.25), spread=0.95, turn=np.pi))
    # Lighter than the backdrop, at least on average: learning both polarities takes longer than a short training.
    subject = backdrop + _uniform(rng, n, 0.08, 0.52, channels=3) + _texture(rng, n, 0.0, 0.12)
    image = _over(image, subject, _shape_mask(labels, rng, scale=(0.47, 0.8), spread=0.22, turn=0.55))
    occluder = backdrop + _uniform(rng, n, 0.0, 0.35, channels=3)
    image = _over(image, occluder, _band_mask(rng, n))
    noise = rng.standard_normal(image.shape, dtype=np.float32) * _uniform(rng, n, 0.015, 0.07)
    pixels: NDArray[np.uint8] = np.clip(np.rint((image + noise) * 255), 0, 255).astype(np.uint8)
    return pixels


def _uniform(rng: np.random.Generator, n: int, low: float, high: float, channels: int = 1) -> Array:
    """Uniform numbers ``(n, channels, 1, 1)``, to broadcast over images."""
    return (low + (high - low) * rng.random((n, channels, 1, 1), dtype=np.float32)).astype(np.float32)


def _contrast(rng: np.random.Generator, n: int, low: float, high: float) -> Array:
    """Colour offsets ``(n, 3, 1, 1)`` of a random direction, with a root mean square between ``low`` and ``high``."""
    direction = rng.standard_normal((n, 3, 1, 1), dtype=np.float32)
    rms = np.sqrt(np.mean(direction**2, axis=1, keepdims=True))
    offset: Array = direction / rms * _uniform(rng, n, low, high)
    return offset


def _grid() -> tuple[Array, Array]:
    """Pixel centers in [-1, 1]: x ``(1, 1, 1, 32)`` and y ``(1, 1, 32, 1)``."""
    centers = ((np.arange(SIZE, dtype=np.float32) + 0.5) * 2 / SIZE - 1).astype(np.float32)
    return centers.reshape(1, 1, 1, SIZE), centers.reshape(1, 1, SIZE, 1)


def _texture(rng: np.random.Generator, n: int, low: float, high: float) -> Array:
    """A plane wave of random direction, wavelength (4 to 30 pixels), phase and tint: ``(n, 3, 32, 32)``."""
    x, y = _grid()
    angle = _uniform(rng, n, 0.0, np.pi)
    frequency = np.pi * SIZE / _uniform(rng, n, 4.0, 30.0)
    wave = np.sin((x * np.cos(angle) + y * np.sin(angle)) * frequency + _uniform(rng, n, 0.0, 2 * np.pi))
    return wave * _contrast(rng, n, low, high)


def _shape_mask(
    kinds: NDArray[np.int64], rng: np.random.Generator, scale: tuple[float, float], spread: float, turn: float
) -> Array:
    """Coverage in [0, 1], ``(n, 1, 32, 32)``, of one shape per image, turned, scaled and moved at random."""
    n = len(kinds)
    x, y = _grid()
    size, angle = _uniform(rng, n, *scale), _uniform(rng, n, -turn, turn)
    dx, dy = x - _uniform(rng, n, -spread, spread), y - _uniform(rng, n, -spread, spread)
    stretch = _uniform(rng, n, 0.85, 1.18)
    u = (dx * np.cos(angle) + dy * np.sin(angle)) / (size * stretch)
    v = (dy * np.cos(angle) - dx * np.sin(angle)) / (size / stretch)
    distance = np.empty((n, 1, SIZE, SIZE), dtype=np.float32)
    for kind, shape in enumerate(SHAPES.values()):
        chosen = kinds == kind
        distance[chosen] = shape(u[chosen], v[chosen])
    return _coverage(distance * size)


def _band_mask(rng: np.random.Generator, n: int) -> Array:
    """Coverage ``(n, 1, 32, 32)`` of a straight band, at most 6 pixels wide, across half of the images."""
    x, y = _grid()
    angle = _uniform(rng, n, 0.0, np.pi)
    distance = np.abs(x * np.cos(angle) + y * np.sin(angle) - _uniform(rng, n, -0.6, 0.6))
    # A negative half width draws nothing.
    return _coverage(distance - _uniform(rng, n, -0.19, 0.19))


def _coverage(distance: Array) -> Array:
    """Antialiasing: a pixel whose centre lies on the border is covered by half. One pixel is ``2 / SIZE`` units."""
    covered: Array = np.clip(0.5 - distance * (SIZE / 2), 0, 1)
    return covered


def _over(below: Array, above: Array, mask: Array) -> Array:
    return below + (above - below) * mask
