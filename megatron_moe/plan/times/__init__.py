"""How long pieces of a model, and messages, take on a cluster."""
