"""What comes in and goes out: images, folders, roles, base models, adapters."""

EMBEDDED_SETS = ("twemoji", "openmoji", "emojione")  # functions of files/emojis.py
