"""Forwards as they run: every operation is told to a trace, and nothing leaves unseen.

`following` runs them, again where chance may choose another path, and accounts for what they return and keep; `tracer`
meets every operation; `exits` sees what leaves for Python and NumPy, `elsewhere` what other threads are given. Above
`operations` and `trace`; `looking` imports it.
"""
