"""Names, console help and formats change on purpose alone: `python tests/helpers/snapshot.py interfaces --write`."""

import json

import snapshot


def test_interfaces_are_as_stored():
    stored = json.loads(snapshot.STORED.read_text(encoding="utf-8"))
    assert snapshot.differences(stored, snapshot.interfaces()) == ""
