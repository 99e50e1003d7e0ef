"""What one adapter leaks and how good its pictures are: targets, queries, attacks, shadows,
quality, figures, tables.
"""
