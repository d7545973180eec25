"""What PyTorch calls us back on: before a forward, after an optimizer's step, when a model is changed.

`forwards` hangs hooks that copies leave behind, `optimizers` asks whether steps run hooks and have happened, `registry`
lists what is attached, `observing` says whether a forward counts. Imports nothing of the package; everyone may import
it.
"""
