"""Random bit-flips: every bit of a number flips with a probability of its own field."""
