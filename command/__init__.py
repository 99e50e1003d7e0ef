"""Flags, one-line errors, files that are whole, progress: what every command needs."""
