"""A training run that survives: its folder, state, lock, processes, costs, pictures and card."""
