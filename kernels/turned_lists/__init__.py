"""For each key tile, the query tiles that visit it."""
