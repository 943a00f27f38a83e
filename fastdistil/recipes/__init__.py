"""The papers' recipes: terms of a loss (`terms`), stages, and a module for each paper."""
