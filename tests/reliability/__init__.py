"""Fault injection: a small selection by default, all of it with `tox run -e reliability`."""
