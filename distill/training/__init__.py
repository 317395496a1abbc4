"""Training: the training loop, the sequence of a student's stages, and a whole run from recipe to report."""
