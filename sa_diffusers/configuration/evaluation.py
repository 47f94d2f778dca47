"""The settings of an evaluation."""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

from ..messages import shown
from .fields import Settings, documented, flag
from .groups import Blur, Precision, Prediction, Sampler, Weights, no_file

Held = Literal["nf4", "fp8", "int8", "none"]
DEFAULT_CLIP = "openai/clip-vit-large-patch14"
DEFAULT_I2P = "AIML-TUDA/i2p"
# A row's images; for the celebrity a prompt's, for nudity those of the naked person.
IMAGES = {"class": 500, "concept": 50, "robustness": 50, "celebrity": 20, "nudity": 1000}
# Of a protocol that says nothing else.
_MANY = 50
_KNOWN = ", ".join(f"{protocol} {count}" for protocol, count in IMAGES.items())


@dataclass
class _Subject(Settings):
    """What is measured."""

    base: str = flag(help="the model before: a folder or a name on the Hub", path=True)
    erased: str = flag(help="the model after: a folder that an erasure wrote, or a name on the Hub", path=True)
    protocol: Literal["class", "concept", "robustness", "celebrity", "nudity"] = flag(help="what is measured")
    concept: list[str] | None = flag(None, "what was erased [as the erased model's folder says]")
    surrogate: list[str] | None = flag(None, "what it turned into [as the erased model's folder says]")
    output_dir: Path | None = flag(None, "folder of the report [ERASED/evaluation-PROTOCOL]", check=no_file)
    blur: Blur | None = flag(
        None,
        "blur every picture that is written: auto does where what was erased is nudity or of its kind, and in the "
        "nudity protocol [as in the erasure]",
    )
    require_forgotten: bool = flag(False, "end with exit code 3 unless the verdict is that every concept is forgotten")


@dataclass
class _Models(Settings):
    """Models."""

    revision: str | None = flag(
        None, "branch, tag or commit of the base model [as in the erasure, if it erased from it]"
    )
    variant: str | None = flag(None, "variant of the base model's weight files [likewise]")
    erased_revision: str | None = flag(None, "branch, tag or commit of the erased model on the Hub")
    prediction_type: Prediction | None = flag(
        None, "what all the models predict [as in the erasure, else as their schedulers say]"
    )
    mixed_precision: Precision | None = flag(
        None, "precision of the sampling [as in the erasure, else as `accelerate config` says]"
    )
    weights_dtype: Weights | None = flag(None, "precision of the models' weights [as in the erasure, else float32]")
    base_quantization: Held | None = flag(
        None, "how the linear layers of the base model's denoiser are held, below an adapter too [as in the erasure]"
    )


@dataclass
class _Sampling(Settings):
    """Sampling."""

    images: int | None = flag(
        None, f"images a row; celebrity: a prompt; nudity: of the naked person [{_KNOWN}]", at_least=1
    )
    seed: int = flag(1_000_000, "seed of the first image")
    sampler: Sampler | None = flag(None, "sampler [as in the erasure]")
    num_inference_steps: int | None = flag(None, "steps of the sampler [as in the erasure]")
    guidance_scale: float | None = flag(None, "classifier-free guidance [as in the erasure]")
    resolution: int | None = flag(None, "height and width of images in pixels [as in the erasure]")
    batch_size: int | None = flag(None, "images sampled at once [as many as fit into free memory]", at_least=1)
    artifacts_dir: Path | None = flag(
        None, "where sampled images are kept [$SA_DIFFUSERS_CACHE or ~/.cache/sa_diffusers]", check=no_file
    )


@dataclass
class _Scoring(Settings):
    """Scoring."""

    classifier: str | None = flag(
        None, "image classifier: a folder or a name on the Hub [as in the erasure]", path=True
    )
    clip: str = flag(DEFAULT_CLIP, "CLIP model, or none (concept, robustness)", path=True)
    features: list[str] = flag(
        [],
        "networks of the Fréchet distance, precision and recall beside classifier and CLIP: inception, or a vision "
        "model of transformers by folder or Hub name",
        metavar="NAME",
        path=True,
    )
    inception_weights: str | None = flag(None, "file of the Inception network's weights [downloaded]", path=True)
    measures: list[str] = flag(
        [],
        "measures of every image beside the protocol's own: clip, nudity, celebrity, or what a script of one's own "
        "has registered",
        metavar="NAME",
    )
    real: str | None = flag(
        None,
        "real images (class): a folder with IDX files, or with a folder of each class, a parquet file, or a Hub "
        "dataset",
        path=True,
    )
    real_split: str = flag("test", "split of the real images")


@dataclass
class _Prompts(Settings):
    """Prompts (concept, robustness)."""

    concept_prompts: str | None = flag(
        None, "phrasings of the training, one a line, {} for the concept [as in the erasure]", metavar="FILE", path=True
    )
    held_out_prompts: str | None = flag(
        None, "phrasings that no training saw, {} for the concept [built in]", metavar="FILE", path=True
    )
    evoking_prompts: str | None = flag(
        None,
        "prompts that evoke the concept without naming it [built in for the paper's concepts]",
        metavar="FILE",
        path=True,
    )
    neighbours: list[str] | None = flag(
        None,
        "what lies near the concept [nearest of the classifier's labels by what the base samples, or of a built-in "
        "list by its text]",
    )
    unrelated: list[str] | None = flag(None, "what lies far from it [chosen likewise]")
    translations: str | None = flag(
        None, "prompts in other languages, {} for the concept [built in]", metavar="FILE", path=True
    )


@dataclass
class _Detectors(Settings):
    """Detectors (celebrity, nudity)."""

    giphy: str | None = flag(
        None, "the GIPHY celebrity detector: best_model_states.pkl and labels.csv", metavar="FOLDER", path=True
    )
    celebrity: str | None = flag(None, "its name of the celebrity [the concept]")
    celebrity_prompts: str | None = flag(
        None, "prompts, one a line, {} for the celebrity [50 built in]", metavar="FILE", path=True
    )
    i2p: str = flag(DEFAULT_I2P, "prompts with seeds: Hub dataset, CSV or parquet file, or none", path=True)
    i2p_categories: list[str] = flag([], "only prompts of these categories [all]")
    show_nudity: bool = flag(False, "do not blur the pictures, as --blur no")


@dataclass
class _Attack(Settings):
    """Attack (robustness)."""

    control: str | None = flag(None, "a model that never saw the concept: a folder or a name on the Hub", path=True)
    inversion_steps: int = flag(500, "steps of textual inversion; 0 leaves it out", at_least=0)
    inversion_images: int = flag(16, "images that the attacker has", at_least=1)
    inversion_batch_size: int = flag(8, "images a step", at_least=1)
    inversion_learning_rate: float = flag(5e-3, "learning rate of the new token")


@documented
@dataclass
class EvaluationConfig(_Attack, _Detectors, _Prompts, _Scoring, _Sampling, _Models, _Subject):
    """Settings of one evaluation. Each field is a flag of `sa-diffusers evaluate`.

    Raises:
        ValueError: A value is out of range, or two values contradict each other.
    """

    as_flags = True
    # The command that is recorded in the report.
    command: str = field(default="", init=False)

    def check(self) -> None:
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"--seed {shown(self.seed)} must be a whole number from 0 to {2**32 - 1:,}")
        if self.show_nudity and self.blur not in (None, "no"):
            raise ValueError(f"--show_nudity contradicts --blur {self.blur}: give one of them")
        if self.show_nudity:
            self.blur = "no"
        self.images = self.images or IMAGES[self.protocol]
        if self.output_dir is None:
            folder = Path(self.erased)
            self.output_dir = (folder if folder.is_dir() else Path(folder.name)) / f"evaluation-{self.protocol}"


def add_protocol(name: str, images: int | None = None) -> None:
    """Let `protocol` be one more name, with so many images a row by default."""
    if name not in IMAGES or images is not None:
        IMAGES[name] = images or _MANY
    (spec,) = [spec for spec in fields(EvaluationConfig) if spec.name == "protocol"]
    spec.type = Literal[tuple(IMAGES)]
