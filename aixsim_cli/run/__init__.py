"""What every training run shares, whoever trains: its folder, its manifests, its signals."""
