"""The layers that benchmark_moe.py measures, one kind a file: each makes a `Contender` of the same
weights."""
