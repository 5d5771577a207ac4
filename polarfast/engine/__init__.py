"""Data, models, training loop, runs, figures: all that stands on top of the library.

Needs the extra ``polarfast[train]``; nothing below this package imports it.
"""
