"""From a name or a folder to the objective of the model in it."""

from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from huggingface_hub import HfApi, constants, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

from ..models.class_conditional_pipeline import ClassConditionalPipeline
from ..models.conditional_vae import ConditionalVAE
from ..models.conditional_vae_pipeline import ConditionalVAEPipeline
from .base import Objective
from .class_conditional import ClassConditionalObjective
from .conditional_vae import ConditionalVAEObjective
from .latent_diffusion import LatentDiffusionObjective

HUB_TIMEOUT_SECONDS = 10
_OWN_PIPELINES: dict[str, type] = {kind.__name__: kind for kind in (ClassConditionalPipeline, ConditionalVAEPipeline)}
_OWN_MODELS: dict[str, type] = {"ConditionalVAE": ConditionalVAE}


def load_pipeline(
    name_or_path: str, revision: str | None = None, variant: str | None = None, cache_dir: str | None = None
) -> DiffusionPipeline:
    """Load a pipeline in float32 from a folder, the Hub, or, when the Hub does not answer, the Hub's local cache.

    Raises:
        ValueError: There is no such model, or no leave to read it.
        ConnectionError: The Hub does not answer within seconds and the cache does not hold the model.
    """
    options: dict[str, Any] = {"variant": variant, "dtype": torch.float32}
    if Path(name_or_path).is_dir():
        if not (Path(name_or_path) / DiffusionPipeline.config_name).is_file():
            raise ValueError(
                f'pretrained_model_name_or_path="{name_or_path}" is a folder without {DiffusionPipeline.config_name}: '
                "give the folder of a saved pipeline"
            )
        return _load(name_or_path, options)
    unreachable = _why_unreachable(name_or_path, revision)
    options |= {"revision": revision, "cache_dir": cache_dir, "local_files_only": unreachable is not None}
    try:
        return _load(name_or_path, options)
    except (OSError, ValueError) as error:
        if unreachable is None:
            raise
        raise ConnectionError(
            f'the model "{name_or_path}" is not in the local cache and the Hub cannot be reached ({unreachable}). With '
            f"a connection, run `hf download {name_or_path}` once, or give the path of a local folder with "
            "--pretrained_model_name_or_path"
        ) from error


def _load(name_or_path: str, options: dict[str, Any]) -> DiffusionPipeline:
    options = {name: value for name, value in options.items() if value is not None}
    place = {name: options[name] for name in ("revision", "cache_dir", "local_files_only") if name in options}
    index = DiffusionPipeline.load_config(name_or_path, **place)
    if isinstance(index["_class_name"], list) and index["_class_name"][1] in _OWN_PIPELINES:
        if not Path(name_or_path).is_dir():
            name_or_path = snapshot_download(name_or_path, **place)
        return _load_own(Path(name_or_path), index, {name: options[name] for name in options if name not in place})
    return DiffusionPipeline.from_pretrained(name_or_path, **options)


def _load_own(folder: Path, index: dict[str, Any], options: dict[str, Any]) -> DiffusionPipeline:
    """A pipeline of this package, with this package's code and not with the copy that it was saved with."""
    components: dict[str, Any] = {}
    for name, value in index.items():
        if not isinstance(value, list) or name.startswith("_"):
            continue
        kind = _OWN_MODELS.get(value[1]) or getattr(diffusers, value[1])
        is_model = issubclass(kind, diffusers.ModelMixin)
        components[name] = kind.from_pretrained(folder, subfolder=name, **(options if is_model else {}))
    return _OWN_PIPELINES[index["_class_name"][1]](**components, id2label=index.get("id2label"))


def _why_unreachable(name: str, revision: str | None) -> str | None:
    """Ask the Hub for a model; the reason if it cannot be asked.

    Raises:
        ValueError: The Hub answers that there is no such model, or no leave to read it.
    """
    if constants.HF_HUB_OFFLINE:
        return "offline mode is on: HF_HUB_OFFLINE is set"
    advice = "give a folder, or a name such as CompVis/stable-diffusion-v1-4"
    try:
        HfApi().model_info(name, revision=revision, timeout=HUB_TIMEOUT_SECONDS)
    except GatedRepoError as error:
        raise ValueError(
            f'the model "{name}" is gated: accept its terms on its page, then run `hf auth login`'
        ) from error
    except RevisionNotFoundError as error:
        raise ValueError(f'the model "{name}" has no revision "{revision}" on the Hub') from error
    except RepositoryNotFoundError as error:
        raise ValueError(f'there is no model "{name}", neither as a folder nor on the Hub: {advice}') from error
    except HFValidationError as error:
        raise ValueError(f'"{name}" is neither a folder nor a name on the Hub ({error}): {advice}') from error
    except Exception as error:  # the kinds of network errors depend on huggingface_hub's HTTP library
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no answer'}"
    return None


def objective_for(
    pipeline: DiffusionPipeline,
    prediction_type: str | None = None,
    snr_gamma: float | None = None,
    noise_offset: float = 0.0,
) -> Objective:
    """The objective of a pipeline.

    Raises:
        ValueError: No objective knows this kind of pipeline.
    """
    own = _OWN_PIPELINES.get(type(pipeline).__name__)
    if own and type(pipeline) is not own:
        # Loaded with the copy of the code that lies beside the weights.
        pipeline = own(**pipeline.components, id2label=pipeline.config.id2label)
    if type(pipeline) is StableDiffusionPipeline:
        return LatentDiffusionObjective(pipeline, prediction_type, snr_gamma, noise_offset)
    if type(pipeline) is ClassConditionalPipeline:
        return ClassConditionalObjective(pipeline, prediction_type, snr_gamma, noise_offset)
    if type(pipeline) is ConditionalVAEPipeline:
        for name, value in (
            ("prediction_type", prediction_type),
            ("snr_gamma", snr_gamma),
            ("noise_offset", noise_offset),
        ):
            if value:
                raise ValueError(f"{name}={value} has no meaning for a conditional VAE: leave it out")
        return ConditionalVAEObjective(pipeline)
    raise ValueError(
        f"{type(pipeline).__name__} is not supported yet; supported: StableDiffusionPipeline (Stable Diffusion 1 and "
        f"2), {', '.join(_OWN_PIPELINES)}. For another kind of model, write a subclass of Objective"
    )


def resolved_revision(name_or_path: str, revision: str | None = None, cache_dir: str | None = None) -> str | None:
    """The commit that a name on the Hub stands for in the local cache; None for a folder."""
    if Path(name_or_path).is_dir():
        return None
    index = try_to_load_from_cache(name_or_path, DiffusionPipeline.config_name, cache_dir, revision)
    return Path(index).parent.name if isinstance(index, str) else None
