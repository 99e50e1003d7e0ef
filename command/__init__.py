"""Flags, one-line errors, files that are whole, progress: what every command needs."""

import os

# OpenMP's threads sleep while they wait.  Spinning ones hold up each other beside other programs:
# on two busy cores a step took three to five times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
