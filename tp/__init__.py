"""Tensor parallelism: who holds what (`heads`, `shard`), and the layers that follow it (`layers`)."""
