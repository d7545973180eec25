"""One step, whole or not at all: what forwards leave behind, what is chosen, and what is written.

`engine` does it for one state, `together` for several, `journal` takes back or finishes what was cut short. Above the
backends; `ContinualBackprop` and the layers import it.
"""
