"""What a command's exit code says to scripts and schedulers."""

DONE = 0
FAILED = 1
WRONG_INPUT = 2
START_AGAIN = 75
"""Stopped by a termination signal with nothing lost: started again, the run goes on."""
