"""Which key tiles hold the most of a query tile's attention, estimated from averaged queries."""
