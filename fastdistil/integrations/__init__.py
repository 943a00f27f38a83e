"""Our losses in other people's trainers: one module for each library."""
