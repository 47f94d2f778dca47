"""The benchmark package eval-unlearn runs what this package erased."""

import json
import shutil

import numpy as np
import pytest
import torch
from eval_unlearn.registry import get_technique, register_metric
from eval_unlearn.registry.entrypoints import load_entrypoints
from eval_unlearn.runners import SingleBenchmarkRunner
from eval_unlearn.types import Dataset, MetricResult

from sa_diffusers import SamplingSettings, load_pipeline, objective_for
from sa_diffusers.evaluation.eval_unlearn import TECHNIQUE_NAME, SelectiveAmnesiaTechnique
from sa_diffusers.models import build_class_pipeline


@register_metric("brightness")
class Brightness:
    """The mean of all pixels: what the benchmark asks of a metric, and no more."""

    seen: list[float]

    def __init__(self, **_):
        self.seen = []

    def load_dataset(self):
        return [Dataset(["brad pitt", "a house"], {"source": "two prompts"})]

    def update(self, images, prompts, metadata):
        self.seen += [float(np.asarray(image).mean()) for image in images]

    def compute(self):
        return MetricResult("brightness", sum(self.seen) / len(self.seen), {"images": len(self.seen)})


def run(technique, settings, folder):
    return SingleBenchmarkRunner(technique, "brightness", settings, {}, str(folder), seed=3).run()


def test_the_technique_is_found_through_its_entry_point():
    load_entrypoints()
    assert get_technique(TECHNIQUE_NAME) is SelectiveAmnesiaTechnique


def test_an_erased_pipeline_runs_by_its_own_name_and_as_a_free_run(tiny_folder, tmp_path):
    settings = {"model_id": str(tiny_folder), "num_inference_steps": 2, "guidance_scale": 3.0, "erase_concept": "brad"}
    ours = run(TECHNIQUE_NAME, settings, tmp_path / "ours")
    free = run("free_run", settings, tmp_path / "free")
    assert ours["metric_result"]["details"] == free["metric_result"]["details"] == {"images": 2}
    # The same sampler, seeds and weights: batched here, one by one there.
    assert ours["metric_result"]["value"] == pytest.approx(free["metric_result"]["value"], abs=0.5)
    pictures = sorted((tmp_path / "ours").rglob("*.png"))
    assert len(pictures) == 2


def test_settings_come_from_the_erasure(tiny_folder, tmp_path):
    folder = tmp_path / "erased"
    shutil.copytree(tiny_folder, folder)
    erasure = {"sampler": "dpmsolver++", "num_inference_steps": 4, "guidance_scale": 2.0}
    (folder / "selective_amnesia.json").write_text(json.dumps(erasure))
    settings = SelectiveAmnesiaTechnique(str(folder), guidance_scale=1.5).settings
    assert (settings.sampler, settings.num_inference_steps, settings.guidance_scale) == ("dpmsolver++", 4, 1.5)
    # As in the erasure and its report, unless it is said otherwise.
    erasure |= {"resolution": 32, "prediction_type": "v_prediction", "mixed_precision": "no"}
    (folder / "selective_amnesia.json").write_text(json.dumps(erasure))
    (folder / "report.json").write_text(json.dumps({"mixed_precision": "bf16"}))
    (picture,) = SelectiveAmnesiaTechnique(str(folder)).generate(["brad"], seed=3)
    objective = objective_for(load_pipeline(str(folder)), "v_prediction")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = objective.sample(["brad"], [3], SamplingSettings("dpmsolver++", 4, 2.0, 8, 32))
    assert picture.size == (32, 32)
    assert picture.tobytes() == objective.decode(expected)[0].tobytes()
    told = {"resolution": 16, "prediction_type": "epsilon", "mixed_precision": "no"}
    (picture,) = SelectiveAmnesiaTechnique(str(folder), **told).generate(["brad"], seed=3)
    objective = objective_for(load_pipeline(str(folder)))
    expected = objective.sample(["brad"], [3], SamplingSettings("dpmsolver++", 4, 2.0, 8, 16))
    assert picture.tobytes() == objective.decode(expected)[0].tobytes()
    # Weights are those of the report, not what float32 makes of them.
    (folder / "selective_amnesia.json").write_text(json.dumps({**erasure, "weights_dtype": "bfloat16"}))
    assert SelectiveAmnesiaTechnique(str(folder)).objective.module.dtype == torch.bfloat16
    for precision, message in (("fp16", "needs a CUDA device"), ("int4", "is not one of no, fp16, bf16")):
        with pytest.raises(ValueError, match=message):
            SelectiveAmnesiaTechnique(str(folder), mixed_precision=precision)
    build_class_pipeline("mnist_vae", ["a", "b"]).save_pretrained(tmp_path / "classes")
    with pytest.raises(ValueError, match="takes classes, not prompts"):
        SelectiveAmnesiaTechnique(str(tmp_path / "classes"))
