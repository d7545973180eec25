"""All that persists from step to step, in one buffer a device, and the table by which kernels find their way in it.

`layout` says where a group's units lie, `state` holds the buffer. Above `groups`, `rules` and `parallel`; the backends
read it, the step writes it.
"""
