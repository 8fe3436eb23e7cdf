"""The Optical Transformer (arXiv 2302.10360): quantised modulators, a noisy quantising detector."""
