"""Where layers go, and how many are computed again."""
