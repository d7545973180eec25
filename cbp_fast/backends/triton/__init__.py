"""The Triton backend: tables, kernels, launches.

Imported when it is first used, since Triton need not be installed.
"""
