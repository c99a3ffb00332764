"""What a model costs: its weights, FLOPs, and bytes."""
