"""One command per table of docs/results.md that takes hours."""
