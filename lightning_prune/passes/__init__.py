"""A model and its batches, borrowed: read, run and left as they were.

What all rooms share about running a model: batches of any form (:mod:`batches`), passes that leave
no trace (:mod:`isolation`), and weights of an earlier moment (:mod:`teacher`). Imports no room.
"""
