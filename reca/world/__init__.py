"""A world small enough to be scored exactly: coloured shapes on a 2 x 2 grid, and the words about them."""
