# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Settings of Sphinx for the documentation site, which step lint of tests/run.sh builds."""

from __future__ import annotations

import typing as t

from docutils import nodes

if t.TYPE_CHECKING:
    from sphinx import addnodes
    from sphinx.application import Sphinx
    from sphinx.environment import BuildEnvironment

project = "kvmfleet.qcow2"
project_copyright = "Contributors to the kvmfleet.qcow2 collection"
html_title = project
html_show_sphinx = False
extensions = ["myst_parser", "sphinx_antsibull_ext"]
myst_heading_anchors = 3  # links such as design.md#what-is-not-in-a-snapshot, as on GitHub
pygments_style = "ansible"
highlight_language = "text"  # where a block names none

ANSIBLE = "https://docs.ansible.com/ansible/latest/"
LABELS = {
    "common_return_values": "reference_appendices/common_return_values.html",
    "ansible_configuration_settings": "reference_appendices/config.html",
    "action_plugins": "plugins/action.html",
}
BUILTIN = "ansible_collections.ansible.builtin."


def lead_to_ansible(
    _app: Sphinx, _env: BuildEnvironment, node: addnodes.pending_xref, content: nodes.TextElement
) -> nodes.reference | None:
    """Return a link into the documentation of Ansible, so that the build needs no network; None is still a warning."""
    label = str(node.get("reftarget"))
    path = LABELS.get(label)
    if label.startswith(BUILTIN) and label.endswith("_module"):
        path = f"collections/ansible/builtin/{label.removeprefix(BUILTIN)}.html"
    return nodes.reference("", "", content, refuri=ANSIBLE + path, internal=False) if path else None


def setup(app: Sphinx) -> None:
    """Tell Sphinx, which calls this."""
    app.connect("missing-reference", lead_to_ansible)
