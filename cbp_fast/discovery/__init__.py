"""Which unit groups a model has: found by following one forward, explained, and checked by changing weights.

Above `groups`, and apart from the step, which knows nothing of how groups came about.
"""
