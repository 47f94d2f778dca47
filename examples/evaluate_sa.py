"""Measure what a saved pipeline has forgotten and what it has kept, against its base.

python examples/evaluate_sa.py --base CompVis/stable-diffusion-v1-4 --erased brad-pitt --protocol concept
"""

from sa_diffusers.commands.evaluate import main

if __name__ == "__main__":
    main()
