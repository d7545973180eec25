"""Several processes that train one model: who they are, what they must agree on, and what of a step is whose.

Above `groups` and `tensors`; the state and the step import it.
"""
