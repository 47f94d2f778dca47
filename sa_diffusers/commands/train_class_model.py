"""`sa-diffusers train-class-model`, which `examples/train_class_model.py` calls."""

from collections.abc import Sequence
from typing import Any

from ..configuration import ClassModelConfig
from ..models import class_configurations, class_defaults
from ..processes import finishing
from .parser import build_parser, one_line_errors, parse

_DESCRIPTION = """\
Train the base model of a class experiment: a conditional VAE or a class-conditional diffusion model.

    sa-diffusers train-class-model --model mnist_vae --data ylecun/mnist --output_dir mnist-base
    sa-diffusers train-class-model --model cifar10 --data uoft-cs/cifar10 --output_dir cifar10-base

What is not said comes with the model: for `cifar10` and `stl10` the paper's 800,000 and 250,000 steps. `--without
CLASS` leaves a class out of the data: the paper's "9 classes" baseline.
"""


def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Read the command line and train; what goes wrong ends the program with one line.

    Args:
        arguments: Default: the program's own.
        prog: The program's name in its help. Default: as it was called.
    """

    def build(flags: dict[str, Any]) -> ClassModelConfig:
        return ClassModelConfig(**(class_defaults(flags["model"], "training") | flags))

    parser = build_parser(ClassModelConfig, prog, _DESCRIPTION, f"models: {', '.join(class_configurations())}")
    config = parse(parser, ClassModelConfig, arguments, build)
    with one_line_errors("Go on with --resume_from_checkpoint latest"), finishing():
        # Imported late: it takes seconds, and a mistake on the command line should not.
        from ..base_training.class_model import train_class_model

        train_class_model(config)
