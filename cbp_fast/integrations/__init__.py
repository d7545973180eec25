"""Continual backpropagation in the frameworks that people train with; each module needs its own extra."""
