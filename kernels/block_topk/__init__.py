"""Which key tiles hold the most of a query tile's attention, estimated from some of its queries."""
