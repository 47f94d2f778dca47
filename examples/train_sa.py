"""Make a text-to-image or class-conditional model forget a concept.

accelerate launch examples/train_sa.py --concept "Brad Pitt" --surrogate "a middle aged man"
"""

from sa_diffusers.commands.erase import main

if __name__ == "__main__":
    main()
