"""What is known of a run's memory beforehand. Pure arithmetic: no torch, no GPU."""
