"""docs/families.md: what it says is what the families are, and its models are as large as they were published."""

import runpy

import pytest

from .conftest import REPOSITORY

PAGE = runpy.run_path(str(REPOSITORY / "docs" / "families.py"))


@pytest.fixture(scope="module")
def counts():
    return {name: PAGE["counts"](name) for name in PAGE["BASES"]}


def test_the_page_is_what_the_families_are(counts):
    PAGE["text"].__globals__["counts"] = counts.__getitem__
    assert (REPOSITORY / "docs" / "families.md").read_text() == PAGE["text"]()


@pytest.mark.parametrize(
    ("name", "billions"),
    # As their publishers give them.
    [("stable-diffusion-v1-4", 0.86), ("stable-diffusion-xl-base-1.0", 2.6), ("stable-diffusion-3-medium", 2.0),
     ("stable-diffusion-3.5-large", 8.1), ("FLUX.1-dev", 12.0), ("Z-Image", 6.0),
     ("Sana_1600M_1024px", 1.6), ("Qwen-Image", 20.0), ("FLUX.2-klein-base-4B", 4.0), ("FLUX.2-klein-base-9B", 9.0)],
)  # fmt: skip
def test_models_are_as_large_as_published(counts, name, billions):
    assert counts[name]["full"] / 1e9 == pytest.approx(billions, rel=0.035)


def test_selections_have_no_parameter_in_common(counts):
    for name, found in counts.items():
        assert found["xattn"] + found["noxattn"] < found["full"], name
