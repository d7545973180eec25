"""What a step computes, as data: no kernel, table or check knows a method by its name.

`rule` says what can be combined, and each family of methods has a module of its own. Imports nothing of the package;
whoever computes imports it.
"""
