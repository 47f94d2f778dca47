"""The settings of training base models of class experiments, and their classifiers."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..messages import shown
from .fields import Settings, documented, flag
from .groups import Precision, Sampler, Schedule, Tracker, no_file

_DATA = "folder with IDX files or with a folder a class, parquet file, or Hub dataset"


@documented
@dataclass
class ClassModelConfig(Settings):
    """Settings of training a class-conditional model. Each field is a flag of `sa-diffusers train-class-model`.

    Raises:
        ValueError: A value is out of range.
    """

    as_flags = True
    model: str = flag(help="a configuration that comes with the package, or a JSON file of the same form", path=True)
    data: str = flag(help=_DATA, path=True)
    output_dir: Path = flag(help="folder of the pipeline", check=no_file)
    split: list[str] = flag(["train"], "splits to train on")
    labels: list[str] | None = flag(None, "names of the classes [the data's]")
    without: list[str] = flag([], "classes left out of the data", metavar="CLASS")
    max_train_steps: int | None = flag(None, "optimiser steps [as suits the model, like the three below]", at_least=1,
                                       at_most=100_000_000)  # fmt: skip
    train_batch_size: int | None = flag(None, "images in a batch of one device", at_least=1, at_most=65_536)
    learning_rate: float | None = flag(None, "learning rate", above=0, at_most=1_000)
    lr_scheduler: Schedule | None = flag(None, "schedule of the learning rate")
    lr_warmup_steps: int = flag(0, "steps of warm-up", at_least=0)
    max_grad_norm: float = flag(1.0, "clip the gradient to this norm", above=0)
    condition_dropout: float = flag(0.1, "share trained as the null class (diffusion)", at_least=0, below=1)
    affine: float = flag(0.0, "strength of random rotation, shift and scale; 1 is light", at_least=0,
                         at_most=10)  # fmt: skip
    flip: bool = flag(False, "mirror half of the images")
    use_ema: bool = flag(False, "average the weights over the steps [as suits the model]")
    ema_decay: float = flag(0.9999, "decay of the average, unless the model has another", at_least=0, below=1)
    mixed_precision: Precision | None = flag(None, "precision [as `accelerate config` says]")
    checkpointing_steps: int = flag(2000, "steps between checkpoints", at_least=1)
    resume_from_checkpoint: Literal["latest", "no"] = flag(
        "latest", "latest goes on where this very training stopped, no starts over"
    )
    sample_steps: int = flag(2000, "steps between sample grids", at_least=1)
    sampler: Sampler = flag("ddim", "sampler of the sample grids")
    num_inference_steps: int = flag(50, "steps of the sampler", at_least=1, at_most=10_000)
    guidance_scale: float = flag(3.0, "guidance of the sample grids; the paper's weight 2 is 3 here", at_least=0,
                                 at_most=10_000)  # fmt: skip
    report_to: Tracker | None = flag(None, "tracker of the losses (default: tensorboard if it is installed, else none)")
    seed: int = flag(0, "seed of everything random", at_least=0, at_most=2**32 - 1)

    def check(self) -> None:
        for name in ("max_train_steps", "train_batch_size", "learning_rate", "lr_scheduler"):
            if getattr(self, name) is None:
                raise ValueError(f"--{name} must be given: {self.model} does not say what suits it")
        _check_labels(self.labels)


@documented
@dataclass
class ClassifierConfig(Settings):
    """Settings of training an image classifier. Each field is a flag of `sa-diffusers train-classifier`.

    Raises:
        ValueError: A value is out of range, or two values contradict each other.
    """

    as_flags = True
    data: str = flag(help=_DATA, path=True)
    output_dir: Path = flag(help="folder of the classifier", check=no_file)
    split: str = flag("train", "split to train on")
    test_split: str = flag("test", "split to measure on")
    labels: list[str] | None = flag(None, "names of the classes [the data's]")
    cnn: bool = flag(False, "two convolutional layers, for 28x28 pixels or about that")
    base: str | None = flag(None, "image classifier to fine-tune: a folder or a name on the Hub", path=True)
    pixels: int | None = flag(
        None, "images are resized to this for the classifier [64; 28 with --cnn]", at_least=16, at_most=10_000
    )
    epochs: int = flag(7, "passes over the data", at_least=1, at_most=1_000_000)
    batch_size: int = flag(128, "images in a batch", at_least=1, at_most=65_536)
    learning_rate: float | None = flag(None, "peak of the one-cycle schedule [3e-3; 1e-4 with --base]", above=0,
                                       at_most=1_000)  # fmt: skip
    weight_decay: float = flag(0.05, "weight decay of AdamW", at_least=0, at_most=1_000)
    affine: float = flag(1.0, "strength of random rotation, shift and scale; 1 is light", at_least=0,
                         at_most=10)  # fmt: skip
    flip: bool = flag(False, "mirror half of the images")
    seed: int = flag(0, "seed of everything random", at_least=0, at_most=2**64 - 1)

    def check(self) -> None:
        if self.cnn and self.base:
            raise ValueError("--cnn builds a new network, --base fine-tunes one: give one of them")
        _check_labels(self.labels)
        self.pixels = self.pixels or (28 if self.cnn else 64)


def _check_labels(labels: list[str] | None) -> None:
    for name in labels or ():
        if labels.count(name) > 1:
            raise ValueError(f'--labels names "{shown(name)}" twice: give each class a name of its own')
