"""Fréchet distance, precision and recall against plain implementations of their definitions."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from sa_diffusers.evaluation.quality import InceptionFeatures, feature_network, image_quality
from sa_diffusers.results.statistics import frechet_distance, moments


def features(seed, shift=0.0, scale=1.0, count=60, size=5):
    return torch.randn(count, size, generator=torch.Generator().manual_seed(seed)) * scale + shift


def inside(points, centres, neighbours=3):
    """Share of points in a ball around any centre that reaches to its so-manieth neighbour, one by one."""
    hits = 0
    radii = [sorted(torch.dist(centre, other).item() for other in centres)[neighbours] for centre in centres]
    for point in points:
        hits += any(torch.dist(point, centre) <= radius for centre, radius in zip(centres, radii, strict=True))
    return hits / len(points)


@pytest.mark.parametrize(("shift", "scale"), [(0.0, 1.0), (0.8, 0.4), (0.0, 3.0), (9.0, 1.0)])
def test_quality_is_its_definition(shift, scale):
    drawn, real = features(1, shift, scale), features(2)
    quality = image_quality(drawn, real)
    assert quality["precision"] == pytest.approx(inside(drawn, real))
    assert quality["recall"] == pytest.approx(inside(real, drawn))
    expected = frechet_distance(moments(drawn), moments(real))
    assert quality["frechet_distance"] == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_narrow_samples_are_precise_and_recall_little():
    quality = image_quality(features(1, scale=0.2), features(2))
    assert quality["precision"] > 0.9 > 0.3 > quality["recall"]


def test_too_few_images_and_foreign_features_are_refused():
    with pytest.raises(ValueError, match="3 drawn and 60 reference images are too few: give more than 3 of each"):
        image_quality(features(1, count=3), features(2))
    with pytest.raises(ValueError, match="features of 4 and of 5 entries come from different networks"):
        image_quality(features(1, size=4), features(2))


def pictures(count=3, size=20):
    pixels = np.random.default_rng(0).integers(0, 256, (count, size, size, 3), dtype=np.uint8)
    return [Image.fromarray(image) for image in pixels]


def test_vision_models_of_transformers_give_features(tmp_path):
    processor = {"size": {"height": 28, "width": 28}, "do_center_crop": False}
    small = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    Dinov2Model(Dinov2Config(**small)).save_pretrained(tmp_path / "dino")
    ViTImageProcessor(size=processor["size"]).save_pretrained(tmp_path / "dino")
    CLIPModel(CLIPConfig(vision_config={**small, "intermediate_size": 8}, text_config={
        "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8,
    })).save_pretrained(tmp_path / "clip")  # fmt: skip
    CLIPImageProcessor(**processor).save_pretrained(tmp_path / "clip")
    for name in ("dino", "clip"):
        network = feature_network(str(tmp_path / name))
        seen = network(pictures(), batch_size=2)
        assert seen.shape == (3, 8)
        assert torch.allclose(seen[2:], network(pictures()[2:]), atol=1e-5)
    with pytest.raises(ValueError, match='"no/where" could not be loaded'):
        feature_network("no/where")
    weights = tmp_path / "dino" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(
        ValueError, match=r'the model of the features ".*dino" could not be loaded \(.*model.safetensors'
    ):
        feature_network(str(tmp_path / "dino"))


def test_a_network_that_would_be_random_is_refused(tmp_path):
    small = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    ViTForImageClassification(ViTConfig(**small, intermediate_size=8)).save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 28, "width": 28}).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="its files lack 2 of the weights that it needs, such as pooler"):
        feature_network(str(tmp_path))


def test_inception_features_come_from_a_file_of_weights(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="are not at missing.pth: give the file's path"):
        InceptionFeatures("missing.pth")
    torch.save(torch.nn.Linear(2, 2), tmp_path / "code.pth")
    with pytest.raises(ValueError, match="code.pth holds no weights of the Inception network"):
        InceptionFeatures(tmp_path / "code.pth")
    for content in (b"", b"no weights", b"PK\x03\x04"):
        (tmp_path / "other.pth").write_bytes(content)
        with pytest.raises(ValueError, match="other.pth holds no weights of the Inception network"):
            InceptionFeatures(tmp_path / "other.pth")
    torch.save(torch.zeros(2), tmp_path / "tensor.pth")
    with pytest.raises(ValueError, match="the weights of the Inception network could not be had"):
        InceptionFeatures(tmp_path / "tensor.pth")
    torch.save({"weight": torch.zeros(2)}, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match="Missing key"):
        InceptionFeatures(tmp_path / "weights.pth")
    with monkeypatch.context() as patch:
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        torch.manual_seed(0)
        network = InceptionFeatures(tmp_path / "weights.pth")
    torch.save(network.network.state_dict(), tmp_path / "weights.pth")
    seen = feature_network("inception", tmp_path / "weights.pth")(pictures(), batch_size=2)
    assert seen.shape == (3, 2048)
    assert torch.allclose(seen, network(pictures()), atol=1e-4)
