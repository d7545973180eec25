"""Unit groups: which rows, columns and entries of which layers belong to the same hidden units.

`layers` knows the kinds of layers, `spec` is a group as given and as resolved, `resolving` looks it up in a model and
checks it. Above `tensors`; discovery, the state and whoever attaches import it.
"""
