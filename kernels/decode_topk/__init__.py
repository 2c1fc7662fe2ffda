"""Which tiles of a cache a decoded token reads, by what their keys can score at most."""
