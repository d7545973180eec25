"""Two streams on which plain backprop loses plasticity: permuted digits and slowly-changing regression.

`problem` says what a problem consists of, `digits` and `regression` are two, `problems` finds them by name, `training`
runs both methods in processes, `report` tells how it went. Above the package's own rooms; only `cli` imports it.
"""
