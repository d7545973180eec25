"""The seven kernels that are launched; tables of integers tell them what to do, so that one launch serves all tensors.

`select` computes everything up to the choice for all groups in one launch, `reinit` writes what the choice asks for in
a second one. Some steps take more: `capture` sums activations apart, `hat` is what a centred utility measures them
from, `score` is the second half of `select` where that needs all units of a group at once, `rank` sorts where many are
chosen, `transfer` moves what replaced units gave into biases. In the order in which a step enters:

    capturing.py   `capture` and `hat`: activations that are summed apart
    selecting.py   `select` and `score`: what a program brings from a tile to the choice
    summing.py     a tile of a tensor to sums, and the parts of a sum put together
    scoring.py     a block of units from sums to scores
    choosing.py    the units of a group with the least scores, and `rank`
    writing.py     `transfer` and `reinit`
    drawing.py     random numbers
    arithmetic.py  logarithm and bias correction, with the same bits on every GPU
    memory.py      addresses from tables, and counters at which programs meet

What they read is in `rows`. Of the package, `backend` and `specialising` import the kernels, and nothing the rest.
"""

from .capturing import capture as capture
from .capturing import hat as hat
from .choosing import rank as rank
from .selecting import score as score
from .selecting import select as select
from .writing import reinit as reinit
from .writing import transfer as transfer
