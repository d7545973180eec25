"""The arithmetic of a step, several times over: `reference` is the truth, `cpp` and `triton` are quick.

`registry` chooses. A backend has five functions, named and explained in `reference`; it takes a state and tensors,
keeps nothing of its own but tables, and checks nothing that the step has checked. Above `state`.
"""
