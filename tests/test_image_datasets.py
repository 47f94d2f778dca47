"""Labelled images from every kind of source."""

import gzip
import struct

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from sa_diffusers.data.image_datasets import LabelledImages, load_labelled_images


def write_idx(path, values: np.ndarray) -> None:
    header = bytes([0, 0, 8, values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape)
    data = header + values.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


@pytest.fixture
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (6, 10, 10), dtype=np.uint8)


LABELS = np.array([0, 1, 2, 0, 1, 2])


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_idx_files(tmp_path, pixels, ending):
    for split, part in (("train", slice(0, 4)), ("t10k", slice(4, 6))):
        write_idx(tmp_path / f"{split}-images-idx3-ubyte{ending}", pixels[part])
        write_idx(tmp_path / f"{split}-labels-idx1-ubyte{ending}", LABELS[part])
    train, test = load_labelled_images(tmp_path), load_labelled_images(str(tmp_path), "test")
    assert train.pixels.shape == (4, 1, 10, 10)
    assert train.pixels.dtype == torch.uint8
    assert torch.equal(train.pixels[:, 0], torch.from_numpy(pixels[:4]))
    assert train.labels.tolist() == [0, 1, 2, 0]
    assert train.names == ["0", "1", "2"]
    assert test.labels.tolist() == [1, 2]


def test_image_folder_with_and_without_splits(tmp_path, pixels):
    for index, label in enumerate(LABELS):
        folder = tmp_path / "train" / ["cat", "dog", "hen"][label]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels[index]).save(folder / f"{index}.png")
    images = load_labelled_images(tmp_path)
    assert images.names == ["cat", "dog", "hen"]
    assert images.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert torch.equal(images.pixels[1, 0], torch.from_numpy(pixels[3]))
    assert len(load_labelled_images(tmp_path / "train")) == 6


def test_parquet_with_names_and_without(tmp_path, pixels):
    from datasets import ClassLabel, Dataset, Features, Value
    from datasets import Image as ImageFeature

    pictures = [Image.fromarray(np.stack([image] * 3, axis=-1)) for image in pixels]
    for kind, names in ((ClassLabel(names=["cat", "dog", "hen"]), ["cat", "dog", "hen"]),
                        (Value("int64"), ["0", "1", "2"])):  # fmt: skip
        features = Features({"img": ImageFeature(), "label": kind})
        path = tmp_path / "data.parquet"
        Dataset.from_dict({"img": pictures, "label": LABELS}, features=features).to_parquet(path)
        images = load_labelled_images(path)
        assert images.pixels.shape == (6, 3, 10, 10)
        assert images.labels.tolist() == LABELS.tolist()
        assert images.names == names
    Dataset.from_dict({"img": pictures}, features=Features({"img": ImageFeature()})).to_parquet(path)
    with pytest.raises(ValueError, match="has no column of labels; it has img"):
        load_labelled_images(path)
    Dataset.from_dict({"label": LABELS}).to_parquet(path)
    with pytest.raises(ValueError, match="has no column of images; it has label"):
        load_labelled_images(path)


def test_rows_without_a_picture_or_a_label_are_named(tmp_path, pixels):
    rows = {"image": [Image.fromarray(values) for values in pixels], "label": [0, 1, -1, 0, 1, 0]}
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "unlabelled.parquet")
    with pytest.raises(ValueError, match=r"has rows without a label \(number -1 in label\)"):
        load_labelled_images(tmp_path / "unlabelled.parquet")
    broken = datasets.Dataset.from_dict({"image": [{"bytes": b"no picture", "path": None}], "label": [0]})
    broken.cast_column("image", datasets.Image()).to_parquet(tmp_path / "broken.parquet")
    with pytest.raises(ValueError, match=r"broken.parquet, row 0, is not a readable image"):
        load_labelled_images(tmp_path / "broken.parquet")


def test_bad_sources(tmp_path, pixels):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="images need a class"):
        load_labelled_images(tmp_path / "empty")
    with pytest.raises(ValueError, match=r"none.parquet does not exist"):
        load_labelled_images(tmp_path / "none.parquet")
    with pytest.raises(ValueError, match='"nobody/nothing" is neither a folder nor a parquet file'):
        load_labelled_images("nobody/nothing")
    folder = tmp_path / "images" / "cat"
    folder.mkdir(parents=True)
    Image.fromarray(pixels[0]).save(folder / "a.png")
    Image.fromarray(pixels[0][:5]).save(folder / "b.png")
    with pytest.raises(ValueError, match=r"a.png is 10x10 with 1 channels, but .*b.png is 10x5 with 1 channels"):
        load_labelled_images(tmp_path / "images")
    (folder / "b.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"b.png is not a readable image"):
        load_labelled_images(tmp_path / "images")
    write_idx(tmp_path / "train-images-idx3-ubyte", pixels)
    with pytest.raises(ValueError, match="but no labels"):
        load_labelled_images(tmp_path)
    write_idx(tmp_path / "train-labels-idx1-ubyte", LABELS[:4])
    with pytest.raises(ValueError, match="6 images and 4 labels"):
        load_labelled_images(tmp_path)


def test_without_a_class_the_others_keep_their_index():
    images = LabelledImages(torch.arange(3, dtype=torch.uint8).view(3, 1, 1, 1), torch.tensor([0, 1, 2]), list("abc"))
    left = images.without(["b"])
    assert left.labels.tolist() == [0, 2]
    assert left.pixels.flatten().tolist() == [0, 2]
    assert left.names == ["a", "b", "c"]
    with pytest.raises(ValueError, match="no class is named d; there are a, b, c"):
        images.without(["d"])
    with pytest.raises(ValueError, match="no image is left"):
        images.without(["a", "b", "c"])


def test_fitted_pads_mnist_and_resizes_the_rest():
    mnist = LabelledImages(torch.full((1, 1, 28, 28), 200, dtype=torch.uint8), torch.tensor([0]), ["0"])
    padded = mnist.fitted(32, 3).pixels
    assert padded.shape == (1, 3, 32, 32)
    assert padded[0, :, :2].max() == 0
    assert padded[0, :, 2:30, 2:30].min() == 200
    colour = LabelledImages(torch.tensor([0, 90, 180], dtype=torch.uint8).view(1, 3, 1, 1).expand(1, 3, 8, 8),
                            torch.tensor([0]), ["0"])  # fmt: skip
    small = colour.fitted(4, 1).pixels
    assert small.shape == (1, 1, 4, 4)
    assert small.unique().tolist() == [90]
