"""The check of a unit group by changing weights and running the model; nothing of how it was found is used.

`verifying` is for users, `check` plans the rounds, `members` are the rows and columns that it changes, `watching` gives
the model other inputs, `seen` compares what runs showed. Above `running`; `finding` imports it.
"""
