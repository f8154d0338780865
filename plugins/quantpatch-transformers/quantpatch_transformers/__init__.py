"""transformers for quantpatch: its own layers, its attention, and its ways to save, load and train."""
