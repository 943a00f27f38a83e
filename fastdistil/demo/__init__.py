"""A real distillation end to end: multilingual teacher, Turkish, Chinese and Greek text, four students, one report."""
