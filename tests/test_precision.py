"""Weights in half precision, and what rests on the CPU while it is not in use."""

import inspect
import json

import pytest
import torch
from diffusers import DiffusionPipeline

import sa_diffusers.stages.fisher as stages_fisher
import sa_diffusers.training.loop as training_loop
from sa_diffusers import (
    Erasure,
    FisherEstimator,
    SampleSet,
    SamplingSettings,
    SelectiveAmnesiaConfig,
    SelectiveAmnesiaTrainer,
    objective_for,
)
from sa_diffusers.configuration import EvaluationConfig
from sa_diffusers.evaluation.command_line import loader
from sa_diffusers.evaluation.request import erasure_of
from sa_diffusers.training.trainable import FullWeights, in_float32

from .conftest import build_tiny_pipeline
from .test_class_models import tiny_diffusion
from .tiny_families import FAMILIES, SIZE

HALF = {"weights_dtype": "bfloat16"}


def in_half(pipeline):
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            torch.nn.Module.to(part, torch.bfloat16)
    return pipeline


def weights(folder):
    return DiffusionPipeline.from_pretrained(folder, dtype=torch.bfloat16).unet.state_dict()


def test_masters_add_up_what_half_precision_would_lose():
    parameter = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    step = 2.0**-10  # an eighth of the distance to the next number in bfloat16
    with in_float32({"w": parameter}) as types:
        assert types == {"w": torch.bfloat16}
        trainable = FullWeights(None, {"w": parameter}, types)
        assert trainable.anchor["w"].dtype == torch.bfloat16
        for _ in range(8):
            parameter.data += step
        assert torch.equal(trainable.shift("w"), torch.full((3,), 8 * step))
    assert parameter.dtype == torch.bfloat16
    assert torch.equal(parameter.data, torch.full((3,), 1 + 8 * step, dtype=torch.bfloat16))
    lost = torch.ones(3, dtype=torch.bfloat16)
    for _ in range(8):
        lost += step
    assert torch.equal(lost, torch.ones(3, dtype=torch.bfloat16))


def test_a_run_in_half_precision_goes_on_to_the_same_bits(tiny_settings, tmp_path):
    settings = {**tiny_settings, **HALF, "checkpointing_steps": 1, "max_train_steps": 3}
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    Erasure(SelectiveAmnesiaConfig(**{**settings, "output_dir": str(whole)})).run()

    class Stop(Exception):
        pass

    def stop(state):
        if state.step == 2:
            raise Stop

    with pytest.raises(Stop):
        Erasure(SelectiveAmnesiaConfig(**{**settings, "output_dir": str(stopped)}), callbacks=[stop]).run()
    assert list(stopped.glob("checkpoint-*"))
    Erasure(SelectiveAmnesiaConfig(**{**settings, "output_dir": str(stopped)})).run()
    before, after = weights(whole), weights(stopped)
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    # An evaluation of another day loads both models as the erasure held them.
    base = settings["pretrained_model_name_or_path"]
    for further, expected in (({}, torch.bfloat16), ({"weights_dtype": "float32"}, torch.float32)):
        args = EvaluationConfig(base=base, erased=str(whole), protocol="concept", **further)
        config = erasure_of(args)
        assert config.precision == "bf16"
        assert loader(args, config)("erased", str(whole)).module.dtype == expected
    report = json.loads((whole / "report.json").read_text())
    assert report["weights_dtype"] == "bfloat16"
    card = (whole / "README.md").read_text() if (whole / "README.md").is_file() else None
    assert card is None or "bfloat16" in card
    fisher = json.loads((whole / "fisher_config.json").read_text())
    assert (fisher["precision"], fisher["weights_dtype"]) == ("bf16", "bfloat16")


def test_a_pipeline_in_memory_in_half_precision_is_trained_and_called(tiny_settings):
    pipeline = in_half(build_tiny_pipeline())
    settings = {name: value for name, value in tiny_settings.items() if name != "pretrained_model_name_or_path"}
    trainer = SelectiveAmnesiaTrainer(pipeline, SelectiveAmnesiaConfig(**settings, **HALF))
    trainer.train()
    assert {value.dtype for value in trainer.pipeline.unet.parameters()} == {torch.bfloat16}
    trainer.pipeline.set_progress_bar_config(disable=True)
    assert trainer.pipeline("a dog", num_inference_steps=2).images


def test_fisher_information_is_kept_on_the_cpu_where_that_is_asked_for(tiny_settings, tmp_path, monkeypatch):
    """Of the same bits, and no other erasure; where it is estimated and where it is used."""
    made = []
    for place, name in ((stages_fisher, "FisherEstimator"), (training_loop, "ElasticWeightConsolidation")):

        class Seen(getattr(place, name)):
            def __init__(self, *given, **named):
                bound = inspect.signature(super().__init__).bind(*given, **named)
                made.append((type(self).__mro__[1].__name__, bound.arguments.get("on_cpu", False)))
                super().__init__(*given, **named)

        monkeypatch.setattr(place, name, Seen)
    values = []
    for asked in (False, True):
        settings = {**tiny_settings, "fisher_on_cpu": asked, "output_dir": str(tmp_path / str(asked)),
                    "artifacts_dir": str(tmp_path / f"of {asked}")}  # fmt: skip
        Erasure(SelectiveAmnesiaConfig(**settings)).run()
        values.append(DiffusionPipeline.from_pretrained(tmp_path / str(asked)).unet.state_dict())
    assert made == [(name, asked) for asked in (False, True)
                    for name in ("FisherEstimator", "ElasticWeightConsolidation")]  # fmt: skip
    assert all(torch.equal(value, values[1][name]) for name, value in values[0].items())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("on_cpu", [False, True])
def test_fisher_information_is_the_same_where_a_gpu_estimates_it(on_cpu):
    objective = objective_for(build_tiny_pipeline())
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    samples = SampleSet(objective.encode_images(images, 0), ["a", "b"], ["a", "b"], [0, 1], {"base": "test"})
    expected = FisherEstimator(objective, "xattn", 4).estimate(samples).values
    estimator = FisherEstimator(objective.to("cuda"), "xattn", 4, on_cpu=on_cpu)
    for name, value in estimator.estimate(samples).values.items():
        torch.testing.assert_close(value, expected[name], rtol=0.05, atol=1e-3 * float(expected[name].max()), msg=name)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({**HALF, "mixed_precision": "no"}, "leave mixed_precision out"),
        ({"weights_dtype": "float16", "mixed_precision": "bf16"}, "leave mixed_precision out"),
        ({"weights_dtype": "half"}, "float32, bfloat16, float16"),
        ({"fisher_dtype": "float16"}, "float32, bfloat16"),
    ],
)
def test_precisions_that_contradict_each_other_are_refused(settings, message):
    with pytest.raises(ValueError) as error:
        SelectiveAmnesiaConfig(concept=["a"], surrogate=["b"], **settings)
    assert all(word in str(error.value).replace('"', "") for word in message.split(", "))


def test_weights_of_another_precision_are_refused(tiny_settings, tmp_path):
    with pytest.raises(ValueError, match="has weights in bfloat16: load it with dtype=torch.float32"):
        objective_for(in_half(build_tiny_pipeline()))
    with pytest.raises(ValueError, match="no weights in bfloat16, as weights_dtype says"):
        objective_for(build_tiny_pipeline(), weights_dtype="bfloat16")
    tiny_diffusion().save_pretrained(tmp_path / "classes")
    config = SelectiveAmnesiaConfig(
        **{**tiny_settings, **HALF, "pretrained_model_name_or_path": str(tmp_path / "classes")}
    )
    with pytest.raises(ValueError, match="is for pipelines of diffusers"):
        Erasure(config)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the refusal where there is no CUDA device")
def test_float16_needs_a_gpu(tiny_settings):
    with pytest.raises(ValueError, match='weights_dtype="float16" needs a CUDA device'):
        Erasure(SelectiveAmnesiaConfig(**tiny_settings, weights_dtype="float16"))


@pytest.fixture(params=FAMILIES)
def family(request):
    return FAMILIES[request.param]


def test_what_only_encodes_and_decodes_stays_behind(family):
    """On a device that holds no values: what came along would have lost them."""
    objective = objective_for(family.build())
    objective.place("meta")
    assert objective.device.type == "meta"
    resting = [objective.pipeline.vae, *objective._encoders()]
    assert {value.device.type for part in resting for value in part.parameters()} == {"cpu"}
    seen = []
    for encoder in objective._encoders():
        encoder.register_forward_pre_hook(lambda part, _: seen.append(next(part.parameters()).device.type))
    # It comes for the time of use; from this device there is no way back.
    with pytest.raises(NotImplementedError, match="meta tensor"):
        objective.encode_prompts(["a"])
    assert set(seen) == {"meta"}
    # Who learns through them has them where the model is.
    assert {handle.encoder.device.type for handle in objective.text_encoders()} == {"meta"}


def test_samples_are_those_of_a_model_whose_parts_are_all_in_one_place(family):
    settings = SamplingSettings(**{**objective_for(family.build()).defaults, "num_inference_steps": 2,
                                   "guidance_scale": 3.0, "resolution": family.size})  # fmt: skip
    images = torch.rand(2, 3, family.size, family.size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    found = []
    for move in ("to", "place"):
        objective = objective_for(family.build())
        getattr(objective, move)("cpu")
        samples = objective.sample(["a", "b c"], [0, 1], settings)
        found.append((samples, objective.encode_images(images, 0), objective.decode(samples)[0].tobytes()))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    assert found[0][2] == found[1][2]


def test_the_autoencoder_works_in_float32_whatever_it_is_held_in(family):
    pipeline = in_half(family.build())
    objective = objective_for(pipeline, weights_dtype="bfloat16")
    with objective.autoencoder() as vae:
        assert vae.dtype == torch.float32
    assert pipeline.vae.dtype == torch.bfloat16
    whole = objective_for(family.build())
    torch.nn.Module.to(torch.nn.Module.to(whole.pipeline.vae, torch.bfloat16), torch.float32)
    images = torch.rand(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert torch.equal(objective.encode_images(images, 0), whole.encode_images(images, 0))
