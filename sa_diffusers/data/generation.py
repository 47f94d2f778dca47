"""Sampling the surrogate, replay and Fisher samples from the frozen model."""

import contextlib
import hashlib
import json
import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import load as load_tensors
from safetensors.torch import save
from tqdm import tqdm

from ..environment import precision_in_use
from ..families.base import Objective, SamplingSettings
from ..files import DamagedArtefact, digest_of, load_kept, remade_folder, write_bytes
from ..identity import Identity, fingerprint
from ..passes import Passes, counted, together
from ..processes import check_stop, finishing, shrinking, wait_until
from ..seeds import first_seed
from .concepts import UNIFORM_NOISE, ErasurePair, image_files
from .phrasings import fill_template
from .pictures import read_picture
from .sample_set import FORMAT_VERSION, SampleSet, sample_identity
from .sensitive import blurred

PREVIEW_IMAGES = 16
_PART = ".part-"
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


def takes_concept(pairs: Sequence[ErasurePair], templates: Sequence[str], count: int, share: float) -> list[bool]:
    """Which of `count` surrogate images the concept's own stand in for: a share of them, in each pair and phrasing."""
    rounds = [index // len(pairs) for index in range(count)]
    places = [turn // len(templates) + turn % len(templates) for turn in rounds]
    return [math.floor((place + 1) * share) > math.floor(place * share) for place in places]


def knows_noise(objective: Objective) -> bool:
    """Whether an objective knows what a model whose samples are uniform noise predicts, on whatever sample."""
    # A sample that is the mean of its pixels says nothing of noise.
    if objective.labels is None or objective.shows_means:
        return False
    samples = torch.linspace(-1, 1, 4, device=objective.device).view(1, 1, 2, 2)
    samples = samples.expand(1, objective.channels, 2, 2)
    timesteps = torch.full((1,), objective.num_train_timesteps // 2, device=objective.device)
    arguments = (samples, timesteps, torch.ones_like(samples))
    return not torch.equal(objective.uniform_noise_target(*arguments).float(), objective.target(*arguments).float())


class SampleGenerator:
    """Samples from a frozen model, in parallel over processes, and keeps what it sampled, batch by batch.

    Args:
        objective: The model.
        artifacts_dir: Folder under which sets are kept, each named after its kind and fingerprint.
        accelerator: The processes that share the work.
        base_fingerprint: Digest of the base model's weights (default: computed).
        blur: Whether the pictures of previews are blurred.
    """

    def __init__(
        self,
        objective: Objective,
        artifacts_dir: str | Path,
        accelerator: Accelerator,
        base_fingerprint: str | None = None,
        blur: bool = False,
    ) -> None:
        self.objective = objective
        self.artifacts_dir = Path(artifacts_dir)
        self.accelerator = accelerator
        self.base_fingerprint = base_fingerprint or objective.fingerprint()
        self.blur = blur

    def prompted(
        self, name: str, conditions: Sequence[str], sources: Sequence[str], first_seed: int, settings: SamplingSettings
    ) -> SampleSet:
        """One sample for each prompt in `sources`, to be trained on under `conditions`.

        Args:
            name: Kind of the set, part of its folder's name.
            conditions: Prompts to train under.
            sources: Prompts to sample with, as many.
            first_seed: The i-th sample is drawn from seed `first_seed + i`.
            settings: Sampler, steps, guidance.
        """
        seeds = list(range(first_seed, first_seed + len(sources)))
        return self.drawn(name, conditions, sources, seeds, settings)

    def surrogates(
        self, pairs: Sequence[ErasurePair], templates: Sequence[str], count: int, seed: int, settings: SamplingSettings,
        own: Sequence[bool] | None = None,
    ) -> SampleSet:  # fmt: skip
        """The surrogate set of all pairs: sampled from prompts, read from folders, or uniform noise.

        Args:
            pairs: Concepts and their surrogates.
            templates: Phrasings.
            count: Samples, over all pairs.
            seed: Of the run.
            settings: Sampler, steps, guidance.
            own: Which of them are sampled with the concept's prompt in place of the surrogate's. Their source, whose
                answer is right, stays the surrogate. Default: none.
        """
        chosen, conditions, sources = surrogate_requests(pairs, templates, count)
        first = first_seed("surrogate", seed)
        drawn, others = _by_kind(chosen, own)
        parts: list[SampleSet] = []
        if drawn:
            prompts = [conditions[i] if own and own[i] else sources[i] for i in drawn]
            under, seeds = [conditions[i] for i in drawn], [first + i for i in drawn]
            made = self.drawn("surrogate", under, prompts, seeds, settings)
            if own and any(own):
                right = [UNIFORM_NOISE if chosen[i].surrogate.kind == "noise" else sources[i] for i in drawn]
                made = replace(made, sources=right, drawn=prompts)
            parts.append(made)
        for index in others:
            parts.append(self.from_pixels([chosen[i] for i in index], [conditions[i] for i in index],
                                           [first + i for i in index], settings))  # fmt: skip
        whole = parts[0]
        for part in parts[1:]:
            whole = whole + part
        return whole

    def surrogate_identity(
        self, pairs: Sequence[ErasurePair], templates: Sequence[str], count: int, seed: int, settings: SamplingSettings,
        own: Sequence[bool] | None = None,
    ) -> Identity:  # fmt: skip
        """What `surrogates` depends on, known before anything is sampled. Images count by their bytes."""
        chosen, conditions, sources = surrogate_requests(pairs, templates, count)
        folders = {pair.surrogate.value for pair in pairs if pair.surrogate.kind == "images"}
        digests = {folder: [digest_of(file) for file in image_files(folder)] for folder in sorted(folders)}
        kinds = [pair.surrogate.kind for pair in chosen]
        values = [fingerprint(digests[pair.surrogate.value]) if pair.surrogate.kind == "images" else source
                  for pair, source in zip(chosen, sources, strict=True)]  # fmt: skip
        facts = {"conditions": conditions, "kinds": kinds, "sources": values,
                 "first_seed": first_seed("surrogate", seed), "origin": self._origin(settings)}  # fmt: skip
        if own and any(own):
            facts["own"] = [place for place, is_own in enumerate(own) if is_own]
        return Identity("surrogates", facts)

    def identity(self, name: str, conditions: Sequence[str], sources: Sequence[str | None], seeds: Sequence[int],
                 settings: SamplingSettings) -> Identity:  # fmt: skip
        """What a sampled set depends on. The batch size is no part of it: it changes rounding only."""
        return sample_identity(name, list(conditions), list(sources), list(seeds), self._origin(settings))

    def folder(self, name: str, conditions: Sequence[str], sources: Sequence[str | None], seeds: Sequence[int],
               settings: SamplingSettings) -> Path:  # fmt: skip
        """Where a set is kept; it is reused when it is there."""
        return self.identity(name, conditions, sources, seeds, settings).folder(self.artifacts_dir)

    def _origin(self, settings: SamplingSettings) -> dict[str, Any]:
        sampling = {name: value for name, value in settings.to_dict().items() if name != "batch_size"}
        return {"base_model": self.base_fingerprint, "kind": self.objective.kind, **sampling,
                "precision": precision_in_use(self.accelerator), "format": FORMAT_VERSION}  # fmt: skip

    def drawn(self, name: str, conditions: Sequence[str], sources: Sequence[str], seeds: Sequence[int],
              settings: SamplingSettings, preview: bool = True) -> SampleSet:  # fmt: skip
        """As `prompted`, with a seed given for each sample, and a preview of its pictures only if it is asked for.

        Raises:
            FloatingPointError: A sample is not finite; none is kept.
            Interrupted: The run is to stop. What was sampled is kept, and the same call goes on from there.
        """
        wanted = self.identity(name, conditions, sources, seeds, settings)
        folder = wanted.folder(self.artifacts_dir)
        is_main = self.accelerator.is_main_process

        def load(place: Path) -> SampleSet:
            found = SampleSet.load(place)
            if found.fingerprint != wanted.digest:
                raise DamagedArtefact(f"{place} holds other samples than its name says")
            return found

        def kept() -> SampleSet | None:
            return load_kept(folder, load, is_main)

        result = kept()
        while result is None and not is_main and folder.is_dir():
            # A damaged one: the main process sets it aside.
            check_stop()
            time.sleep(0.1)
            result = kept()
        if result is not None:
            if is_main:
                # A run that died between the set's arrival and its parts' removal.
                for left in folder.parent.glob(f"{_PART}{folder.name}-*"):
                    shutil.rmtree(left, ignore_errors=True)
                # Sets of before do not say so: theirs may be clear.
                if preview and result.black_images is not None and bool(result.blurred) != self.blur:
                    with remade_folder(folder) as place:
                        self._save(place, result)
            return result
        # The batch size changes rounding, and what goes on must end in the same bits.
        parts = folder.with_name(f"{_PART}{folder.name}-{settings.batch_size}")
        self._sample(name, sources, seeds, settings, parts, folder)
        starts = range(0, len(sources), settings.batch_size)
        if is_main:
            # Parts go away when another run with the same set is done with it.
            wait_until(lambda: all(_part(parts, start).is_file() for start in starts) or folder.is_dir())
            if not folder.is_dir():
                with finishing():
                    batches = [_read_part(_part(parts, start)) for start in starts]
                    passes = together(_part_passes(_part(parts, start)) for start in starts)
                    if not any(batch is None for batch in batches):
                        self._keep(folder, batches, conditions, sources, seeds, settings, preview, passes)
            if folder.is_dir():
                shutil.rmtree(parts, ignore_errors=True)
        else:
            wait_until(folder.is_dir)
        result = kept()
        return result if result is not None else self.drawn(name, conditions, sources, seeds, settings, preview)

    def _keep(self, folder: Path, parts: Sequence[torch.Tensor | None], conditions: Sequence[str],
              sources: Sequence[str], seeds: Sequence[int], settings: SamplingSettings,
              preview: bool, passes: Passes | None) -> None:  # fmt: skip
        samples = torch.cat([part for part in parts if part is not None])
        result = SampleSet(samples, list(conditions), list(sources), list(seeds), self._origin(settings),
                           passes=passes)  # fmt: skip
        self._save(folder, result, preview)

    def _save(self, folder: Path, result: SampleSet, preview: bool = True) -> None:
        pictures = []
        if preview:
            pictures = self._decoded(result.samples[:PREVIEW_IMAGES])
            result.black_images, result.blurred = count_black(pictures), self.blur
        result.save(folder, [blurred(picture) for picture in pictures] if self.blur else pictures)

    def _decoded(self, samples: torch.Tensor) -> list[Image.Image]:
        def decode(size: int) -> list[Image.Image]:
            return [picture for part in samples.split(size)
                    for picture in self.objective.decode(part.to(self.objective.device))]  # fmt: skip

        return shrinking(decode, max(len(samples), 1), "sample_batch_size")

    def _sample(self, name: str, prompts: Sequence[str], seeds: Sequence[int], settings: SamplingSettings,
                parts: Path, folder: Path) -> None:  # fmt: skip
        """Sample this process's batches into files of their own, those that are not there yet."""
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        # Whole batches go to processes, so that a batch holds the same images however many processes there are.
        mine = list(range(0, len(prompts), settings.batch_size))[rank::processes]
        missing = [start for start in mine if _read_part(_part(parts, start)) is None]
        done = min((len(mine) - len(missing)) * settings.batch_size * processes, len(prompts))
        with (
            tqdm(
                total=len(prompts),
                initial=done,
                desc=f"sampling {name}",
                unit="image",
                leave=name != "evaluation",
                disable=rank > 0,
            ) as bar,
            finishing(),
        ):
            for start in missing:
                check_stop()
                if folder.is_dir():
                    return
                batch = slice(start, start + settings.batch_size)
                with counted(self.objective.module) as passes:
                    samples = self._batch(list(prompts[batch]), list(seeds[batch]), settings)
                try:
                    _write_part(_part(parts, start), samples, passes)
                except OSError:
                    # Another run has made the set, and removed all parts.
                    if not folder.is_dir():
                        raise
                    return
                bar.update(min(len(samples) * processes, len(prompts) - bar.n))

    def _batch(self, prompts: list[str], seeds: list[int], settings: SamplingSettings) -> torch.Tensor:
        def sample(size: int) -> torch.Tensor:
            pieces = []
            for start in range(0, len(prompts), size):
                piece = slice(start, start + size)
                with self.accelerator.autocast():
                    pieces.append(self.objective.sample(prompts[piece], seeds[piece], settings).float().cpu())
            return torch.cat(pieces)

        samples = shrinking(sample, settings.batch_size, "sample_batch_size")
        check_finite(samples, prompts[0], precision_in_use(self.accelerator), settings)
        return samples

    def from_pixels(self, pairs: Sequence[ErasurePair], conditions: Sequence[str], seeds: Sequence[int],
                    settings: SamplingSettings) -> SampleSet:  # fmt: skip
        """Surrogates that no prompt samples, one a seed: uniform noise, or images of a folder in turn."""
        size = settings.resolution or self.objective.resolution
        files: dict[str, list[Path]] = {}
        turn: dict[str, int] = {}
        latents = []
        digest = hashlib.blake2b(digest_size=8)
        with finishing():
            for pair, seed in zip(tqdm(pairs, desc="encoding surrogates", unit="image"), seeds, strict=True):
                check_stop()
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
        return SampleSet(torch.cat(latents), list(conditions), sources, list(seeds), origin, 0, Passes())


def _by_kind(pairs: Sequence[ErasurePair], own: Sequence[bool] | None) -> tuple[list[int], list[list[int]]]:
    """Places of the samples that a prompt samples, and of the others, images and noise apart."""
    kinds = ["prompt" if own and own[i] else pair.surrogate.kind for i, pair in enumerate(pairs)]
    places = {kind: [i for i, own_kind in enumerate(kinds) if own_kind == kind]
              for kind in ("prompt", "images", "noise")}  # fmt: skip
    return places["prompt"], [places[kind] for kind in ("images", "noise") if places[kind]]


def _part(parts: Path, start: int) -> Path:
    return parts / f"{start:09d}.safetensors"


def _write_part(path: Path, samples: torch.Tensor, passes: Passes | None = None) -> None:
    samples = samples.contiguous()
    content = {"digest": _part_digest(path, samples), "passes": json.dumps(passes and passes.to_dict())}
    write_bytes(path, save({"samples": samples}, metadata=content), flush=False)


def _read_part(path: Path) -> torch.Tensor | None:
    """None if it is not there or not whole."""
    try:
        with safe_open(path, "pt") as file:
            content = file.metadata() or {}
        samples = load_tensors(path.read_bytes())["samples"]
        if content.get("digest") == _part_digest(path, samples) and torch.isfinite(samples).all():
            return samples
    except (OSError, SafetensorError, KeyError, ValueError):
        pass
    path.unlink(missing_ok=True)
    return None


def _part_passes(path: Path) -> Passes | None:
    """What a part took of the network; None where it does not say."""
    with contextlib.suppress(OSError, SafetensorError, KeyError, ValueError), safe_open(path, "pt") as file:
        return Passes.read(json.loads((file.metadata() or {})["passes"]))
    return None


def _part_digest(path: Path, tensor: torch.Tensor) -> str:
    """Of samples, their shape and their place: a part of another set, or of elsewhere in this one, will not do."""
    digest = hashlib.blake2b(f"{path.parent.name}/{path.name} {list(tensor.shape)}".encode(), digest_size=16)
    digest.update(memoryview(tensor.contiguous().flatten().view(torch.uint8).numpy()))
    return digest.hexdigest()


def load_image(path: str | Path, size: int) -> torch.Tensor:
    """Read an image as `[1, 3, size, size]` in [-1, 1]: resized on its shorter side, cropped in the middle.

    It is what `read_picture` makes of the file: turned as its EXIF data say, transparency over white.

    Raises:
        ValueError: The file is not a readable image.
    """
    return fitted(read_picture(path, str(path)), size)


def fitted(picture: Image.Image, size: int) -> torch.Tensor:
    """A picture as `[1, 3, size, size]` in [-1, 1]: resized on its shorter side, cropped in the middle."""
    image = picture.convert("RGB")
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


def sampled(
    objective: Objective, prompts: Sequence[str], seeds: Sequence[int], settings: SamplingSettings
) -> torch.Tensor:
    """Samples of a model, in smaller batches where those of the settings do not fit into memory: beside what training
    or Fisher information holds, fewer do than before."""

    def sample(size: int) -> torch.Tensor:
        return objective.sample(prompts, seeds, replace(settings, batch_size=size))

    return shrinking(sample, min(settings.batch_size, len(prompts)), "sample_batch_size")


def check_finite(samples: torch.Tensor, prompt: str, precision: str, settings: SamplingSettings) -> None:
    """Refuse samples that are not finite.

    Raises:
        FloatingPointError: One is not.
    """
    if torch.isfinite(samples).all():
        return
    cause = (
        f"the precision in use is {precision}: sample with --mixed_precision no, or bf16 in place of fp16"
        if precision != "no"
        else f"precision is not the cause; look at the model's weights and at --sampler {settings.sampler}, which may "
        "not suit the model's noise schedule"
    )
    raise FloatingPointError(f'samples of "{prompt}" are not finite, and none is kept. {cause}')


def count_black(pictures: Sequence[Image.Image]) -> int:
    """How many pictures are black all over, as a safety checker leaves them."""
    return sum(max(high for _, high in picture.convert("RGB").getextrema()) < _BLACK_LEVEL for picture in pictures)
