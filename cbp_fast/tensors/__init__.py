"""What is asked of any tensor: its bytes, the part of it that is here, whether it has numbers at all.

`native` loads the compiled module and has its questions, `memory` says which bytes are whose, `parts` knows DTensors.
Imports nothing of the package but the compiled module; everyone may
import it.
"""
