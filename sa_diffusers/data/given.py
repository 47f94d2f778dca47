"""Samples that a caller hands in, in whatever form they are at hand."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from PIL import Image

from ..families import Objective
from ..identity import Identity, fingerprint
from ..messages import shown
from .generation import fitted
from .sample_set import SampleSet

Samples = SampleSet | torch.Tensor | Sequence[str] | Sequence[Image.Image] | Sequence[Mapping[str, Any]]
_FORMS = (
    "a SampleSet, prompts, images (PIL, or a tensor [n, channels, height, width] in [0, 1]), or dictionaries of an "
    'image and its "text"'
)


def taken(what: str, given: Any) -> Any:
    """What is handed in, as it is now: a copy of samples, and a list of whatever else comes one by one.

    Raises:
        ValueError: It is in none of the forms of `Samples`.
    """
    if given is None or isinstance(given, torch.Tensor):
        return given if given is None else given.detach().clone()
    if isinstance(given, str):
        raise ValueError(f'{what}="{shown(given)}" is a text: give a list of prompts')
    if not isinstance(given, SampleSet):
        return _items(what, given)
    texts = [*given.conditions, *(source for source in given.sources if source is not None)]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{what}: conditions and sources of a SampleSet are texts, and some of these are not")
    try:
        fingerprint([given.origin, list(given.seeds)])
    except TypeError as error:
        raise ValueError(f"{what}: origin and seeds of a SampleSet are plain data ({error})") from None
    samples = given.samples.detach().to("cpu", torch.float32, copy=True)
    return replace(given, samples=samples, conditions=list(given.conditions), sources=list(given.sources))


def given_prompts(what: str, given: Any) -> list[str] | None:
    """The prompts of what is handed in, as far as they are in it; None for bare images.

    Args:
        what: `"surrogates"`, `"replay"` or `"samples"`, for messages.
        given: In one of the forms of `Samples`.

    Raises:
        ValueError: It is in none of these forms, or empty.
    """
    if isinstance(given, SampleSet):
        prompts = list(given.conditions)
    elif isinstance(given, torch.Tensor):
        if given.ndim != 4:
            raise ValueError(
                f"{what}: a tensor of shape {list(given.shape)} holds no images: give [n, 3, height, width]"
            )
        prompts = None
    else:
        items = _items(what, given)
        kinds = {_kind(item) for item in items}
        if len(kinds) > 1:
            raise ValueError(f"{what}: {_told(items)} are not of one kind: give {_FORMS}")
        if None in kinds:
            wanted = 'an "image" (PIL) and a "text" in each' if all(isinstance(item, Mapping) for item in items) else ""
            raise ValueError(f"{what}: {_told(items)} will not do: give {wanted or _FORMS}")
        prompts = None
        if kinds == {"prompt"}:
            prompts = items
        elif kinds == {"row"}:
            prompts = [str(item["text"]) for item in items]
    if not len(given):
        raise ValueError(f"{what} is empty: give at least one, or leave it out to have samples made")
    return prompts


def are_prompts(given: Any) -> bool:
    """Whether what is handed in are prompts, to be sampled from the frozen model."""
    return not isinstance(given, (SampleSet, torch.Tensor)) and isinstance(next(iter(given), None), str)


def given_samples(
    what: str, given: Any, objective: Objective, conditions: Sequence[str], resolution: int | None = None
) -> SampleSet:
    """What is handed in as the model's samples, images encoded as the model sees them.

    Args:
        what: For messages.
        given: In one of the forms of `Samples`, but not prompts.
        objective: The model.
        conditions: Prompts to train bare images under, as many.
        resolution: Height and width in pixels; None is the model's own.

    Raises:
        ValueError: It does not fit the model, or is not finite.
    """
    if isinstance(given, SampleSet):
        result = given
    else:
        result = _encoded(what, given, objective, conditions, resolution or objective.resolution)
    expected = objective.encode_images(_blank(objective, resolution), 0).shape[1:]
    if result.samples.shape[1:] != expected:
        raise ValueError(
            f"{what}: samples of shape {list(result.samples.shape[1:])} do not fit the model, whose own are "
            f"{list(expected)}: give what it sampled, or images"
        )
    if not torch.isfinite(result.samples).all():
        raise ValueError(f"{what}: samples are not finite: look at how they were made")
    return result


def content_identity(kind: str, samples: SampleSet) -> Identity:
    """What given samples are known by: their content."""
    digest = hashlib.blake2b(samples.samples.contiguous().numpy().tobytes(), digest_size=16).hexdigest()
    return Identity(kind, {"given": samples.fingerprint, "content": digest})


def _encoded(what: str, given: Any, objective: Objective, conditions: Sequence[str], size: int) -> SampleSet:
    if isinstance(given, torch.Tensor):
        own = objective.encode_images(_blank(objective, size), 0).shape[1:]
        if given.is_floating_point() and given.shape[1:] == own != (objective.channels, size, size):
            samples, digest = given.detach().float().cpu(), "latents"
            return SampleSet(samples, list(conditions), [None] * len(samples), [0] * len(samples), {"given": digest})
        images = _as_images(what, given, size)
    else:
        items = _items(what, given)
        pictures = [item["image"] if _kind(item) == "row" else item for item in items]
        images = torch.cat([fitted(picture, size) for picture in pictures])
    seeds = list(range(len(images)))
    encoded = [objective.encode_images(image[None].to(objective.device), seed).float().cpu()
               for image, seed in zip(images, seeds, strict=True)]  # fmt: skip
    pixels = fingerprint(hashlib.blake2b(images.numpy().tobytes(), digest_size=16).hexdigest())
    return SampleSet(torch.cat(encoded), list(conditions), [None] * len(images), seeds, {"pixels": pixels})


def _as_images(what: str, given: torch.Tensor, size: int) -> torch.Tensor:
    """A tensor in [0, 1] as `[n, channels, size, size]` in [-1, 1]."""
    if not given.is_floating_point():
        raise ValueError(f"{what}: images as a tensor are in [0, 1], and these are of {given.dtype}: divide by 255")
    given = given.detach().float().cpu()
    if given.ndim != 4 or given.shape[1] not in (1, 3):
        raise ValueError(f"{what}: a tensor of shape {list(given.shape)} holds no images: give [n, 3, height, width]")
    if not torch.isfinite(given).all():
        raise ValueError(f"{what}: images that are not finite: look at how they were made")
    if given.min() < 0 or given.max() > 1:
        raise ValueError(
            f"{what}: images as a tensor are in [0, 1], and these are in [{given.min():g}, {given.max():g}]: divide "
            "them by 255, or add 1 and halve them; what the model itself sampled goes in as a SampleSet"
        )
    if given.shape[2:] != (size, size):
        raise ValueError(
            f"{what}: images of {given.shape[3]}x{given.shape[2]} pixels, but the model works on {size}x{size}: resize "
            "them, or give PIL images, which are"
        )
    return (given if given.shape[1] == 3 else given.expand(-1, 3, -1, -1)) * 2 - 1


def _blank(objective: Objective, size: int | None = None) -> torch.Tensor:
    size = size or objective.resolution
    return torch.zeros(1, 3, size, size, device=objective.device)


def _items(what: str, given: Any) -> list[Any]:
    try:
        return list(given)
    except TypeError:
        raise ValueError(
            f"{what}: what is of type {type(given).__name__} is none of the forms allowed: give {_FORMS}"
        ) from None


def _kind(item: Any) -> str | None:
    if isinstance(item, str):
        return "prompt"
    if isinstance(item, Image.Image):
        return "picture"
    if isinstance(item, Mapping) and isinstance(item.get("image"), Image.Image) and isinstance(item.get("text"), str):
        return "row"
    return None


def _told(items: Sequence[Any]) -> str:
    return " and ".join(sorted({type(item).__name__ for item in items}))
