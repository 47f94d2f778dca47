"""Moved to `sa_diffusers.families`."""

from .moved import forward, forward_parts

_PARTS = {
    "base": ("families.base",),
    "class_conditional": ("families.class_conditional", "families.paths"),
    "conditional_vae": ("families.conditional_vae",),
    "diffusion": ("families.diffusion",),
    "latent_diffusion": ("families.stable_diffusion",),
    "loading": ("families.loading", "families.registry", "families.names"),
}
__getattr__ = forward(__name__, "families")
globals().update(forward_parts(__name__, _PARTS))
