"""More cases than `make test` has time for, by loss: python tests/fuzz.py LOSS --cases 20000; see docs/numerics.md."""
