"""Training steps of published codes, made again from their algorithms on the same public libraries, to be compared with
ours: one file for each. Nobody trains with them."""
