"""What all models share that are sampled by a scheduler of diffusers, in steps."""

from diffusers import SchedulerMixin

from ..messages import shown_error
from .base import Objective, SamplingSettings


class ScheduledObjective(Objective):
    """An objective whose samplers are schedulers; `make_sampler` makes one."""

    def make_sampler(self, name: str, scheduler: SchedulerMixin) -> SchedulerMixin:
        """The sampler of a name, on the noise of the model's own scheduler.

        Raises:
            ValueError: The sampler does not exist, or cannot follow that noise.
        """
        raise NotImplementedError

    def set_steps(self, sampler: SchedulerMixin, steps: int) -> None:
        """Set a sampler to so many steps, to see whether it can and what it makes of them."""
        sampler.set_timesteps(steps)

    def schedule_facts(self, scheduler: SchedulerMixin) -> list[str]:
        """What a digest of the model holds of its scheduler."""
        # Names with an underscore are diffusers' own book-keeping, in no fixed order.
        return [repr(sorted((name, value) for name, value in scheduler.config.items() if name[0] != "_"))]

    def check_sampling(self, settings: SamplingSettings, scheduler: SchedulerMixin) -> None:
        """Refuse, before anything is sampled, a sampler that cannot follow the model's betas, or steps that it lacks.

        Raises:
            ValueError: As `make_sampler`, or there are more steps than the model was trained with.
        """
        super().check_sampling(settings)
        sampler = self.make_sampler(settings.sampler, scheduler)
        if settings.num_inference_steps > self.num_train_timesteps:
            raise ValueError(
                f"num_inference_steps={settings.num_inference_steps} is more than the {self.num_train_timesteps} "
                "timesteps that the model was trained with: give fewer"
            )
        try:
            self.set_steps(sampler, settings.num_inference_steps)
        except Exception as error:  # samplers fail at their least number of steps in ways of their own
            raise ValueError(
                f'sampler="{settings.sampler}" cannot make num_inference_steps={settings.num_inference_steps} steps '
                f"({shown_error(error)}): give more"
            ) from error

    def passes_of_sample(self, settings: SamplingSettings, scheduler: SchedulerMixin = None) -> int:
        if scheduler is None:
            return super().passes_of_sample(settings)
        # Some samplers call the network more than once in a step.
        sampler = self.make_sampler(settings.sampler, scheduler)
        self.set_steps(sampler, settings.num_inference_steps)
        return len(sampler.timesteps) * self.rows_of_step(settings)
