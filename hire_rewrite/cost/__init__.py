"""What a site costs: bytes, and the time of a machine."""
