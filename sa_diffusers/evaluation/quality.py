"""Image quality: Fréchet distance, precision and recall, in the features of a network chosen by name.

The network and the distances are torch-fidelity's, the other networks those of transformers. torch-fidelity is imported
where it is used: a model is erased without it.
"""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from transformers import AutoModel
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from ..hub import one_line
from .classification import loaded, whole
from .memory import in_batches

INCEPTION = "inception"
NEIGHBOURS = 3
_FEATURES = "2048"


def can_measure() -> bool:
    """Whether torch-fidelity is installed."""
    return importlib.util.find_spec("torch_fidelity") is not None


def check_can_measure() -> None:
    """To be called before the work.

    Raises:
        ValueError: torch-fidelity is not installed.
    """
    if not can_measure():
        raise ValueError(
            "Fréchet distance, precision and recall are measured with torch-fidelity, which is not installed: "
            'run `pip install "sa_diffusers[evaluation]"`, or `pip install torch-fidelity`'
        )


class FeatureNetwork(Protocol):
    """Pictures in, features `[n, d]` out; its name goes into reports."""

    name: str

    def __call__(self, pictures: Sequence[Image.Image]) -> torch.Tensor: ...


class InceptionFeatures:
    """The 2048 features of the Inception network that the Fréchet Inception Distance is defined on.

    Args:
        weights: File of its weights as torch-fidelity names them. Default: downloaded once.
        device: Where it runs.

    Raises:
        ValueError: The weights cannot be read or downloaded, or torch-fidelity is not installed.
    """

    name = "inception-v3-compat"

    def __init__(self, weights: str | Path | None = None, device: torch.device | str = "cpu") -> None:
        check_can_measure()
        from torch_fidelity.utils import create_feature_extractor

        if weights is not None:
            _check_weights(Path(weights))
        try:
            self.network = create_feature_extractor(
                self.name, [_FEATURES], cuda=False, feature_extractor_weights_path=weights and str(weights),
                verbose=False,
            )  # fmt: skip
        except Exception as error:  # a file of other things than weights makes it raise whatever comes first
            raise ValueError(
                f"the weights of the Inception network could not be had ({one_line(error)}): give the path of a file "
                "that holds them, or choose another network for the features"
            ) from error
        self.network.to(device)
        self.device = device

    @torch.no_grad()
    def __call__(self, pictures: Sequence[Image.Image], batch_size: int = 50) -> torch.Tensor:

        def features(batch: Sequence[Image.Image]) -> torch.Tensor:
            pixels = np.stack([np.asarray(image.convert("RGB")) for image in batch])
            images = torch.from_numpy(pixels).permute(0, 3, 1, 2).to(self.device)
            return self.network(images)[0].float().cpu()

        return torch.cat(in_batches(pictures, batch_size, features))


def _check_weights(path: Path) -> None:
    """torch-fidelity unpickles whatever the file holds, code too: let it see nothing but tensors.

    Raises:
        ValueError: There is no such file, or it holds anything else.
    """
    if not path.is_file():
        raise ValueError(f"the weights of the Inception network are not at {path}: give the file's path")
    try:
        torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what is no file of torch makes it raise whatever comes first
        raise ValueError(
            f"{path} holds no weights of the Inception network ({type(error).__name__}): give a file of tensors "
            "as torch-fidelity names them"
        ) from error


class TransformersFeatures:
    """The pooled output of any vision model of transformers: DINOv2, CLIP, ...

    Args:
        name_or_path: A folder or a name on the Hub.
        device: Where it runs.

    Raises:
        ValueError: There is no such model, or it has no pooled output.
    """

    def __init__(self, name_or_path: str, device: torch.device | str = "cpu") -> None:
        what = f'the model of the features "{name_or_path}"'
        advice = f"give {INCEPTION}, or a folder or Hub name of a vision model of transformers"
        model = loaded(what, name_or_path, lambda: whole(AutoModel.from_pretrained(
            name_or_path, output_loading_info=True, trust_remote_code=False)), advice)  # fmt: skip
        self.processor = loaded(
            what,
            name_or_path,
            lambda: AutoImageProcessor.from_pretrained(name_or_path, trust_remote_code=False),
            advice,
        )
        # A CLIP holds its vision model beside its text model.
        self.model = getattr(model, "vision_model", model).to(device)
        self.name = name_or_path
        self.device = device

    @torch.no_grad()
    def __call__(self, pictures: Sequence[Image.Image], batch_size: int = 50) -> torch.Tensor:

        def features(batch: Sequence[Image.Image]) -> torch.Tensor:
            opaque = [image.convert("RGB") for image in batch]
            pixels = self.processor(opaque, return_tensors="pt")["pixel_values"].to(self.device)
            pooled = self.model(pixel_values=pixels).pooler_output
            if pooled is None:
                raise ValueError(f'the model of the features "{self.name}" has no pooled output: choose another')
            return pooled.flatten(1).float().cpu()

        return torch.cat(in_batches(pictures, batch_size, features))


def feature_network(
    name: str, weights: str | Path | None = None, device: torch.device | str = "cpu"
) -> InceptionFeatures | TransformersFeatures:
    """The network of a name: `"inception"`, or a vision model of transformers.

    Args:
        name: `"inception"`, or a folder or a name on the Hub.
        weights: File of the Inception network's weights; see `InceptionFeatures`.
        device: Where it runs.
    """
    return InceptionFeatures(weights, device) if name == INCEPTION else TransformersFeatures(name, device)


def image_quality(drawn: torch.Tensor, reference: torch.Tensor, neighbours: int = NEIGHBOURS) -> dict[str, float]:
    """How far drawn images are from a reference: Fréchet distance, precision and recall (Kynkäänniemi et al., 2019).

    Args:
        drawn: Features `[n, d]` of the drawn images.
        reference: Features `[m, d]` of real images, or of another model's.
        neighbours: Images of each set are surrounded by balls that reach to so many nearest neighbours.

    Returns:
        `frechet_distance`; `precision`, the share of drawn images in a ball of the reference; `recall`, the share of
        the reference in a ball of the drawn.

    Raises:
        ValueError: Too few images, features of different networks, or torch-fidelity is not installed.
    """
    check_can_measure()
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    if drawn.shape[1:] != reference.shape[1:]:
        raise ValueError(
            f"features of {drawn.shape[1]} and of {reference.shape[1]} entries come from different networks"
        )
    if min(len(drawn), len(reference)) <= neighbours:
        raise ValueError(
            f"{len(drawn)} drawn and {len(reference)} reference images are too few: give more than {neighbours} of each"
        )
    statistics = [fid_features_to_statistics(features.double()) for features in (drawn, reference)]
    # Precision and recall of torch-fidelity take the drawn images first.
    ratio = prc_features_to_metric(
        drawn.double(), reference.double(), prc_neighborhood=neighbours, verbose=False, save_cpu_ram=False
    )
    return {
        "frechet_distance": fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"],
        "precision": float(ratio["precision"]),
        "recall": float(ratio["recall"]),
    }
