"""What log p and log q of a row are measured from, for the acceptance sum min(p, q)."""

# Columns of the levels, enum AcceptanceLevel of csrc/rules/acceptance_args.h: the student's largest logit m and ln of
# the sum of exp((z - m) / T_s), so that log p = (z - m) / T_s less that; the teacher's likewise.
LEVELS = 4
