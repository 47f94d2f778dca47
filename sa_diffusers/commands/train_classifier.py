"""`sa-diffusers train-classifier`, which `examples/train_classifier.py` calls."""

from collections.abc import Sequence

from ..configuration import ClassifierConfig
from .parser import build_parser, one_line_errors, parse

_DESCRIPTION = """\
Train the image classifier that scores a class experiment, on real images only: no noise, no label smoothing.

    sa-diffusers train-classifier --data ylecun/mnist --cnn --output_dir mnist-classifier
    sa-diffusers train-classifier --data uoft-cs/cifar10 --base microsoft/resnet-34 --pixels 224 --flip \\
        --output_dir cifar10-classifier

It is a small residual network, or with `--cnn` one of two convolutions (the paper's for MNIST), or with `--base` any
image classifier of the Hub, fine-tuned. Writes an ordinary transformers folder and `accuracy.json`, measured on the
test split, or on every tenth image of each class, held out, where there is none.
"""


def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Read the command line and train; what goes wrong ends the program with one line.

    Args:
        arguments: Default: the program's own.
        prog: The program's name in its help. Default: as it was called.
    """
    config = parse(build_parser(ClassifierConfig, prog, _DESCRIPTION), ClassifierConfig, arguments)
    with one_line_errors("The same command starts over"):
        # Imported late: it takes seconds, and a mistake on the command line should not.
        from ..base_training.classifier import train_classifier

        train_classifier(config)
