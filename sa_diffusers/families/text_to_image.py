"""What text-to-image models of diffusers share: prompts through tokenizers and text encoders, pictures through an
autoencoder, sampling by a pipeline of diffusers."""

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.training_utils import offload_models
from PIL import Image
from torch import nn

from ..footprint import bytes_of, fits_beside, free_on
from ..messages import shown, shown_error
from ..processes import is_out_of_memory
from .base import Conditions, SamplingSettings, TextEncoder, digest_of
from .distilled import distilled_in_memory
from .scheduled import ScheduledObjective
from .trained import save_trained

# Eight images of 512x512: what a small GPU decodes at once.
_DECODED_LATENT_PIXELS = 8 * 64 * 64
_ENCODED_PROMPTS = 64
# What pipelines call the conditions of models that take hidden states and a pooled embedding, in this order.
_EMBEDDINGS = ("prompt_embeds", "pooled_prompt_embeds")


class TextToImageObjective(ScheduledObjective):
    """The part of an objective that belongs to prompts and pictures; a class beside it brings path and samplers.

    A family names its parts below and says what `encode` and `call` are.

    Args:
        pipeline: The frozen pipeline. Its denoiser becomes the trainable module.
        settings: As of `Family.from_pipeline`.

    Attributes:
        denoiser: Name of the part that is trained.
        text_parts: Names of tokenizers and their text encoders; those that a pipeline lacks are left out.
        read_tokens: Tokenizer -> tokens that its encoder is given, where that is not the tokenizer's own limit.
        sampled_by: The pipeline that samples from a prompt alone, whatever the class of the given one.
        unsampled: What that pipeline is made with in place of the given one's parts and settings.
        samples_with: Names of parts that it takes beside the denoiser, though it is given embeddings and gives latents.
        takes_mode: Whether a sample is the most likely latents of an image, in place of latents drawn from the
            autoencoder's posterior.
    """

    reduction = "mean"
    script = "train_sa.py"
    denoiser = "unet"
    text_parts: Sequence[tuple[str, str]] = (("tokenizer", "text_encoder"),)
    read_tokens: Mapping[str, int] = {}
    sampled_by: type[DiffusionPipeline]
    unsampled: Mapping[str, Any] = {}
    samples_with: Sequence[str] = ()
    takes_mode = False
    # The model's device while the denoiser rests elsewhere.
    _place: torch.device | None = None

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        prediction_type: str | None = None,
        snr_gamma: float | None = None,
        noise_offset: float = 0.0,
    ) -> None:
        # A sibling's parts are those of the pipeline that samples from a prompt alone.
        self.pipeline = pipeline if type(pipeline) is self.sampled_by else made_of(self.sampled_by, pipeline)
        self.module = getattr(pipeline, self.denoiser)
        if told := distilled_in_memory(pipeline):
            self.defaults = {**self.defaults, **told.defaults}
        super().__init__(pipeline.scheduler, prediction_type, snr_gamma, noise_offset)  # type: ignore[call-arg]
        for part in (pipeline.vae, *self._encoders()):
            part.requires_grad_(False)

    @classmethod
    def check_parts(cls, place: str, parts: Mapping[str, list], read: Callable[[str], Mapping[str, Any]]) -> None:
        super().check_parts(place, parts, read)
        needed = [cls.denoiser, "vae", *(part for pair in cls.text_parts for part in pair[::-1]), "scheduler"]
        missing = [part for part in needed if part not in parts and part not in cls.optional_parts]
        if missing:
            raise ValueError(f"{place} has no {' and no '.join(missing)}: give a whole pipeline")

    def _texts(self) -> list[tuple[str, Any, nn.Module]]:
        """Tokenizers by name, with their encoders."""
        named = [(one, getattr(self.pipeline, one), getattr(self.pipeline, other)) for one, other in self.text_parts]
        return [text for text in named if text[2] is not None]

    def _encoders(self) -> list[nn.Module]:
        return [encoder for _, _, encoder in self._texts()]

    @property
    def resolution(self) -> int:
        return self.module.config.sample_size * self.pipeline.vae_scale_factor

    def to(self, device: torch.device | str) -> "TextToImageObjective":
        for component in (self.module, self.pipeline.vae, *self._encoders()):
            component.to(device)
        return self

    def place(self, device: torch.device | str) -> "TextToImageObjective":
        self.module.to(device)
        for part in (self.pipeline.vae, *self._encoders()):
            part.to("cpu")
        return self

    @contextlib.contextmanager
    def at_hand(self, *parts: nn.Module) -> Iterator[None]:
        """Parts are on the model's device meanwhile, wherever they rest."""
        device = self.device
        away = [
            part for part in parts if any(value.device != device for value in (*part.parameters(), *part.buffers()))
        ]
        with offload_models(*away, device=device):
            yield

    @property
    def device(self) -> torch.device:
        return self._place or super().device

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Text encoders are on the model's device meanwhile; where they find no room, the denoiser waits on the CPU."""
        encoders, device = self._encoders(), self.device
        free = free_on(device)
        with contextlib.ExitStack() as stack:
            if free is not None:
                away = (value for part in encoders for value in part.parameters() if value.device != device)
                if not fits_beside(bytes_of(away), free):
                    stack.enter_context(self.waiting())
            stack.enter_context(self.at_hand(*encoders))
            yield

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """The denoiser rests on the CPU meanwhile; the model's device stays what it was."""
        self._place = device = self.device
        self.module.to("cpu")
        if device.type == "cuda":
            torch.cuda.empty_cache()
        try:
            yield
        finally:
            self.module.to(device)
            self._place = None

    @contextlib.contextmanager
    def autoencoder(self) -> Iterator[Any]:
        """The autoencoder, on the model's device and in float32 meanwhile: in half precision some overflow."""
        vae = self.pipeline.vae
        kind = vae.dtype
        with self.at_hand(vae):
            # Not by its own `to`, which warns of what is done on purpose here.
            nn.Module.to(vae, torch.float32)
            try:
                yield vae
            finally:
                nn.Module.to(vae, kind)

    def fingerprint(self) -> str:
        pipeline = self.pipeline
        facts = [
            *self.latent_facts(),
            *self.schedule_facts(pipeline.scheduler),
            *(
                repr((sorted(tokenizer.get_vocab().items()), tokenizer.model_max_length))
                for _, tokenizer, _ in self._texts()
            ),
            self.prediction_type,
            *self.further_facts(),
        ]
        return digest_of([self.module, pipeline.vae, *self._encoders()], facts)

    def latent_facts(self) -> list[str]:
        """What the digest holds of how samples and the autoencoder's latents differ, beside its weights."""
        vae = self.pipeline.vae.config
        return [float(vae.scaling_factor).hex(), *([float(vae.shift_factor).hex()] if vae.get("shift_factor") else [])]

    def further_facts(self) -> list[str]:
        """What else samples depend on, for the digest of the model."""
        return []

    def text_encoders(self) -> list[TextEncoder]:
        # Who learns through them keeps graphs that end in them: they rest no longer.
        for encoder in self._encoders():
            encoder.to(self.device)
        return [TextEncoder(tokenizer, encoder) for _, tokenizer, encoder in self._texts()]

    def encode(self, prompts: list[str]) -> Conditions:
        """Conditions of a few prompts."""
        raise NotImplementedError

    def encode_prompts(self, prompts: Sequence[str], batch_size: int = _ENCODED_PROMPTS) -> Conditions:
        # Each once, such as the empty prompt beside every other: text encoders may be as large as what is trained.
        rows = {prompt: row for row, prompt in enumerate(dict.fromkeys(prompts))}
        distinct = list(rows)
        with self.reading(), self._told():
            starts = range(0, len(distinct), batch_size)
            parts = [self.encode(distinct[start : start + batch_size]) for start in starts]
        read = {name: torch.cat([part[name] for part in parts]).float() for name in parts[0]}
        if len(distinct) == len(prompts):
            return read
        return {name: values[[rows[prompt] for prompt in prompts]] for name, values in read.items()}

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """What a library says of a prompt that it cannot read, as one sentence: a null where it takes a number, say, is
        an error of any kind there."""
        try:
            yield
        except Exception as error:
            if is_out_of_memory(error):
                raise
            files = (f"{one}/tokenizer_config.json, {other}/config.json" for one, other in self.text_parts)
            raise ValueError(
                f"the model's tokenizer or text encoder cannot read a prompt ({type(error).__name__}: "
                f"{shown_error(error)}): look for a wrong value in {', '.join(files)}, or download or save the "
                "pipeline again"
            ) from error

    def _window(self, name: str, tokenizer: Any, encoder: nn.Module) -> int:
        """Tokens that a text encoder reads, those of start and end included."""
        if name in self.read_tokens:
            return self.read_tokens[name]
        return min(tokenizer.model_max_length, encoder.config.max_position_embeddings)

    def _counts(self, prompts: Sequence[str]) -> list[tuple[int, list[int]]]:
        """For each text encoder the tokens that it reads, and those of each prompt, start and end included."""
        counts = []
        for name, tokenizer, encoder in self._texts():
            with self._told():
                read = tokenizer(list(prompts), truncation=False, add_special_tokens=False, verbose=False)["input_ids"]
            whole = [len(tokens) + tokenizer.num_special_tokens_to_add() for tokens in read]
            counts.append((self._window(name, tokenizer, encoder), whole))
        return counts

    def why_unseen(self, prompt: str, name: str) -> str | None:
        # What one encoder reads, the model sees.
        read = self._counts([prompt[: prompt.index(name) + len(name)]])
        if any(whole[0] <= window for window, whole in read):
            return None
        window, (count,) = max(read)
        return (
            f'in the prompt "{shown(prompt)}" the text encoder reads {window} tokens, and "{shown(name)}" ends '
            f"at token {count}: shorten it"
        )

    def count_cut(self, prompts: Sequence[str]) -> int:
        if not prompts:
            return 0
        cut = [[count > window for count in whole] for window, whole in self._counts(prompts)]
        return sum(map(all, zip(*cut, strict=True)))

    def means_the_same(self, first: str, second: str) -> bool:
        for name, tokenizer, encoder in self._texts():
            window = self._window(name, tokenizer, encoder)
            with self._told():
                read = tokenizer([first, second], padding="max_length", max_length=window, truncation=True)
            one, other = read["input_ids"]
            if one != other:
                return False
        return True

    @torch.no_grad()
    def encode_images(self, images: torch.Tensor, seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        with self.autoencoder() as vae:
            return self.to_samples(images.to(vae.device, vae.dtype), generator).float()

    def to_samples(self, images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Samples of images `[batch, 3, height, width]` in [-1, 1], on the autoencoder's device; `generator`, on the
        CPU, is for its posterior."""
        vae = self.pipeline.vae
        latents = self.chosen(vae.encode(images).latent_dist, generator)
        return (latents - (vae.config.get("shift_factor") or 0)) * vae.config.scaling_factor

    def to_images(self, samples: torch.Tensor) -> torch.Tensor:
        """Images `[batch, 3, height, width]` in about [-1, 1] of samples, on the autoencoder's device."""
        vae = self.pipeline.vae
        latents = samples / vae.config.scaling_factor + (vae.config.get("shift_factor") or 0)
        return vae.decode(latents).sample

    def chosen(self, posterior: Any, generator: torch.Generator) -> torch.Tensor:
        """Latents of an autoencoder's posterior: its mode, or drawn by a generator on the CPU."""
        if self.takes_mode:
            return posterior.mode()
        noise = torch.randn(posterior.mean.shape, generator=generator).to(posterior.mean.device)
        return posterior.mean + posterior.std * noise

    @property
    def multiple(self) -> int:
        """Of which height and width in pixels are multiples."""
        return self.pipeline.vae_scale_factor

    def check_sampling(self, settings: SamplingSettings, scheduler: Any = None) -> None:
        if settings.resolution and settings.resolution % self.multiple:
            raise ValueError(
                f"resolution={settings.resolution}: this model draws multiples of {self.multiple} pixels: give one"
            )
        super().check_sampling(settings, scheduler)

    def call(self, prompts: list[str], settings: SamplingSettings) -> dict[str, Any]:
        """What the pipeline is called with for prompts, beside size, steps and generators."""
        return {**self.embedded(prompts, settings), "guidance_scale": settings.guidance_scale}

    def embedded(self, prompts: list[str], settings: SamplingSettings) -> dict[str, torch.Tensor]:
        """Embeddings of prompts, and of the empty one where it guides, as pipelines take them, pooled ones behind."""
        said = dict(zip(_EMBEDDINGS, self.encode_prompts(prompts).values(), strict=False))
        if settings.guidance_scale > 1:
            empty = self.encode_prompts([""] * len(prompts)).values()
            said |= {f"negative_{name}": value for name, value in zip(_EMBEDDINGS, empty, strict=False)}
        return said

    def sample_batch(
        self, prompts: list[str], generators: list[torch.Generator], settings: SamplingSettings
    ) -> torch.Tensor:
        scheduler = self.make_sampler(settings.sampler, self.pipeline.scheduler)
        sampler = made_of(self.sampled_by, self.pipeline, **{**self.unsampled, "scheduler": scheduler})
        sampler.set_progress_bar_config(disable=True)
        size = settings.resolution or self.resolution
        given = self.call(prompts, settings)
        # A pipeline works where its first part is: those that rest elsewhere are left out, unless it encodes itself.
        encoders = [name for _, name in self.text_parts]
        needed = [*self.samples_with, *(encoders if "prompt" in given else [])]
        sampler.register_modules(**{name: None for name in ("vae", *encoders) if name not in needed})
        parts = (getattr(self.pipeline, name) for name in needed)
        with self.at_hand(*(part for part in parts if part is not None)):
            return sampler(
                height=size,
                width=size,
                num_inference_steps=settings.num_inference_steps,
                generator=generators,
                output_type="latent",
                **given,
            ).images

    @torch.no_grad()
    def decode(self, samples: torch.Tensor) -> list[Image.Image]:
        batch_size = max(1, _DECODED_LATENT_PIXELS // (samples.shape[-1] * samples.shape[-2]))
        pictures: list[Image.Image] = []
        with self.autoencoder() as vae:
            for part in samples.split(batch_size):
                images = self.to_images(part.to(vae.device, vae.dtype)).float()
                # They would become black pictures, on which no classifier sees a concept.
                if not torch.isfinite(images).all():
                    raise FloatingPointError(
                        "the model's autoencoder gives pictures that are not finite: its weights are damaged, download "
                        "or save the model again"
                    )
                pictures += self.pipeline.image_processor.postprocess(images, output_type="pil")
        return pictures

    def save(self, folder: Path) -> None:
        self.pipeline.save_pretrained(folder)

    def saved_scheduler(self) -> Any:
        """The scheduler as a saved pipeline carries it."""
        return self.pipeline.scheduler

    def save_trained(self, folder: Path, base: Mapping[str, Any]) -> None:
        """Write what is trained alone; see `sa_diffusers.families.trained.save_trained`."""
        save_trained(self.pipeline, self.module, self.saved_scheduler(), folder, base)


def made_of(kind: type[DiffusionPipeline], pipeline: DiffusionPipeline, **others: Any) -> DiffusionPipeline:
    """A pipeline of another's parts and settings, as far as it takes them.

    Args:
        kind: Its class.
        pipeline: The other.
        others: What it takes in their place.
    """
    taken = inspect.signature(kind.__init__).parameters
    parts = {**pipeline.config, **pipeline.components, **others}
    return kind(**{name: value for name, value in parts.items() if name in taken})
