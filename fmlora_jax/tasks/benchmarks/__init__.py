"""One file per benchmark, found by its name: `make(config, source_size) -> DataSource`."""
