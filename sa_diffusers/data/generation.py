"""Drawing the surrogate, replay and Fisher samples from the frozen model."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from PIL import Image
from tqdm import tqdm

from ..objectives.base import Objective, SamplingSettings
from .pictures import read_picture
from .prompts import UNIFORM_NOISE, ErasurePair, fill_template, image_files
from .sample_set import MANIFEST_NAME, SampleSet

PREVIEW_IMAGES = 16
# Streams of seeds that never meet: samples of one stage share no initial noise with another's.
SURROGATE_SEEDS, REPLAY_SEEDS, CONCEPT_SEEDS = 0, 10_000_000, 20_000_000
_BLACK_LEVEL = 4


def surrogate_requests(
    pairs: Sequence[ErasurePair], templates: Sequence[str], count: int
) -> tuple[list[ErasurePair], list[str], list[str]]:
    """Spread `count` surrogate images evenly over pairs and phrasings.

    Returns:
        For each image its pair, the concept's prompt, and the surrogate in the same phrasing.
    """
    chosen, conditions, sources = [], [], []
    for index in range(count):
        pair = pairs[index % len(pairs)]
        template = templates[index // len(pairs) % len(templates)]
        chosen.append(pair)
        conditions.append(fill_template(template, pair.concept))
        sources.append(fill_template(template, pair.surrogate.value))
    return chosen, conditions, sources


class SampleGenerator:
    """Draws samples from a frozen model, in parallel over processes, and keeps them.

    Args:
        objective: The model.
        artifacts_dir: Folder under which sets are kept, each named after its kind and fingerprint.
        accelerator: The processes that share the work.
        base_fingerprint: Digest of the base model's weights (default: computed).
    """

    def __init__(
        self,
        objective: Objective,
        artifacts_dir: str | Path,
        accelerator: Accelerator,
        base_fingerprint: str | None = None,
    ) -> None:
        self.objective = objective
        self.artifacts_dir = Path(artifacts_dir)
        self.accelerator = accelerator
        self.base_fingerprint = base_fingerprint or objective.fingerprint()

    def prompted(
        self, name: str, conditions: Sequence[str], sources: Sequence[str], first_seed: int, settings: SamplingSettings
    ) -> SampleSet:
        """One sample for each prompt in `sources`, to be trained on under `conditions`.

        Args:
            name: Kind of the set, part of its folder's name.
            conditions: Prompts to train under.
            sources: Prompts to draw with, as many.
            first_seed: The i-th sample is drawn from seed `first_seed + i`.
            settings: Sampler, steps, guidance.
        """
        seeds = list(range(first_seed, first_seed + len(sources)))
        return self.drawn(name, conditions, sources, seeds, settings)

    def surrogates(
        self, pairs: Sequence[ErasurePair], templates: Sequence[str], count: int, seed: int, settings: SamplingSettings
    ) -> SampleSet:
        """The surrogate set of all pairs: drawn from prompts, read from folders, or uniform noise."""
        chosen, conditions, sources = surrogate_requests(pairs, templates, count)
        first_seed = SURROGATE_SEEDS + seed * 1000
        by_kind = {kind: [i for i, pair in enumerate(chosen) if pair.surrogate.kind == kind]
                   for kind in ("prompt", "images", "noise")}  # fmt: skip
        parts: list[SampleSet] = []
        if by_kind["prompt"]:
            index = by_kind["prompt"]
            seeds = [first_seed + i for i in index]
            parts.append(
                self.drawn("surrogate", [conditions[i] for i in index], [sources[i] for i in index], seeds, settings)
            )
        for kind in ("images", "noise"):
            if by_kind[kind]:
                index = by_kind[kind]
                parts.append(self._from_pixels([chosen[i] for i in index], [conditions[i] for i in index],
                                               [first_seed + i for i in index], settings))  # fmt: skip
        whole = parts[0]
        for part in parts[1:]:
            whole = whole + part
        return whole

    def folder(self, name: str, conditions: Sequence[str], sources: Sequence[str | None], seeds: Sequence[int],
               settings: SamplingSettings) -> Path:  # fmt: skip
        """Where a set is kept; it is reused when it is there."""
        empty = torch.empty(len(conditions), 0)
        identity = SampleSet(empty, list(conditions), list(sources), list(seeds), self._origin(settings))
        return self.artifacts_dir / f"{name}-{identity.fingerprint}"

    def _origin(self, settings: SamplingSettings) -> dict:
        return {"base_model": self.base_fingerprint, "kind": self.objective.kind, **settings.to_dict()}

    def drawn(self, name: str, conditions: Sequence[str], sources: Sequence[str], seeds: Sequence[int],
              settings: SamplingSettings, preview: bool = True) -> SampleSet:  # fmt: skip
        """As `prompted`, with a seed given for each sample, and a preview of its pictures only if it is asked for."""
        folder = self.folder(name, conditions, sources, seeds, settings)
        if (folder / MANIFEST_NAME).is_file():
            return SampleSet.load(folder)
        samples = self._draw(name, sources, seeds, settings)
        result = SampleSet(samples, list(conditions), list(sources), list(seeds), self._origin(settings))
        if self.accelerator.is_main_process:
            pictures = self.objective.decode(samples.to(self.objective.device)) if preview else []
            result.black_images = count_black(pictures) if preview else None
            result.save(folder, pictures[:PREVIEW_IMAGES])
        self.accelerator.wait_for_everyone()
        return SampleSet.load(folder)

    def _draw(
        self, name: str, prompts: Sequence[str], seeds: Sequence[int], settings: SamplingSettings
    ) -> torch.Tensor:
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        # Whole batches go to processes, so that a batch holds the same images however many processes there are.
        starts = range(0, len(prompts), settings.batch_size)
        mine = list(starts)[rank::processes]
        parts: list[tuple[int, torch.Tensor]] = []
        with tqdm(total=len(prompts), desc=f"sampling {name}", unit="image", disable=rank > 0) as bar:
            for start in mine:
                batch = slice(start, start + settings.batch_size)
                with self.accelerator.autocast():
                    drawn = self.objective.sample(prompts[batch], seeds[batch], settings)
                parts.append((start, drawn.float().cpu()))
                bar.update(min(len(drawn) * processes, len(prompts) - bar.n))
        if processes > 1:
            parts = gather_object(parts)
        return torch.cat([drawn for _, drawn in sorted(parts, key=lambda part: part[0])])

    def _from_pixels(self, pairs: Sequence[ErasurePair], conditions: Sequence[str], seeds: Sequence[int],
                     settings: SamplingSettings) -> SampleSet:  # fmt: skip
        size = settings.resolution or self.objective.resolution
        files: dict[str, list[Path]] = {}
        turn: dict[str, int] = {}
        latents = []
        digest = hashlib.blake2b(digest_size=8)
        for pair, seed in zip(tqdm(pairs, desc="encoding surrogates", unit="image"), seeds, strict=True):
            if pair.surrogate.kind == "noise":
                generator = torch.Generator().manual_seed(seed)
                # In the model's own channels: the grey of three would be their mean, which is not uniform.
                image = torch.rand(1, self.objective.channels, size, size, generator=generator) * 2 - 1
            else:
                folder = pair.surrogate.value
                paths = files.setdefault(folder, image_files(folder))
                image = load_image(paths[turn.get(folder, 0) % len(paths)], size)
                turn[folder] = turn.get(folder, 0) + 1
            digest.update(image.numpy().tobytes())
            latents.append(self.objective.encode_images(image.to(self.objective.device), seed).cpu())
        origin = {**self._origin(settings), "pixels": digest.hexdigest()}
        sources = [UNIFORM_NOISE if pair.surrogate.kind == "noise" else None for pair in pairs]
        return SampleSet(torch.cat(latents), list(conditions), sources, list(seeds), origin, 0)


def load_image(path: str | Path, size: int) -> torch.Tensor:
    """Read an image as `[1, 3, size, size]` in [-1, 1]: resized on its shorter side, cropped in the middle.

    It is what `read_picture` makes of the file: turned as its EXIF data say, transparency over white.

    Raises:
        ValueError: The file is not a readable image.
    """
    image = read_picture(path, str(path)).convert("RGB")
    # Of a long strip only the middle is seen; resized as a whole it could fill the memory.
    longest = 16 * min(image.size)
    if max(image.size) > longest:
        left, top = (max(side - longest, 0) // 2 for side in image.size)
        image = image.crop((left, top, left + min(image.width, longest), top + min(image.height, longest)))
    scale = size / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    image = image.resize((width, height), Image.Resampling.LANCZOS)
    left, top = (width - size) // 2, (height - size) // 2
    pixels = np.asarray(image.crop((left, top, left + size, top + size)), dtype=np.float32)
    return torch.from_numpy(pixels / 127.5 - 1).permute(2, 0, 1)[None]


def count_black(pictures: Sequence[Image.Image]) -> int:
    """How many pictures are black all over, as a safety checker leaves them."""
    return sum(max(high for _, high in picture.convert("RGB").getextrema()) < _BLACK_LEVEL for picture in pictures)
