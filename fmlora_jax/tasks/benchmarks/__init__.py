"""One file per benchmark, imported by its name: `make(config, source_size) -> DataSource`."""
