"""Train the base model of a class experiment: a conditional VAE or a class-conditional diffusion model.

accelerate launch examples/train_class_model.py --model mnist_vae --data ylecun/mnist --output_dir mnist-base
"""

from sa_diffusers.commands.train_class_model import main

if __name__ == "__main__":
    main()
