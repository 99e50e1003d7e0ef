"""Flags, one-line errors, files that are whole, progress: what every command needs.

OpenMP's threads spin while they wait for one another, and where another program has the core they
spin for the whole of its turn.  libgomp spins 300,000 times before a thread sleeps; here it is
20,000, which costs nothing alone (`bench/speed.py waiting`).
"""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "20000")  # read when torch is loaded
