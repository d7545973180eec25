"""What is known while a forward is followed: `trace` of all tensors, `shadow` of one storage, `call` of one operation.

Above `nodes` and `running`; the rules of operations and `following` write into a trace, `candidates` read it.
"""
