"""What the backends of an op obey: its constants, the order of its statistics, the tables that cross into C++.

losses -> ops -> backends -> contracts: each imports what stands to its right and nothing to its left, which
tests/test_house.py checks. The backends are fastdistil.reference, .backends.cpu, .backends.cuda and .kernels.triton.
"""
