"""Engines: where spans of work are done. Each yields (span, result) as spans finish, in any order."""
