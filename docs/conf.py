"""How the documentation is built: `make docs`. Nothing here asks the network."""

from __future__ import annotations

import contextlib
import inspect
import io
import os
import re
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx_gallery.scrapers import figure_rst
from sphinx_gallery.sorting import FunctionSortKey

import cbp_fast
from cbp_fast.cli import COMMANDS, main

HERE = Path(__file__).parent

project = "cbp_fast"
author = copyright = "the cbp_fast contributors"
version = release = cbp_fast.__version__
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.doctest",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_gallery.gen_gallery",
]
exclude_patterns = ["api/command", "development/targets.txt"]
# the pictures of the gallery are taken by a function
suppress_warnings = ["config.cache"]
nitpick_ignore_regex = [
    # what is documented elsewhere, and names that a docstring sets in code
    (r"py:.*", r"(torch|nn|lightning|matplotlib|collections|typing)\..*"),
    (r"py:.*", r"(Tensor|Optimizer|Figure|Any|Iterable|Mapping|Sequence|_\w+)"),
    (r"py:.*", r"cbp_fast\..*\._\w+"),
    (r"py:obj", r".*"),
]

# a name in single backquotes is a link where it leads somewhere, and code anywhere else
default_role = "py:obj"
autodoc_mock_imports = ["clarena", "lightning"]
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
python_maximum_signature_line_length = 88
maximum_signature_line_length = 88

myst_enable_extensions = ["colon_fence", "deflist", "fieldlist"]
myst_heading_anchors = 3

html_theme = "furo"
html_title = f"cbp_fast {release}"
html_static_path = ["_static"]
html_css_files = ["style.css"]
html_theme_options = {"navigation_with_keys": True}
html_show_sphinx = False
pygments_style = "default"
pygments_dark_style = "monokai"
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True


def plain_figure(block: Any, block_vars: dict[str, Any], gallery_conf: dict[str, Any]) -> str:
    """The picture of a matplotlib figure that is not pyplot's, as `metrics.plot` makes one."""
    figure = block_vars["example_globals"].get("figure")
    if figure is None or hasattr(figure, "number"):
        return ""
    path = next(block_vars["image_path_iterator"])
    figure.savefig(path)
    return figure_rst([path], gallery_conf["src_dir"])


sphinx_gallery_conf = {
    "examples_dirs": "../examples",
    "gallery_dirs": "examples",
    "filename_pattern": r"\.py$",
    # what it is for comes first
    "within_subsection_order": FunctionSortKey(lambda name: (name != "plot_stream.py", name)),
    "download_all_examples": False,
    "remove_config_comments": True,
    "show_signature": False,
    "show_memory": False,
    "min_reported_time": 10_000,
    "write_computation_times": False,
    "only_warn_on_example_error": False,
    "abort_on_example_error": True,
    "image_scrapers": ("matplotlib", plain_figure),
    "matplotlib_animations": False,
}

doctest_global_setup = (HERE / "setup_of_examples.py").read_text()


def write_help(app: Sphinx) -> None:
    """What each command and `make` say of themselves, for the pages to include."""
    targets = re.findall(r"^([a-z-]+):.*## (.*)", (HERE.parent / "Makefile").read_text(), re.MULTILINE)
    (HERE / "development" / "targets.txt").write_text("".join(f"make {name:18} {text}\n" for name, text in targets))
    folder = HERE / "api" / "command"
    folder.mkdir(exist_ok=True)
    os.environ["COLUMNS"] = "96"
    for command in ("", *COMMANDS):
        out = io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
            main([*command.split(), "--help"])
        # colours of newer Pythons
        (folder / f"{command or 'all'}.txt").write_text(re.sub(r"\x1b\[[\d;]*m", "", out.getvalue()))


def leave_frameworks_out(app: Sphinx, doctree: nodes.document) -> None:
    """The frameworks need not be installed, so that nothing of these pages can run."""
    if app.env.docname == "api/integrations":
        for block in doctree.findall(nodes.doctest_block):
            block["skipif"] = "True"


def mend_signature(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, signature: str | None, returned: str | None
) -> tuple[str, None] | None:
    """A class of which a framework's that is not installed would be the base has lost its own."""
    if what != "class" or not name.startswith("cbp_fast.integrations."):
        return None
    _, *own = inspect.signature(obj.__init__).parameters.values()
    return str(inspect.Signature([parameter.replace(annotation=parameter.empty) for parameter in own])), None


def mend_property(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Napoleon takes what a property's docstring says before a colon for its type."""
    for i, line in enumerate(lines if what == "property" else ()):
        if line.startswith(":type: "):
            del lines[i]
            lines[0] = f"{line.removeprefix(':type: ')}: {lines[0]}"
            return


def setup(app: Sphinx) -> dict[str, Any]:
    """Called by Sphinx."""
    app.connect("builder-inited", write_help, priority=100)
    app.connect("autodoc-process-signature", mend_signature)
    # after Napoleon's
    app.connect("autodoc-process-docstring", mend_property, priority=600)
    app.connect("doctree-read", leave_frameworks_out)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
