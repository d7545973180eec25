"""What stands between PyTorch's hooks and a step: which groups are asked for, who is observed, whose turn it is.

`asking` says how groups are wanted, `recording` observes the readers, `turns` waits for the optimizers, `children`
notices replaced layers, `awaiting` stands in until there are groups, `layered` is all that for layers that step by
themselves, `sharing` refuses units that are taken, `silence` has the warnings. Above the step; `ContinualBackprop`
and the layers import it.
"""
