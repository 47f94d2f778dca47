"""Train the image classifier that scores a class experiment, on real images only: no noise, no label smoothing.

    python examples/train_classifier.py --data ylecun/mnist --cnn --output_dir mnist-classifier
    python examples/train_classifier.py --data uoft-cs/cifar10 --base microsoft/resnet-34 --pixels 224 --flip \\
        --output_dir cifar10-classifier

It is a small residual network, or with `--cnn` one of two convolutions (the paper's for MNIST), or with `--base` any
image classifier of the Hub, fine-tuned. Writes an ordinary transformers folder and `accuracy.json`, measured on the
test split, or on every tenth image of each class, held out, where there is none.
"""

import argparse
import sys
from pathlib import Path

import torch
from PIL import Image
from torch.nn import functional as F
from tqdm import tqdm
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    ViTImageProcessor,
)

from sa_diffusers.data.image_datasets import LabelledImages, augment, load_labelled_images
from sa_diffusers.evaluation.classification import ImageClassifier
from sa_diffusers.files import replacing_folder, write_json
from sa_diffusers.models.digit_classifier import DigitClassifier, DigitClassifierConfig

HELD_OUT = 10


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", required=True, help="folder with IDX files or with a folder a class, parquet file, or Hub dataset")
    add("--split", default="train", help="split to train on [train]")
    add("--test_split", default="test", help="split to measure on [test]")
    add("--labels", nargs="+", help="names of the classes [the data's]")
    add("--cnn", action="store_true", help="two convolutional layers, for 28x28 pixels or about that")
    add("--base", help="image classifier to fine-tune: a folder or a name on the Hub")
    add("--output_dir", type=Path, required=True)
    add("--pixels", type=int, help="images are resized to this for the classifier [64; 28 with --cnn]")
    add("--epochs", type=int, default=7)
    add("--batch_size", type=int, default=128)
    add("--learning_rate", type=float, help="peak of the one-cycle schedule [3e-3; 1e-4 with --base]")
    add("--weight_decay", type=float, default=0.05)
    add("--affine", type=float, default=1.0, help="strength of random rotation, shift and scale [1, light]")
    add("--flip", action="store_true", help="mirror half of the images")
    add("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    if args.cnn and args.base:
        parser.error("--cnn builds a new network, --base fine-tunes one: give one of them")
    args.pixels = args.pixels or (28 if args.cnn else 64)
    if args.pixels < 16:
        parser.error(f"--pixels {args.pixels} must be at least 16")
    return args


def build(args: argparse.Namespace, names: list[str]) -> tuple[torch.nn.Module, object]:
    names_by_index = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    size = {"height": args.pixels, "width": args.pixels}
    if args.cnn:
        processor = ViTImageProcessor(size=size, resample=2, image_mean=[0.5] * 3, image_std=[0.5] * 3)
        return DigitClassifier(DigitClassifierConfig(image_size=args.pixels, **names_by_index)), processor
    if args.base is None:
        config = ResNetConfig(num_channels=3, embedding_size=32, hidden_sizes=[32, 64, 96], depths=[2, 2, 2],
                              layer_type="basic", **names_by_index)  # fmt: skip
        processor = ViTImageProcessor(size=size, resample=2, image_mean=[0.5] * 3, image_std=[0.5] * 3)
        return ResNetForImageClassification(config), processor
    model = AutoModelForImageClassification.from_pretrained(args.base, ignore_mismatched_sizes=True, **names_by_index)
    given = AutoImageProcessor.from_pretrained(args.base)
    mean, deviation = given.image_mean, given.image_std
    return model, ViTImageProcessor(size=size, resample=2, image_mean=mean, image_std=deviation)


def train(model: torch.nn.Module, processor, data: LabelledImages, args: argparse.Namespace, device: str) -> None:
    steps = max(1, args.epochs * len(data) // args.batch_size)
    rate = args.learning_rate or (3e-3 if args.base is None else 1e-4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=args.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.05,
                                                   cycle_momentum=False)  # fmt: skip
    mean, deviation = (torch.tensor(values, device=device).view(1, 3, 1, 1)
                       for values in (processor.image_mean, processor.image_std))  # fmt: skip
    generator = torch.Generator().manual_seed(args.seed)
    order = torch.empty(0, dtype=torch.long)
    model.train()
    bar = tqdm(range(steps), unit="step")
    for _ in bar:
        while len(order) < args.batch_size:
            order = torch.cat([order, torch.randperm(len(data), generator=generator)])
        rows, order = order[: args.batch_size], order[args.batch_size :]
        images = augment(data.pixels[rows].float() / 127.5 - 1, args.affine, args.flip, generator)
        images = ((images + 1) / 2).expand(-1, 3, -1, -1).to(device)
        images = F.interpolate(images, (args.pixels, args.pixels), mode="bilinear", antialias=True)
        loss = F.cross_entropy(model((images - mean) / deviation).logits, data.labels[rows].to(device))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.4f}")
    model.eval()


def main(arguments: list[str] | None = None) -> None:
    args = parse_args(arguments)
    torch.manual_seed(args.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    data, test = load_labelled_images(args.data, args.split), load_labelled_images(args.data, args.test_split)
    measured_on = f"the split {args.test_split}"
    if torch.equal(data.pixels, test.pixels):
        # A source without splits gives all of it, twice.
        data, test = data.split(HELD_OUT)
        measured_on = f"the training (one in {HELD_OUT} of each class, held out)"
        if not len(test):
            raise ValueError(
                f"{args.data} has no test split, and too few images of a class to hold one in {HELD_OUT} out"
            )
    test = test.under(data.names)
    names = args.labels or data.names
    if len(names) != len(data.names):
        raise ValueError(f"--labels names {len(names)} classes, the data has {len(data.names)}")
    model, processor = build(args, names)
    train(model.to(device), processor, data, args, device)
    with replacing_folder(args.output_dir) as staging:
        model.save_pretrained(staging)
        processor.save_pretrained(staging)
    pictures = [Image.fromarray(image.permute(1, 2, 0).expand(-1, -1, 3).numpy()) for image in test.pixels]
    right = ImageClassifier(args.output_dir, device)(pictures).probabilities.argmax(-1) == test.labels
    # A class that the test lacks has no accuracy.
    by_class = {name: float(right[test.labels == index].float().mean()) if index in test.labels else None
                for index, name in enumerate(names)}  # fmt: skip
    accuracy = float(right.float().mean())
    write_json(
        args.output_dir / "accuracy.json",
        {"images": len(test), "measured_on": measured_on, "accuracy": accuracy, "by_class": by_class},
    )
    print(f"{accuracy:.2%} of {len(test)} images of {measured_on} recognised")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
