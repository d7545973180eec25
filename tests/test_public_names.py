"""The public names, said literally: a name that goes, comes or moves is a decision, and each has a docstring."""

import ast
import inspect
from pathlib import Path
from types import FunctionType

import pytest

import cbp_fast
from cbp_fast import metrics

PACKAGE = [
    "CBPConv",
    "CBPLinear",
    "ContinualBackprop",
    "Part",
    "Rule",
    "UnitGroup",
    "attached",
    "explain",
    "find_unit_groups",
    "metrics",
    "verify_unit_group",
]
METRICS = ["Monitor", "Writer", "dormant_units", "effective_rank", "plot", "stable_rank", "weight_magnitude"]
INTEGRATIONS = {"clarena": ["CBP"], "lightning": ["ContinualBackpropCallback"]}
LAYER = [
    "age",
    "decay_rate",
    "extra_repr",
    "forward",
    "get_extra_state",
    "in_layer",
    "maturity_threshold",
    "num_replaced",
    "out_layer",
    "replacement_rate",
    "set_extra_state",
    "utility",
]
# methods and properties of our own, and not what a base of another package has
MEMBERS = {
    "ContinualBackprop": [
        "age",
        "backend",
        "decay_rate",
        "enabled",
        "groups",
        "join_device",
        "join_hook",
        "join_process_group",
        "last_replaced",
        "load_state_dict",
        "maturity_threshold",
        "num_replaced",
        "refresh",
        "remove",
        "replacement_rate",
        "rule",
        "state_dict",
        "step",
        "to",
        "utility",
    ],
    "CBPLinear": LAYER,
    "CBPConv": LAYER,
    "Rule": ["bound", "centred", "clarena", "distribution", "gnt", "keeps_mean", "make", "nature", "options"],
}


def members_of(kind):
    """Its public methods and properties by name, as they were defined in this package."""
    found = {}
    for base in reversed(kind.__mro__):
        if base.__module__.partition(".")[0] == "cbp_fast":
            found |= {
                name: value
                for name, value in vars(base).items()
                if isinstance(value, (FunctionType, property, classmethod, staticmethod)) and not name.startswith("_")
            }
    return found


def public_of(module):
    """The functions and classes that are the module's own, by name."""
    return {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("_")
        and (inspect.isfunction(value) or inspect.isclass(value))
        and value.__module__.startswith(module.__name__)
    }


def undocumented(things):
    return [name for name, value in things.items() if not (value.__doc__ or "").strip()]


def test_names_of_the_package():
    assert cbp_fast.__all__ == PACKAGE
    things = {name: getattr(cbp_fast, name) for name in PACKAGE}
    assert undocumented(things) == []


def test_names_of_the_metrics():
    assert sorted(public_of(metrics)) == METRICS
    assert undocumented(public_of(metrics)) == []


@pytest.mark.parametrize("name", INTEGRATIONS)
def test_names_of_an_integration(name):
    # by its text, as the framework need not be installed
    path = Path(cbp_fast.__file__).parent / "integrations" / f"{name}.py"
    named = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    public = [n for n in ast.parse(path.read_text()).body if isinstance(n, named) and not n.name.startswith("_")]
    assert [node.name for node in public] == INTEGRATIONS[name]
    assert [node.name for node in public if not ast.get_docstring(node)] == []


@pytest.mark.parametrize("name", MEMBERS)
def test_methods_and_properties(name):
    assert sorted(members_of(getattr(cbp_fast, name))) == MEMBERS[name]


KINDS = {kind.__name__: kind for kind in (*vars(cbp_fast).values(), *vars(metrics).values()) if inspect.isclass(kind)}


@pytest.mark.parametrize("name", sorted({*PACKAGE, *METRICS} & set(KINDS)))
def test_methods_and_properties_have_docstrings(name):
    kind = KINDS[name]
    # one that overrides PyTorch's may leave it at PyTorch's
    assert [member for member in members_of(kind) if not inspect.getdoc(getattr(kind, member))] == []
