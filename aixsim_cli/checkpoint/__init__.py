"""Checkpoints on disk: what a path holds, reading, writing and converting."""
