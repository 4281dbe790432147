"""Adapting a model to examples: any start opened, stacked adapters tested together, a user's own examples."""
