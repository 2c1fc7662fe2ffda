"""Pages of plans: text, differences, reports and HTML. Data in, text out; decides nothing."""
