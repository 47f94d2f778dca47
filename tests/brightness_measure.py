"""A measure that the package does not know. This one file adds it."""

import numpy as np

from sa_diffusers.evaluation import register_measure


@register_measure("brightness")
class Brightness:
    def provenance(self):
        return {"name": "brightness", "columns": ["brightness"], "range": "black is 0, white is 1"}

    def __call__(self, pictures, prompts):
        return {"brightness": [float(np.asarray(picture.convert("L")).mean() / 255) for picture in pictures]}
