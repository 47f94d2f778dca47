"""Labelled image datasets as arrays, from files on disk or from the Hub."""

import gzip
import io
import math
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from ..messages import near_paths, shown, shown_error
from .concepts import image_files
from .pictures import read_picture

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
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            raw = file.read()
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is not a whole gzip file ({error}): fetch it again") from error
    if len(raw) < 4 or raw[:3] != b"\x00\x00\x08" or len(raw) < 4 + 4 * raw[3]:
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

    def under(self, names: Sequence[str]) -> "LabelledImages":
        """The same images, their labels as indices of other names: a class is found by its name.

        Where either side knows its classes by number only (as IDX files do), the number says which class it is.

        Raises:
            ValueError: A class has no counterpart.
        """
        unknown = [name for name in self.names if name not in names]
        if not unknown:
            places = torch.tensor([list(names).index(name) for name in self.names])
            return LabelledImages(self.pixels, places[self.labels], list(names))
        numbers = [str(index) for index in range(max(len(self.names), len(names)))]
        known_by_number = any(list(side) == numbers[: len(side)] for side in (self.names, names))
        if known_by_number and len(self.names) <= len(names):
            return LabelledImages(self.pixels, self.labels, list(names))
        raise ValueError(f"{_listed(unknown)}: not among the classes {_listed(names)}")

    def joined(self, other: "LabelledImages") -> "LabelledImages":
        """These images and others of the same classes.

        Raises:
            ValueError: The others have another size, or a class that is missing here.
        """
        if self.pixels.shape[2:] != other.pixels.shape[2:]:
            sizes = [_size(images.pixels.numpy()[0]) for images in (self, other)]
            raise ValueError(f"images must be of one size: {sizes[0]} in the one, {sizes[1]} in the other")
        channels = max(self.pixels.shape[1], other.pixels.shape[1])
        pixels = [images.pixels.expand(-1, channels, -1, -1) for images in (self, other)]
        return LabelledImages(torch.cat(pixels), torch.cat([self.labels, other.under(self.names).labels]), self.names)

    def split(self, every: int) -> tuple["LabelledImages", "LabelledImages"]:
        """All but every n-th image of each class, and those."""
        held = torch.zeros(len(self), dtype=torch.bool)
        for label in self.labels.unique():
            held[torch.nonzero(self.labels == label).flatten()[every - 1 :: every]] = True
        first, second = (LabelledImages(self.pixels[rows], self.labels[rows], self.names) for rows in (~held, held))
        return first, second

    def fitted(self, size: int, channels: int) -> "LabelledImages":
        """The same images in a model's format: grey repeated or colours averaged; padded with black or resized.

        28x28 pixels are padded to 32x32, as is usual for MNIST; other sizes are cropped to the square in the middle and
        resized.

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
            side = min(pixels.shape[-2:])
            top, left = ((length - side) // 2 for length in pixels.shape[-2:])
            pixels = pixels[..., top : top + side, left : left + side]
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
    try:
        path = Path(source).expanduser()
        is_folder = path.is_dir()
    except (OSError, ValueError, RuntimeError):
        raise ValueError(f'"{shown(str(source))}" is neither a folder nor a name: give one of images') from None
    if is_folder:
        if _idx_file(path, split, "images-idx3"):
            return _from_idx(path, split)
        return _from_image_folder(_split_folder(path, split))
    if path.suffix == ".parquet":
        if not path.is_file():
            raise ValueError(f"the parquet file {path} does not exist{near_paths(path)}")
        from datasets import load_dataset

        try:
            dataset = load_dataset("parquet", data_files=str(path), split="train")
        except Exception as error:  # `datasets` wraps what pyarrow raises, in several ways
            raise ValueError(f"{path} is not a readable parquet file ({_cause(error)}): fetch it again") from error
        return _from_dataset(dataset, str(path))
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


def _class_folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and image_files(path))


def _split_folder(folder: Path, split: str) -> Path:
    """Where the folders of the classes are. A class may be called "train": a split holds folders."""
    if (folder / split).is_dir() and _class_folders(folder / split):
        return folder / split
    if not _class_folders(folder):
        splits = sorted(path.name for path in folder.iterdir() if path.is_dir() and _class_folders(path))
        if splits:
            raise ValueError(f'{folder} has no split "{split}"; it has {", ".join(splits)}')
    return folder


def _from_image_folder(folder: Path) -> LabelledImages:
    classes = _class_folders(folder)
    if not classes:
        raise ValueError(
            f"{folder} holds neither IDX files nor folders of images, one for each class: images need a class"
        )
    files = [(index, file) for index, path in enumerate(classes) for file in image_files(path)]
    pictures = [_array(read_picture(file, str(file))) for _, file in files]
    labels = torch.tensor([index for index, _ in files])
    return LabelledImages(_stack(pictures, [str(file) for _, file in files]), labels, [path.name for path in classes])


def _from_hub(source: str, split: str) -> LabelledImages:
    from datasets import load_dataset

    name, _, config = source.partition(":")
    try:
        dataset = load_dataset(name, config or None, split=split)
    except Exception as error:
        raise ValueError(
            f'"{shown(source)}" is neither a folder nor a parquet file, and no dataset of that name with a split '
            f'"{shown(split)}" '
            f"could be loaded ({_cause(error)}){near_paths(name)}"
        ) from error
    return _from_dataset(dataset, source)


def _cause(error: BaseException) -> str:
    """The innermost reason of an error."""
    while error.__cause__ is not None:
        error = error.__cause__
    return shown_error(error)


_LABEL_WORDS = ("label", "class", "target", "category")


def _from_dataset(dataset: Any, source: str) -> LabelledImages:
    from datasets import ClassLabel, Value
    from datasets import Image as ImageFeature

    features = dataset.features
    image = next((name for name, feature in features.items() if isinstance(feature, ImageFeature)), None) or next(
        # Files that something other than `datasets` wrote do not say that these bytes are images.
        (name for name, feature in features.items() if _holds_bytes(feature)), None
    )  # fmt: skip
    if image is None:
        raise ValueError(f"{source} has no column of images; it has {', '.join(features)}")
    classes = [name for name, feature in features.items() if isinstance(feature, ClassLabel)]
    plain = [name for name, feature in features.items()
             if isinstance(feature, Value) and ("int" in feature.dtype or "string" in feature.dtype)
             and any(word in name.lower() for word in _LABEL_WORDS)]  # fmt: skip
    column = next(iter(classes + plain), None)
    if column is None:
        raise ValueError(f"{source} has no column of labels; it has {', '.join(features)}")
    if not len(dataset):
        raise ValueError(f"{source} has no rows")
    values = dataset[column][:]
    if None in values:
        raise ValueError(f"{source}, row {values.index(None)}, has no label in {column}: leave it out")
    if classes:
        names = features[column].names
    else:
        names = sorted(set(values)) if isinstance(values[0], str) else [str(index) for index in range(max(values) + 1)]
    if isinstance(values[0], str):
        values = [names.index(value) for value in values]
    labels = torch.tensor(values, dtype=torch.long)
    if int(labels.min()) < 0:
        raise ValueError(f"{source} has rows without a label (number {int(labels.min())} in {column}): leave them out")
    pictures = []
    undecoded = dataset.cast_column(image, ImageFeature(decode=False))
    for row in range(len(dataset)):
        place, cell = f"{source}, row {row},", undecoded[row][image]
        if cell is None or (cell["bytes"] is None and cell["path"] is None):
            raise ValueError(f"{place} has no image in {image}: leave it out")
        file = io.BytesIO(cell["bytes"]) if cell["bytes"] is not None else dataset[row][image]
        pictures.append(_array(read_picture(file, place)))
    return LabelledImages(_stack(pictures, [f"{source}, row {row}" for row in range(len(pictures))]), labels, names)


def _holds_bytes(feature: Any) -> bool:
    if isinstance(feature, dict):
        feature = feature.get("bytes")
    return "binary" in str(getattr(feature, "dtype", ""))


def _array(picture: Image.Image) -> np.ndarray:
    """`uint8` `[channels, height, width]`, grey or RGB."""
    values = np.asarray(picture, dtype=np.uint8)
    return values[None] if values.ndim == 2 else values.transpose(2, 0, 1)


def _stack(pictures: list[np.ndarray], places: list[str]) -> torch.Tensor:
    # Some programs store a colourless picture among colour ones as a grey one.
    channels = max(len(picture) for picture in pictures)
    pictures = [np.broadcast_to(picture, (channels, *picture.shape[1:])) for picture in pictures]
    for picture, place in zip(pictures, places, strict=True):
        if picture.shape != pictures[0].shape:
            raise ValueError(
                f"images must be of one size: {places[0]} is {_size(pictures[0])}, but {place} is {_size(picture)}"
            )
    return torch.from_numpy(np.stack(pictures))


def _size(picture: np.ndarray) -> str:
    return f"{picture.shape[2]}x{picture.shape[1]}"


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")


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
