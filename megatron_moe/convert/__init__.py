"""Other people's checkpoints, both ways: one short file a model family; upcycling, merging, splitting.

Everything that holds a model's weights, on disk or computed from others, is a `weights.Weights`: a list of
names with shapes, and a function that reads one of them. What changes weights wraps one of these in another;
what writes takes any. So nothing ever holds more than a few matrices.
"""
