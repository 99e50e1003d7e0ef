"""What comes in and goes out: images, folders, roles, base models, adapters in others' forms."""
