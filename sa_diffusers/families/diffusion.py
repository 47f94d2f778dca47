"""What all discrete-time diffusion models share: their path, and sampling by the betas of their own scheduler."""

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from diffusers import DDPMScheduler, DiffusionPipeline, SchedulerMixin

from ..samplers import SAMPLERS
from .paths import PREDICTION_TYPES, DiscretePath
from .samplers import check_scheduler, is_of_flow, other_samplers, rescales, sampler_class
from .scheduled import ScheduledObjective

__all__ = ["PREDICTION_TYPES", "DiffusionObjective", "check_scheduler"]


class DiffusionObjective(ScheduledObjective):
    """The (reweighted) ELBO of a discrete-time diffusion model (paper, section 2.1).

    Args:
        scheduler: The model's own; its betas are those of the training.
        prediction_type: `"epsilon"` or `"v_prediction"`. Default: as the scheduler says.
        snr_gamma: Min-SNR weighting of the loss (Hang et al., 2023); None leaves the loss unweighted.
        noise_offset: Scale of a further noise that is constant over each channel's pixels.

    Raises:
        ValueError: As `DiscretePath`.
    """

    path_class: type[DiscretePath] = DiscretePath

    def __init__(
        self,
        scheduler: SchedulerMixin,
        prediction_type: str | None = None,
        snr_gamma: float | None = None,
        noise_offset: float = 0.0,
    ) -> None:
        self.path = self.path_class(scheduler, prediction_type, snr_gamma, noise_offset)

    @classmethod
    def check_parts(cls, place: str, parts: Mapping[str, list], read: Callable[[str], Mapping[str, Any]]) -> None:
        if "scheduler" in parts:
            check_scheduler(str(parts["scheduler"][1]), read("scheduler"))

    @property
    def noise_schedule(self) -> DDPMScheduler:
        return self.path.schedule

    @property
    def zero_terminal_snr(self) -> bool:
        return self.path.zero_terminal_snr

    def make_sampler(self, name: str, scheduler: SchedulerMixin) -> SchedulerMixin:
        """The sampler of a name, on the betas of the model's own scheduler.

        Where the last timestep is noise alone, sampling begins there: steps are never spaced `"leading"`.

        Raises:
            ValueError: The sampler does not exist, or cannot follow these betas.
        """
        kind, options = sampler_class(name)
        if is_of_flow(kind, options):
            raise ValueError(
                f'sampler="{name}" is for models of rectified flow, and this one predicts {self.prediction_type}: use '
                f"one of {other_samplers()}"
            )
        if self.zero_terminal_snr and not rescales(kind):
            able = ", ".join(other for other in SAMPLERS if rescales(sampler_class(other)[0]))
            raise ValueError(
                f'sampler="{name}" ignores rescale_betas_zero_snr, which the model\'s scheduler sets: use one of {able}'
            )
        try:
            return kind.from_config(scheduler.config, **{**self._own_settings(scheduler), **options})
        except (NotImplementedError, TypeError, ValueError) as error:
            raise ValueError(
                f'sampler="{name}" cannot follow the model\'s scheduler ({error}): use another sampler'
            ) from error

    def own_scheduler(self, scheduler: SchedulerMixin) -> SchedulerMixin:
        """The model's scheduler with the prediction type in use, as a saved pipeline must carry it."""
        settings = self._own_settings(scheduler)
        if all(scheduler.config.get(name) == value for name, value in settings.items()):
            return scheduler
        return type(scheduler).from_config(scheduler.config, **settings)

    def save_with_own_scheduler(self, pipeline: DiffusionPipeline, folder: Path) -> None:
        """Save a pipeline with `own_scheduler`; the pipeline itself stays as it is."""
        scheduler = self.own_scheduler(pipeline.scheduler)
        if scheduler is not pipeline.scheduler:
            pipeline = copy.copy(pipeline)
            pipeline.register_modules(scheduler=scheduler)
        pipeline.save_pretrained(folder)

    def _own_settings(self, scheduler: SchedulerMixin) -> dict[str, Any]:
        settings = {"prediction_type": self.prediction_type}
        if self.zero_terminal_snr and scheduler.config.get("timestep_spacing", "leading") == "leading":
            settings["timestep_spacing"] = "trailing"
        return settings
