"""What training puts in front of people: outlines (`shapes`, `layouts`), fillings (`textures`, `photographs`).

`edgepose.data.occlude` chooses among them and pastes. All of it is for training only: networks are tested against
`edgepose.data.corrupt`, whose superellipses, stars, bars and leaves, noise, checks and clouds must not appear here.

Invariant: all randomness comes from the generator that is passed in.
"""
