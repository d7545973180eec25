"""All that persists from step to step, in one buffer a device, and the table by which kernels find their way in it.

`layout` has the words for where things lie, `regions` lists what is set when a unit is replaced, `arrangement` puts
both in order, `table` writes it down for compiled kernels, `state` holds the buffer. Above `groups`, `rules` and
`parallel`; the step owns a state, the backends read and write its buffer.
"""
