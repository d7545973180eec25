"""The Triton backend: tables that the host fills, kernels that walk them, and one function that launches.

Imported when it is first used, since Triton need not be installed. In the order in which a step enters:

    backend.py       the five functions of every backend; what is launched, one after the other
    tables.py        what a state's launches have in common, and which tables are there from earlier steps
    step_plan.py     `select`, `score`, `rank`: sums over activations and weights, then every group's choice
    forward_plan.py  `capture`, `hat`: activations that are summed apart
      sum_plan.py    which program takes which tile of a sum
      sums.py        which sums those are
    targets.py       `transfer`, `reinit`: what is written where units are replaced
    sending.py       tables and addresses on their way to the device
    specialising.py  what a rule makes of the kernels
    launching.py     every launch
    kernels/         what runs on the device
    rows.py          the rows of all tables, and the offsets by which kernels read them

Each module imports from those below it. `backends.registry` imports `backend`, the tests and benchmarks the rest.
"""
