"""Understanding features projected into a language model and put into rows of its sequence."""
