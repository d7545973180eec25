"""From a trace to unit groups.

`candidates` takes units together that the same layers make and read, by the `facts` of every node, and says why they
make no group; `writing` writes them as one; `unreached` knows the layers that no forward reached. Above `trace`;
`looking`, `finding` and `report` import it.
"""
