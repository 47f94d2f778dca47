"""Labelled images from every kind of source."""

import gzip
import struct

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
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


@pytest.mark.parametrize("wrapped", [True, False])
def test_parquet_files_that_another_program_wrote(tmp_path, pixels, wrapped):
    encoded = []
    for values in pixels:
        Image.fromarray(values).save(tmp_path / "one.png")
        encoded.append((tmp_path / "one.png").read_bytes())
    images = [{"bytes": data, "path": None} for data in encoded] if wrapped else encoded
    names = ["hen", "cat", "dog", "hen", "cat", "dog"]
    pyarrow.parquet.write_table(pyarrow.table({"image": images, "target": names}), tmp_path / "plain.parquet")
    data = load_labelled_images(tmp_path / "plain.parquet")
    assert data.names == ["cat", "dog", "hen"]
    assert data.labels.tolist() == [2, 0, 1, 2, 0, 1]
    assert torch.equal(data.pixels[:, 0], torch.from_numpy(pixels))
    for column, message in (("image", "row 1, has no image in image"), ("target", "row 1, has no label in target")):
        columns = {"image": images, "target": names}
        columns[column] = [columns[column][0], None, *columns[column][2:]]
        pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "holes.parquet")
        with pytest.raises(ValueError, match=message):
            load_labelled_images(tmp_path / "holes.parquet")


def test_sixteen_bits_are_scaled_and_grey_joins_colour(tmp_path, pixels):
    for name, picture in (
        ("a", Image.fromarray(pixels[0].astype(np.uint16) * 257)),
        ("b", Image.fromarray(np.stack([pixels[1]] * 3, -1))),
    ):
        (tmp_path / name).mkdir()
        picture.save(tmp_path / name / "picture.png")
    data = load_labelled_images(tmp_path)
    for channel in range(3):
        assert torch.equal(data.pixels[:, channel], torch.from_numpy(pixels[:2]))


def test_classes_are_matched_by_name(tmp_path, pixels):
    def images(labels, names):
        return LabelledImages(torch.from_numpy(pixels[: len(labels), None]), torch.tensor(labels), names)

    joined = images([0, 1], ["cat", "dog"]).joined(images([0, 0], ["dog"]))
    assert joined.labels.tolist() == [0, 1, 1, 1]
    assert joined.names == ["cat", "dog"]
    assert images([0, 1], ["0", "1"]).under(["cat", "dog"]).labels.tolist() == [0, 1]
    assert images([0, 1], ["1", "2"]).under(["0", "1", "2"]).labels.tolist() == [1, 2]
    with pytest.raises(ValueError, match="bird: not among the classes cat, dog"):
        images([0, 1], ["bird", "dog"]).under(["cat", "dog"])
    with pytest.raises(ValueError, match="one size: 10x10 in the one, 5x10 in the other"):
        joined.joined(LabelledImages(joined.pixels[..., :5], joined.labels, joined.names))
    kept, held = images([0, 1, 0, 1, 0], ["cat", "dog"]).split(2)
    assert kept.labels.tolist() == [0, 1, 0]
    assert held.labels.tolist() == [0, 1]


def test_a_class_may_be_called_as_a_split_is(tmp_path, pixels):
    for name in ("car", "train"):
        (tmp_path / name).mkdir()
        Image.fromarray(pixels[0]).save(tmp_path / name / "picture.png")
    assert load_labelled_images(tmp_path).names == ["car", "train"]
    (tmp_path / "all" / "train").mkdir(parents=True)
    (tmp_path / "car").rename(tmp_path / "all" / "train" / "car")
    with pytest.raises(ValueError, match='has no split "test"; it has train'):
        load_labelled_images(tmp_path / "all", "test")


def test_damaged_files_are_named(tmp_path, pixels):
    write_idx(tmp_path / "train-labels-idx1-ubyte", LABELS)
    whole = tmp_path / "train-images-idx3-ubyte.gz"
    write_idx(whole, pixels)
    whole.write_bytes(whole.read_bytes()[:60])
    with pytest.raises(ValueError, match="is not a whole gzip file"):
        load_labelled_images(tmp_path)
    whole.unlink()
    (tmp_path / "train-images-idx3-ubyte").write_bytes(bytes([0, 0, 8, 3, 0]))
    with pytest.raises(ValueError, match="not an IDX file"):
        load_labelled_images(tmp_path)
    folder = tmp_path / "images" / "cat"
    folder.mkdir(parents=True)
    Image.fromarray(pixels[0]).save(folder / "a.png")
    (folder / "a.png").write_bytes((folder / "a.png").read_bytes()[:20])
    with pytest.raises(ValueError, match="a.png is not a readable image"):
        load_labelled_images(tmp_path / "images")


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
    with pytest.raises(ValueError, match=r"a.png is 10x10, but .*b.png is 10x5"):
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
    wide = torch.zeros(1, 1, 4, 8, dtype=torch.uint8)
    wide[..., 2:6] = 200
    assert LabelledImages(wide, torch.tensor([0]), ["0"]).fitted(2, 1).pixels.unique().tolist() == [200]


def test_sources_that_are_none_are_one_sentence(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    (tmp_path / "cut.parquet").write_bytes(b"PAR1 and nothing else")
    for source, message in (
        ("cut.parquet", "cut.parquet is not a readable parquet file"),
        ("cot.parquet", 'does not exist; did you mean "cut.parquet"'),
        ("./imagse", 'could be loaded .*did you mean "images"'),
        ("a\0b", "is neither a folder nor"),
        ("~nobody-of-that-name/x", "is neither a folder nor a name"),
        ("x" * 5000, "is neither a folder nor a name"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            load_labelled_images(source)
        assert str(error.value).isprintable() and len(str(error.value)) < 600
