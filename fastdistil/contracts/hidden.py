"""The kinds of hidden_loss."""

KINDS = ("mse", "cosine", "kl")
KERNEL_KINDS = KINDS[:2]  # the enum HiddenKind of csrc/rules/hidden_args.h; on a CPU the kernel of logits does kl
