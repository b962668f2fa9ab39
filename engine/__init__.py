"""Generates text with a sharded model: the job, the compiled steps, and the loops that run them.

`job` (does not import torch) defines a job, `steps` compiles a model's steps, `loop` runs them,
`generate` and `chat` are what each rank executes, `report` writes the output.
"""
