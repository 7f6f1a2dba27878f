"""A few rows through large frozen weights, plain or quantised."""
