"""Collectives between the ranks of one model: shared memory between sockets, gloo as the reference.

`group` opens and closes groups, `ops` holds the collectives, `build` compiles the extension.
"""
