"""Hydra configuration tree of fedsim: every default lives here, and nowhere else.

One folder is one group, one file in it one option (``strategy=fedspeed`` picks ``strategy/fedspeed.yaml``). Types
and the meaning of each key are in :mod:`fedsim.config.schema`.
"""
