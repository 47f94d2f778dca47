"""Training: what is trained, on which batches, and the loop of eq. 4."""
