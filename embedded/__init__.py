"""The small base model that everything runs on by default: its parts, its pre-training, its public and private images."""
