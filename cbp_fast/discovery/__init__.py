"""Which unit groups a model has: found by following its forwards, explained, and checked by changing weights.

In the order in which a search first enters them:

1. `finding`: `find_unit_groups` and `explain`, from their arguments to what they return.
2. `looking`: by which inputs the model is looked at, and until when.
3. `following`: forwards as they run, operation by operation, to what leaves them.
4. `operations`: the rule of each operation: of which units its result is made.
5. `trace`: what is known meanwhile of tensors, parameters and modules, and what was found.
6. `nodes`: sets of units, which the trace knows by ids.
7. `candidates`: from what was found to unit groups, and why others are none.
8. `report`: in words.

Beside these, `verification` checks a group, whoever gave it, and `running` has forwards to run and puts everything back
afterwards. Imports go down: `finding`; `looking` and `report`; `following` and `candidates`; `operations`; `trace`;
`nodes` and `verification`; `running`.

Above `groups`, and apart from the step, which knows nothing of how groups came about. `ContinualBackprop`, the
integrations and users import what is listed here; `running.forwards` is for those, too.
"""

from .finding import explain, find_unit_groups
from .looking import NeedsInputs
from .verification.verifying import verify_unit_group, verify_unit_groups

__all__ = ["NeedsInputs", "explain", "find_unit_groups", "verify_unit_group", "verify_unit_groups"]
