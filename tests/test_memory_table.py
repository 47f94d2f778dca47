"""docs/memory.md: what it says is what `docs/memory.py` counts. One model is counted again; all take minutes."""

import runpy

import pytest

from .conftest import REPOSITORY

PAGE = runpy.run_path(str(REPOSITORY / "docs" / "memory.py"))
KEPT = (REPOSITORY / "docs" / "memory.md").read_text()


def kept_row(name, selection, weights):
    """As it stands on the page."""
    section = KEPT.partition(f"## {PAGE['BASES'][name].name}\n")[2].partition("\n## ")[0]
    (line,) = [line for line in section.splitlines() if line.startswith(f"| {selection} | {weights} |")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def kept_adapter_row(name, held):
    section = KEPT.partition(f"### An adapter of {PAGE['BASES'][name].name}\n")[2].partition("\n##")[0]
    (line,) = [line for line in section.splitlines() if line.startswith(f"| {held} |")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_page_is_what_the_command_writes():
    PAGE["text"].__globals__.update(row=kept_row, adapter_row=kept_adapter_row)
    assert PAGE["text"]() == KEPT


@pytest.mark.parametrize("name", PAGE["BASES"])
def test_what_each_model_keeps_is_what_its_size_says(name):
    """By hand, from the numbers of parameters: network, gradient, Prodigy's four, average, theta*, Fisher."""
    counts, module = PAGE["FAMILIES"]["counts"](name), PAGE["FAMILIES"]["denoiser"](name)
    buffers = 4 * sum(value.numel() for value in module.buffers())
    for selection in PAGE["PRESETS"]:
        for weights, held in (("float32", 4), ("bfloat16", 2)):
            trained, row = counts[selection], kept_row(name, selection, weights)
            network = held * (counts["full"] - trained) + 4 * trained + buffers
            kept = [network, 4 * trained, 16 * trained, 4 * trained, held * trained, 4 * trained]
            assert row[2:8] == [f"{size / 1e9:.1f}" for size in kept], (selection, weights)
            activations, total = float(row[9]), float(row[10])
            assert total == pytest.approx(sum(kept) / 1e9 + activations, abs=0.11), (selection, weights)


@pytest.mark.long
@pytest.mark.parametrize("weights", PAGE["WEIGHTS"])
def test_a_model_counted_again_takes_what_stands_there(weights):
    found = PAGE["row"]("stable-diffusion-v1-4", "xattn", weights)
    assert found == kept_row("stable-diffusion-v1-4", "xattn", weights)


@pytest.mark.long
def test_an_adapter_counted_again_takes_what_stands_there():
    assert PAGE["adapter_row"]("stable-diffusion-v1-4", "nf4") == kept_adapter_row("stable-diffusion-v1-4", "nf4")


@pytest.mark.parametrize(
    ("name", "billions"),
    # As their publishers give them.
    [
        ("stable-diffusion-v1-4", 0.12),
        ("stable-diffusion-xl-base-1.0", 0.82),
        ("FLUX.1-dev", 4.9),
        ("Z-Image", 4.02),
        ("Sana_1600M_1024px", 2.61),
        ("Qwen-Image", 8.29),
        ("FLUX.2-klein-base-4B", 4.02),
        ("FLUX.2-klein-base-9B", 8.19),
    ],
)
def test_text_encoders_are_as_large_as_published(name, billions):
    assert PAGE["blank"](name)[2] / 1e9 == pytest.approx(billions, rel=0.05)
