"""Forwards to run, and a model that is afterwards as it was.

`forwards` are those on given inputs, or on a guess at them. `restoring` puts back all that they change: tensors by
`preserving`, a mode that sees every operation, and what is held in Python by a `snapshot`. `holding` finds the tensors
that any object holds, `reach` says what belongs to an object; `calls` and `memory` answer what is asked at every
operation. Everyone here may import it.
"""
