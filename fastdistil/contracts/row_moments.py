"""The columns of the row moments, which entropies and cross entropy are made of."""

MOMENTS = 9  # enum RowMoment of csrc/rules/row_moments_args.h
