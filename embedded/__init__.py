"""How the small base model in base/ was made: its parts and its pre-training."""
