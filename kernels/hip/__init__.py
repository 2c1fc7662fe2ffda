"""Which key tiles hold the most of a query tile's attention, found by halving chunks of keys."""
