import pytest
from torch import nn

from sa_diffusers import parameter_selection, select_parameters
from sa_diffusers.parameter_selection import only_trainable

from .conftest import build_tiny_pipeline


@pytest.fixture(scope="module")
def unet():
    return build_tiny_pipeline().unet


def test_full_is_everything(unet):
    assert list(select_parameters(unet, "full")) == [name for name, _ in unet.named_parameters()]


def test_xattn_is_the_attention_to_the_text(unet):
    selected = select_parameters(unet, "xattn")
    assert selected
    assert all("attn2" in name for name in selected)
    # Keys and values of cross-attention see the text: their input is as wide as it.
    assert all(p.shape[1] == unet.config.cross_attention_dim for name, p in selected.items() if "to_k.weight" in name)


def test_noxattn_leaves_out_cross_attention_time_embedding_and_output_block(unet):
    selected = set(select_parameters(unet, "noxattn"))
    left_out = {name for name, _ in unet.named_parameters()} - selected
    assert {name.split(".")[0] for name in left_out if "attn2" not in name} == {
        "time_embedding",
        "conv_norm_out",
        "conv_out",
    }
    assert {name for name in left_out if "attn2" in name} == set(select_parameters(unet, "xattn"))
    # The projections of the time embedding in each residual block belong to the block, and are trained.
    assert any("time_emb_proj" in name for name in selected)


def test_regular_expression(unet):
    assert all("attn1" in name for name in select_parameters(unet, r"\.attn1\."))


@pytest.mark.parametrize("selection", ["xatn", "[", r"^nothing$"])
def test_no_match_is_an_error_that_says_what_there_is(unet, selection):
    with pytest.raises(ValueError, match="full, xattn, noxattn") as error:
        select_parameters(unet, selection)
    assert selection in str(error.value)


@pytest.mark.parametrize("selection", ["a{99999999999999999999}", "(" * 5000 + ")" * 5000, "x" * 5000, "a\nb"])
def test_expressions_that_are_none_are_one_line(unet, selection):
    with pytest.raises(ValueError, match="full, xattn, noxattn") as error:
        select_parameters(unet, selection)
    assert str(error.value).isprintable() and len(str(error.value)) < 700


@pytest.mark.parametrize(
    ("selection", "why"),
    [(r"(.*)*x$", "matches no parameter of"), (r"(?:\w|\w\w|\.)+\Z(?<!t)", "takes more than 0.2 seconds on 208 ")],
)
def test_expressions_that_would_take_for_ever_are_refused(unet, selection, why, monkeypatch):
    monkeypatch.setattr(parameter_selection, "_SECONDS", 0.2)
    with pytest.raises(ValueError, match=why) as error:
        select_parameters(unet, selection)
    assert selection in str(error.value)


def test_preset_without_meaning_for_a_module():
    with pytest.raises(ValueError, match='"xattn" has no meaning for Linear'):
        select_parameters(nn.Linear(2, 2), "xattn")


def test_requires_grad_is_restored_even_after_an_error(unet):
    first = next(iter(unet.parameters()))
    first.requires_grad_(False)
    before = [parameter.requires_grad for parameter in unet.parameters()]
    with pytest.raises(RuntimeError), only_trainable(unet, select_parameters(unet, "xattn")):
        assert not all(parameter.requires_grad for parameter in unet.parameters())
        raise RuntimeError
    assert [parameter.requires_grad for parameter in unet.parameters()] == before
    first.requires_grad_(True)
