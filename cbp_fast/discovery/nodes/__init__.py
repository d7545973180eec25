"""Sets of the units that activations are made of.

A node is a set of leaves. A leaf is one unit, a parameter, a mix of many units (a sum over features), DATA that no unit
makes, RANDOM numbers, or ONE, which says that the value is not zero where its units are. A value of units and mixes
alone is zero where its units are, and so is its product with anything: that a unit gates data, so that the column is
the unit's alone, is told from this.

`nodes` has what operations make of them, `table` keeps each set once, `ids` are their numbers, in tensors. Imports
nothing of the package; the trace writes it, whoever reads a trace imports it.
"""
