"""Energy of a model on hardware: what its products take, times what that costs."""
