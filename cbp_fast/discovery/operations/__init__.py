"""The rule of each operation: of which units its result is made, and which it reads, scales, mixes or refuses.

`rules` has the table of all, and what becomes of units in an operation without one. `linear`, `convolution` and `norms`
are of layers, with their `weights` and biases; then come `attention`, `moving`, `indexing`, `reducing` and `pointwise`;
`told` is of numbers that no unit makes. A rule is a function of the trace, the call and the tensors that it returned,
and takes from the call the `arguments` that it accounts for. Above `trace`; the tracer imports it.
"""
