"""Evaluation and generation of models from either kind of checkpoint."""
