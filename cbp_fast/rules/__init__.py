"""What a step computes, as data: no kernel, table or check knows a method by its name.

`arithmetic` says what can be combined, each family of methods has a module of its own, and `rule` is what users hold.
A module that is put beside them is found. Imports nothing of the package; whoever computes imports it.
"""
