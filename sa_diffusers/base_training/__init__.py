"""Base models of class experiments, and the classifiers that score them."""
