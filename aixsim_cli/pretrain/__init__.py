"""Train from scratch, with torchtitan."""
