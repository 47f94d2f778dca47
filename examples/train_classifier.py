"""Train the image classifier that scores a class experiment, on real images only: no noise, no label smoothing.

python examples/train_classifier.py --data ylecun/mnist --cnn --output_dir mnist-classifier
"""

from sa_diffusers.commands.train_classifier import main

if __name__ == "__main__":
    main()
