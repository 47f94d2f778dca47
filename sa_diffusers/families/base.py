"""What the rest of the package knows of a generative model: nothing but `Family` and, with a path, `Objective`."""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from pathlib import Path as FilePath
from typing import Any

import torch
from PIL import Image
from torch import nn

from ..parameter_selection import select_parameters
from .digests import digest_of, fingerprint_module
from .paths import Path, draw_timesteps
from .values import Conditions, Denoiser, SamplingSettings, TextEncoder, index_conditions, match_channels

__all__ = [
    "Conditions", "Denoiser", "Family", "Objective", "SamplingSettings", "TextEncoder", "digest_of", "draw_timesteps",
    "fingerprint_module", "index_conditions", "match_channels",
]  # fmt: skip


class Family(ABC):
    """One kind of generative model: prompts, pictures, calling the denoiser, sampling, selections, saving.

    Samples are what the denoiser works on (latents, for latent diffusion), `[batch, ...]`, float32. Conditions are
    tensors by name, each `[batch, ...]`.

    Attributes:
        kind: Name of the family, recorded with everything computed under it.
        module: The trainable module.
        labels: Names of the classes, where conditions are classes; None where they are text.
        unconditional: Whether the empty prompt is a condition of its own.
        channels: Channels of its images.
        shows_means: Whether a sample is the mean of its pixels' distribution.
        fixed_resolution: Whether it makes images of its own resolution only.
        selections: Selection -> regular expression on the module's parameter names, for names such as `"xattn"` and
            `"noxattn"`; None means what they mean for every module of that class (`select_parameters`).
        own_pipeline: The class of its pipeline, where it is not one of diffusers.
        own_models: Name -> class of the pipeline's parts that are not of diffusers nor of transformers.
        title: What the family is called in messages, if its pipeline's name does not say.
        script: The script in `examples/` that erases from it, for the card; None where it is the user's own.
        optional_parts: Parts of its pipeline that it also works without: a T5, which `no_t5` leaves out.
        lengths: Conditions whose values say how long a text is, by which others are cut.
        undistilled: A model to train in place of one that is distilled to few steps.
        defaults: Settings that its models are sampled with where nobody says otherwise, by name.
        adapted: Regular expression on the parameters that an adapter is trained on where nobody says otherwise; None
            means all.
    """

    kind: str
    module: nn.Module
    labels: list[str] | None = None
    unconditional: bool = True
    channels: int = 3
    shows_means: bool = False
    fixed_resolution: bool = False
    selections: Mapping[str, str] | None = None
    own_pipeline: type | None = None
    own_models: Mapping[str, type] = {}
    title: str = ""
    script: str | None = None
    optional_parts: Sequence[str] = ()
    lengths: Sequence[str] = ()
    undistilled: str | None = None
    defaults: Mapping[str, Any] = {}
    adapted: str | None = None

    @classmethod
    def from_pipeline(
        cls,
        pipeline: Any,
        prediction_type: str | None = None,
        snr_gamma: float | None = None,
        noise_offset: float = 0.0,
    ) -> "Family":
        """The family's object of a loaded pipeline; see `objective_for`.

        Raises:
            ValueError: A setting has no meaning for it.
        """
        return cls(pipeline, prediction_type, snr_gamma, noise_offset)  # type: ignore[call-arg]

    @classmethod
    def check_parts(cls, place: str, parts: Mapping[str, list], read: Callable[[str], Mapping[str, Any]]) -> None:
        """Refuse, before weights are loaded, what the configurations of a pipeline's parts already forbid.

        Args:
            place: The pipeline, as messages name it.
            parts: Name -> library and class, as in the pipeline's index.
            read: From a part's name to its configuration.

        Raises:
            ValueError: A part is missing, or parts do not fit each other.
        """
        return

    @classmethod
    def why_distilled(cls, read: Callable[[str | None], Mapping[str, Any]]) -> tuple[str, str] | None:
        """What in the configurations of a pipeline and its parts says that it is distilled to few steps, and the
        published model that is used as it is (`sa_diffusers.families.distilled`); None if nothing does.

        Args:
            read: As of `check_parts`; from None to the pipeline's own, its index.
        """
        return None

    @classmethod
    def card_snippet(cls, condition: str | int) -> str:
        """Python, for the card: `image` sampled under a prompt or a class's number, from a loaded `pipeline`."""
        if isinstance(condition, str):
            return f"image = pipeline({json.dumps(condition, ensure_ascii=False)}).images[0]"
        return f"image = pipeline(class_labels=[{condition}]).images[0]"

    @property
    @abstractmethod
    def resolution(self) -> int:
        """Height and width of the model's own images in pixels."""

    @property
    def device(self) -> torch.device:
        # Not the module's own word: a model of diffusers walks through all its modules for it.
        return next(self.module.parameters()).device

    def rows_of_step(self, settings: SamplingSettings) -> int:
        """Rows that one image takes in a step of sampling: two with guidance."""
        return 2 if settings.guidance_scale > 1 else 1

    def passes_of_sample(self, settings: SamplingSettings, scheduler: Any = None) -> int:
        """About how many rows pass through the network for one image; for a plan.

        Args:
            settings: Sampler, steps, guidance.
            scheduler: The pipeline's own, where it has one.
        """
        return settings.num_inference_steps * self.rows_of_step(settings)

    @abstractmethod
    def to(self, device: torch.device | str) -> "Family":
        """Move what encoding, sampling and training need."""

    def place(self, device: torch.device | str) -> "Family":
        """Move what is trained; what only encodes and decodes may rest on the CPU, and comes for the time of use."""
        return self.to(device)

    @abstractmethod
    def fingerprint(self) -> str:
        """A digest of all weights and settings that samples depend on."""

    def select(self, selection: str) -> dict[str, nn.Parameter]:
        """Name and parameter of a selection; see `select_parameters`."""
        return select_parameters(self.module, selection, self.selections)

    @abstractmethod
    def encode_prompts(self, prompts: Sequence[str]) -> Conditions:
        """Conditions of prompts, `[len(prompts), ...]`, on the model's device."""

    def reading(self) -> AbstractContextManager[Any]:
        """What encodes prompts is at hand meanwhile, for `encode_prompts` many times over; see `place`."""
        return nullcontext()

    def text_encoders(self) -> list[TextEncoder]:
        """Handles for attacks that learn a token; none where conditions are classes.

        Where there are some, `encode_prompts` keeps the graph that leads to their embeddings, if gradients are on.
        """
        return []

    def why_unseen(self, prompt: str, name: str) -> str | None:
        """Why the model does not see all of a prompt's first mention of a name, as a sentence.

        None if it does, and where conditions are classes.
        """
        return None

    def count_cut(self, prompts: Sequence[str]) -> int:
        """How many prompts are longer than what the model reads of them; 0 where conditions are classes."""
        return 0

    def means_the_same(self, first: str, second: str) -> bool:
        """Whether two prompts are one and the same condition to the model."""
        return first == second

    @abstractmethod
    def encode_images(self, images: torch.Tensor, seed: int) -> torch.Tensor:
        """Samples of images `[batch, 3 or channels, height, width]` in [-1, 1]; `seed` is that of an encoder's
        posterior."""

    def check_sampling(self, settings: SamplingSettings, scheduler: Any = None) -> None:
        """Refuse, before anything is sampled, settings that the model cannot be sampled by.

        Args:
            settings: Sampler, steps, guidance.
            scheduler: The pipeline's own, where it has one.

        Raises:
            ValueError: The sampler cannot follow the model's noise schedule, say, or it makes no images of this
                resolution.
        """
        if self.fixed_resolution and settings.resolution not in (None, self.resolution):
            raise ValueError(f"resolution={settings.resolution}: this model draws {self.resolution} pixels only")

    @torch.no_grad()
    def sample(self, prompts: Sequence[str], seeds: Sequence[int], settings: SamplingSettings) -> torch.Tensor:
        """One sample for each prompt, float32; all its randomness comes from the seed of the same index.

        Raises:
            ValueError: The model makes no images of this resolution.
        """
        Family.check_sampling(self, settings)
        training = self.module.training
        self.module.eval()
        parts = []
        try:
            for start in range(0, len(prompts), settings.batch_size):
                batch = slice(start, start + settings.batch_size)
                generators = [torch.Generator().manual_seed(seed) for seed in seeds[batch]]
                parts.append(self.sample_batch(list(prompts[batch]), generators, settings).float())
        finally:
            self.module.train(training)
        return torch.cat(parts)

    def sample_batch(
        self, prompts: list[str], generators: list[torch.Generator], settings: SamplingSettings
    ) -> torch.Tensor:
        """One sample for each prompt, from the generator (on the CPU) of the same index; the module is in evaluation
        mode and gradients are off.

        Calls of the module count as what sampling costs; one that calls parts of it alone says so by
        `sa_diffusers.passes.count_rows`.
        """
        raise NotImplementedError(f"{type(self).__name__} needs a sample_batch, or a sample")

    @abstractmethod
    def decode(self, samples: torch.Tensor) -> list[Image.Image]:
        """Pictures of samples."""

    def denoise(
        self, module: Denoiser, noisy: torch.Tensor, timesteps: torch.Tensor, conditions: Conditions
    ) -> torch.Tensor:
        """Call the denoiser (`self.module`, or what stands in for it) on noised samples, at timesteps `[batch]`."""
        return module(noisy, timesteps, **conditions, return_dict=False)[0]

    @abstractmethod
    def save(self, folder: FilePath) -> None:
        """Write the whole pipeline, for `DiffusionPipeline.from_pretrained`."""


class _OfPath:
    """An attribute of the path that the objective shows as its own, unless it has one itself."""

    def __init__(self, *default: Any) -> None:
        self.default = default

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, objective: "Objective | None", owner: type) -> Any:
        if objective is None:
            return self
        path = vars(objective).get("path")
        if path is not None:
            return getattr(path, self.name)
        if self.default:
            return self.default[0]
        raise AttributeError(f"{owner.__name__} has no {self.name}: set self.path, or self.{self.name}")


class Objective(Family):
    """A family on its path: one sample's negative ELBO, which is all that the Fisher estimator and the trainer see.

    A new family of models is a subclass in one file, registered with `register`, and nothing else. It sets
    `self.module` and `self.path`; its loss is then the squared error of the path's target. A model with another loss
    overrides `predict` and `negative_elbo`.

    Attributes:
        path: Noise, target, density and weights of timesteps.
        reduction: How a sample's squared error is reduced over its elements, `"mean"` or `"sum"`. The weight of the
            EWC term does not carry over between the two.
        num_train_timesteps: Of the path, as the next three are.
        prediction_type: What the module predicts.
        snr_gamma: Min-SNR weighting of the ELBO's terms, if any.
        noise_offset: Scale of a further noise that is constant over each channel's pixels.
    """

    reduction: str
    num_train_timesteps: Any = _OfPath()
    prediction_type: Any = _OfPath()
    snr_gamma: Any = _OfPath(None)
    noise_offset: Any = _OfPath(0.0)

    @cached_property
    def path(self) -> Path:
        # A subclass that has a loss of its own need not say more than its number of timesteps.
        return Path(self.num_train_timesteps)

    def draw_noise(self, samples: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """As `Path.draw_noise`."""
        return self.path.draw_noise(samples, generator)

    def target(self, samples: torch.Tensor, timesteps: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """As `Path.target`."""
        return self.path.target(samples, timesteps, noise)

    def uniform_noise_target(self, samples: torch.Tensor, timesteps: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """As `Path.uniform_noise_target`."""
        if type(self).target is not Objective.target:
            return self.target(samples, timesteps, noise)
        return self.path.uniform_noise_target(samples, timesteps, noise)

    def predict(
        self,
        module: Denoiser,
        samples: torch.Tensor,
        conditions: Conditions,
        timesteps: torch.Tensor,
        noise: torch.Tensor,
    ) -> torch.Tensor:
        """What the module predicts for noised samples; the arguments of `negative_elbo`."""
        return self.denoise(module, self.path.add_noise(samples, noise, timesteps), timesteps, conditions)

    def answer(
        self,
        module: Denoiser,
        samples: torch.Tensor,
        conditions: Conditions,
        timesteps: torch.Tensor,
        noise: torch.Tensor,
    ) -> torch.Tensor:
        """What probes compare: the prediction that sampling asks for. `predict`, unless sampling goes another way."""
        return self.predict(module, samples, conditions, timesteps, noise)

    def negative_elbo(
        self,
        module: Denoiser,
        samples: torch.Tensor,
        conditions: Conditions,
        timesteps: torch.Tensor,
        noise: torch.Tensor,
        target: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """One term of each sample's (reweighted) negative ELBO (paper, section 2.1).

        Args:
            module: `self.module`, or what stands in for it.
            samples: `[batch, ...]`.
            conditions: Each `[batch, ...]`.
            timesteps: `int64` `[batch]` in [0, num_train_timesteps).
            noise: As from `draw_noise`.
            target: What the module should predict, of the prediction's shape. Default: the target that the noise
                gives.

        Returns:
            `[batch]`, float32, not yet reduced over the batch.
        """
        prediction = self.predict(module, samples, conditions, timesteps, noise)
        if target is None:
            target = self.target(samples, timesteps, noise)
        return self.deviation(prediction, target, timesteps)

    def deviation(self, prediction: torch.Tensor, target: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """How much two predictions differ, `[batch]`, float32, in units of the loss: what predicting one of them adds
        to the loss where the other is right on average. Never negative, 0 where they are equal.

        Args:
            prediction: `[batch, ...]`, as from `predict`.
            target: Of the same shape.
            timesteps: `int64` `[batch]`.
        """
        if prediction.shape != target.shape:
            raise ValueError(
                f"{type(self).__name__} predicts {[*prediction.shape]} where the target is {[*target.shape]}: its "
                "denoise must give what the path's target is, docs/new-family.md says how"
            )
        error = (prediction.float() - target.float()).square().flatten(1)
        error = error.sum(1) if self.reduction == "sum" else error.mean(1)
        weights = self.path.weights(timesteps)
        return error if weights is None else error * weights

    @property
    def weighs_predictions(self) -> bool:
        """Whether it has `root_weights`: the loss is a squared error, or the family says them itself."""
        own = type(self)
        squared = own.negative_elbo is Objective.negative_elbo and own.deviation is Objective.deviation
        return squared or own.root_weights is not Objective.root_weights

    def root_weights(self, prediction: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Factors of a prediction's elements, which broadcast to it: for small changes, `deviation(prediction + change,
        prediction)` is the sum of `(factor * change)^2`.

        Args:
            prediction: `[batch, ...]`, as from `predict`.
            timesteps: `int64` `[batch]`.
        """
        weights = self.path.weights(timesteps)
        roots = torch.ones_like(timesteps, dtype=torch.float32) if weights is None else weights.float().sqrt()
        if self.reduction == "mean":
            roots = roots / prediction[0].numel() ** 0.5
        return roots.view(-1, *[1] * (prediction.dim() - 1))
