"""One step, whole or not at all: what forwards leave behind, what is chosen, and what is written.

In the order in which they are entered: `observer` takes what forwards leave behind; `together` begins a step of one
engine or several; `engine` chooses, collects what belongs to the chosen units and writes it, with `optimizer_state`
for what optimizers keep, `checks` for what may have changed since attaching, and `known` for what has not; `journal`
takes back or finishes what was cut short. Beside them: `rates` and `settings`, `checkpoint`, and `joining` for a
process that ran out of data. Above the backends; `ContinualBackprop`, the layers and `attaching` import it.
"""
