"""Labelled image datasets as arrays, from IDX files on disk or from the Hub."""

import gzip
import struct
from pathlib import Path

import numpy as np

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
