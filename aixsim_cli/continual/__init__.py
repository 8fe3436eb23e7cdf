"""Train a model further, with transformers' Trainer."""
