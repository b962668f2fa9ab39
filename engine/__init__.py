"""Text from a sharded model: the compiled loop, and the generation job that each rank runs.

`job` (free of torch) says what a job is, `loop` compiles and runs the steps, `rank` is what each rank
executes, `report` is what people and programs are told afterwards.
"""
