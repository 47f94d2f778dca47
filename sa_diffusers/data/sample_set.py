"""Samples of the frozen model, with the prompts and seeds that they came from, as a folder."""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from ..files import read_json, replacing_folder, write_json
from .prompts import UNIFORM_NOISE

SAMPLES_NAME = "samples.safetensors"
MANIFEST_NAME = "manifest.json"
PREVIEW_NAME = "preview"
FORMAT_VERSION = 1


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
        black_images: Number of samples whose pictures are black (None: not decoded).
    """

    samples: torch.Tensor
    conditions: list[str]
    sources: list[str | None]
    seeds: list[int]
    origin: dict[str, Any] = field(default_factory=dict)
    black_images: int | None = None

    def __post_init__(self) -> None:
        lengths = {len(self.samples), len(self.conditions), len(self.sources), len(self.seeds)}
        if len(lengths) != 1:
            raise ValueError(f"samples, conditions, sources and seeds must be equally many, but there are {lengths}")

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def fingerprint(self) -> str:
        """What identifies these samples before they are drawn."""
        return fingerprint(
            {"conditions": self.conditions, "sources": self.sources, "seeds": self.seeds, "origin": self.origin}
        )

    def subset(self, index: list[int]) -> "SampleSet":
        return SampleSet(
            samples=self.samples[index],
            conditions=[self.conditions[i] for i in index],
            sources=[self.sources[i] for i in index],
            seeds=[self.seeds[i] for i in index],
            origin=self.origin,
        )

    def under_their_sources(self) -> "SampleSet":
        """The samples that a prompt drew, to be trained on under that prompt: surrogates, as replay of themselves."""
        kept = self.subset([place for place, source in enumerate(self.sources) if is_prompt(source)])
        kept.conditions = [source for source in kept.sources if is_prompt(source)]
        return kept

    def __add__(self, other: "SampleSet") -> "SampleSet":
        return SampleSet(
            samples=torch.cat([self.samples, other.samples]),
            conditions=self.conditions + other.conditions,
            sources=self.sources + other.sources,
            seeds=self.seeds + other.seeds,
            origin={"parts": [self.origin, other.origin]},
        )

    def save(self, folder: str | Path, pictures: list[Image.Image] | None = None) -> None:
        """Write `samples.safetensors`, `manifest.json` and, if given, pictures under `preview/`."""
        with replacing_folder(folder) as staging:
            save_file({"samples": self.samples.contiguous()}, staging / SAMPLES_NAME)
            for index, picture in enumerate(pictures or []):
                (staging / PREVIEW_NAME).mkdir(exist_ok=True)
                picture.save(staging / PREVIEW_NAME / f"{index:04d}.png")
            write_json(
                staging / MANIFEST_NAME,
                {
                    "format_version": FORMAT_VERSION,
                    "fingerprint": self.fingerprint,
                    "origin": self.origin,
                    "black_images": self.black_images,
                    "conditions": self.conditions,
                    "sources": self.sources,
                    "seeds": self.seeds,
                },
            )

    @classmethod
    def load(cls, folder: str | Path) -> "SampleSet":
        """Read what `save` wrote.

        Raises:
            ValueError: The folder is not whole, or of another format.
        """
        folder = Path(folder)
        for name in (SAMPLES_NAME, MANIFEST_NAME):
            if not (folder / name).is_file():
                raise ValueError(f"{folder} is not a set of samples: it has no {name}")
        manifest = read_json(folder / MANIFEST_NAME)
        if manifest.get("format_version") != FORMAT_VERSION:
            raise ValueError(
                f"{folder} has format {manifest.get('format_version')}, this version reads {FORMAT_VERSION}: delete "
                "the folder, it will be made again"
            )
        return cls(
            samples=load_file(folder / SAMPLES_NAME)["samples"],
            conditions=manifest["conditions"],
            sources=manifest["sources"],
            seeds=manifest["seeds"],
            origin=manifest["origin"],
            black_images=manifest["black_images"],
        )


def is_prompt(source: str | None) -> TypeGuard[str]:
    """Whether a sample's source is the prompt that drew it."""
    return source not in (None, UNIFORM_NOISE)


def fingerprint(value: Any) -> str:
    """A short digest of plain data."""
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=8).hexdigest()
