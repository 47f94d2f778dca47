"""Concepts and styles of the coloured text-to-image pipeline, and variations of their drawings."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

PIXELS = 64
# Icons are rendered larger than pictures, so that turning and shrinking them in one step stays sharp.
RENDERED_PIXELS = 80


@dataclass(frozen=True)
class Style:
    """One set of icons, all drawn in one style.

    Attributes:
        name: The word for it in captions.
        package: Name of the set, and of its package after `@iconify-json/`.
        title: What its makers call it.
        authors: Who drew it.
        licence: Identifier of its licence.
        source: Where it comes from.
    """

    name: str
    package: str
    title: str
    authors: str
    licence: str
    source: str


STYLES = [
    Style("noto", "noto", "Noto Emoji", "Google Inc", "Apache-2.0", "https://github.com/googlefonts/noto-emoji"),
    Style("blob", "noto-v1", "Noto Emoji, version 1", "Google Inc", "Apache-2.0",
          "https://github.com/googlefonts/noto-emoji"),
    Style("fluent", "fluent-emoji", "Fluent Emoji", "Microsoft Corporation", "MIT",
          "https://github.com/microsoft/fluentui-emoji"),
]  # fmt: skip


@dataclass(frozen=True)
class Concept:
    """What captions call one drawing of each set.

    Attributes:
        name: As people type it.
        icon: Its name in the sets.
        code: Its Unicode code point, by which other languages' names are found.
        kinds: Superclasses.
        synonyms: Other names.
    """

    name: str
    icon: str
    code: str
    kinds: tuple[str, ...]
    synonyms: tuple[str, ...]


_ANIMAL, _FOOD, _FRUIT, _VEHICLE, _FACE, _HEART = (
    ("animal",), ("food",), ("fruit", "food"), ("vehicle",), ("face", "smiley"), ("heart",),
)  # fmt: skip

CONCEPTS = [
    Concept("cat face", "cat-face", "1F431", _ANIMAL, ("cat", "kitty")),
    Concept("grinning cat", "grinning-cat-with-smiling-eyes", "1F638", _ANIMAL, ("laughing cat", "happy cat")),
    Concept("tiger", "tiger-face", "1F42F", _ANIMAL, ("tiger face", "bengal tiger")),
    Concept("lion", "lion", "1F981", _ANIMAL, ("lion face", "big cat with a mane")),
    Concept("dog", "dog-face", "1F436", _ANIMAL, ("dog face", "puppy")),
    Concept("wolf", "wolf", "1F43A", _ANIMAL, ("wolf face", "grey wolf")),
    Concept("fox", "fox", "1F98A", _ANIMAL, ("fox face", "red fox")),
    Concept("panda", "panda", "1F43C", _ANIMAL, ("panda face", "panda bear")),
    Concept("bear", "bear", "1F43B", _ANIMAL, ("bear face", "brown bear")),
    Concept("rabbit", "rabbit-face", "1F430", _ANIMAL, ("rabbit face", "bunny")),
    Concept("pig", "pig-face", "1F437", _ANIMAL, ("pig face", "piglet")),
    Concept("frog", "frog", "1F438", _ANIMAL, ("frog face", "toad")),
    Concept("penguin", "penguin", "1F427", _ANIMAL, ("baby penguin", "antarctic bird")),
    Concept("red apple", "red-apple", "1F34E", _FRUIT, ("apple", "ripe apple")),
    Concept("green apple", "green-apple", "1F34F", _FRUIT, ("granny smith", "sour apple")),
    Concept("banana", "banana", "1F34C", _FRUIT, ("peeled banana", "plantain")),
    Concept("strawberry", "strawberry", "1F353", _FRUIT, ("ripe strawberry", "red berry")),
    Concept("watermelon", "watermelon", "1F349", _FRUIT, ("slice of watermelon", "slice of melon")),
    Concept("pizza", "pizza", "1F355", _FOOD, ("slice of pizza", "pizza slice")),
    Concept("hamburger", "hamburger", "1F354", _FOOD, ("burger", "cheeseburger")),
    Concept("doughnut", "doughnut", "1F369", _FOOD, ("donut", "glazed ring")),
    Concept("car", "automobile", "1F697", _VEHICLE, ("automobile", "motor car")),
    Concept("taxi", "taxi", "1F695", _VEHICLE, ("cab", "taxicab")),
    Concept("bus", "bus", "1F68C", _VEHICLE, ("coach", "omnibus")),
    Concept("fire engine", "fire-engine", "1F692", _VEHICLE, ("fire truck", "fire brigade truck")),
    Concept("bicycle", "bicycle", "1F6B2", _VEHICLE, ("bike", "push bike")),
    Concept("rocket", "rocket", "1F680", _VEHICLE, ("space rocket", "spaceship")),
    Concept("airplane", "airplane", "2708", _VEHICLE, ("plane", "jet")),
    Concept("sailboat", "sailboat", "26F5", _VEHICLE, ("sailing boat", "yacht")),
    Concept("grinning face", "grinning-face", "1F600", _FACE, ("happy face", "grin")),
    Concept("crying face", "crying-face", "1F622", _FACE, ("sad face", "tearful face")),
    Concept("love face", "smiling-face-with-heart-eyes", "1F60D", _FACE, ("heart eyes", "face in love")),
    Concept("cool face", "smiling-face-with-sunglasses", "1F60E", _FACE, ("sunglasses face", "face with sunglasses")),
    Concept("angry face", "angry-face", "1F620", _FACE, ("mad face", "cross face")),
    Concept("red heart", "red-heart", "2764", _HEART, ("love heart", "heart in red")),
    Concept("blue heart", "blue-heart", "1F499", _HEART, ("heart in blue", "heart of blue colour")),
    Concept("green heart", "green-heart", "1F49A", _HEART, ("heart in green", "heart of green colour")),
    Concept("yellow heart", "yellow-heart", "1F49B", _HEART, ("heart in yellow", "heart of yellow colour")),
    Concept("purple heart", "purple-heart", "1F49C", _HEART, ("heart in purple", "violet heart")),
    Concept("black heart", "black-heart", "1F5A4", _HEART, ("heart in black", "dark heart")),
]  # fmt: skip


def variations(icons: torch.Tensor, generator: torch.Generator, pixels: int = PIXELS) -> torch.Tensor:
    """Pictures of icons: each turned, moved, scaled, perhaps mirrored, on a pastel background, all at random.

    Args:
        icons: `[n, 4, h, h]`, red, green, blue, each multiplied by alpha, and alpha, in [0, 1].
        generator: Of all draws: the same state gives the same pictures.
        pixels: Size of the pictures.

    Returns:
        `[n, 3, pixels, pixels]` in [-1, 1].
    """
    count = len(icons)
    angle, shift_x, shift_y, size, mirror = torch.rand(5, count, generator=generator)
    angle = (angle - 0.5) * 2 * math.radians(12)
    size = 0.76 + 0.2 * size
    mirror = torch.where(mirror < 0.5, -1.0, 1.0)
    # What `affine_grid` wants leads from places in the picture to places in the icon.
    cosine, sine = angle.cos() / size, angle.sin() / size
    room = 2 * (1 - size) * 0.7 + 0.04
    matrices = torch.stack(
        [
            torch.stack([mirror * cosine, mirror * sine, (shift_x - 0.5) * room / size], -1),
            torch.stack([-sine, cosine, (shift_y - 0.5) * room / size], -1),
        ],
        1,
    )
    grid = F.affine_grid(matrices, (count, 4, pixels, pixels), align_corners=False)
    drawn = F.grid_sample(icons, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    paper = backgrounds(count, generator)[:, :, None, None]
    return (drawn[:, :3] + (1 - drawn[:, 3:]) * paper).clamp(0, 1) * 2 - 1


def backgrounds(count: int, generator: torch.Generator) -> torch.Tensor:
    """Pastel colours `[count, 3]` in [0, 1]."""
    hue, saturation, value = torch.rand(3, count, generator=generator)
    saturation, value = 0.06 + 0.24 * saturation, 0.86 + 0.14 * value
    places = (torch.tensor([5.0, 3.0, 1.0]) + 6 * hue[:, None]) % 6
    strength = torch.minimum(places, 4 - places).clamp(0, 1)
    return value[:, None] * (1 - saturation[:, None] * strength)
