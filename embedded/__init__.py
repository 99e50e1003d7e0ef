"""The small base model that everything runs on by default: parts, pre-training and images."""
