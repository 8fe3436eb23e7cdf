"""What is simulated: paradigms, the config that chooses them, the walk that puts them in."""
