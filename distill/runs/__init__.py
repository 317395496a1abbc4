"""Runs: the run folder, its checkpoints, the session, progress on the console, and stopping early."""
