"""Tensor parallelism: what each rank holds (`heads`, `shard`), and sharded layers (`layers`)."""
