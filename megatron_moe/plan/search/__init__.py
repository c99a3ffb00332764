"""The fastest layout of an experiment on so many GPUs."""
