"""A fuzzer of the command line: hostile input of every kind, and one rule for what may come of it (CONTRIBUTING.md)."""
