"""One process per socket, bound to its cores and memory, and looked after until all have ended.

Free of torch and of anything else outside the standard library, so that it starts in milliseconds:
`topology` reads the machine, `plan` decides (pure), `spawn` starts and watches, `child` and `bind`
run in each rank before torch is imported.
"""
