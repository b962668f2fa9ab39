"""Start one process per socket, bind it to its cores and memory, and watch it until all have ended.

Uses no torch and nothing else outside the standard library, so that it starts in milliseconds:
`machine` reads the machine, `plan` places the ranks (pure), `spawn` starts them, `watch` supervises
them, `child` and `bind` run in each rank before torch is imported.
"""
