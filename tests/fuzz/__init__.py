"""Random functions with sites planted in them, and laws that hold for each."""
