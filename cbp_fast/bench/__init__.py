"""What `cbp-fast bench` times: a suite is a module, `step`, `kernels`, `training` or `scaling`.

`networks` has what is timed, `baselines` the other ways to do a step, `timing` how turns are taken, `report` tables and
pictures. Above the package's own rooms; only `cli` imports it.
"""
