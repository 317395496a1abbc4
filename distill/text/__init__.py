"""Text, from its sources to the batches that stages read: sources, tokens prepared once, windows, held-out windows."""
