"""Models that are distilled to few steps: told, named, and sampled as they are used."""

import json

import pytest
import torch
from diffusers import (
    EulerAncestralDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LatentConsistencyModelPipeline,
    StableDiffusionPipeline,
)

from sa_diffusers import Erasure, SamplingSettings, load_pipeline, objective_for
from sa_diffusers.commands.evaluate import main as evaluate
from sa_diffusers.data.sample_set import MANIFEST_NAME
from sa_diffusers.evaluation.eval_unlearn import SelectiveAmnesiaTechnique
from sa_diffusers.families import kind_in
from sa_diffusers.families.distilled import distilled_in_memory
from sa_diffusers.results import Report

from .conftest import BY_HAND, build_tiny_pipeline, run_here
from .test_cost import STAGES, figures, planned, summed
from .test_flux import config_of
from .test_loading import without_weights
from .tiny_families import (
    as_consistency_model,
    build_flux,
    build_klein,
    build_qwen,
    build_sd3,
    build_xl,
    build_z_image,
)

SMALL = {**BY_HAND, "num_surrogate_images": 4, "num_replay_images": 4, "num_fisher_samples": 2, "fisher_timesteps": 2,
         "max_train_steps": 1, "train_batch_size": 2, "num_eval_images": 2, "train_method": "xattn"}  # fmt: skip


def used(steps, sampler=None):
    return {"num_inference_steps": steps, "guidance_scale": 1.0, **({"sampler": sampler} if sampler else {})}


@pytest.mark.parametrize(
    ("build", "name", "expected"),
    [
        (build_xl, "sdxl-turbo", used(4, "euler_ancestral_trailing")),
        (build_tiny_pipeline, "sd-turbo", used(4, "euler_ancestral_trailing")),
        (build_xl, "SDXL-Lightning", used(4, "euler_trailing")),
        (build_xl, "sdxl_lightning_8step_unet", used(8, "euler_trailing")),
        (build_xl, "Hyper-SDXL", used(8, "ddim_trailing")),
        (build_xl, "Hyper-SDXL-2steps", used(2, "ddim_trailing")),
        (build_xl, "lcm-sdxl", used(4, "lcm")),
        (build_xl, "DMD2", used(4, "lcm")),
        (build_sd3, "stable-diffusion-3.5-large-turbo", used(4)),
        (build_flux, "FLUX.1-schnell", used(4)),
        (build_klein, "FLUX.2-klein-4B", used(4)),
        (build_klein, "FLUX.2-klein-9B", used(4)),
        (build_z_image, "Z-Image-Turbo", used(8)),
        (build_qwen, "Qwen-Image-Lightning-8steps", used(8)),
    ],
)
def test_a_name_tells_how_a_model_is_used(build, name, expected, tmp_path):
    pipeline = build()
    pipeline.save_pretrained(tmp_path / name)
    _, told = kind_in(str(without_weights(tmp_path / name)))
    assert told.why == f"as its name {name} says"
    assert told.defaults == expected
    # As samplers take it, too.
    pipeline.register_to_config(_name_or_path=f"somebody/{name}")
    objective = objective_for(pipeline)
    assert objective.defaults.items() >= expected.items()
    objective.check_sampling(SamplingSettings(**objective.defaults), pipeline.scheduler)


def test_a_folder_of_the_hub_s_cache_is_called_by_its_repository(tmp_path):
    """Nothing else tells this one."""
    folder = tmp_path / "models--stabilityai--stable-diffusion-3.5-large-turbo" / "snapshots" / ("0" * 40)
    build_sd3().save_pretrained(folder)
    with pytest.raises(ValueError, match="as its name stabilityai/stable-diffusion-3.5-large-turbo says"):
        load_pipeline(str(without_weights(folder)), undistilled=True)


def xl_turbo():
    pipeline = build_xl()
    pipeline.scheduler = EulerAncestralDiscreteScheduler.from_config(
        pipeline.scheduler.config, timestep_spacing="trailing"
    )
    return pipeline


def z_turbo():
    pipeline = build_z_image()
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    return pipeline


@pytest.mark.parametrize(
    ("build", "why", "expected"),
    [
        (xl_turbo, "its scheduler is that of SDXL-Turbo", used(4, "euler_ancestral_trailing")),
        (lambda: build_flux(guidance_embeds=False), "its transformer takes no guidance", used(4)),
        (lambda: build_klein(distilled=True), "its index says is_distilled", used(4)),
        (z_turbo, "its scheduler's shift is 3", used(8)),
        (lambda: as_consistency_model(build_xl()), "its UNet takes guidance as a number", used(4, "lcm")),
        (
            lambda: StableDiffusionPipeline.from_pipe(
                build_tiny_pipeline(), scheduler=as_consistency_model(build_tiny_pipeline()).scheduler
            ),
            "its scheduler is that of latent consistency models",
            used(4, "lcm"),
        ),
    ],
)
def test_configurations_tell_how_a_model_is_used(build, why, expected, tmp_path):
    build().save_pretrained(tmp_path / "model")
    for told in (distilled_in_memory(build()), kind_in(str(without_weights(tmp_path / "model")))[1]):
        assert told.why.startswith(why)
        assert told.defaults == expected
    with pytest.raises(ValueError, match=f"{why}.*which training breaks: erase from"):
        Erasure(config_of(tmp_path / "model"))


@pytest.mark.parametrize("build", [build_tiny_pipeline, build_xl, build_sd3, build_flux, build_z_image, build_klein])
def test_other_models_are_sampled_as_their_family_is(build, tmp_path):
    build().save_pretrained(tmp_path / "model")
    assert kind_in(str(without_weights(tmp_path / "model")))[1] is None
    objective = objective_for(build())
    assert objective.defaults == type(objective).defaults


def test_settings_that_are_given_are_kept(tmp_path):
    build_xl().save_pretrained(tmp_path / "sdxl-turbo")
    given = {"num_inference_steps": 1, "guidance_scale": 2.0, "sampler": "euler"}
    config = Erasure(config_of(tmp_path / "sdxl-turbo", train_distilled=True, **given)).config
    assert {name: getattr(config, name) for name in given} == given
    (tmp_path / "sdxl-turbo" / "selective_amnesia_defaults.json").write_text('{"num_inference_steps": 2}')
    config = Erasure(config_of(tmp_path / "sdxl-turbo", train_distilled=True)).config
    assert (config.num_inference_steps, config.guidance_scale, config.sampler) == (2, 1.0, "euler_ancestral_trailing")


def test_a_flag_tells_what_nothing_else_does(tmp_path):
    build_tiny_pipeline().save_pretrained(tmp_path / "model")
    erasure = Erasure(config_of(tmp_path / "model", train_distilled=True))
    assert "\ndistilled The base model is distilled to few steps (as train_distilled says)" in erasure.plan()
    assert erasure.config.num_inference_steps == 50
    assert "\ndistilled " not in Erasure(config_of(tmp_path / "model")).plan()


def test_an_erasure_samples_all_as_the_model_is_used_and_says_what_it_is(tmp_path, clip_folder):
    base, erased = tmp_path / "sd-turbo", tmp_path / "erased"
    build_tiny_pipeline().save_pretrained(base)
    settings = {**SMALL, "num_probe_images": 8, "num_neighbour_images": 2, "ewc_weight": None,
                "validation_prompts": ["a dog"], "validation_steps": 1,
                "output_dir": str(erased), "artifacts_dir": str(tmp_path / "artifacts")}  # fmt: skip
    erasure = Erasure(config_of(base, train_distilled=True, **settings))
    sentence = (
        "The base model is distilled to few steps (as its name sd-turbo says), and training takes these from it: "
        "what images lose may be the training's doing and not the erasure's, and only figures at the steps of its use "
        "(4) count."
    )
    assert f"\ndistilled {sentence}\n" in erasure.plan()
    steps = []
    erasure.objective.module.register_forward_pre_hook(
        lambda module, given: steps.append(int(given[1].flatten()[0])) if not torch.is_grad_enabled() else None
    )
    report = erasure.run().report
    assert erasure.card_stage.run()
    assert report.distilled == sentence
    assert (report.sampling.sampler, report.sampling.num_inference_steps) == ("euler_ancestral_trailing", 4)
    kept = {path.parent.name.split("-")[0]: json.loads(path.read_text())["origin"]
            for path in (tmp_path / "artifacts").glob(f"*/{MANIFEST_NAME}")}  # fmt: skip
    assert {"surrogate", "replay", "concept", "probe"} <= set(kept)
    for name, origin in kept.items():
        asked = (origin["sampler"], origin["num_inference_steps"], origin["guidance_scale"])
        assert asked == ("euler_ancestral_trailing", 4, 1.0), name
    # They begin at the last timestep.
    assert steps[:4] == [999, 749, 499, 249]
    for file in ("report.md", "README.md"):
        assert "distilled to few steps" in (erased / file).read_text(), file
    assert "distilled to few steps" in (erased / "report.html").read_text()
    said = "# Distilled to few steps: evaluated with euler_ancestral_trailing, 4 steps, guidance 1.\nimage = pipeline("
    assert said in (erased / "README.md").read_text()

    # So does an evaluation of somebody else's erasure, which asks the base; and one of this, where the base's name
    # says it no longer, which asks its own report.
    build_tiny_pipeline().save_pretrained(tmp_path / "another")
    base.rename(tmp_path / "moved")
    (tmp_path / "sd-turbo").symlink_to(tmp_path / "moved")
    asked = ["--concept", "brad pitt", "--surrogate", "a man"]
    for folder, of, further in (("another", "sd-turbo", asked), ("erased", "moved", [])):
        arguments = ["--base", tmp_path / of, "--erased", tmp_path / folder, "--protocol", "concept", "--clip",
                     clip_folder, "--images", "2", "--neighbours", "dog", "--unrelated", "cat", *further]  # fmt: skip
        result = run_here(evaluate, arguments, tmp_path)
        assert result.returncode == 0, result.stderr
        assert f"\ndistilled {sentence}\n" in result.stdout
        found = Report.load(tmp_path / folder / "evaluation-concept" / "report.json")
        assert found.distilled == sentence
        assert (found.sampling.num_inference_steps, found.sampling.guidance_scale) == (4, 1.0)


def test_the_benchmark_s_technique_draws_as_the_model_is_used(tmp_path):
    build_xl().save_pretrained(tmp_path / "sdxl-turbo")
    settings = SelectiveAmnesiaTechnique(str(tmp_path / "sdxl-turbo")).settings
    assert (settings.sampler, settings.num_inference_steps) == ("euler_ancestral_trailing", 4)


def test_what_was_trained_alone_is_as_its_base_is(tmp_path):
    build_xl().save_pretrained(tmp_path / "sdxl-turbo")
    settings = {**SMALL, "save_components": "trained", "output_dir": str(tmp_path / "alone"),
                "artifacts_dir": str(tmp_path / "artifacts")}  # fmt: skip
    Erasure(config_of(tmp_path / "sdxl-turbo", train_distilled=True, **settings)).run()
    assert kind_in(str(tmp_path / "alone"))[1] == kind_in(str(tmp_path / "sdxl-turbo"))[1]
    with pytest.raises(ValueError, match="as its name sdxl-turbo says"):
        load_pipeline(str(tmp_path / "alone"), undistilled=True)


def test_schnell_reads_half_as_many_tokens():
    dev, schnell = (objective_for(build_flux(guidance_embeds=given)) for given in (True, False))
    for objective, tokens in ((dev, 512), (schnell, 256)):
        assert objective.encode_prompts(["a dog"])["encoder_hidden_states"].shape[1] == tokens
        # Its end counts.
        assert objective.count_cut(["a" * (tokens - 2), "a" * tokens]) == 1


# Latent consistency models, whose guidance is a number


def test_a_consistency_model_is_sampled_in_one_pass_a_step_and_says_so(tmp_path):
    LatentConsistencyModelPipeline(
        **as_consistency_model(build_tiny_pipeline()).components, requires_safety_checker=False
    ).save_pretrained(tmp_path / "model")
    settings = {**SMALL, "output_dir": str(tmp_path / "erased"), "artifacts_dir": str(tmp_path / "artifacts")}
    config = config_of(tmp_path / "model", train_distilled=True, **settings)
    erasure = Erasure(config)
    plan = planned(erasure)
    found = figures(erasure.run().report.cost)
    for name, titles in STAGES.items():
        assert plan.get(name, (0, 0)) == summed(found, titles), name
    # Of the erased pipeline plain diffusers samples what was evaluated.
    pipeline = load_pipeline(str(tmp_path / "erased"))
    assert type(pipeline) is StableDiffusionPipeline
    objective = objective_for(load_pipeline(str(tmp_path / "erased")))
    expected = pipeline(["a dog"], num_inference_steps=4, guidance_scale=8.0, output_type="latent",
                        generator=[torch.Generator().manual_seed(3)]).images  # fmt: skip
    settings = SamplingSettings(**objective.defaults)
    torch.testing.assert_close(objective.sample(["a dog"], [3], settings), expected)
    with pytest.raises(ValueError, match="guidance_scale=7.5: this model takes guidance as a number, 8, and has no"):
        Erasure(config.replace(guidance_scale=7.5, output_dir=str(tmp_path / "other")))


def test_the_number_is_part_of_what_a_model_is():
    objective = objective_for(as_consistency_model(build_xl()))
    whole = objective.fingerprint()
    objective.embedded_guidance = 7.0
    assert objective.fingerprint() != whole
