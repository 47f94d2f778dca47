"""Training the image classifier that scores a class experiment, on real images only: no noise, no label smoothing."""

from typing import Any

import torch
from PIL import Image
from torch.nn import functional as F
from tqdm import tqdm
from transformers import AutoModelForImageClassification, ResNetConfig, ResNetForImageClassification, ViTImageProcessor
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from ..configuration import ClassifierConfig
from ..data.image_datasets import LabelledImages, augment, load_labelled_images
from ..evaluation.classification import ImageClassifier
from ..files import replacing_folder, write_json
from ..models.digit_classifier import DigitClassifier, DigitClassifierConfig
from ..output_folder import OutputFolder
from .folder import check_is_own

HELD_OUT = 10
_FINISHED_NAME = "accuracy.json"


def build(args: ClassifierConfig, names: list[str]) -> tuple[torch.nn.Module, Any]:
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


def train(model: torch.nn.Module, processor: Any, data: LabelledImages, args: ClassifierConfig, device: str) -> None:
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


def train_classifier(args: ClassifierConfig) -> None:
    """Train, measure on held-out images, and write an ordinary transformers folder and `accuracy.json`.

    Raises:
        ValueError: The data does not fit the settings, or holds too few images, or the folder holds something else.
    """
    check_is_own(args.output_dir, _FINISHED_NAME)
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
    with OutputFolder(args.output_dir).lock:
        train(model.to(device), processor, data, args, device)
        with replacing_folder(args.output_dir) as staging:
            model.save_pretrained(staging)
            processor.save_pretrained(staging)
            told = _measured(ImageClassifier(staging, device), test, names)
            write_json(staging / _FINISHED_NAME, {"images": len(test), "measured_on": measured_on, **told})
    print(f"{told['accuracy']:.2%} of {len(test)} images of {measured_on} recognised")


def _measured(classifier: ImageClassifier, test: LabelledImages, names: list[str]) -> dict[str, Any]:
    pictures = [Image.fromarray(image.permute(1, 2, 0).expand(-1, -1, 3).numpy()) for image in test.pixels]
    right = classifier(pictures).probabilities.argmax(-1) == test.labels
    # A class that the test lacks has no accuracy.
    by_class = {name: float(right[test.labels == index].float().mean()) if index in test.labels else None
                for index, name in enumerate(names)}  # fmt: skip
    return {"accuracy": float(right.float().mean()), "by_class": by_class}
