"""A run: its folder and checkpoints, the session it works in, and what it shows and when it stops."""
