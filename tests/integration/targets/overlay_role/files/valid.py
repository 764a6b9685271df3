# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""valid.py SCHEMA REPORT: end well if the report has what the schema says, and nothing else."""

from __future__ import annotations

import json
import pathlib
import sys

import jsonschema


def validate(schema, report):
    """Raise what is wrong with the report."""
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.Draft202012Validator(strict(schema)).validate(report)


def strict(schema):
    """Return the schema without the room that it leaves for what later versions add."""
    if isinstance(schema, list):
        return [strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {"additionalProperties": False} if schema.get("type") == "object" and "properties" in schema else {}
    return {**{name: strict(part) for name, part in schema.items()}, **closed}


if __name__ == "__main__":
    validate(*(json.loads(pathlib.Path(path).read_text(encoding="utf-8")) for path in sys.argv[1:]))
