"""`fastmoe tune`: measures tiles for the `triton` backend's products, and keeps the fastest in a table."""
