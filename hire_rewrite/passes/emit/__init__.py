"""Order a changed function for emission: what stays, what is replaced, what is written again."""
