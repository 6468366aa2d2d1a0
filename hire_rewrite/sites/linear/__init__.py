"""Every other linear layer, as a kind of site."""
