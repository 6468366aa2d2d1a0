"""Proofs that a head's greatest values are those of the dense head."""
