"""Training: the one loop, a student's way through its stages, and a whole run from recipe to report."""
