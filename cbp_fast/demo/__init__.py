"""Two streams on which plain backprop loses plasticity: permuted digits and slowly-changing regression."""
