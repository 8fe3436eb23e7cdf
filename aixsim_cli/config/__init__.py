"""What a pretraining run is: its config, its sizes, its budget."""
