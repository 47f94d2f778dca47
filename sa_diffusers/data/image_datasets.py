"""Labelled image datasets as arrays, from IDX files on disk or from the Hub."""

import gzip
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from .prompts import image_files

DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
HUB_FASHION_MNIST = "zalando-datasets/fashion_mnist"
_IDX_FILES = {"train": "train", "test": "t10k"}


def read_idx(path: str | Path) -> np.ndarray:
    """Read one IDX file (the MNIST format), gzipped or not.

    Args:
        path: File whose magic number declares unsigned bytes.

    Returns:
        `uint8` array in the shape that the header declares.

    Raises:
        ValueError: The file is not an IDX file of unsigned bytes, or is cut short.
    """
    path = Path(path)
    with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
        raw = file.read()
    if len(raw) < 4 or raw[:3] != b"\x00\x00\x08":
        raise ValueError(f"{path} is not an IDX file of unsigned bytes (the format of MNIST and Fashion-MNIST)")
    rank = raw[3]
    shape = struct.unpack(f">{rank}I", raw[4 : 4 + 4 * rank])
    values = np.frombuffer(raw, dtype=np.uint8, offset=4 + 4 * rank)
    if values.size != int(np.prod(shape)):
        raise ValueError(f"{path} declares shape {shape} but holds {values.size} values: the file is cut short")
    return values.reshape(shape)


@dataclass
class LabelledImages:
    """Images of named classes.

    Attributes:
        pixels: `uint8` `[n, channels, height, width]`.
        labels: `int64` `[n]`, indices of `names`.
        names: Names of the classes.
    """

    pixels: torch.Tensor
    labels: torch.Tensor
    names: list[str]

    def __len__(self) -> int:
        return len(self.pixels)

    def without(self, names: Sequence[str]) -> "LabelledImages":
        """All images but those of some classes; the other classes keep their indices.

        Raises:
            ValueError: A class is unknown, or nothing is left.
        """
        unknown = [name for name in names if name not in self.names]
        if unknown:
            raise ValueError(f"no class is named {', '.join(unknown)}; there are {', '.join(self.names)}")
        dropped = torch.tensor([self.names.index(name) for name in names], dtype=torch.long)
        kept = ~torch.isin(self.labels, dropped)
        if not kept.any():
            raise ValueError(f"without {', '.join(names)} no image is left")
        return LabelledImages(self.pixels[kept], self.labels[kept], self.names)

    def fitted(self, size: int, channels: int) -> "LabelledImages":
        """The same images in a model's format: grey repeated or colours averaged; padded with black or resized.

        28x28 pixels are padded to 32x32, as is usual for MNIST; other sizes are resized.

        Args:
            size: Height and width in pixels.
            channels: 1 or 3.
        """
        pixels = self.pixels
        if pixels.shape[1] != channels:
            grey = pixels if pixels.shape[1] == 1 else pixels.float().mean(1, keepdim=True).round().to(torch.uint8)
            pixels = grey.expand(-1, channels, -1, -1)
        if tuple(pixels.shape[-2:]) == (28, 28) and size == 32:
            pixels = F.pad(pixels, (2, 2, 2, 2))
        elif tuple(pixels.shape[-2:]) != (size, size):
            parts = [F.interpolate(part.float(), (size, size), mode="bilinear", antialias=True).round().to(torch.uint8)
                     for part in pixels.split(1000)]  # fmt: skip
            pixels = torch.cat(parts)
        return LabelledImages(pixels.contiguous(), self.labels, self.names)


def load_labelled_images(source: str | Path, split: str = "train") -> LabelledImages:
    """Load labelled images, all of one size.

    Args:
        source: A folder with IDX files (the format of MNIST), a folder with one folder of images for each class (or
            with `train` and `test` folders of that kind), a parquet file, or a dataset on the Hub as NAME or
            NAME:CONFIG.
        split: `"train"`, `"test"`, or what the dataset calls it. A parquet file and an image folder without such
            folders have one split only, and give all of it.

    Raises:
        ValueError: There is no such source, it has no images or no labels, an image is corrupt or of another size; the
            message names the file or the column.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        if _idx_file(path, split, "images-idx3"):
            return _from_idx(path, split)
        return _from_image_folder(path / split if (path / split).is_dir() else path)
    if path.suffix == ".parquet":
        if not path.is_file():
            raise ValueError(f"the parquet file {path} does not exist")
        from datasets import load_dataset

        return _from_dataset(load_dataset("parquet", data_files=str(path), split="train"), str(path))
    return _from_hub(str(source), split)


def _idx_file(folder: Path, split: str, kind: str) -> Path | None:
    name = f"{_IDX_FILES.get(split, split)}-{kind}-ubyte"
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)


def _from_idx(folder: Path, split: str) -> LabelledImages:
    images, labels = _idx_file(folder, split, "images-idx3"), _idx_file(folder, split, "labels-idx1")
    if labels is None:
        raise ValueError(f"{folder} has images ({images.name if images else ''}) but no labels for the split {split}")
    pixels, classes = read_idx(images), read_idx(labels)  # type: ignore[arg-type]
    if len(pixels) != len(classes):
        raise ValueError(f"{folder} has {len(pixels)} images and {len(classes)} labels for the split {split}")
    names = [str(index) for index in range(int(classes.max()) + 1)]
    return LabelledImages(torch.from_numpy(pixels[:, None].copy()), torch.from_numpy(classes.astype(np.int64)), names)


def _from_image_folder(folder: Path) -> LabelledImages:
    names = sorted(path.name for path in folder.iterdir() if path.is_dir() and image_files(path))
    if not names:
        raise ValueError(
            f"{folder} holds neither IDX files nor folders of images, one for each class: images need a class"
        )
    pictures, labels, files = [], [], []
    for index, name in enumerate(names):
        for file in image_files(folder / name):
            try:
                with Image.open(file) as opened:
                    pictures.append(_array(opened))
            except (OSError, SyntaxError) as error:
                raise ValueError(f"{file} is not a readable image ({error}): remove or replace it") from error
            labels.append(index)
            files.append(str(file))
    return LabelledImages(_stack(pictures, files), torch.tensor(labels), names)


def _from_hub(source: str, split: str) -> LabelledImages:
    from datasets import load_dataset

    name, _, config = source.partition(":")
    try:
        dataset = load_dataset(name, config or None, split=split)
    except Exception as error:
        raise ValueError(
            f'"{source}" is neither a folder nor a parquet file, and no dataset of that name with a split "{split}" '
            f"could be loaded ({error})"
        ) from error
    return _from_dataset(dataset, source)


def _from_dataset(dataset: Any, source: str) -> LabelledImages:
    from datasets import ClassLabel, Value
    from datasets import Image as ImageFeature

    features = dataset.features
    images = [name for name, feature in features.items() if isinstance(feature, ImageFeature)]
    if not images:
        raise ValueError(f"{source} has no column of images; it has {', '.join(features)}")
    classes = [name for name, feature in features.items() if isinstance(feature, ClassLabel)]
    whole = [name for name, feature in features.items() if isinstance(feature, Value) and "int" in feature.dtype]
    chosen = next(iter(classes or [name for name in whole if "label" in name.lower()]), None)
    if chosen is None:
        raise ValueError(f"{source} has no column of labels; it has {', '.join(features)}")
    labels = torch.tensor(dataset[chosen][:], dtype=torch.long)
    names = features[chosen].names if classes else [str(index) for index in range(int(labels.max()) + 1)]
    if int(labels.min()) < 0:
        raise ValueError(f"{source} has rows without a label (number {int(labels.min())} in {chosen}): leave them out")
    pictures = []
    for row in range(len(dataset)):
        try:
            pictures.append(_array(dataset[row][images[0]]))
        except (OSError, SyntaxError) as error:
            raise ValueError(f"{source}, row {row}, is not a readable image ({error}): leave it out") from error
    return LabelledImages(_stack(pictures, [f"{source}, row {row}" for row in range(len(pictures))]), labels, names)


def _array(picture: Image.Image) -> np.ndarray:
    """`uint8` `[channels, height, width]`, grey or RGB."""
    if picture.mode != "L":
        picture = picture.convert("RGB")
    values = np.asarray(picture, dtype=np.uint8)
    return values[None] if values.ndim == 2 else values.transpose(2, 0, 1)


def _stack(pictures: list[np.ndarray], places: list[str]) -> torch.Tensor:
    for picture, place in zip(pictures, places, strict=True):
        if picture.shape != pictures[0].shape:
            raise ValueError(
                f"images must be of one size: {places[0]} is {_size(pictures[0])}, but {place} is {_size(picture)}"
            )
    return torch.from_numpy(np.stack(pictures))


def _size(picture: np.ndarray) -> str:
    return f"{picture.shape[2]}x{picture.shape[1]} with {picture.shape[0]} channels"


def load_fashion_mnist(split: str, folder: str | Path | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Load Fashion-MNIST (MIT licence, Zalando).

    Args:
        split: `"train"` (60,000 images) or `"test"` (10,000).
        folder: Folder with the four IDX files. Default: where Debian's `dataset-fashion-mnist` puts them; when
            that package is not installed, the Hub's copy is used.

    Returns:
        `uint8` images `[n, 28, 28]` in [0, 255] and `int64` labels `[n]` in [0, 9].
    """
    if split not in _IDX_FILES:
        raise ValueError(f'split="{split}" is not one of {", ".join(map(repr, _IDX_FILES))}')
    folder = Path(folder) if folder is not None else DEBIAN_FASHION_MNIST
    images = folder / f"{_IDX_FILES[split]}-images-idx3-ubyte.gz"
    if images.is_file():
        labels = folder / f"{_IDX_FILES[split]}-labels-idx1-ubyte.gz"
        return read_idx(images), read_idx(labels).astype(np.int64)

    from datasets import load_dataset

    dataset = load_dataset(HUB_FASHION_MNIST, split=split)
    pixels = np.stack([np.asarray(image, dtype=np.uint8) for image in dataset["image"]])
    return pixels, np.asarray(dataset["label"], dtype=np.int64)


def augment(images: torch.Tensor, strength: float, flip: bool, generator: torch.Generator) -> torch.Tensor:
    """Random affine maps (at strength 1 up to 10 degrees, 7 % shift, 10 % scale) and mirror images.

    Args:
        images: `[batch, channels, height, width]` in [-1, 1]; what comes in from outside is -1.
        strength: Of the affine maps; 0 leaves them out.
        flip: Whether half of the images, at random, are mirrored.
        generator: On the CPU.
    """
    count = len(images)
    if strength:
        draws = (torch.rand(4, count, generator=generator) * 2 - 1) * strength
        angle, scale = draws[0] * math.radians(10), 1 + 0.1 * draws[1]
        theta = torch.zeros(count, 2, 3)
        theta[:, 0, 0] = theta[:, 1, 1] = angle.cos() * scale
        theta[:, 0, 1], theta[:, 1, 0] = -angle.sin() * scale, angle.sin() * scale
        theta[:, :, 2] = 0.14 * draws[2:].T
        grid = F.affine_grid(theta, list(images.shape), align_corners=False)
        images = F.grid_sample(images + 1, grid, align_corners=False) - 1
    if flip:
        mirrored = torch.rand(count, generator=generator) < 0.5
        images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
    return images
