"""Selective Amnesia in Python: train, evaluate, save, publish."""

import contextlib
import inspect
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from .configuration import HISTORY_NAME, SelectiveAmnesiaConfig
from .data.given import Samples
from .erasure import Erasure
from .families import Objective, checked_pipeline, modules_of, pipeline_name
from .families.adapters import has_adapter, unload_adapter
from .files import read_json
from .fisher import FisherInformation
from .moved import forward
from .publish import push_pipeline
from .publish.folder import save_copy
from .results import Report
from .training.callbacks import Callback
from .training.training import Training


class SelectiveAmnesiaTrainer:
    """Makes a model forget (paper, eq. 4): surrogate ELBO on the concept, EWC, generative replay.

        config = SelectiveAmnesiaConfig(concept="Brad Pitt", surrogate="a middle aged man", output_dir="brad-pitt")
        trainer = SelectiveAmnesiaTrainer("CompVis/stable-diffusion-v1-4", config)
        trainer.train()
        report = trainer.evaluate()
        trainer.push_to_hub("user/brad-pitt")

    Minimises, over the parameters that `train_method` selects, `surrogate loss + replay_weight * replay loss +
    ewc_weight * sum F (theta - theta*)^2`, each loss the negative ELBO averaged over a batch. All samples come from the
    frozen model itself, unless they are handed in. What a run has made is kept, under `artifacts_dir` and in
    `output_dir`, and a run that was stopped goes on by the same calls.

    Args:
        model: The base model: a pipeline in float32, of a kind that `objective_for` knows, or its folder or name on the
            Hub. It is trained in place.
        config: All settings. What the base model's own folder recommends holds where they were not written.
        surrogates: Samples of the surrogate, in place of those that would be made: a `SampleSet`, prompts to sample
            with, images (PIL, or a tensor `[n, channels, height, width]` in [0, 1]), or dictionaries of an `"image"`
            and its `"text"`, the concept's prompt to train it under.
        replay: What to remember, in the same forms; bare images belong to the empty prompt.
        fisher: Fisher information, or its folder or name on the Hub.
        callbacks: Functions, or objects with `after_step(state)`, that are called after every step with a `StepState`;
            one that sets `state.stop` ends the training there.

    Attributes:
        config: The settings in use.
        pipeline: The pipeline, without the concept once `train` is done. An adapter (`adapter="lora"`) is loaded into
            it then, and can be switched on and off.

    Raises:
        ValueError: The settings contradict each other, the model is of an unknown kind, in half precision or has
            adapters (with `fuse_adapters=True` those are fused into the pipeline, in place), the output folder holds
            something else, or what is handed in does not fit the model.
        ConnectionError: The Hub cannot be reached and the model is not in its cache.
    """

    def __new__(cls, model: Any, *arguments: Any, **named: Any) -> Any:
        if isinstance(model, Objective):
            warnings.warn(
                "SelectiveAmnesiaTrainer(objective, ...) is now sa_diffusers.training.training.Training; "
                "SelectiveAmnesiaTrainer takes a pipeline or its name",
                DeprecationWarning,
                stacklevel=2,
            )
            return Training(model, *arguments, **named)
        return super().__new__(cls)

    def __init__(
        self,
        model: DiffusionPipeline | str | Path,
        config: SelectiveAmnesiaConfig,
        surrogates: Samples | None = None,
        replay: Samples | None = None,
        fisher: FisherInformation | str | Path | None = None,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        if not isinstance(config, SelectiveAmnesiaConfig):
            raise ValueError(
                f"config: what is of type {type(config).__name__} is no configuration: give a SelectiveAmnesiaConfig"
            )
        given = None if isinstance(model, (str, Path)) else checked_pipeline(model)
        name = str(model) if given is None else pipeline_name(given)
        by_default = SelectiveAmnesiaConfig.__dataclass_fields__["pretrained_model_name_or_path"].default
        if config.pretrained_model_name_or_path not in (name, by_default):
            raise ValueError(
                f'the model is "{name}" and pretrained_model_name_or_path="{config.pretrained_model_name_or_path}": '
                "leave the setting out"
            )
        if given is not None and (config.revision or config.variant):
            raise ValueError("revision and variant have no meaning for a pipeline in memory: leave them out")
        config = config.replace(pretrained_model_name_or_path=name)
        if given is not None:
            for part in modules_of(given):
                part.eval()
        self._erasure = Erasure(
            config, pipeline=given, surrogates=surrogates, replay=replay, fisher=fisher, callbacks=callbacks
        )
        self.config = self._erasure.config
        self.pipeline: DiffusionPipeline = self._erasure.subject.pipeline
        self._history: list[dict[str, float]] = []
        # theta*, once the model in memory is another; of an adapter nothing, which is taken out and put in again.
        self._anchor: dict[str, torch.Tensor] | None = None

    @property
    def history(self) -> list[dict[str, float]]:
        """What `train` has logged."""
        return self._history

    @property
    def output_dir(self) -> Path:
        """Where the erased pipeline, its report and checkpoints are."""
        return self._erasure.output_dir

    def plan(self) -> str:
        """What will be sampled, computed and trained, and what is reused."""
        return self._erasure.plan()

    def train(self) -> list[dict[str, float]]:
        """Sample what is missing, train, and write the erased pipeline into `output_dir`.

        A run that was stopped goes on from its last checkpoint; where `output_dir` holds this very erasure, its weights
        are loaded.

        Returns:
            For every logged step: `step`, `surrogate_loss`, `replay_loss`, `ewc_penalty`, `learning_rate`.

        Raises:
            FloatingPointError: No gradient is finite any more. The last checkpoint is from before.
            ValueError: This trainer has trained, or another run is using `output_dir`.
            Interrupted: The run is to stop; a checkpoint is written first.
        """
        erasure = self._erasure
        if self._anchor is not None:
            raise ValueError("this trainer has trained already, and its model is no longer the base: make a new one")
        erasure.check_base()
        erasure.training_stage.plan_the_whole()
        with erasure.holding():
            anchor = {}
            if not self.config.adapter:
                anchor = {name: value.detach().cpu().clone() for name, value in erasure.subject.parameters.items()}
            if erasure.finished():
                erased = erasure.erased()
                if erased is not erasure.objective:
                    erasure.objective.module.load_state_dict(erased.module.state_dict())
                self._anchor = anchor
                self._history = list(read_json(self.output_dir / HISTORY_NAME))
                self._call_it_erased()
                return self._history
            erasure.training_stage.start_trackers()
            surrogates = erasure.timed(erasure.surrogate_stage)
            products = erasure.products(surrogates)
            # Whatever happens from here on, the model is no longer the base.
            self._anchor = anchor
            self._history = erasure.training_stage.run(surrogates, *products).history
            if self.config.adapter:
                erasure.erased()
        self._call_it_erased()
        return self._history

    def evaluate(self) -> Report | None:
        """Compare the erased pipeline with the base model at equal seeds; report, pictures and card go into
        `output_dir`.

        Returns:
            The report, whose `verdict.line` says whether the concept is gone; None in all processes but the main one.

        Raises:
            ValueError: Nothing is trained yet.
        """
        erasure = self._erasure
        with erasure.holding(begin=self._anchor is None, trains=False):
            self._check_trained()
            if erasure.is_main:
                erasure.report_stage.keep_settings()
            report = erasure.report_stage.kept() if erasure.is_main else None
            if not erasure.subject.agreed(report is not None):
                with self._base_model():
                    surrogates = erasure.timed(erasure.surrogate_stage)
                    before = erasure.timed(erasure.image_stage, "evaluation before", erasure.objective, erasure.base)
                with self._on_the_cpu():
                    comparison = erasure.compared(before, surrogates)
                report = comparison and comparison.report
                if self.config.adapter and self._anchor is None:
                    # Whoever did not train here has the base model in memory still.
                    unload_adapter(erasure.objective)
            if report is not None:
                erasure.card_stage.run()
        self._make_whole()
        return report

    def save_model(self, folder: str | Path | None = None) -> None:
        """Write the erased pipeline, with its settings, report and card as far as there are any, into another folder.

        Args:
            folder: Empty, not there, or an earlier copy of this kind, which is replaced. Default: `output_dir`, where
                `train` has written it already.

        Raises:
            ValueError: Nothing is trained yet, or the folder holds something else.
            OSError: The folder cannot be written; what was there before is unchanged.
        """
        self._check_trained()
        if folder is None or Path(folder).resolve() == self.output_dir.resolve():
            return
        if self._erasure.is_main:
            save_copy(self.output_dir, folder)
        self._erasure.accelerator.wait_for_everyone()

    def push_to_hub(self, repo_id: str | None = None, private: bool | None = None) -> str | None:
        """Write the model card, and upload pipeline, card, report and pictures.

        Args:
            repo_id: Name on the Hub. Default: `hub_model_id`, else the folder's name, under the user.
            private: Make a new repository private. Default: `hub_private_repo`.

        Returns:
            The address of the repository; None in all processes but the main one.

        Raises:
            ValueError: Nothing is trained yet, or the Hub allows no such name.
            ConnectionError: The upload failed. What is in the folder is whole; the message says how to repeat it.
        """
        self._check_trained()
        if not self._erasure.is_main:
            return None
        self._erasure.card_stage.run()
        private = self.config.hub_private_repo if private is None else private
        return push_pipeline(self.output_dir, repo_id or self.config.hub_model_id, private)

    def _call_it_erased(self) -> None:
        # What is made of it next is made of this, not of the base model.
        self.pipeline.register_to_config(_name_or_path=str(self.output_dir.absolute()))
        self._make_whole()

    def _make_whole(self) -> None:
        """All parts of the pipeline on one device again, as who calls it needs them."""
        self.pipeline.to(self._erasure.accelerator.device)

    def _check_trained(self) -> None:
        if self._anchor is None:
            self._erasure.training_stage.take_up_what_was_stopped()
        if not self._erasure.finished(quietly=True):
            raise ValueError(f"{self.output_dir} holds no pipeline of this erasure: call train first")

    @contextlib.contextmanager
    def _base_model(self) -> Iterator[None]:
        """The model in memory is the base model meanwhile, also after it was trained."""
        if self.config.adapter and has_adapter(self._erasure.objective):
            unload_adapter(self._erasure.objective)
            try:
                self._erasure.check_base()
                yield
            finally:
                self._erasure.erased()
            return
        if self._anchor is None:
            self._erasure.check_base()
            yield
            return
        parameters = self._erasure.subject.parameters
        trained = {name: value.detach().cpu().clone() for name, value in parameters.items()}
        _put_in(parameters, self._anchor)
        try:
            self._erasure.check_base()
            yield
        finally:
            _put_in(parameters, trained)

    @contextlib.contextmanager
    def _on_the_cpu(self) -> Iterator[None]:
        """The model in memory makes room for the one that is loaded from disk."""
        objective = self._erasure.objective
        device = objective.device
        objective.to("cpu")
        try:
            yield
        finally:
            objective.place(device)


@torch.no_grad()
def _put_in(parameters: Mapping[str, torch.nn.Parameter], values: Mapping[str, torch.Tensor]) -> None:
    for name, parameter in parameters.items():
        parameter.copy_(values[name])


# What `help` and completion show: not the arguments of `__new__`, which also takes the earlier form.
SelectiveAmnesiaTrainer.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
    list(inspect.signature(SelectiveAmnesiaTrainer.__init__).parameters.values())[1:]
)
__getattr__ = forward(__name__, "training.training", "training.settings", "training.trainable", "environment")
