"""Images of the base model and of the erased one, and the report on them."""

from typing import Any

import torch

from ..cache import delete_evaluations
from ..configuration import CONFIG_NAME, REPORT_NAME
from ..data.phrasings import fill_template
from ..data.sample_set import MANIFEST_NAME, SampleSet
from ..evaluation import Classification, Comparison, compare, label_groups, prompt_groups, sample_groups, score_groups
from ..evaluation.erased import adapter_on_record, recorded_ending, saved_alone
from ..evaluation.groups import REMEMBERED_PROMPTS, PromptGroup
from ..evaluation.scoring import parts_of
from ..families import Objective
from ..files import digest_of, read_json
from ..identity import Identity, plain
from ..output_folder import OutputFolder, weights_in
from ..passes import Passes, together
from ..processes import finishing, say
from ..results.schema import DECODER, Report, Sampling
from ..seeds import STREAMS, met
from .base import Stage
from .samples import ReplayStage, SurrogateStage
from .subject import SAMPLING, Subject
from .training import TrainingStage

_REPORT = ("classifier", "reference_features", "clip", "num_eval_images", "eval_templates", "eval_seed", "blur")


class EvaluationImages(Stage):
    """A model's images of every row of the report; the base's and the erased model's have the same seeds.

    Args:
        subject: What is forgotten, and how images are sampled.

    Raises:
        ValueError: The images would have seeds of samples that are trained on.
    """

    title = "evaluation"
    depends_on = frozenset((*_REPORT, *SAMPLING))

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self.groups = self._groups()

    def _groups(self) -> list[PromptGroup]:
        subject, config = self.subject, self.subject.config
        prompts = [prompt for prompt in dict.fromkeys(subject.replay_prompts) if prompt]
        where = (config.num_eval_images, config.eval_seed)
        scorer = subject.classifier
        if scorer is not None:
            return label_groups(
                scorer.labels, subject.pairs, scorer.label_of, config.concept_templates, subject.eval_templates, *where,
                prompts, scorer.neighbours, scorer.prompted, config.num_concept_eval_images,
            )  # fmt: skip
        remembered = prompts[:REMEMBERED_PROMPTS]
        return prompt_groups(subject.pairs, remembered, subject.eval_templates, *where, config.concept_templates)

    def check_seeds(self, surrogates: SurrogateStage, replay: ReplayStage) -> None:
        """Refuse an evaluation that shares its initial noise with what is trained on."""
        config = self.subject.config
        images = sum(len(group.prompts) for group in self.groups)
        span = max(max(group.seeds) for group in self.groups) + 1 - config.eval_seed
        counts = {
            "surrogate": surrogates.count,
            "replay": len(replay.prompts) + config.num_neighbour_images,
            "concept": config.num_fisher_samples,
            "probe": STREAMS["probe"].length if config.probes else 0,
        }
        for stream, samples in counts.items():
            if samples > STREAMS[stream].length:
                raise ValueError(f"{samples} {stream} samples: there are seeds for {STREAMS[stream].length}")
        if found := met(config.eval_seed, span, config.seed, counts):
            stream, first = found
            raise ValueError(
                f"eval_seed={config.eval_seed}: the evaluation's {images} images would have the seeds of {stream} "
                f"samples ({first} to {first + counts[stream] - 1}): leave it at {STREAMS['evaluation'].first}"
            )

    def identity(self) -> Identity:
        return Identity("evaluation", {name: getattr(self.subject.config, name) for name in self.depends_on})

    def plan(self) -> list[str]:
        scorer = self.subject.classifier
        scored = f"scored by {scorer.name}" if scorer else "nothing knows the concept: pixel change"
        config = self.subject.config
        usual, more = config.num_eval_images, config.num_concept_eval_images
        own = f", {more} of a concept" if scorer and more > usual else ""
        lines = [f"evaluate  {usual} images a row{own}, before and after, {scored}"]
        unknown = [pair.concept for pair in self.subject.pairs if scorer and scorer.label_of(pair.concept) is None]
        if unknown:
            names = ", ".join(f'"{name}"' for name in unknown)
            lines.append(f"          which has no label for {names}, and cannot say whether that is forgotten")
        return lines

    def cost(self) -> Passes:
        """Of the images before, as far as they are not kept, and of those after."""
        subject, images = self.subject, 0
        for group in self.groups:
            for part in parts_of(group):
                prompts = group.prompts[part]
                place = subject.generator.folder("evaluation", prompts, prompts, group.seeds[part], subject.settings)
                images += len(prompts) * (1 if (place / MANIFEST_NAME).is_file() else 2)
        return subject.sampling(images, subject.settings)

    def run(self, *inputs: Any) -> list[list[torch.Tensor]]:
        """Every group's samples, in the main process, sampled by all.

        Args:
            *inputs: The model, and its digest.
        """
        objective, fingerprint = inputs
        subject = self.subject
        made: list[Passes | None] = []
        samples = sample_groups(objective, self.groups, subject.settings, subject.config.resolved_artifacts_dir,
                                subject.accelerator, fingerprint, made)  # fmt: skip
        self.made = together(made)
        return samples


class ReportStage(Stage):
    """The report on what changed, beside the erased pipeline.

    Args:
        subject: What is forgotten, and what scores it.
        output: Where it goes.
        images: What is compared.
        training: What made the erased model.
    """

    title = "scoring"
    depends_on = TrainingStage.depends_on | EvaluationImages.depends_on

    def __init__(
        self, subject: Subject, output: OutputFolder, images: EvaluationImages, training: TrainingStage
    ) -> None:
        self.subject = subject
        self.output = output
        self._images = images
        self._training = training
        named, reference = subject.classifier and subject.classifier.name, subject.config.reference_features
        self._scorer = [named, subject.scorer, reference and digest_of(reference)]

    def identity(self) -> Identity:
        config = self.subject.config
        facts = {name: getattr(config, name) for name in (*_REPORT, *SAMPLING)}
        if self.subject.classifier is not None and config.num_concept_eval_images > config.num_eval_images:
            facts["num_concept_eval_images"] = config.num_concept_eval_images
        return Identity("report", {**facts, "scorer": self._scorer, "training": self._training.identity().digest})

    def plan(self) -> list[str]:
        return [f"output    {self.output.path}"]

    def kept(self) -> Report | None:
        """The report of this very erasure, if it is there and whole."""
        if not self.output.holds_report(self.identity(), say):
            return None
        return Report.load(self.output.path / REPORT_NAME)

    def keep_settings(self) -> None:
        """Let the folder say what holds now, where that differs from what its weights were made with."""
        config = self.subject.config
        try:
            recorded = read_json(self.output.path / CONFIG_NAME)
        except (OSError, ValueError):
            recorded = {}
        if not plain(config.to_dict()).items() <= recorded.items():
            self.output.save_settings(config)

    def run(self, *inputs: Any) -> Comparison:
        """Score both, and write report, pages and pictures; in the main process only.

        Args:
            *inputs: The erased model, digests of its module and of all of it, the samples before and after, the
                surrogate set.
        """
        erased, module, whole, before, after, surrogates = inputs
        subject, groups, scorer = self.subject, self._images.groups, self.subject.classifier
        with subject.timed(self.title):
            pictures = [score_groups(erased, groups, kept, scorer) for kept in (before, after)]
        own = self._surrogates_as_seen(erased, surrogates) if scorer else None
        # Nothing is denoised in a model that has one step.
        how = Sampling(DECODER, 1, 1.0) if erased.num_train_timesteps == 1 else subject.settings
        comparison = compare(groups, *pictures, how, scorer, {**self._provenance(), "erased_module": module}, own)
        with finishing():
            delete_evaluations(subject.config.resolved_artifacts_dir, whole)
            self.output.save_report(comparison.save, self.identity())
        return comparison

    def _surrogates_as_seen(self, objective: Objective, surrogates: SampleSet) -> dict[int, dict[str, Classification]]:
        """What the classifier says of the surrogate samples themselves, by label: as far as forgetting can go.

        A decoder that shows the pixels' means can show no noise, only its mean: that is seen too.
        """
        config, scorer = self.subject.config, self.subject.classifier
        assert scorer is not None
        seen: dict[int, dict[str, Classification]] = {}
        for pair in self.subject.pairs:
            label = scorer.label_of(pair.concept)
            prompts = {fill_template(template, pair.concept) for template in config.concept_templates}
            of_surrogate = zip(surrogates.conditions, surrogates.are_own, strict=True)
            rows = [row for row, (prompt, is_own) in enumerate(of_surrogate) if prompt in prompts and not is_own]
            if label is None or not rows:
                continue
            samples = surrogates.samples[rows].to(objective.device)
            seen[label] = {"samples": scorer(objective.decode(samples[: config.num_eval_images]))}
            if objective.shows_means and pair.surrogate.kind == "noise":
                seen[label]["mean"] = scorer(objective.decode(samples.mean(0, keepdim=True)))
        return seen

    def _cost(self) -> dict[str, Any]:
        """By stage what this run took of the network, and what went into the products that it used."""
        spent = self.subject.passes
        # What has no product is made whenever it is run.
        made = {**self.output.made(self._training.identity()), **spent, **self.subject.made}
        return {
            title: {**spent.get(title, Passes()).to_dict(), **({"made": passes.to_dict()} if passes else {})}
            for title, passes in made.items()
        }

    def _provenance(self) -> dict[str, Any]:
        from ..version import __version__

        subject = self.subject
        return {
            "sa_diffusers_version": __version__,
            "base_model": subject.config.pretrained_model_name_or_path,
            "base_revision": subject.revision,
            "base_module": subject.module,
            "erased_model": str(self.output.path),
            "pairs": [
                {"concept": pair.concept, "surrogate": pair.surrogate.value, "kind": pair.surrogate.kind}
                for pair in subject.pairs
            ],
            "configuration": subject.config.to_dict(),
            "identity": self.identity().digest,
            "distilled": subject.distilled,
            "handed_in": subject.handed_in,
            "stopped_after_step": self._training.stopped_after_step,
            "weights": weights_in(self.output.path),
            "saved": saved_alone(str(self.output.path)),
            "adapter": adapter_on_record(str(self.output.path)),
            "ending": recorded_ending(str(self.output.path)),
            "blur": subject.blur,
            "mixed_precision": str(subject.accelerator.mixed_precision),
            "weights_dtype": subject.config.weights_dtype,
            "base_quantization": subject.config.base_quantization,
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            "seconds": subject.seconds,
            "cost": self._cost(),
        }
