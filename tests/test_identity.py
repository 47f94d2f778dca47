"""Every setting is part of what an artefact depends on, or of no consequence for it."""

import dataclasses
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from sa_diffusers import SelectiveAmnesiaConfig, embedded_pipeline
from sa_diffusers.erasure import DEPENDENCIES, IRRELEVANT, Erasure
from sa_diffusers.evaluation import ImageClassifier
from sa_diffusers.identity import Identity
from sa_diffusers.seeds import STREAMS, first_seed, generator_of

from .conftest import build_tiny_pipeline

NAMES = [spec.name for spec in dataclasses.fields(SelectiveAmnesiaConfig)]
# Another value for each setting, from which another artefact must follow, or the same.
OTHER = {
    "concept": ["dog"], "surrogate": ["a young man"], "concept_templates": ["a {}"],
    "prediction_type": "v_prediction", "train_method": "xattn", "adapter": "lora", "resolution": 24,
    "num_surrogate_images": 7, "num_replay_images": 11, "replay_prompts": "garments", "replay_surrogates": False,
    "concept_share": 0.25, "timestep_draws": 2,
    "replay_unconditional_share": 0.5, "sampler": "euler", "num_inference_steps": 3, "guidance_scale": 2.0,
    "surrogate_guidance_scale": 2.0, "replay_guidance_scale": 2.0, "sample_batch_size": 3,
    "fisher_kind": "jacobian", "num_fisher_samples": 4,
    "fisher_timesteps": 5, "fisher_batch_size": 3, "fisher_concept_share": 0.9, "ewc": 2.0, "ewc_weight": 2.0,
    "num_probe_images": 9, "num_neighbour_images": 3, "forget_target": 0.6, "drift_tolerance": 0.5,
    "replay_weight": 2.0, "seed": 1, "max_train_steps": 5, "train_batch_size": 3, "gradient_accumulation_steps": 2,
    "gradient_checkpointing": True, "target": "noise", "condition_dropout": 0.1, "naive": True, "snr_gamma": 5.0,
    "noise_offset": 0.1, "learning_rate": 1e-4, "scale_lr": True, "lr_scheduler": "cosine", "lr_warmup_steps": 1,
    "lr_num_cycles": 2, "lr_power": 2.0, "adam_beta1": 0.8, "adam_beta2": 0.9, "adam_weight_decay": 0.1,
    "adam_epsilon": 1e-7, "max_grad_norm": 2.0, "use_ema": True, "ema_decay": 0.5, "ema_warmup": False,
    "mixed_precision": "bf16", "checkpointing_steps": 3, "checkpointing_minutes": 1.0, "checkpoints_total_limit": 3,
    "resume_from_checkpoint": "no", "validation_prompts": ["cat"], "validation_steps": 2, "num_validation_images": 1,
    "clip": "none", "require_forgotten": True,
    "num_eval_images": 3, "eval_templates": ["my {}"], "eval_seed": 5_000_000, "blur": "yes",
    "report_to": "tensorboard", "logging_dir": "runs", "logging_steps": 1, "tracker_project_name": "tiny",
    "push_to_hub": True, "hub_model_id": "a/b", "hub_private_repo": True, "overwrite_output_dir": True,
    "train_distilled": True, "save_components": "trained", "weights_dtype": "bfloat16", "fisher_dtype": "bfloat16",
    "fisher_on_cpu": True,
}  # fmt: skip
# Their values need files, or a device, of their own: see the tests below, and those of flags that need CUDA.
NEED_FILES = {"pretrained_model_name_or_path", "revision", "variant", "cache_dir", "artifacts_dir", "output_dir",
              "fisher", "classifier", "reference_features", "drop_naming_prompts", "allow_tf32", "use_8bit_adam",
              "enable_xformers_memory_efficient_attention", "no_t5", "single_file_config"}  # fmt: skip
# They mean something for adapters alone: see tests/test_adapters.py, test_fused.py and test_quantization.py.
OF_ADAPTERS = {"lora_rank", "lora_format", "fisher_form", "fuse_adapters", "base_quantization"}


def digests(settings: dict) -> dict[str, str]:
    """The name of every artefact."""
    erasure = Erasure(SelectiveAmnesiaConfig(**settings))
    return {
        "surrogates": erasure.surrogate_stage.identity().digest,
        "replay": erasure.replay_stage.identity().digest,
        "fisher": erasure.fisher_stage.folder.name,
        "probes": erasure.probe_stage.identity().digest,
        "training": erasure.identity.digest,
        "report": erasure.report_stage.identity().digest,
    }


@pytest.fixture
def plain(tiny_settings):
    return {**tiny_settings, "num_fisher_samples": 5, "num_probe_images": 8}


@pytest.fixture
def before(plain):
    return digests(plain)


def test_every_setting_is_classified_and_tried():
    relevant = frozenset().union(*DEPENDENCIES.values())
    assert relevant | IRRELEVANT == set(NAMES)
    assert not relevant & IRRELEVANT
    assert set(OTHER) | NEED_FILES | OF_ADAPTERS == set(NAMES)


def changed(before: dict, after: dict) -> set[str]:
    return {name for name in before if before[name] != after[name]}


def expected(name: str) -> set[str]:
    return {artefact for artefact, settings in DEPENDENCIES.items() if name in settings}


@pytest.mark.long
def test_a_setting_changes_the_artefacts_that_depend_on_it_and_no_other(plain, before):
    from accelerate.state import AcceleratorState

    wrong = {}
    for name, value in OTHER.items():
        AcceleratorState._reset_state(reset_partial_state=True)
        found = changed(before, digests({**plain, name: value}))
        if found != expected(name):
            wrong[name] = (found, expected(name))
    assert not wrong


@pytest.mark.parametrize("name", ["artifacts_dir", "output_dir", "cache_dir"])
def test_places_change_nothing(plain, before, name, tmp_path):
    assert not changed(before, digests({**plain, name: str(tmp_path / "elsewhere")}))


@pytest.mark.parametrize("part", ["unet", "text_encoder", "vae", "scheduler", "variant"])
def test_every_part_of_the_base_model_counts(plain, before, part, tmp_path):
    """A text encoder or betas of another model made Fisher information that was reused."""
    pipeline = build_tiny_pipeline()
    more = {}
    if part == "scheduler":
        pipeline.scheduler.register_to_config(beta_end=0.02)
    else:
        with torch.no_grad():
            next(getattr(pipeline, "unet" if part == "variant" else part).parameters()).add_(1)
    if part == "variant":
        more = {"variant": "fp16"}
    pipeline.save_pretrained(tmp_path / "other", **more)
    after = digests({**plain, "pretrained_model_name_or_path": str(tmp_path / "other"), **more})
    assert changed(before, after) == set(before)


def test_a_given_fisher_information_and_edited_prompts_count(plain, before, tmp_path):
    erasure = Erasure(SelectiveAmnesiaConfig(**plain))
    information = erasure.fisher()
    information.save_pretrained(tmp_path / "fisher")
    assert changed(before, digests({**plain, "fisher": str(tmp_path / "fisher")})) == {"training", "report"}
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a dog\na cow\n")
    first = digests({**plain, "replay_prompts": str(prompts)})
    prompts.write_text("a dog\na hen\n")
    assert changed(first, digests({**plain, "replay_prompts": str(prompts)})) == {"replay", "fisher", "probes",
                                                                                 "training", "report"}  # fmt: skip


def test_a_classifier_counts_by_its_weights(plain, tmp_path):
    """One that was trained anew in its folder looks at images before a training stops, and scores them afterwards."""
    own = embedded_pipeline().parent / "classifier"
    shutil.copytree(own, tmp_path / "classifier")
    first = digests({**plain, "classifier": str(tmp_path / "classifier")})
    weights = load_file(own / "model.safetensors")
    save_file({name: -value for name, value in weights.items()}, tmp_path / "classifier" / "model.safetensors",
              {"format": "pt"})  # fmt: skip
    again = {**plain, "classifier": str(tmp_path / "classifier")}
    assert changed(first, digests(again)) == {"training", "report"}
    scored = {**again, "forget_target": None}
    assert digests(scored)["training"] == digests({**scored, "classifier": str(own)})["training"]


def test_a_clip_and_reference_features_count_by_their_content(plain, clip_folder, tmp_path):
    shutil.copytree(clip_folder, tmp_path / "clip")
    first = digests({**plain, "clip": str(tmp_path / "clip")})
    weights = load_file(clip_folder / "model.safetensors")
    save_file({name: -value for name, value in weights.items()}, tmp_path / "clip" / "model.safetensors",
              {"format": "pt"})  # fmt: skip
    assert changed(first, digests({**plain, "clip": str(tmp_path / "clip")})) == {"report"}
    classifier = ImageClassifier(embedded_pipeline().parent / "classifier")
    settings = {**plain, "classifier": classifier.name, "reference_features": str(tmp_path / "features")}
    found = []
    for grey in (50, 200):
        pictures = [Image.new("RGB", (32, 32), (grey + number,) * 3) for number in range(3)]
        classifier.save_reference_features([pictures] * len(classifier.labels), tmp_path / "features")
        found.append(digests(settings))
    assert changed(*found) == {"report"}


def test_an_edited_surrogate_image_counts(plain, tmp_path):

    folder = tmp_path / "images"
    folder.mkdir()
    Image.new("RGB", (16, 16), "white").save(folder / "a.png")
    first = digests({**plain, "surrogate": [str(folder)]})
    Image.new("RGB", (16, 16), "black").save(folder / "a.png")
    assert "training" in changed(first, digests({**plain, "surrogate": [str(folder)]}))


def test_differences_are_told_by_name():
    ours = Identity("training", {"seed": 1, "betas": [0.9, 0.99], "same": 3})
    assert ours.differences({"seed": 2, "betas": [0.9, 0.99], "same": 3}) == ["seed=2 (now 1)"]
    assert ours.differences({"seed": 1, "betas": [0.9, 0.99]}) == ["same=None (now 3)"]


@pytest.mark.parametrize("seed", [0, 1, 3, 23, 63, 64, 1000, 12345, 2**31, 2**32 - 1, 2**40, 2**63])
def test_no_two_streams_of_a_run_meet(seed):
    """`--seed 1000` gave surrogates the evaluation's seeds."""
    spans = sorted((first_seed(name, seed), stream.length, name) for name, stream in STREAMS.items())
    for (first, length, name), (following, _, other) in zip(spans, [*spans[1:], spans[0]], strict=True):
        gap = (following - first) % 2**32
        assert gap >= length, (name, other)


def test_seed_0_is_what_it_was_and_other_seeds_sample_something_else():
    assert [first_seed(name) for name in ("surrogate", "replay", "concept", "evaluation")] == [
        0,
        10**7,
        2 * 10**7,
        10**6,
    ]
    drawn = [torch.randn(4, generator=generator_of("surrogate", seed, 0)) for seed in (0, 1, 2, 64, 2**32, 2**33)]
    assert len({tuple(values.tolist()) for values in drawn}) == len(drawn)
    assert first_seed("evaluation", 7) == first_seed("evaluation", 0)


@pytest.mark.parametrize(
    ("seed", "stream"),
    # The last two have the noise of small seeds: a generator takes the low 32 bits.
    [(3, "surrogate"), (30_000_005, "probe"), (2**32 + 3, "surrogate"), (2**32 - 1, "surrogate")],
)
def test_an_evaluation_on_the_noise_of_training_samples_is_refused(plain, seed, stream):
    with pytest.raises(
        ValueError, match=f"eval_seed={seed}: the evaluation's .* would have the seeds of {stream} samp"
    ):
        Erasure(SelectiveAmnesiaConfig(**plain, eval_seed=seed))


def test_the_seeds_of_the_last_images_count_too(plain):
    """What a concept's rows have beyond the others' number lies behind everybody's seeds."""
    known = {**plain, "concept": ["sneaker"], "surrogate": ["dress"], "num_eval_images": 60,
             "classifier": str(embedded_pipeline().parent / "classifier")}  # fmt: skip
    first = first_seed("concept") - 800
    erasure = Erasure(SelectiveAmnesiaConfig(**known))
    assert sum(len(group.prompts) for group in erasure.image_stage.groups) < 800
    with pytest.raises(ValueError, match=f"eval_seed={first}: .* would have the seeds of concept samples"):
        Erasure(SelectiveAmnesiaConfig(**known, eval_seed=first))


def test_a_report_of_before_is_another_where_a_concept_had_fewer_images(plain, monkeypatch):
    settings = {**plain, "concept": ["sneaker"], "surrogate": ["dress"],
                "classifier": str(embedded_pipeline().parent / "classifier")}  # fmt: skip
    now = [digests({**settings, "num_eval_images": count})["report"] for count in (2, 60)]
    monkeypatch.setattr(SelectiveAmnesiaConfig, "num_concept_eval_images", property(lambda self: self.num_eval_images))
    then = [digests({**settings, "num_eval_images": count})["report"] for count in (2, 60)]
    assert now[0] == then[0]
    assert now[1] != then[1]
