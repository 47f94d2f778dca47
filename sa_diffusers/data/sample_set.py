"""Samples of the frozen model, with the prompts and seeds that they came from, as a folder."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..files import DamagedArtefact, new_folder, read_sealed, replacing_folder, write_sealed
from ..identity import Identity, fingerprint
from ..passes import Passes, together
from .concepts import UNIFORM_NOISE

SAMPLES_NAME = "samples.safetensors"
MANIFEST_NAME = "manifest.json"
PREVIEW_NAME = "preview"
FORMAT_VERSION = 2


@dataclass
class SampleSet:
    """Samples and where they came from.

    Attributes:
        samples: `[n, ...]` float32 on the CPU, what the denoiser works on (latents, for latent diffusion).
        conditions: For each sample the prompt under which the model is to be trained on it.
        sources: For each sample the prompt that drew it; where no prompt did, `UNIFORM_NOISE` for such noise and None
            for an image of the user's.
        seeds: For each sample the seed that drew it.
        origin: The base model's fingerprint and the sampling settings.
        black_images: How many of the previewed pictures are black (None: there is no preview).
        blurred: Whether the pictures of the preview are blurred; None where that is not on record. No part of the
            fingerprint.
        passes: What sampling them took of the network; None where that is not on record. No part of the fingerprint.
        drawn: For each sample the prompt that drew it, where a concept's own stand among its surrogate's and have the
            same sources; None where `sources` says it.
    """

    samples: torch.Tensor
    conditions: list[str]
    sources: list[str | None]
    seeds: list[int]
    origin: dict[str, Any] = field(default_factory=dict)
    black_images: int | None = None
    passes: Passes | None = None
    drawn: list[str | None] | None = None
    blurred: bool | None = None

    def __post_init__(self) -> None:
        drawn = self.sources if self.drawn is None else self.drawn
        lengths = {len(self.samples), len(self.conditions), len(self.sources), len(self.seeds), len(drawn)}
        if len(lengths) != 1:
            raise ValueError(f"samples, conditions, sources and seeds must be equally many, but there are {lengths}")

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def fingerprint(self) -> str:
        """What identifies these samples before they are drawn."""
        facts = sample_facts(self.conditions, self.sources, self.seeds, self.origin)
        return fingerprint(facts if self.drawn is None else {**facts, "drawn": self.drawn})

    @property
    def are_own(self) -> list[bool]:
        """Which samples are a concept's own, and not what their source draws."""
        return [first != second for first, second in zip(self.drawn or self.sources, self.sources, strict=True)]

    def subset(self, index: list[int]) -> "SampleSet":
        return SampleSet(
            samples=self.samples[index],
            conditions=[self.conditions[i] for i in index],
            sources=[self.sources[i] for i in index],
            seeds=[self.seeds[i] for i in index],
            origin=self.origin,
            drawn=self.drawn and [self.drawn[i] for i in index],
        )

    def under_their_sources(self) -> "SampleSet":
        """The samples whose source is a prompt, to be trained on under it: surrogates, as replay of themselves."""
        kept = self.subset([place for place, source in enumerate(self.sources) if is_prompt(source)])
        kept.conditions = [source for source in kept.sources if is_prompt(source)]
        return kept

    def __add__(self, other: "SampleSet") -> "SampleSet":
        drawn = [*(self.drawn or self.sources), *(other.drawn or other.sources)]
        return SampleSet(
            samples=torch.cat([self.samples, other.samples]),
            conditions=self.conditions + other.conditions,
            sources=self.sources + other.sources,
            seeds=self.seeds + other.seeds,
            origin={"parts": [self.origin, other.origin]},
            passes=together([self.passes, other.passes]),
            drawn=drawn if self.drawn or other.drawn else None,
        )

    def save(self, folder: str | Path, pictures: list[Image.Image] | None = None) -> None:
        """Write `samples.safetensors`, `manifest.json` and, if given, pictures under `preview/`."""
        with (replacing_folder if Path(folder).is_dir() else new_folder)(folder) as staging:
            save_file({"samples": self.samples.contiguous()}, staging / SAMPLES_NAME)
            for index, picture in enumerate(pictures or []):
                (staging / PREVIEW_NAME).mkdir(exist_ok=True)
                picture.save(staging / PREVIEW_NAME / f"{index:04d}.png")
            values = {
                "fingerprint": self.fingerprint,
                "origin": self.origin,
                "black_images": self.black_images,
                "blurred": self.blurred,
                "conditions": self.conditions,
                "sources": self.sources,
                "seeds": self.seeds,
                "drawn": self.drawn,
                "passes": self.passes and self.passes.to_dict(),
            }
            write_sealed(staging, MANIFEST_NAME, FORMAT_VERSION, values)

    @classmethod
    def load(cls, folder: str | Path) -> "SampleSet":
        """Read what `save` wrote, and compare its digests.

        Raises:
            DamagedArtefact: The folder is not whole, or not what was written.
            ValueError: It is of another format.
        """
        folder = Path(folder)
        manifest = read_sealed(folder, MANIFEST_NAME, FORMAT_VERSION, "a set of samples")
        try:
            result = cls(
                samples=load_file(folder / SAMPLES_NAME)["samples"],
                conditions=manifest["conditions"],
                sources=manifest["sources"],
                seeds=manifest["seeds"],
                origin=manifest["origin"],
                black_images=manifest["black_images"],
                passes=Passes.read(manifest.get("passes")),
                drawn=manifest.get("drawn"),
                blurred=manifest.get("blurred"),
            )
        except (KeyError, ValueError, TypeError, FileNotFoundError, SafetensorError) as error:
            raise DamagedArtefact(f"{folder} is not a set of samples ({error})") from error
        if not torch.isfinite(result.samples).all():
            raise DamagedArtefact(f"{folder} holds samples that are not finite")
        return result


def sample_facts(
    conditions: list[str], sources: list[str | None], seeds: list[int], origin: dict[str, Any]
) -> dict[str, Any]:
    """What samples depend on: the facts of their identity."""
    return {"conditions": conditions, "sources": sources, "seeds": seeds, "origin": origin}


def sample_identity(
    kind: str, conditions: list[str], sources: list[str | None], seeds: list[int], origin: dict[str, Any]
) -> Identity:
    """The identity of a set that is kept; its digest is the set's `fingerprint`."""
    return Identity(kind, sample_facts(conditions, sources, seeds, origin))


def is_prompt(source: str | None) -> TypeGuard[str]:
    """Whether a sample's source is the prompt that drew it."""
    return source not in (None, UNIFORM_NOISE)
